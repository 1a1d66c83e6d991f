"""Features of regions: averages of bilinear samples on a grid inside each box, from the pyramid level of its size."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align


def level_of(boxes: Tensor, levels: int, *, canonical: float = 56.0) -> Tensor:
    """The pyramid level of each box: ``floor(log2(sqrt(area) / canonical + 1e-6))``, within 0 .. levels - 1.

    Args:
        boxes: float [N, 4] xyxy px.
        levels: number of levels.
        canonical: px; boxes of that side to its double belong to the finest level.

    Returns:
        int64 [N]; 0 for boxes without area.

    Source:
        Lin et al. (arXiv:1612.03144), equation 1; method section 1.4.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    return torch.floor(torch.log2(side / canonical + 1e-6)).clamp(0, levels - 1).to(torch.int64)


def multilevel_roi_align(
    levels: list[Tensor],
    boxes: Tensor,
    image: Tensor,
    size: int,
    *,
    strides: tuple[int, ...],
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """``size`` x ``size`` features of each box from the level of its size.

    Args:
        levels: L maps [B, C, H_l, W_l].
        boxes: float [N, 4] xyxy px of the batch tensor; no gradient flows to them.
        image: int64 [N], 0 .. B-1.
        size: S, cells per side.
        strides: px per cell of each map.
        sampling_ratio: samples per cell and axis; 0: as many as the cell is wide, rounded up.
        aligned: pixel centres at half-integers; False shifts boxes by half a cell, as the first publication did.

    Returns:
        [N, C, S, S] in the type of the maps; [0, C, S, S] with a graph to every map without boxes.

    Source:
        Mask R-CNN (arXiv:1703.06870), section 3.
    """
    level = level_of(boxes, len(levels))
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    parts, order = [], []
    for number, (features, stride) in enumerate(zip(levels, strides, strict=True)):
        rows = (level == number).nonzero().squeeze(1)
        pooled = torchvision_roi_align(
            features, rois[rows].to(features.dtype), size, 1 / stride, sampling_ratio or -1, aligned
        )
        parts.append(pooled)
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]
