"""Where detectors look: points or anchor boxes, one set per cell of each pyramid level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligndet.ops.constants import constants

# Where the priors of a cell stand: at its centre; at its upper left corner; likewise, with the stride that the size of
# the padded image and the number of cells give (torchvision: 800 px in 13 cells are 61 px each, not 64).
GRIDS = ("centre", "corner", "fitted")


@dataclass(frozen=True)
class Points:
    """The P points of one image: levels one after another, fine to coarse, each row by row.

    Attributes:
        centres: float [P, 2], x and y px.
        stride: float [P] px.
        level: int64 [P].
        cell: int64 [P, 2], row and column.
    """

    centres: Tensor
    stride: Tensor
    level: Tensor
    cell: Tensor


@dataclass(frozen=True)
class Anchors:
    """The P boxes of one image: levels one after another, fine to coarse, each row by row, A in every cell.

    Attributes:
        boxes: float [P, 4] xyxy px.
        level: int64 [P].
        cell: int64 [P, 2], row and column.
        stride: float [P] px.
        counts: boxes per level.
    """

    boxes: Tensor
    level: Tensor
    cell: Tensor
    stride: Tensor
    counts: tuple[int, ...]


def points_of(
    shapes: list[tuple[int, int]],
    strides: tuple[int, ...],
    device: torch.device,
    *,
    grid: str = "centre",
    padded: tuple[int, int] = (0, 0),
) -> Points:
    """One point per cell of levels of the given (H_l, W_l).

    Args:
        grid: one of GRIDS; at "centre" they are ((column + 0.5) stride, (row + 0.5) stride).
        padded: (height, width) px of the image tensor, read by "fitted" only.
    """
    centres, stride_of, level_of, cells = [], [], [], []
    for level, ((height, width), stride) in enumerate(zip(shapes, strides, strict=True)):
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        cell = torch.stack([y, x], dim=2).reshape(-1, 2)
        sides = [padded[0] // height, padded[1] // width] if grid == "fitted" else [stride, stride]
        step = constants(sides, cell, torch.float32)
        centres.append(((cell + (0.5 if grid == "centre" else 0.0)) * step).flip(1))
        cells.append(cell)
        stride_of.append(torch.full((height * width,), float(stride), device=device))
        level_of.append(torch.full((height * width,), level, device=device))
    return Points(torch.cat(centres), torch.cat(stride_of), torch.cat(level_of), torch.cat(cells))


@dataclass(frozen=True)
class AnchorShapes:
    """Which boxes stand in each cell.

    Attributes:
        sizes: per level, the square roots of areas px.
        ratios: height / width; the outer of the two loops.
        grid: one of GRIDS.
        whole: sides are rounded to even px, as torchvision does.

    Source:
        Method section 1.0: "corner", ratio-outer, size-inner.
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    grid: str = "corner"
    whole: bool = False

    @property
    def per_cell(self) -> int:
        """A."""
        return len(self.sizes[0]) * len(self.ratios)

    def shapes(self, level: int) -> Tensor:
        """float32 [A, 4] xyxy px about the origin."""
        root = torch.tensor(self.ratios).sqrt()
        sizes = torch.tensor(self.sizes[level])
        height, width = (root[:, None] * sizes).flatten(), ((1 / root)[:, None] * sizes).flatten()
        boxes = torch.stack([-width, -height, width, height], dim=1) / 2
        return boxes.round() if self.whole else boxes

    def on(
        self,
        shapes: list[tuple[int, int]],
        strides: tuple[int, ...],
        device: torch.device,
        padded: tuple[int, int] = (0, 0),
    ) -> Anchors:
        """The anchors of levels of the given (H_l, W_l); ``padded`` as in ``points_of``."""
        points = points_of(shapes, strides, device, grid=self.grid, padded=padded)
        cells = [height * width for height, width in shapes]
        parts = [
            (centres.repeat(1, 2)[:, None] + self.shapes(level).to(device, non_blocking=True)).reshape(-1, 4)
            for level, centres in enumerate(points.centres.split(cells))
        ]
        each = self.per_cell
        return Anchors(
            torch.cat(parts),
            points.level.repeat_interleave(each),
            points.cell.repeat_interleave(each, dim=0),
            points.stride.repeat_interleave(each),
            tuple(count * each for count in cells),
        )


def octaves(strides: Sequence[int], base: float = 4.0, number: int = 3) -> tuple[tuple[float, ...], ...]:
    """RetinaNet's sizes: per level ``base * stride * 2^(i / number)`` px (arXiv:1708.02002, section 4)."""
    return tuple(tuple(base * stride * 2 ** (i / number) for i in range(number)) for stride in strides)


def on_image(anchors: Anchors, sizes: Tensor, divisor: int) -> Tensor:
    """Which anchors stand in cells of each image, padded by itself to a multiple of ``divisor``: bool [B, P].

    What is beyond stems from larger images of the same batch; leaving it out makes an image's losses independent of
    its neighbours. Source: method section 1.0.
    """
    own = (sizes + divisor - 1) // divisor * divisor  # [B, 2]
    cells = torch.ceil(own[:, None] / anchors.stride[:, None])  # [B, P, 2]
    return (anchors.cell < cells).all(dim=2)
