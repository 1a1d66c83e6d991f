"""Where dense detectors look: one point per cell of each pyramid level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Points:
    """The P points of one image: levels one after another, fine to coarse, each row by row.

    Attributes:
        centres: float [P, 2], x and y px.
        stride: float [P] px.
        level: int64 [P].
    """

    centres: Tensor
    stride: Tensor
    level: Tensor


def points_of(shapes: list[tuple[int, int]], strides: tuple[int, ...], device: torch.device) -> Points:
    """The centres of the cells, ((column + 0.5) stride, (row + 0.5) stride), of levels of the given (H_l, W_l)."""
    centres, stride_of, level_of = [], [], []
    for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        rows = (torch.arange(height, device=device) + 0.5) * stride
        columns = (torch.arange(width, device=device) + 0.5) * stride
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack([x, y], dim=2).reshape(-1, 2))
        stride_of.append(torch.full((height * width,), float(stride), device=device))
        level_of.append(torch.full((height * width,), level, device=device))
    return Points(torch.cat(centres), torch.cat(stride_of), torch.cat(level_of))
