"""RetinaNet: dense anchors and the focal loss; Lin et al. (arXiv:1708.02002)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from aligndet.assigners.iou import IoUAssigner
from aligndet.losses.focal import sigmoid_focal_loss
from aligndet.models.backbones import Backbone
from aligndet.models.conventions import ANCHORS, rules_of
from aligndet.models.dense_head import Head, best_per_level, convolution, flat, per_anchor
from aligndet.models.fpn import FPN
from aligndet.models.priors import Anchors, on_image
from aligndet.ops.boxes import clip
from aligndet.ops.coders import DeltaCoder
from aligndet.ops.reduce import mean_over_ranks
from aligndet.protocol import Detector, pooled_mean
from aligndet.structures import Candidates, Detections, Targets, class_of, scores_of

STEM, FINEST = 4, 8  # px, strides of the backbone's finest output and of P3


@dataclass(frozen=True)
class RetinaNetCandidates(Candidates):
    """Anchors, image by image and level by level; with targets only those that ``sample`` kept.

    Attributes:
        anchors: float [N, 4] xyxy px.
        deltas: float [N, 4], offsets of the boxes from them; None where ``localizes`` is off.
        counts: anchors per level of one image, before sampling.
        images: B.
    """

    anchors: Tensor
    deltas: Tensor | None
    counts: tuple[int, ...]
    images: int


class RetinaNet(Detector):
    """RetinaNet with nine anchors per cell.

    Args:
        backbone: its outputs from stride 8 on are used.
        num_classes: K.
        channels: C of neck and head.
        convolutions: of each tower.
        levels: pyramid levels from stride 8 on, at least 3.
        score_threshold: class probability below which nothing is detected.
        neck_norm: None or key of NORMS.
        conventions: key of ``conventions.ANCHORS``.

    Source:
        Method section 1.3.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 256,
        convolutions: int = 4,
        levels: int = 5,
        score_threshold: float = 0.05,
        neck_norm: str | None = None,
        conventions: str = "aligndet",
    ) -> None:
        super().__init__()
        if levels < 3:
            raise ValueError(f"levels: want at least the 3 of the backbone's strides 8, 16, 32, got {levels}")
        if convolutions < 0:
            raise ValueError(f"convolutions: want at least 0, got {convolutions}")
        self.conventions, self.rules = conventions, rules_of(ANCHORS, conventions)
        rules = self.rules
        if channels < 1 or (rules.norm and channels % 32):
            raise ValueError(f"channels: want a positive number (a multiple of 32 with group norm), got {channels}")
        if rules.sizes is not None and levels > len(rules.sizes):
            raise ValueError(f"levels: {conventions} has anchors for {len(rules.sizes)}, got {levels}")
        self.strides = tuple(FINEST * 2**level for level in range(levels))
        self.shapes = rules.shapes(self.strides)
        self.coder = DeltaCoder(shrink=rules.shrink)
        self.assigner = IoUAssigner(0.5, 0.4)
        self.channels, self.score_threshold = channels, score_threshold
        # Rows of anchors -> rows whose embeddings they get; only ``aligndet.reference`` sets it, to measure a mistake.
        self.misplaced: Callable[[Tensor, tuple[int, ...], int], Tensor] | None = None
        self.backbone = backbone
        self.neck = FPN(
            backbone.channels[1:], channels, levels - 3, source=rules.extra, relu=rules.relu, norm=neck_norm
        )
        self.head = Head(channels, convolutions, norm=rules.norm)
        score = self.score_layer(num_classes)
        assert isinstance(score, nn.Conv2d) and score.bias is not None
        nn.init.constant_(score.bias, -math.log(99))  # every class starts at a probability of 1 %
        box = convolution(channels, 4 * self.shapes.per_cell, 3)
        self.predictors = nn.ModuleDict({"score": score, "box": box})

    def score_layer(self, width: int, hidden: bool = False) -> nn.Module:
        """A 3 x 3 convolution; hidden: two of 1 x 1. Anchor a of a cell owns the a-th ``width`` outputs."""
        outputs = width * self.shapes.per_cell
        if not hidden:
            return convolution(self.channels, outputs, 3)
        first = convolution(self.channels, self.channels, 1)
        return nn.Sequential(first, nn.ReLU(inplace=True), convolution(self.channels, outputs, 1))

    def candidates(self, features: list[Tensor], sizes: Tensor, targets: Targets | None = None) -> RetinaNetCandidates:
        """See Detector; the rows are anchors, image by image, level by level, row by row, anchor by anchor."""
        levels = self.neck(features[1:])
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        padded = (int(features[0].shape[2]) * STEM, int(features[0].shape[3]) * STEM)
        anchors = self.shapes.on(shapes, self.strides, levels[0].device, padded)
        images, number = len(levels[0]), len(anchors.boxes)
        image = torch.arange(images, device=levels[0].device).repeat_interleave(number)
        matched = None if targets is None else self._assign(anchors, sizes, targets, images)
        rows = None if matched is None or self.sample is None else self.sample(matched, image)

        classes = [self.head.classification(level) for level in levels]
        scores = self._chosen("score", classes, rows) if "score" in self.predictors else None
        embeddings = None
        if "embedding" in self.predictors:
            places = rows
            if rows is not None and self.misplaced is not None:
                places = self.misplaced(rows, anchors.counts, images)
            embeddings = self._embed(classes, places)
        deltas = self._chosen("box", [self.head.box(level) for level in levels], rows) if self.localizes else None
        row = torch.arange(len(image), device=image.device) if rows is None else rows
        matched = None if matched is None else matched[row]
        return RetinaNetCandidates(
            scores, embeddings, image[row], matched, anchors.boxes[row % number], deltas, anchors.counts, images
        )

    def localization_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """L1 of the offsets of positives over their number; each image counts as at least one."""
        assert isinstance(candidates, RetinaNetCandidates) and candidates.matched is not None
        assert candidates.deltas is not None
        positive = (candidates.matched >= 0).nonzero().squeeze(1)
        truth = self.coder.encode(candidates.anchors[positive], targets.boxes[candidates.matched[positive]])
        cost = F.l1_loss(candidates.deltas[positive].float(), truth, reduction="sum")
        return {"box": cost / _positives(candidates)}

    def classification_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """Focal loss over the number of positives; each image counts as at least one."""
        assert candidates.matched is not None
        scores = scores_of(candidates)
        labels = class_of(targets, candidates.matched, scores.shape[1])
        return {"classification": sigmoid_focal_loss(scores, labels) / _positives(candidates)}

    @torch.no_grad()
    def detect(self, candidates: Candidates, sizes: Tensor) -> list[Detections]:
        """Score above the threshold, best 1000 per level, class-wise NMS at 0.5, best 100 (torchvision: 300)."""
        assert isinstance(candidates, RetinaNetCandidates) and candidates.deltas is not None
        images, scores = len(sizes), scores_of(candidates)
        scores = scores.float().sigmoid().view(images, -1, scores.shape[1])  # [B, P, K]
        deltas, anchors = candidates.deltas.view(images, -1, 4), candidates.anchors.view(images, -1, 4)
        found = []
        for i in range(images):
            row, label, score = best_per_level(scores[i], candidates.counts, self.score_threshold, 1000)
            boxes = clip(self.coder.decode(anchors[i][row], deltas[i][row]), sizes[i])
            chosen = batched_nms(boxes, score, label, 0.5)[: self.rules.most]
            found.append(Detections(boxes[chosen], score[chosen], label[chosen]))
        return found

    def region_features(self, features: list[Tensor], boxes: Tensor, image: Tensor, height: int) -> Tensor:
        """The mean over each box of the neck's map of its size: [N, C]."""
        return pooled_mean(self.neck(features[1:]), boxes, image, height)

    def _assign(self, anchors: Anchors, sizes: Tensor, targets: Targets, images: int) -> Tensor:
        allowed = on_image(anchors, sizes, self.size_divisor).flatten()
        return self.assigner([anchors.boxes] * images, targets, allowed=allowed)

    def _chosen(self, name: str, levels: list[Tensor], rows: Tensor | None) -> Tensor:
        maps = [self.predictors[name](level) for level in levels]
        joined = per_anchor(flat(maps), self.shapes.per_cell)
        return joined if rows is None else joined[rows]

    def _embed(self, classes: list[Tensor], rows: Tensor | None) -> Tensor:
        """The projection of the given anchors only: of their cells, then each anchor's own share."""
        projection = self.predictors["embedding"]
        assert isinstance(projection, nn.Sequential)
        first, activation, last = projection
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
        each = self.shapes.per_cell
        if rows is None:
            return per_anchor(flat([projection(level) for level in classes]), each)
        cells = flat(classes, rows // each)  # [n, C]
        hidden = activation(F.linear(cells, first.weight.flatten(1), first.bias))
        outputs = F.linear(hidden, last.weight.flatten(1), last.bias).view(len(rows), each, -1)
        return outputs[torch.arange(len(rows), device=rows.device), rows % each]


def _positives(candidates: Candidates) -> Tensor:
    """Positives of the batch, at least one per image, mean over ranks. Source: method section 1.3."""
    assert isinstance(candidates, RetinaNetCandidates) and candidates.matched is not None
    counts = torch.zeros(candidates.images, device=candidates.image.device)
    counts.index_add_(0, candidates.image, (candidates.matched >= 0).float())
    return mean_over_ranks(counts.clamp(min=1).sum())
