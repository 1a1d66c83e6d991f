"""Box-domain pre-training: the whole detector learns from two views of unlabelled images; twin of ``finetune.py``."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.assigners.sampling import PositivesFirst
from aligndet.losses.contrastive import POSITIVES, REDUCTIONS, box_contrastive_loss
from aligndet.protocol import Detector
from aligndet.structures import Batch, Targets, check_boxes

# Similarities held at once; more are computed in portions, and once more in the backward pass. 256 MiB of float32.
PAIRS = 2**26


class AlignDet(nn.Module):
    """A detector with its frozen backbone, an online and a momentum branch, and two views -> losses.

    The detector gets a projection in the place of its class scores and is changed in place. Its backbone is frozen and
    shared by both branches; everything else is copied as the momentum branch, an exact copy at step 0, which afterwards
    only changes through ``engine.ema``. What learns from masks alone stays as it is.

    Args:
        detector: any detector of the protocol, its backbone already pre-trained.
        embedding: D, outputs of the projection.
        candidates, scope, background: how many candidates are kept per view, counted over a "batch" or an "image", and
            the share of them that is kept free for background; None: what ``detector.sampling`` says. Anchors of a
            first stage are always sampled by its number, positives first and filled up with background.
        temperature: positive; divides cosine similarities.
        contrast: weight of the box-contrastive loss; at 0 there is no projection and no momentum branch.
        localization: weight of the detector's own box losses.
        classification: weight of its classification loss on pseudo-classes (``Targets.labels``, 0 .. K-1); at 0 the
            class scores are removed, and boxes are those of any class.
        positives, own_keys, reduction: see ``box_contrastive_loss``.
        symmetric: each view passes both branches and has all losses, at twice the cost.
        freeze_backbone: False trains what the detector leaves trainable of its backbone, and averages it as the rest.
        start: a detector like the first, whose weights the momentum branch starts from; None: a copy of the first.

    Source:
        AlignDet (arXiv:2307.11077), section 3.2 and algorithm 1; departures in docs/decisions.md.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        embedding: int = 256,
        candidates: int | None = None,
        scope: str | None = None,
        background: float | None = None,
        temperature: float = 0.5,
        contrast: float = 1.0,
        localization: float = 1.0,
        classification: float = 0.0,
        positives: str = "keys",
        own_keys: bool = False,
        reduction: str = "boxes",
        symmetric: bool = False,
        freeze_backbone: bool = True,
        start: Detector | None = None,
    ) -> None:
        super().__init__()
        _check_weights(contrast=contrast, localization=localization, classification=classification)
        if not isinstance(embedding, int) or embedding < 1:
            raise ValueError(f"embedding: want a whole number of at least 1, got {embedding}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: want a finite number above 0, got {temperature}")
        for name, word, known in (("positives", positives, POSITIVES), ("reduction", reduction, REDUCTIONS)):
            if word not in known:
                raise ValueError(f"{name}: want one of {', '.join(known)}, got {word!r}")
        self.contrast, self.localization, self.classification = contrast, localization, classification
        self.temperature, self.positives, self.own_keys, self.reduction = temperature, positives, own_keys, reduction
        self.symmetric, self.frozen = symmetric, freeze_backbone
        for branch in (detector, *([] if start is None else [start])):
            if not classification:
                branch.ignore_classes()
                if "score" in branch.predictors:
                    del branch.predictors["score"]
            if contrast > 0:
                device = next(branch.parameters()).device
                branch.predictors["embedding"] = branch.score_layer(embedding, hidden=True).to(device)
            branch.needs_masks = False
            for part in branch.mask_parts():
                part.requires_grad_(False)
            branch.sample = sampler_of(branch.sampling, candidates, scope, background)
            # A number of their own: a few hundred would be positives alone, and anchors are mostly background.
            branch.sample_anchors = None if branch.sampling is None else replace(branch.sampling, negatives=None)
        if freeze_backbone:
            detector.backbone.requires_grad_(False)
        self.momentum = _average_of(detector, start or detector, freeze_backbone) if contrast > 0 else None
        self.online = detector
        if self.momentum is None:
            for value in _unreached(self):
                value.requires_grad_(False)
        self.train(self.training)

    def forward(self, view1: Batch, view2: Batch) -> dict[str, Tensor]:
        """The losses of ``view1`` against ``view2``; scalars with a graph, zeros where no image has a proposal.

        Equal ``targets.ids`` in the two views mean the same box. A box that one view lacks costs no contrast.

        Raises:
            ValueError: the views are not of the same number of images, a pseudo-class is not one of the detector's, or
                a box is not finite or has a side that is not positive.
        """
        views = (view1, view2)
        if len(view1) != len(view2):
            raise ValueError(f"view2: want the {len(view1)} images of view1, got {len(view2)}")
        for view in views:
            check_boxes(view.targets)
        online, momentum = self._features(views)
        losses = self._one_way(online[0], view1, momentum[-1], view2)
        if not self.symmetric:
            return losses
        back = self._one_way(online[1], view2, momentum[0], view1)
        return {name: (loss + back[name]) / 2 for name, loss in losses.items()}

    def train(self, mode: bool = True) -> AlignDet:
        """Train or evaluation mode of both branches; a frozen backbone always stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.online.backbone.eval()
        return self

    def left_behind(self) -> list[str]:
        """Names of the parts of the online branch that no later task can use: projection, pseudo-classes, masks."""
        names = {id(part): name for name, part in self.online.named_modules()}
        return ["predictors.embedding", "predictors.score", *(names[id(part)] for part in self.online.mask_parts())]

    def _one_way(self, first: list[Tensor], view1: Batch, second: list[Tensor], view2: Batch) -> dict[str, Tensor]:
        """The losses of the online branch on ``view1``, with keys of the momentum branch on ``view2``."""
        online = self.online.candidates(first, view1.sizes, view1.targets)
        losses = self.online.localization_loss(online, view1.targets)
        losses = {name: self.localization * loss for name, loss in losses.items()}
        if self.classification:
            named = self.online.classification_loss(online, view1.targets)
            losses |= {name: self.classification * loss for name, loss in named.items()}
        if self.momentum is not None:
            with torch.no_grad():
                momentum = self.momentum.candidates(second, view2.sizes, view2.targets)
            if online.embeddings is None or momentum.embeddings is None:
                raise ValueError(
                    f"{type(self.online).__name__}.candidates: want embeddings, predictors has a layer for them"
                )
            total = len(online.embeddings) + len(momentum.embeddings)
            losses["contrast"] = self.contrast * box_contrastive_loss(
                online.embeddings,
                online.box_ids(view1.targets),
                momentum.embeddings,
                momentum.box_ids(view2.targets),
                temperature=self.temperature,
                chunk=None if len(online.embeddings) * total <= PAIRS else max(1, PAIRS // total),
                positives=self.positives,
                own_keys=self.own_keys,
                reduction=self.reduction,
            )
        return losses

    def _features(self, views: tuple[Batch, Batch]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Backbone features of each view for the online and the momentum branch; views not read are left out."""
        read = views if self.symmetric else views[:1]
        if self.frozen:
            with torch.no_grad():
                shared = _features_of(self.online, read if self.momentum is None else views)
            return shared, shared
        online = _features_of(self.online, read)
        if self.momentum is None:
            return online, online
        with torch.no_grad():
            return online, _features_of(self.momentum, views if self.symmetric else views[1:])


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}: want a finite weight of at least 0, got {weight}")
    if not any(weights.values()):
        raise ValueError(f"{', '.join(weights)}: want a weight above 0, got 0 for each")


def sampler_of(
    own: PositivesFirst | None, candidates: int | None, scope: str | None, background: float | None
) -> PositivesFirst | None:
    """A detector's own sampling with what is not None changed; a background share lifts its bound on background.

    Raises:
        ValueError: ``candidates`` below 1 or no whole number, ``background`` outside 0 .. 1, another ``scope``; one of
            the last two for a detector that keeps everything, without ``candidates``.
    """
    if candidates is not None and (not isinstance(candidates, int) or candidates < 1):
        raise ValueError(f"candidates: want a whole number of at least 1, got {candidates}")
    if own is None and candidates is None:
        if scope is not None or background is not None:
            raise ValueError("scope, background: this detector keeps all candidates; set candidates as well")
        return None
    wanted: dict[str, Any] = {"limit": candidates, "scope": scope, "background": background}
    changed = replace(own or PositivesFirst(1), **{name: value for name, value in wanted.items() if value is not None})
    return replace(changed, negatives=None) if background else changed


def _unreached(model: AlignDet) -> list[nn.Parameter]:
    """The trainable parameters that no loss depends on: without the contrast, those that only served class scores.

    Found by the graph of the losses of a black image with one box. Left trainable they would wait for gradients that
    never come, and several ranks with them.
    """
    detector = model.online
    device, mode = next(detector.parameters()).device, detector.training
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    targets = Targets(torch.tensor([[64.0, 64.0, 192.0, 192.0]], device=device), rows, rows, rows)
    sizes = torch.tensor([[256, 256]], device=device)
    images = torch.zeros(1, 3, 256, 256, dtype=torch.uint8, device=device)
    trained = [value for value in detector.parameters() if value.requires_grad]
    detector.eval()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():  # sampling draws random numbers
        found = detector.candidates(detector.features(images, sizes), sizes, targets)
        losses = detector.localization_loss(found, targets)
        if model.classification:
            losses |= detector.classification_loss(found, targets)
        total = torch.stack(list(losses.values())).sum()
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
    detector.train(mode)
    return [value for value, gradient in zip(trained, gradients, strict=True) if gradient is None]


def _average_of(detector: Detector, start: Detector, share_backbone: bool) -> Detector:
    """The momentum branch: ``start`` without what it never reads, and what both branches have in common uncopied."""
    # The memo of a deep copy puts its values in the place of what would be copied: an empty module for what the branch
    # never reads, the very same module for what is tied.
    unread = [*([start.backbone] if share_backbone else []), *start.mask_parts()]
    if "score" in start.predictors:
        unread.append(start.predictors["score"])
    memo: dict[int, Any] = {id(module): nn.Identity() for module in unread}
    memo |= {id(own): module for own, module in zip(start.tied_parts(), detector.tied_parts(), strict=True)}
    average = copy.deepcopy(start, memo)
    if "score" in average.predictors:
        del average.predictors["score"]
    tied = {id(value) for module in detector.tied_parts() for value in module.parameters()}
    for value in average.parameters():
        if id(value) not in tied:
            value.requires_grad_(False)
    average.localizes = False
    return average


def _features_of(branch: Detector, views: Sequence[Batch]) -> list[list[Tensor]]:
    """The backbone's features of each view, from one pass over all of them as one batch."""
    if len(views) == 1:
        return [branch.features(views[0].images, views[0].sizes)]
    height = max(view.images.shape[2] for view in views)
    width = max(view.images.shape[3] for view in views)
    images = torch.cat([_padded(view.images, height, width) for view in views])  # [2B, 3, H, W]
    features = branch.features(images, torch.cat([view.sizes for view in views]))
    counts = [len(view) for view in views]
    return [list(parts) for parts in zip(*(level.split(counts) for level in features), strict=True)]


def _padded(images: Tensor, height: int, width: int) -> Tensor:
    return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
