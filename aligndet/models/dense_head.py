"""Parts of dense heads: towers, flattening, and layers applied at chosen points only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.ops.constants import constants


def tower(channels: int, convolutions: int, *, norm: bool = True, bias: bool | None = None) -> nn.Sequential:
    """3 x 3 convolutions with group norm (where ``norm``) and ReLU, shared by all levels; initialised N(0, 0.01).

    Convolutions have a bias where there is no norm, unless ``bias`` says otherwise.
    """
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layer = convolution(channels, channels, 3, bias=not norm if bias is None else bias)
        layers += [layer, *([GroupNorm(32, channels)] if norm else []), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class GroupNorm(nn.GroupNorm):
    """torch's, which refuses a map of one cell where a group has one channel; here that becomes the bias."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class Head(nn.Module):
    """The two towers that all levels share."""

    def __init__(self, channels: int, convolutions: int, *, norm: bool = True, bias: bool | None = None) -> None:
        super().__init__()
        self.classification = tower(channels, convolutions, norm=norm, bias=bias)
        self.box = tower(channels, convolutions, norm=norm, bias=bias)


def convolution(inputs: int, outputs: int, size: int, *, bias: bool = True) -> nn.Conv2d:
    """A convolution of odd ``size`` that keeps height and width; N(0, 0.01), bias 0."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
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

    shapes = constants([level.shape[-2:] for level in levels], rows, torch.int64)  # [L, 2]
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


def per_anchor(joined: Tensor, anchors: int) -> Tensor:
    """``[N, A * X] -> [N * A, X]``: the rows of ``flat`` for A boxes per cell, in the order of ``Anchors``."""
    return joined.reshape(len(joined) * anchors, -1)


def best_per_level(
    scores: Tensor, counts: tuple[int, ...], threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (candidate, class) pairs of each level of one image.

    Args:
        scores: float [P, K], levels one after another.
        counts: candidates per level.
        threshold: pairs that do not exceed it are left out.
        most: pairs per level.

    Returns:
        int64 [n] candidates, int64 [n] classes, float [n] scores; levels one after another, each best first.
    """
    rows, labels, values = [], [], []
    start = 0
    for part in scores.split(counts):
        row, label = (part > threshold).nonzero(as_tuple=True)
        value, best = part[row, label].topk(min(most, len(row)))
        rows.append(row[best] + start)
        labels.append(label[best])
        values.append(value)
        start += len(part)
    return torch.cat(rows), torch.cat(labels), torch.cat(values)
