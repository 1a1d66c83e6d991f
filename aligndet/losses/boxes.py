"""Losses of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from aligndet.ops.boxes import generalized_iou, matched_iou


def iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """``-ln IoU`` of matched boxes.

    Args:
        predicted: float [N, 4] xyxy px.
        target: float [N, 4] xyxy px.

    Returns:
        float32 [N] in 0 .. 13.8: IoU below 1e-6 counts as 1e-6, without a gradient there.

    Source:
        UnitBox (arXiv:1608.01471); the clamp is method section 1.2.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        return -matched_iou(predicted.to(dtype), target.to(dtype)).clamp(min=1e-6).log()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """``1 - GIoU`` of matched boxes.

    Args:
        predicted: float [N, 4] xyxy, any unit.
        target: float [N, 4] xyxy, the same unit.

    Returns:
        float32 [N] in 0 .. 2.

    Source:
        GIoU (arXiv:1902.09630), section 3.1.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        return 1 - generalized_iou(predicted.to(dtype), target.to(dtype))


def centerness_of(points: Tensor, boxes: Tensor) -> Tensor:
    """How central points lie in their boxes: sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)).

    Args:
        points: float [N, 2], x and y px, inside the boxes.
        boxes: float [N, 4] xyxy px.

    Returns:
        [N] in 0 .. 1: 1 at the centre, 0 on a side. Source: FCOS (arXiv:1904.01355), equation 3.
    """
    low, high = points - boxes[:, :2], boxes[:, 2:] - points  # [N, 2] each
    shares = torch.minimum(low, high).clamp(min=0) / torch.maximum(low, high).clamp(min=torch.finfo(boxes.dtype).tiny)
    return shares.prod(dim=1).sqrt()
