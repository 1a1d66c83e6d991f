"""Features of regions: averages of bilinear samples on a grid inside each box, from the pyramid level of its size."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from aligndet.ops.counts import counts_of
from aligndet.ops.cuda_module import module_for, say_once
from aligndet.ops.roi_align_cpu import by_sums
from aligndet.ops.roi_align_cuda import Grid, Kernels, RoIAlign, fits


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
    canonical: float = 56.0,
) -> Tensor:
    """``size`` x ``size`` features of each box from the level of its size.

    On a GPU by our own kernel, the gradient of which is the same in every run; on the processor by weighted sums; by
    torchvision's op where neither can serve. A log line says once which of them it is.

    Args:
        levels: L maps [B, C, H_l, W_l].
        boxes: float [N, 4] xyxy px of the batch tensor; no gradient flows to them.
        image: int64 [N], 0 .. B-1.
        size: S, cells per side.
        strides: px per cell of each map.
        sampling_ratio: samples per cell and axis; 0: as many as the cell is wide, rounded up.
        aligned: pixel centres at half-integers; False shifts boxes by half a cell, as the first publication did.
        canonical: px, see ``level_of``; 14 cells of the finest map.

    Returns:
        [N, C, S, S] in the type of the maps and, but by torchvision's op, in their memory format; [0, C, S, S] with a
        graph to every map without boxes. Exactly 0 for samples more than one cell beyond a map, and for inverted boxes
        that adapt their samples.

    Source:
        Mask R-CNN (arXiv:1703.06870), section 3.
    """
    grid = Grid(size, strides, sampling_ratio, aligned)
    level = level_of(boxes, len(levels), canonical=canonical)
    if levels[0].device.type == "cpu":
        pooled = by_sums(levels, boxes, image, level, grid)
        if pooled is not None:
            say_once(logging.INFO, "roi_align: weighted sums on the processor")
            return pooled
    kernels = _kernels_for(levels, len(boxes), grid)
    if kernels is None:
        return by_torchvision(levels, boxes, image, level, grid)
    return RoIAlign.apply(kernels, grid, boxes.detach().float().contiguous(), image.contiguous(), level, *levels)


def by_torchvision(levels: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor, grid: Grid) -> Tensor:
    """The same by torchvision's op, one call per level; ``level`` int64 [N]. Waits for a GPU once.

    Maps of 16 bits are pooled as float32: the op would round the boxes to the type of the maps, which moves them by
    pixels.
    """
    kind = torch.promote_types(levels[0].dtype, torch.float32)
    low, high = boxes.detach().to(kind).split(2, dim=1)
    if grid.sampling_ratio == 0:
        high = torch.maximum(low, high)  # the same zeros; for inverted boxes the op would ask for negative memory
    rois = torch.cat([image[:, None].to(kind), low, high], dim=1)
    order = level.argsort(stable=True)
    counts = counts_of(level, len(levels)).tolist()
    ratio = grid.sampling_ratio or -1
    parts = [
        torchvision_roi_align(features.to(kind), part, grid.size, 1 / stride, ratio, grid.aligned)
        for features, stride, part in zip(levels, grid.strides, rois[order].split(counts), strict=True)
    ]
    pooled = torch.cat(parts).to(levels[0].dtype)
    # Features of a thousand regions are 50 MB: they are moved only if the boxes did not come level by level.
    return pooled if torch.equal(order, torch.arange(len(order), device=order.device)) else pooled[order.argsort()]


def _kernels_for(levels: list[Tensor], rois: int, grid: Grid) -> Kernels | None:
    device = levels[0].device
    if device.type != "cuda":
        say_once(logging.INFO, f"roi_align: torchvision's op on {device.type}")
        return None
    if not fits(levels, rois, grid):
        say_once(logging.INFO, "roi_align: torchvision's op for maps of other types or sizes than our kernel takes")
        return None
    return module_for("roi_align", device.index)
