"""RoIAlign on the processor: each output cell is a weighted sum of a few cells of the maps, all levels in one table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet.ops.roi_align_cuda import Grid

# More samples per cell and axis than boxes of any real image need; beyond it the weights would take too much memory.
MOST_SAMPLES = 64


def by_sums(levels: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor, grid: Grid) -> Tensor | None:
    """What ``multilevel_roi_align`` returns, with its arguments and ``level`` int64 [N]; None where it is not suited.

    Bilinear interpolation on a grid of samples is separable: per axis the weights of the few rows (or columns) that the
    samples of a cell touch are added up, so that samples that share cells of the map cost one multiplication together.
    The sums are torch's ``embedding_bag``, in float32; forward and backward take a fraction of torchvision's time.

    Not suited are boxes that need more than MOST_SAMPLES per cell or are not finite, maps of other than 16 and 32 bits,
    and no boxes.
    """
    if not len(boxes) or levels[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    if not bool(boxes.isfinite().all()):
        return None
    shapes = torch.tensor([feature.shape[2:] for feature in levels])  # [L, 2]
    sides = shapes[level]  # [N, 2]
    scale = 1 / torch.tensor(grid.strides, dtype=torch.float32)[level]
    corners = boxes.detach().float() * scale[:, None] - (0.5 if grid.aligned else 0.0)
    rows, columns = (_axis(corners[:, [1 - k, 3 - k]], sides[:, k], grid) for k in range(2))
    if rows is None or columns is None:
        return None
    (row, row_weight), (column, column_weight) = rows, columns  # [N, S, R] each
    images, channels = levels[0].shape[:2]
    cells = images * shapes.prod(dim=1)
    start = (cells.cumsum(0) - cells)[level] + image * sides.prod(dim=1)  # [N], of the image's map in the table
    weight = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]  # [N, S, S, R, R']
    place = (start[:, None, None] + row * sides[:, 1, None, None])[:, :, None, :, None] + column[:, None, :, None, :]
    used = weight != 0
    counts = used.flatten(3).sum(dim=3).flatten()
    offsets = counts.cumsum(0) - counts
    table = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in levels]).float()
    sums = F.embedding_bag(place[used], table, offsets, mode="sum", per_sample_weights=weight[used])
    pooled = sums.view(len(boxes), grid.size, grid.size, channels).permute(0, 3, 1, 2).to(levels[0].dtype)
    return pooled.contiguous() if levels[0].is_contiguous() else pooled


def _axis(edges: Tensor, side: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Along one axis: which cells of the map each output cell reads, and with what weight: int64 and float [N, S, R].

    ``edges`` [N, 2] are the boxes' in cells of their maps, ``side`` int64 [N] the maps' lengths. Weights of samples
    more than a cell outside are 0, those between a border and the outermost cell's centre go to that cell.
    """
    low, size = edges[:, 0], grid.size
    length = edges[:, 1] - low
    length = length if grid.aligned else length.clamp(min=1)
    adaptive = (length / size).ceil().clamp(min=0)
    number = torch.full_like(length, grid.sampling_ratio) if grid.sampling_ratio else adaptive
    most = int(number.max())
    if most > MOST_SAMPLES:
        return None
    each = (length / size)[:, None, None]
    steps = torch.arange(max(most, 1))
    share = (steps + 0.5) / number.clamp(min=1)[:, None, None]  # [N, 1, n]
    sample = low[:, None, None] + each * (torch.arange(size)[:, None] + share)  # [N, S, n]
    last = side[:, None, None] - 1
    inside = (steps < number[:, None, None]) & (sample >= -1) & (sample <= last + 1)
    sample = torch.minimum(sample.clamp(min=0), last.float())
    nearer = sample.floor()
    farther_weight = torch.where(inside, sample - nearer, 0.0) / number.clamp(min=1)[:, None, None]
    nearer_weight = torch.where(inside, 1 - (sample - nearer), 0.0) / number.clamp(min=1)[:, None, None]
    cell = nearer.to(torch.int64)
    first = cell.amin(dim=2, keepdim=True)
    reach = int((cell - first).max()) + 2
    weight = torch.zeros(*cell.shape[:2], reach).scatter_add_(2, cell - first, nearer_weight)
    weight.scatter_add_(2, cell - first + 1, farther_weight)
    cells = torch.minimum(first + torch.arange(reach), last)  # a cell beyond the border has weight 0
    return cells, weight
