"""Batch norm over the images, or the rows, of all ranks, on any device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as OnGPUs

from aligndet.ops.reduce import SumOverRanks, several_ranks


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of the images of all ranks.

    On GPUs torch's function of that name; on processors the same written out, since torch and its DDP refuse them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; B, H and W may differ between ranks."""
        if not self.training or not several_ranks():
            return super().forward(x)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        if x.is_cuda:
            moving, group = (self.running_mean, self.running_var), dist.group.WORLD
            numbers = (self.eps, self.momentum, group, dist.get_world_size())
            return OnGPUs.apply(x, self.weight, self.bias, *moving, *numbers)
        with torch.autocast(x.device.type, enabled=False):
            mean, variance, number = _over_ranks(x.float())
            _move(self, mean, variance, number)
            scale, shift = _scale_and_shift(self, mean, variance)
            return (x.float() * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class RowNorm(nn.BatchNorm1d):
    """Batch norm of rows [N, C] with the statistics of the rows of all ranks, of which a rank may have one or none.

    Fewer than two rows in all have no statistics: they are normalised by the running ones, which then stay.
    """

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C] -> float [N, C]."""
        if not self.training or (len(x) > 1 and not several_ranks()):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            mean, variance, number = _over_ranks(x.float())
            if number < 2:
                assert self.running_mean is not None and self.running_var is not None
                mean, variance = 0 * mean + self.running_mean, 0 * variance + self.running_var
            else:
                _move(self, mean, variance, number)
            scale, shift = _scale_and_shift(self, mean, variance)
            return (x.float() * scale + shift).to(x.dtype)


def _move(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor, number: float) -> None:
    """Move the running statistics towards a mean and a biased variance of ``number`` values, each [C]."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    norm.running_mean.lerp_(mean.detach(), norm.momentum)
    norm.running_var.lerp_(variance.detach() * number / (number - 1), norm.momentum)


def _scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """What normalises by the statistics and applies the affine parameters as ``x * scale + shift``, each [C]."""
    scale = (variance + norm.eps).rsqrt()
    if not norm.affine:
        return scale, -mean * scale
    return scale * norm.weight, norm.bias - mean * scale * norm.weight


def _over_ranks(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean [C] and biased variance [C] of [N, C, ...] over all ranks, with a graph, and how many values each has.

    Zeros where no rank has a value.
    """
    own = x.numel() // x.shape[1]
    each = (0, *range(2, x.ndim))
    variance, mean = torch.var_mean(x, dim=each, correction=0) if own else (x.sum(dim=each), x.sum(dim=each))
    if not several_ranks():
        return mean, variance, own
    sums = SumOverRanks.apply(torch.cat([own * mean, mean.new_tensor([own])]))
    number = sums[-1].item()
    total = sums[:-1] / max(1.0, number)
    squares = SumOverRanks.apply(own * (variance + (mean - total) ** 2))
    return total, squares / max(1.0, number), number
