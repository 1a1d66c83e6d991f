"""Batch norm over the images of all ranks, on any device."""

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
            self._move(mean.detach(), variance.detach() * number / (number - 1))
            scale = (variance + self.eps).rsqrt() * self.weight  # [C]
            shift = self.bias - mean * scale  # [C]
            return (x.float() * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, each [C]."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def _over_ranks(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean [C] and biased variance [C] of [B, C, H, W] over all ranks, with a graph, and how many values each has."""
    own = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    sums = SumOverRanks.apply(torch.cat([own * mean, mean.new_tensor([own])]))
    number, total = sums[-1].item(), sums[:-1] / sums[-1].item()
    squares = SumOverRanks.apply(own * (variance + (mean - total) ** 2))
    return total, squares / number, number
