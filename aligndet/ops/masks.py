"""Masks between a box's own grid and the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision.ops  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor


def paste(patches: Tensor, boxes: Tensor, size: tuple[int, int], snapped: bool = False) -> Tensor:
    """Masks of an image from probabilities inside boxes: bilinear at the pixel centres, from 0.5 on.

    Args:
        patches: float [n, S, S], spread over each box.
        boxes: float [n, 4] xyxy px.
        size: (height, width) px of the image.
        snapped: spread them over whole pixels as torchvision does: a border of zeros around the patch, the box as much
            larger, its corners rounded towards zero, the last pixel included.

    Returns:
        bool [n, H, W]; False outside the box and for boxes without area.
    """
    if snapped:
        patches, boxes = _snapped(patches, boxes)
    masks = torch.zeros(len(patches), *size, dtype=torch.bool, device=patches.device)
    for mask, patch, (x0, y0, x1, y1) in zip(masks, patches.float(), boxes.tolist(), strict=True):
        left, top = max(int(x0), 0), max(int(y0), 0)
        right, bottom = min(int(x1) + 1, size[1]), min(int(y1) + 1, size[0])
        if left >= right or top >= bottom or x1 <= x0 or y1 <= y0:
            continue
        x = (torch.arange(left, right, device=patches.device) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(top, bottom, device=patches.device) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=2)
        mask[top:bottom, left:right] = F.grid_sample(patch[None, None], grid[None], align_corners=False)[0, 0] >= 0.5
    return masks


def _snapped(patches: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    factor = (patches.shape[-1] + 2) / patches.shape[-1]
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * factor
    corners = torch.cat([centre - half, centre + half], dim=1).trunc()
    return F.pad(patches, (1, 1, 1, 1)), corners + corners.new_tensor([0, 0, 1, 1])


def crop(masks: Tensor, rows: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What of a mask lies in a box, on a grid of ``size`` x ``size`` cells.

    Args:
        masks: bool [M, H, W].
        rows: int64 [n], row of ``masks`` for each box.
        boxes: float [n, 4] xyxy px.

    Returns:
        float32 [n, size, size] of 0 and 1: whether at least half of a cell is covered.
    """
    rois = torch.cat([rows[:, None].float(), boxes.float()], dim=1)
    # The op itself: in deterministic mode torchvision takes one written in Python for both directions, which needs
    # gigabytes, and only the way back adds up in changing orders.
    cells = torch.ops.torchvision.roi_align(masks[:, None].float(), rois, 1.0, size, size, -1, True)
    return (cells[:, 0] >= 0.5).float()
