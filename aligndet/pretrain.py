"""Box-domain pre-training: the whole detector learns from two views of unlabelled images; twin of ``finetune.py``."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.assigners.sampling import PositivesFirst
from aligndet.losses.contrastive import box_contrastive_loss
from aligndet.protocol import Detector
from aligndet.structures import Batch


class AlignDet(nn.Module):
    """A detector with its frozen backbone, an online and a momentum branch, and two views -> losses.

    The detector gets a projection in the place of its class scores and is changed in place. Its backbone is frozen and
    shared by both branches; everything else is copied as the momentum branch, an exact copy at step 0, which afterwards
    only changes through ``engine.ema``.

    Args:
        detector: any detector of the protocol, its backbone already pre-trained.
        embedding: D, outputs of the projection.
        candidates: most candidates kept per view, positives first (method section 2.5).
        scope: "batch" or "image": what ``candidates`` counts over.
        background: share of ``candidates`` that is kept free for background.
        temperature: positive; divides cosine similarities.
        contrast: weight of the box-contrastive loss; at 0 there is no projection and no momentum branch.
        localization: weight of the detector's own box losses.

    Source:
        AlignDet (arXiv:2307.11077), section 3.2 and algorithm 1; departures in docs/decisions.md.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        embedding: int = 256,
        candidates: int = 2048,
        scope: str = "batch",
        background: float = 0.0,
        temperature: float = 0.5,
        contrast: float = 1.0,
        localization: float = 1.0,
    ) -> None:
        super().__init__()
        if contrast < 0 or localization < 0 or contrast + localization == 0:
            raise ValueError(f"want loss weights >= 0 of which one is above 0, got {contrast} and {localization}")
        self.temperature, self.contrast, self.localization = temperature, contrast, localization
        detector.backbone.requires_grad_(False)
        detector.sample = PositivesFirst(limit=candidates, scope=scope, background=background)
        if "score" in detector.predictors:
            del detector.predictors["score"]
        self.momentum: Detector | None = None
        if contrast > 0:
            detector.predictors["embedding"] = detector.score_layer(embedding, hidden=True)
            # The memo puts an empty module where the copy would hold a second backbone.
            self.momentum = copy.deepcopy(detector, {id(detector.backbone): nn.Identity()}).requires_grad_(False)
            self.momentum.localizes = False
        self.online = detector
        self.train(self.training)

    def forward(self, view1: Batch, view2: Batch) -> dict[str, Tensor]:
        """The losses of ``view1`` against ``view2``; scalars with a graph, zeros where no image has a proposal.

        Equal ``targets.ids`` in the two views mean the same box. A box that one view lacks costs no contrast.
        """
        first, second = self._features(view1, view2)
        online = self.online.candidates(first, view1.sizes, view1.targets)
        losses = self.online.localization_loss(online, view1.targets)
        losses = {name: self.localization * loss for name, loss in losses.items()}
        if self.momentum is not None:
            with torch.no_grad():
                momentum = self.momentum.candidates(second, view2.sizes, view2.targets)
            assert online.embeddings is not None and momentum.embeddings is not None
            losses["contrast"] = self.contrast * box_contrastive_loss(
                online.embeddings,
                online.box_ids(view1.targets),
                momentum.embeddings,
                momentum.box_ids(view2.targets),
                temperature=self.temperature,
            )
        return losses

    def train(self, mode: bool = True) -> AlignDet:
        """Train or evaluation mode of both branches; the frozen backbone always stays in evaluation mode."""
        super().train(mode)
        self.online.backbone.eval()
        return self

    @torch.no_grad()
    def _features(self, view1: Batch, view2: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """The frozen backbone's features of both views, from one pass over the two as one batch."""
        if self.momentum is None:
            return self.online.features(view1.images, view1.sizes), []
        height = max(view1.images.shape[2], view2.images.shape[2])
        width = max(view1.images.shape[3], view2.images.shape[3])
        images = torch.cat([_padded(view.images, height, width) for view in (view1, view2)])  # [2B, 3, H, W]
        features = self.online.features(images, torch.cat([view1.sizes, view2.sizes]))
        return [level[: len(view1)] for level in features], [level[len(view1) :] for level in features]


def _padded(images: Tensor, height: int, width: int) -> Tensor:
    return F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
