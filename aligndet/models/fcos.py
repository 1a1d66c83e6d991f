"""FCOS: fully convolutional one-stage detection; Tian et al. (arXiv:1904.01355)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from aligndet.assigners.center import assign_center
from aligndet.assigners.sampling import PositivesFirst
from aligndet.losses.boxes import centerness_of, iou_loss
from aligndet.losses.focal import sigmoid_focal_loss
from aligndet.models.backbones import Backbone
from aligndet.models.conventions import DENSE, rules_of
from aligndet.models.dense_head import Head, at_points, best_per_level, convolution, flat
from aligndet.models.fpn import FPN
from aligndet.models.priors import Points, points_of
from aligndet.ops.boxes import clip
from aligndet.ops.counts import counts_of
from aligndet.ops.precise import in_float32
from aligndet.ops.reduce import mean_over_ranks
from aligndet.protocol import Detector, pooled_mean
from aligndet.structures import Candidates, Detections, Targets, class_of, scores_of

STEM, FINEST = 4, 8  # px, strides of the backbone's finest output and of P3
LONGEST = 16.0  # distances end at its exp, nine million px: at infinity the gradient of the IoU is nan
FIRST_RANGE = 64.0  # px, P3 regresses distances up to here; each level twice as far
FIRST_DISTANCE = 16.0  # px, what every level says at first; with a bias of 0 short schedules climb from 1 px


@dataclass(frozen=True)
class FCOSCandidates(Candidates):
    """Points, image by image and level by level; with targets only those that ``sample`` kept.

    Attributes:
        points: float [N, 2], x and y px.
        level: int64 [N].
        boxes: float32 [N, 4] xyxy px, not clipped; None where ``localizes`` is off.
        centerness: float [N] logits; None likewise.
    """

    points: Tensor
    level: Tensor
    boxes: Tensor | None
    centerness: Tensor | None


class BoxPredictor(nn.Module):
    """Distances from a point to the four sides: exp(scale of the level * convolution), px."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.convolution = convolution(channels, 4, 3)
        assert self.convolution.bias is not None
        nn.init.constant_(self.convolution.bias, math.log(FIRST_DISTANCE))
        self.scales = nn.Parameter(torch.ones(levels))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """``L maps [B, C, H_l, W_l] -> L maps [B, 4, H_l, W_l]`` in float32: left, top, right, bottom."""
        outputs = [in_float32(self.convolution, level) for level in levels]
        return [(scale * output).clamp(max=LONGEST).exp() for scale, output in zip(self.scales, outputs, strict=True)]


class LinearBoxPredictor(nn.Module):
    """Distances from a point to the four sides: stride of the level * rectified convolution, px (torchvision)."""

    def __init__(self, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.convolution, self.strides = convolution(channels, 4, 3), strides

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """As ``BoxPredictor``."""
        outputs = [in_float32(self.convolution, level) for level in levels]
        return [output.relu() * stride for output, stride in zip(outputs, self.strides, strict=True)]


class FCOS(Detector):
    """FCOS with centerness on the classification branch, no centre sampling by default.

    Args:
        backbone: its outputs from stride 8 on are used.
        num_classes: K.
        channels: C of neck and head.
        convolutions: of each tower.
        levels: pyramid levels from stride 8 on, at least 3; the coarsest regresses any distance.
        centre_radius: centre sampling in units of stride, or None.
        neck_norm: None or key of NORMS.
        score_threshold: class probability below which nothing is detected.
        conventions: key of ``conventions.DENSE``.

    Source:
        Method section 1.2. Weights and initialisation as there, but for ``FIRST_DISTANCE``; the level scales belong to
        the box predictor. ``sampling`` as in 2.5, where two images of a GPU share 2048 points; here each has its 1024,
        so that nothing depends on how many images a pass holds.
    """

    sampling = PositivesFirst(1024, "image")

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 256,
        convolutions: int = 4,
        levels: int = 5,
        centre_radius: float | None = None,
        neck_norm: str | None = None,
        score_threshold: float = 0.05,
        conventions: str = "aligndet",
    ) -> None:
        super().__init__()
        if channels < 1 or channels % 32:
            raise ValueError(f"channels: group norm wants a multiple of 32, got {channels}")
        if levels < 3:
            raise ValueError(f"levels: want at least the 3 of the backbone's strides 8, 16, 32, got {levels}")
        if convolutions < 1:
            raise ValueError(f"convolutions: want at least 1, got {convolutions}")
        if centre_radius is not None and centre_radius <= 0:
            raise ValueError(f"centre_radius: want a positive number or None, got {centre_radius}")
        self.channels, self.centre_radius, self.score_threshold = channels, centre_radius, score_threshold
        self.conventions, self.rules = conventions, rules_of(DENSE, conventions)
        self.strides = tuple(FINEST * 2**level for level in range(levels))
        self.backbone = backbone
        self.neck = FPN(backbone.channels[1:], channels, levels - 3, norm=neck_norm)
        self.head = Head(channels, convolutions, bias=self.rules.biased)
        score = self.score_layer(num_classes)
        assert isinstance(score, nn.Conv2d) and score.bias is not None
        nn.init.constant_(score.bias, -math.log(99))  # every class starts at a probability of 1 %
        box = LinearBoxPredictor(channels, self.strides) if self.rules.linear else BoxPredictor(channels, levels)
        centerness = convolution(channels, 1, 3)
        self.predictors = nn.ModuleDict({"score": score, "box": box, "centerness": centerness})

    def score_layer(self, width: int, hidden: bool = False) -> nn.Module:
        """A 3 x 3 convolution on the classification tower; with ``hidden`` 3 x 3, ReLU, 1 x 1 (method section 2.4)."""
        if not hidden:
            return convolution(self.channels, width, 3)
        first, last = convolution(self.channels, self.channels, 3), convolution(self.channels, width, 1)
        return nn.Sequential(first, nn.ReLU(inplace=True), last)

    def candidates(self, features: list[Tensor], sizes: Tensor, targets: Targets | None = None) -> FCOSCandidates:
        """See Detector; the rows are points, image by image, level by level, row by row."""
        levels = self.neck(features[1:])
        padded = (int(features[0].shape[2]) * STEM, int(features[0].shape[3]) * STEM)
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        points = points_of(shapes, self.strides, levels[0].device, grid=self.rules.grid, padded=padded)
        images, number = len(levels[0]), len(points.level)
        image = torch.arange(images, device=points.level.device).repeat_interleave(number)
        matched = None if targets is None else self._assign(points, targets, images)
        rows = None if matched is None or self.sample is None else self.sample(matched, image)

        classes = [self.head.classification(level) for level in levels]
        scores = (
            flat([self.predictors["score"](level) for level in classes], rows) if "score" in self.predictors else None
        )
        embeddings = None
        if "embedding" in self.predictors:
            projection = self.predictors["embedding"]
            assert isinstance(projection, nn.Sequential)
            embeddings = at_points(projection, classes, rows)

        row = torch.arange(len(image), device=image.device) if rows is None else rows
        point = row % number
        centres = points.centres[point]
        boxes, centerness = self._localize(levels, classes, centres, rows) if self.localizes else (None, None)
        matched = None if matched is None else matched[row]
        return FCOSCandidates(scores, embeddings, image[row], matched, centres, points.level[point], boxes, centerness)

    def localization_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """IoU loss weighted by centerness over the sum of weights; cross-entropy of centerness over positives."""
        assert isinstance(candidates, FCOSCandidates) and candidates.matched is not None
        assert candidates.boxes is not None and candidates.centerness is not None
        positive = (candidates.matched >= 0).nonzero().squeeze(1)
        truth = targets.boxes[candidates.matched[positive]].float()
        weight = centerness_of(candidates.points[positive], truth)
        count = mean_over_ranks(weight.new_full((), float(len(positive)))).clamp(min=1)
        # The weights of a batch with positives never sum to so little; without any, 0 / 1e-6 is 0.
        total = mean_over_ranks(weight.sum()).clamp(min=1e-6)
        box = (iou_loss(candidates.boxes[positive], truth) * weight).sum() / total
        logits = candidates.centerness[positive].float()
        centerness = F.binary_cross_entropy_with_logits(logits, weight, reduction="sum") / count
        return {"box": box, "centerness": centerness}

    def classification_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """Focal loss over the number of positives."""
        assert candidates.matched is not None
        scores = scores_of(candidates)
        count = mean_over_ranks((candidates.matched >= 0).sum().float()).clamp(min=1)
        labels = class_of(targets, candidates.matched, scores.shape[1])
        return {"classification": sigmoid_focal_loss(scores, labels) / count}

    @torch.no_grad()
    def detect(self, candidates: Candidates, sizes: Tensor) -> list[Detections]:
        """Score above the threshold, best 1000 per level, times centerness, class-wise NMS at 0.5, best 100.

        Elsewhere (``conventions``) ranking and threshold see the score with centerness already.
        """
        assert isinstance(candidates, FCOSCandidates)
        assert candidates.boxes is not None and candidates.centerness is not None
        images, scores = len(sizes), scores_of(candidates)
        scores = scores.float().sigmoid().view(images, -1, scores.shape[1])  # [B, P, K]
        centerness = candidates.centerness.float().sigmoid().view(images, -1)
        boxes = candidates.boxes.view(images, -1, 4)
        level = candidates.level.view(images, -1)[0]
        counts = tuple(counts_of(level, len(self.strides)).tolist())
        return [self._detect(scores[i], centerness[i], clip(boxes[i], sizes[i]), counts) for i in range(images)]

    def region_features(self, features: list[Tensor], boxes: Tensor, image: Tensor, height: int) -> Tensor:
        """The mean over each box of the neck's map of its size: [N, C]."""
        return pooled_mean(self.neck(features[1:]), boxes, image, height)

    def _assign(self, points: Points, targets: Targets, images: int) -> Tensor:
        """Row of ``targets`` for every point of every image: int64 [B * P]."""
        reach = FIRST_RANGE * 2.0 ** torch.arange(len(self.strides), device=points.level.device)  # [L]
        low = torch.cat([reach.new_full((1,), -1.0), reach[:-1]])
        high = torch.cat([reach[:-1], reach.new_full((1,), torch.inf)])
        ranges = torch.stack([low, high], dim=1)[points.level]
        radius = None if self.centre_radius is None else self.centre_radius * points.stride
        return assign_center(points.centres, ranges, targets, images, radius=radius).flatten()

    def _localize(
        self, levels: list[Tensor], classes: list[Tensor], centres: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        towers = [self.head.box(level) for level in levels]
        distances = flat(self.predictors["box"](towers), rows)  # [N, 4]
        boxes = torch.cat([centres - distances[:, :2], centres + distances[:, 2:]], dim=1)
        centerness = flat(
            [self.predictors["centerness"](level) for level in (towers if self.rules.beside_box else classes)], rows
        ).squeeze(1)
        return boxes, centerness

    def _detect(self, scores: Tensor, centerness: Tensor, boxes: Tensor, counts: tuple[int, ...]) -> Detections:
        if self.rules.beside_box:
            scores = (scores * centerness[:, None]).sqrt()
        point, label, score = best_per_level(scores, counts, self.score_threshold, 1000)
        score = score if self.rules.beside_box else score * centerness[point]
        chosen = batched_nms(boxes[point], score, label, self.rules.overlap)[:100]
        return Detections(boxes[point][chosen], score[chosen], label[chosen])
