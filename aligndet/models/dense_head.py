"""Parts of dense heads: towers, flattening, and layers applied at chosen points only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tower(channels: int, convolutions: int) -> nn.Sequential:
    """3 x 3 convolutions with group norm and ReLU, shared by all levels; initialised N(0, 0.01)."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.normal_(convolution.weight, std=0.01)
        layers += [convolution, nn.GroupNorm(32, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def convolution(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    """A convolution of odd ``size`` that keeps height and width; N(0, 0.01), bias 0."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def flat(levels: list[Tensor], rows: Tensor | None = None) -> Tensor:
    """Maps [B, C, H_l, W_l] of L levels as rows [B * P, C]: image by image, in the order of ``Points``.

    Args:
        rows: int64 [n]; only these, [n, C].
    """
    joined = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)  # [B, P, C]
    joined = joined.reshape(-1, joined.shape[2])
    return joined if rows is None else joined[rows]


def at_points(layer: nn.Sequential, levels: list[Tensor], rows: Tensor | None) -> Tensor:
    """A 3 x 3 convolution, an activation and a 1 x 1 convolution, computed at the given points only.

    Equal to ``flat([layer(level) for level in levels], rows)`` at the cost of the points instead of the maps.

    Args:
        layer: Sequential of those three.
        levels: L maps [B, C, H_l, W_l].
        rows: int64 [n], points in the order of ``flat``; None computes the maps.

    Returns:
        [n, D].
    """
    if rows is None:
        return flat([layer(level) for level in levels])
    first, activation, last = layer
    assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)
    patches = _patches(levels, rows).flatten(1)  # [n, 9 C]
    hidden = activation(F.linear(patches, first.weight.permute(0, 2, 3, 1).flatten(1), first.bias))
    return F.linear(hidden, last.weight.flatten(1), last.bias)


def _patches(levels: list[Tensor], rows: Tensor) -> Tensor:
    """The 3 x 3 neighbourhoods of points, zeros beyond the border: [n, 9, C], row by row."""
    images, channels = levels[0].shape[:2]
    padded = [F.pad(level, (1, 1, 1, 1)).permute(0, 2, 3, 1).reshape(-1, channels) for level in levels]
    table = torch.cat(padded)  # [sum over levels of B (H_l + 2) (W_l + 2), C]

    shapes = torch.tensor([level.shape[-2:] for level in levels], device=rows.device)  # [L, 2]
    cells = shapes.prod(dim=1)
    padded_cells = (shapes + 2).prod(dim=1)
    ends = cells.cumsum(0)
    image, point = rows // ends[-1], rows % ends[-1]
    level = torch.searchsorted(ends, point, right=True)
    cell = point - (ends - cells)[level]
    pitch = shapes[level, 1] + 2  # cells from one row of the padded map to the next
    corner = (cell // shapes[level, 1]) * pitch + cell % shapes[level, 1]  # the upper left neighbour
    start = (images * (padded_cells.cumsum(0) - padded_cells))[level] + image * padded_cells[level]

    steps = torch.arange(3, device=rows.device)
    neighbours = steps[:, None] * pitch[:, None, None] + steps  # [n, 3, 3]
    return table[(start + corner)[:, None] + neighbours.flatten(1)]
