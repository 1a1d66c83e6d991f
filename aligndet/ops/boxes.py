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


def overlap_areas(a: Tensor, b: Tensor) -> Tensor:
    """Areas of the intersections of every box of ``a`` [N, 4] with every box of ``b`` [M, 4]: [N, M] px²."""
    width = torch.minimum(a[:, None, 2], b[:, 2]) - torch.maximum(a[:, None, 0], b[:, 0])
    height = torch.minimum(a[:, None, 3], b[:, 3]) - torch.maximum(a[:, None, 1], b[:, 1])
    return width.clamp_(min=0) * height.clamp_(min=0)


def iou_matrix(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of ``a`` [N, 4] with every box of ``b`` [M, 4]: [N, M] in 0 .. 1.

    0 where the union is empty. Without a graph through ``a`` or ``b``: it serves matching.
    """
    with torch.no_grad():
        overlap = overlap_areas(a, b)
        union = area(a)[:, None] + area(b) - overlap
        return overlap / union.clamp_(min=torch.finfo(a.dtype).tiny)


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes [N, 4] cut at the borders of an image of ``size`` (height, width) px."""
    limits = size.flip(0).repeat(2).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union less the share of the enclosing box that neither covers, for boxes [..., 4].

    The leading dimensions of ``a`` and ``b`` broadcast.

    Returns:
        [...] in -1 .. 1; the overlap is 0 where the union is empty, the share 0 where the enclosing box is.

    Source:
        GIoU (arXiv:1902.09630), algorithm 1.
    """
    tiny = torch.finfo(a.dtype).tiny
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap = sides.prod(dim=-1)
    union = (a[..., 2:] - a[..., :2]).prod(dim=-1) + (b[..., 2:] - b[..., :2]).prod(dim=-1) - overlap
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(dim=-1)
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def corners_to_centre(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] as x0, y0, x1, y1 -> centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def centre_to_corners(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] as centre x, centre y, width, height -> x0, y0, x1, y1."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)
