"""Region proposal network; Ren et al. (arXiv:1506.01497)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from aligndet.assigners.iou import IoUAssigner
from aligndet.assigners.sampling import PositivesFirst
from aligndet.models.dense_head import convolution, flat, per_anchor
from aligndet.models.priors import Anchors, AnchorShapes, on_image
from aligndet.ops.coders import DeltaCoder
from aligndet.ops.reduce import mean_over_ranks
from aligndet.protocol import Sampler
from aligndet.structures import Targets


@dataclass(frozen=True)
class ProposalLimits:
    """How many boxes survive: ``before`` per level into the NMS, ``after`` per image out of it."""

    before: int
    after: int


@dataclass(frozen=True)
class Objectness:
    """What the RPN says of the sampled anchors; the rows of its losses.

    Attributes:
        scores: float [n] logits.
        deltas: float [n, 4], offsets from the anchors.
        anchors: float [n, 4] xyxy px.
        matched: int64 [n], row of Targets or BACKGROUND.
    """

    scores: Tensor
    deltas: Tensor
    anchors: Tensor
    matched: Tensor


class RPN(nn.Module):
    """One 3 x 3 convolution, objectness and box offsets of A anchors per cell.

    Args:
        channels: C of the pyramid.
        shapes: the anchors.
        depth: 3 x 3 convolutions before the predictions.
        train, test: how many proposals come out.
        shrink: of the coder.
        least: px, proposals with a shorter side are dropped; 0: those without area.

    Source:
        Method section 1.4: anchors .7 / .3 / .3 with low-quality matches, 256 per image, half of them positive.
    """

    def __init__(
        self,
        channels: int,
        shapes: AnchorShapes,
        *,
        depth: int = 1,
        train: ProposalLimits = ProposalLimits(2000, 1000),
        test: ProposalLimits = ProposalLimits(1000, 1000),
        shrink: bool = True,
        least: float = 0.0,
    ) -> None:
        super().__init__()
        self.shapes, self.train_limits, self.test_limits, self.least = shapes, train, test, least
        self.assigner = IoUAssigner(0.7, 0.3, 0.3)
        self.sample: Sampler = PositivesFirst(256, "image", 0.5)
        self.coder = DeltaCoder(shrink=shrink)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [convolution(channels, channels, 3), nn.ReLU(inplace=True)]
        self.tower = nn.Sequential(*layers)
        self.score = convolution(channels, shapes.per_cell, 1)
        self.box = convolution(channels, 4 * shapes.per_cell, 1)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """``L maps -> L logits [B, P_l]`` and ``L offsets [B, P_l, 4]`` in the order of ``Anchors``."""
        hidden = [self.tower(level) for level in levels]
        images = len(levels[0])
        scores = [flat([self.score(level)]).reshape(images, -1) for level in hidden]
        deltas = [per_anchor(flat([self.box(level)]), self.shapes.per_cell).view(images, -1, 4) for level in hidden]
        return scores, deltas

    @torch.no_grad()
    def proposals(self, scores: list[Tensor], deltas: list[Tensor], anchors: Anchors, sizes: Tensor) -> list[Tensor]:
        """The boxes of each image, best first: float32 [n, 4] xyxy px, clipped; NMS at 0.7 within each level."""
        limits = self.train_limits if self.training else self.test_limits
        boxes, values, levels = [], [], []
        for number, (priors, score, delta) in enumerate(
            zip(anchors.boxes.split(anchors.counts), scores, deltas, strict=True)
        ):
            value, best = score.float().topk(min(limits.before, score.shape[1]))  # [B, n]
            chosen = delta.gather(1, best[:, :, None].expand(-1, -1, 4))
            boxes.append(self.coder.decode(priors[best], chosen))
            values.append(value)
            levels.append(torch.full_like(best, number))
        height, width = sizes[:, :1].float(), sizes[:, 1:].float()
        edges = torch.stack([width, height, width, height], dim=2)  # [B, 1, 4]
        joined = torch.minimum(torch.cat(boxes, dim=1).clamp(min=0), edges)
        value, level = torch.cat(values, dim=1), torch.cat(levels, dim=1)
        return [
            self._suppressed(joined[image], value[image], level[image], limits.after) for image in range(len(sizes))
        ]

    def matches(
        self,
        scores: list[Tensor],
        deltas: list[Tensor],
        anchors: Anchors,
        sizes: Tensor,
        targets: Targets,
        *,
        divisor: int,
        sample: Sampler,
    ) -> Objectness:
        """The sampled anchors with what is said of them and the box they belong to."""
        images = len(sizes)
        allowed = on_image(anchors, sizes, divisor)
        matched = self.assigner([anchors.boxes] * images, targets, allowed=allowed.flatten())
        image = torch.arange(images, device=sizes.device).repeat_interleave(len(anchors.boxes))
        rows = sample(matched, image)
        return Objectness(
            torch.cat(scores, dim=1).flatten()[rows],
            torch.cat(deltas, dim=1).flatten(0, 1)[rows],
            anchors.boxes[rows % len(anchors.boxes)],
            matched[rows],
        )

    def losses(self, objectness: Objectness, targets: Targets) -> dict[str, Tensor]:
        """Cross-entropy of objectness and L1 of the offsets of positives, both over the number of sampled anchors."""
        total = mean_over_ranks(objectness.scores.new_full((), float(len(objectness.scores)), dtype=torch.float32))
        truth = (objectness.matched >= 0).float()
        cost = F.binary_cross_entropy_with_logits(objectness.scores.float(), truth, reduction="sum")
        positive = (objectness.matched >= 0).nonzero().squeeze(1)
        offsets = self.coder.encode(objectness.anchors[positive], targets.boxes[objectness.matched[positive]])
        box = F.l1_loss(objectness.deltas[positive].float(), offsets, reduction="sum")
        return {"rpn_score": cost / total.clamp(min=1), "rpn_box": box / total.clamp(min=1)}

    def _suppressed(self, boxes: Tensor, scores: Tensor, level: Tensor, most: int) -> Tensor:
        side = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1)
        full = ((side > 0) & (side >= self.least)).nonzero().squeeze(1)
        boxes = boxes[full]
        return boxes[batched_nms(boxes, scores[full], level[full], 0.7)[:most]]
