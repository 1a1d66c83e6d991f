"""FCOS's assigner: points inside a box of the right size belong to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from aligndet.ops.counts import counts_of
from aligndet.structures import BACKGROUND, Targets

# Point-box pairs looked at in one go: bounds memory for crowded images, about 100 MiB.
PAIRS = 2**21


@record_function("assignment")
def assign_center(
    points: Tensor, ranges: Tensor, targets: Targets, images: int, *, radius: Tensor | None = None
) -> Tensor:
    """The row of ``targets`` that each point of each image belongs to.

    A point belongs to a box if it lies strictly inside and the largest of its four distances to the sides is within
    the point's range, both ends included. Of several boxes the one with the smallest area wins; of equal areas the
    first.

    Args:
        points: float [P, 2], x and y px.
        ranges: float [P, 2], smallest and largest distance px that a point regresses.
        targets: M boxes, in the order of their images.
        images: B.
        radius: float [P] px; a point must also be closer than that to the box's centre on both axes (centre sampling).

    Returns:
        int64 [B, P]: row of ``targets`` or BACKGROUND.

    Source:
        FCOS (arXiv:1904.01355), section 3.2; method section 1.2.
    """
    matched = torch.full((images, len(points)), BACKGROUND, dtype=torch.int64, device=points.device)
    counts = counts_of(targets.image, images).tolist()  # the one host synchronisation
    start = 0
    for image, count in enumerate(counts):
        boxes = targets.boxes[start : start + count]
        if count:
            rows = _smallest(points, ranges, boxes, radius)
            matched[image] = torch.where(rows >= 0, rows + start, BACKGROUND)
        start += count
    return matched


def _smallest(points: Tensor, ranges: Tensor, boxes: Tensor, radius: Tensor | None) -> Tensor:
    """Row of ``boxes`` with the smallest area among those a point belongs to, or BACKGROUND: int64 [P]."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    chunk = max(1, PAIRS // len(boxes))
    parts = []
    for first in range(0, len(points), chunk):
        part = slice(first, first + chunk)
        inside = _inside(points[part], ranges[part], boxes, None if radius is None else radius[part])  # [P', M]
        cost = torch.where(inside, areas, torch.inf)
        # argmin may return any of several equal areas: the lowest row is taken by hand.
        least = cost.amin(dim=1, keepdim=True)
        row = ((cost == least) & inside).to(torch.int8).argmax(dim=1)
        parts.append(torch.where(inside.any(dim=1), row, BACKGROUND))
    return torch.cat(parts)


def _inside(points: Tensor, ranges: Tensor, boxes: Tensor, radius: Tensor | None) -> Tensor:
    low = points[:, None] - boxes[:, :2]  # [P, M, 2]: left, top
    high = boxes[:, 2:] - points[:, None]  # [P, M, 2]: right, bottom
    nearest = torch.minimum(low, high).amin(dim=2)
    farthest = torch.maximum(low, high).amax(dim=2)
    inside = (nearest > 0) & (farthest >= ranges[:, :1]) & (farthest <= ranges[:, 1:])
    if radius is not None:
        inside &= ((low - high).abs().amax(dim=2) / 2) < radius[:, None]
    return inside
