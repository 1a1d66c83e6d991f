"""Batch norm: frozen, with learned affine parameters only, per rank, or over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as OnGPUs

from aligndet.ops.reduce import SumOverRanks, several_ranks


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine parameters are constants: buffers under batch norm's names.

    One call of the library's fused operation; written out as scale and shift it would take two passes over the
    features, in float32 even under autocast.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FixedBatchNorm(nn.BatchNorm2d):
    """Batch norm that always uses its running statistics; the affine parameters learn."""

    def train(self, mode: bool = True) -> FixedBatchNorm:
        """Stay in evaluation mode."""
        return super().train(False)


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


NORMS: dict[str, Callable[..., Any]] = {
    "frozen": FrozenBatchNorm,
    "affine": FixedBatchNorm,
    "batch": nn.BatchNorm2d,
    "sync": SyncBatchNorm,
}


def freeze(modules: list[nn.Module]) -> None:
    """Take the parameters out of training and the modules into evaluation mode."""
    for module in modules:
        module.requires_grad_(False)
        module.eval()


def rounded(channels: float) -> int:
    """The multiple of 8 nearest to a channel count, at least 8."""
    return max(8, int(channels + 4) // 8 * 8)
