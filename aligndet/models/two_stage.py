"""What Faster and Mask R-CNN share: proposals first, then a class and a finer box for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from aligndet.assigners.iou import IoUAssigner
from aligndet.assigners.sampling import PositivesFirst
from aligndet.models.backbones import Backbone
from aligndet.models.conventions import REGIONS, rules_of
from aligndet.models.fpn import FPN
from aligndet.models.priors import AnchorShapes
from aligndet.models.roi_head import BoxHead, MaskHead, linear, own_class
from aligndet.models.rpn import RPN, Objectness
from aligndet.ops.boxes import area, clip
from aligndet.ops.coders import DeltaCoder
from aligndet.ops.constants import constants
from aligndet.ops.counts import counts_of
from aligndet.ops.reduce import mean_over_ranks
from aligndet.ops.roi_align import level_of, multilevel_roi_align
from aligndet.protocol import Detector, Sampler
from aligndet.structures import BACKGROUND, Candidates, Detections, Targets, class_of, scores_of

STRIDES = (4, 8, 16, 32, 64)  # px, of P2 .. P6
POOLED = 7  # cells per side of the box head's input
STDS = (0.1, 0.1, 0.2, 0.2)


@dataclass(frozen=True)
class RegionCandidates(Candidates):
    """Regions, image by image; with targets the sampled ones, level by level.

    Attributes:
        boxes: float32 [N, 4] xyxy px, clipped.
        deltas: float [N, K, 4], offsets of the final boxes from them (K = 1: of any class); None where ``localizes``
            is off.
        counts: regions per image.
        levels: P2 .. P5, read by the mask head.
        objectness: what the RPN says of its sampled anchors; None without targets or where ``localizes`` is off.
    """

    boxes: Tensor
    deltas: Tensor | None
    counts: tuple[int, ...]
    levels: list[Tensor]
    objectness: Objectness | None


class TwoStage(Detector):
    """Faster R-CNN's parts; abstract only in name: see ``faster_rcnn`` and ``mask_rcnn``.

    Args:
        backbone: all four outputs are used.
        num_classes: K.
        channels: C of neck and RPN.
        box_head: key of BOX_HEADS.
        score_threshold: class probability below which nothing is detected.
        neck_norm, head_norm: None or key of NORMS; ``head_norm`` of the box head and of the mask head.
        rpn_depth: 3 x 3 convolutions of the RPN.
        head_width: of the fully connected layers of the box head.
        regions: most regions per image that training with labels looks at, a quarter of them on objects.
        class_agnostic: one finer box for all classes instead of one for each.
        conventions: key of ``conventions.REGIONS``.

    Source:
        Method section 1.4; ``sampling`` 2.5.
    """

    # Regions without a box are no use to a loss that compares boxes; anchors without one teach the RPN.
    sampling = PositivesFirst(4096, "image", negatives=0.0)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 256,
        box_head: str = "4conv1fc",
        score_threshold: float = 0.05,
        neck_norm: str | None = None,
        head_norm: str | None = None,
        rpn_depth: int = 1,
        head_width: int = 1024,
        regions: int = 512,
        class_agnostic: bool = False,
        conventions: str = "aligndet",
    ) -> None:
        super().__init__()
        if min(channels, head_width, regions) < 1:
            raise ValueError(f"want positive channels, head_width and regions, got {channels}, {head_width}, {regions}")
        if rpn_depth < 0:
            raise ValueError(f"rpn_depth: want at least 0, got {rpn_depth}")
        self.channels, self.score_threshold = channels, score_threshold
        self.box_head, self.neck_norm, self.head_norm = box_head, neck_norm, head_norm
        self.conventions, self.rules = conventions, rules_of(REGIONS, conventions)
        shrink, least = self.rules.shrink, self.rules.least or (0.0, 0.0)
        self.assigner = IoUAssigner(0.5, 0.5, 0.5, self.rules.low_quality)
        self.sample_regions: Sampler = PositivesFirst(regions, "image", 0.75)
        self.coder = DeltaCoder(STDS, shrink)
        self.backbone = backbone
        self.neck = FPN(backbone.channels, channels, 1, source="pool", norm=neck_norm)
        shapes = AnchorShapes(tuple((8.0 * s,) for s in STRIDES), grid=self.rules.grid, whole=self.rules.whole)
        self.rpn = RPN(channels, shapes, depth=rpn_depth, shrink=shrink, least=least[0])
        self.head = BoxHead(channels, POOLED, box_head, width=head_width, norm=head_norm)
        entries = num_classes + int(self.rules.spare)
        box = linear(self.head.width, 4 * (1 if class_agnostic else entries), 0.001)
        # One output more than classes, the last: background.
        self.predictors = nn.ModuleDict({"score": self.score_layer(num_classes + 1), "box": box})
        self.mask_head = MaskHead(channels, head_norm) if self.needs_masks else None
        if self.needs_masks:
            mask = nn.Conv2d(channels, entries, 1)
            # Not by fan-out, the number of classes: logits of one class would be noise of size 14, its gradient that of
            # the whole detector.
            nn.init.normal_(mask.weight, std=0.001)
            mask.bias = nn.Parameter(torch.zeros(entries))
            self.predictors["mask"] = mask

    def ignore_classes(self) -> None:
        """See Detector: a new box layer with one box for any class, where there is one for each."""
        box = self.predictors["box"]
        if isinstance(box, nn.Linear) and box.out_features > 4:
            self.predictors["box"] = linear(self.head.width, 4, 0.001).to(box.weight.device)

    def score_layer(self, width: int, hidden: bool = False) -> nn.Module:
        """A linear layer; hidden: two (method section 2.4)."""
        last = linear(self.head.width, width, 0.01)
        if not hidden:
            return last
        return nn.Sequential(linear(self.head.width, self.head.width, 0.01), nn.ReLU(inplace=True), last)

    def candidates(self, features: list[Tensor], sizes: Tensor, targets: Targets | None = None) -> RegionCandidates:
        """See Detector; the rows are regions, image by image."""
        levels = self.neck(features)
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        padded = (shapes[0][0] * STRIDES[0], shapes[0][1] * STRIDES[0])
        anchors = self.rpn.shapes.on(shapes, STRIDES, levels[0].device, padded)
        scores, deltas = self.rpn(levels)
        regions = self.rpn.proposals(scores, deltas, anchors, sizes)
        objectness, matched = None, None
        if targets is not None:
            if self.localizes:
                sampler = self.sample_anchors or self.rpn.sample
                objectness = self.rpn.matches(
                    scores, deltas, anchors, sizes, targets, divisor=self.size_divisor, sample=sampler
                )
            regions, matched = self._sampled(regions, targets)
        boxes = torch.cat(regions)
        counts = tuple(len(part) for part in regions)
        image = torch.repeat_interleave(
            torch.arange(len(regions), device=boxes.device), constants(counts, boxes, torch.int64)
        )
        if matched is not None:  # level by level, which spares RoIAlign to put its large output in order
            order = level_of(boxes, 4).argsort(stable=True)
            boxes, image, matched = boxes[order], image[order], matched[order]
        shared = self.head(self.pool(levels[:4], boxes, image, POOLED))
        outputs = {name: self.predictors[name](shared) for name in self._read() if name in self.predictors}
        offsets = outputs["box"].unflatten(1, (-1, 4)) if self.localizes else None
        return RegionCandidates(
            outputs.get("score"),
            outputs.get("embedding"),
            image,
            matched,
            boxes,
            offsets,
            counts,
            levels[:4],
            objectness,
        )

    def localization_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """The RPN's losses, and L1 of the offsets of positive regions over the number of sampled ones."""
        assert isinstance(candidates, RegionCandidates) and candidates.matched is not None
        assert candidates.deltas is not None and candidates.objectness is not None
        losses = self.rpn.losses(candidates.objectness, targets)
        positive = (candidates.matched >= 0).nonzero().squeeze(1)
        match = candidates.matched[positive]
        truth = self.coder.encode(candidates.boxes[positive], targets.boxes[match])
        offsets = own_class(candidates.deltas[positive].float(), targets.labels[match])
        return losses | {"box": F.l1_loss(offsets, truth, reduction="sum") / _number(candidates)}

    def classification_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """Softmax cross-entropy, mean over the sampled regions; background is the last class."""
        assert isinstance(candidates, RegionCandidates) and candidates.matched is not None
        scores = scores_of(candidates)
        classes = scores.shape[1] - 1
        labels = class_of(targets, candidates.matched, classes)
        labels = torch.where(labels == BACKGROUND, classes, labels)
        cost = F.cross_entropy(scores.float(), labels, reduction="sum")
        return {"classification": cost / _number(candidates)}

    @torch.no_grad()
    def detect(self, candidates: Candidates, sizes: Tensor) -> list[Detections]:
        """Class probability above the threshold, class-wise NMS at 0.5, best 100."""
        assert isinstance(candidates, RegionCandidates) and candidates.deltas is not None
        scores = scores_of(candidates).float().softmax(dim=1)[:, :-1].split(candidates.counts)
        deltas, regions = candidates.deltas.split(candidates.counts), candidates.boxes.split(candidates.counts)
        return [self._detect(*parts) for parts in zip(scores, deltas, regions, sizes, strict=True)]

    def mask_parts(self) -> list[nn.Module]:
        """The mask head and its last layer."""
        return [] if self.mask_head is None else [self.mask_head, self.predictors["mask"]]

    def region_features(self, features: list[Tensor], boxes: Tensor, image: Tensor, height: int) -> Tensor:
        """What the box head makes of the boxes: [N, width of the head]."""
        shared: Tensor = self.head(self.pool(self.neck(features)[:4], boxes, image, POOLED))
        return shared

    def pool(self, levels: list[Tensor], boxes: Tensor, image: Tensor, size: int) -> Tensor:
        """Features [N, C, size, size] of boxes, from P2 .. P5."""
        return multilevel_roi_align(
            levels,
            boxes,
            image,
            size,
            strides=STRIDES[:4],
            sampling_ratio=self.rules.sampling_ratio,
            aligned=self.rules.aligned,
        )

    def _read(self) -> tuple[str, ...]:
        return ("score", "embedding", "box") if self.localizes else ("score", "embedding")

    def _sampled(self, regions: list[Tensor], targets: Targets) -> tuple[list[Tensor], Tensor]:
        """The boxes themselves and proposals, matched and sampled. Source: method section 1.4.

        The assigner sees the proposals alone: beside the boxes none would ever be the nearest one. A box's own region
        is on it, which also holds where another object has the same box.
        """
        counts = counts_of(targets.image, len(regions)).tolist()
        own = torch.where(area(targets.boxes) > 0, torch.arange(len(targets), device=targets.boxes.device), BACKGROUND)
        found = self.assigner(regions, targets).split([len(part) for part in regions])
        matched = torch.cat([rows for pair in zip(own.split(counts), found, strict=True) for rows in pair])
        regions = [torch.cat(pair) for pair in zip(targets.boxes.split(counts), regions, strict=True)]
        numbers = constants([len(part) for part in regions], targets.boxes, torch.int64)
        image = torch.repeat_interleave(torch.arange(len(regions), device=numbers.device), numbers)
        rows = (self.sample or self.sample_regions)(matched, image)
        kept = counts_of(image[rows], len(regions)).tolist()
        return list(torch.cat(regions)[rows].split(kept)), matched[rows]

    def _detect(self, scores: Tensor, deltas: Tensor, regions: Tensor, size: Tensor) -> Detections:
        row, label = (scores > self.score_threshold).nonzero(as_tuple=True)
        offsets = own_class(deltas[row], label)
        boxes, score = clip(self.coder.decode(regions[row], offsets), size), scores[row, label]
        if self.rules.least is not None:
            kept = ((boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= self.rules.least[1]).nonzero().squeeze(1)
            boxes, score, label = boxes[kept], score[kept], label[kept]
        chosen = batched_nms(boxes, score, label, 0.5)[:100]
        return Detections(boxes[chosen], score[chosen], label[chosen])


def _number(candidates: RegionCandidates) -> Tensor:
    """Sampled regions of the batch, at least 1, mean over ranks."""
    return mean_over_ranks(candidates.boxes.new_full((), float(len(candidates.boxes)))).clamp(min=1)
