"""Box algebra: xyxy px, half-open."""

from __future__ import annotations

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """Areas of float [M, 4] boxes: [M] px²; negative where a box is inverted on one axis."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def matched_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union, row by row, of two sets of N boxes: [N] in 0 .. 1; 0 where the union is empty."""
    low = torch.maximum(a[:, :2], b[:, :2])
    high = torch.minimum(a[:, 2:], b[:, 2:])
    side = (high - low).clamp(min=0)
    overlap = side[:, 0] * side[:, 1]
    union = area(a) + area(b) - overlap
    return overlap / union.clamp(min=torch.finfo(a.dtype).tiny)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes [N, 4] cut at the borders of an image of ``size`` (height, width) px."""
    limits = size.flip(0).repeat(2).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits)
