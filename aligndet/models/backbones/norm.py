"""Batch norm: frozen, with learned affine parameters only, per rank, or over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.ops.batch_norm import SyncBatchNorm


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


NORMS: dict[str, Callable[..., Any]] = {
    "frozen": FrozenBatchNorm,
    "affine": FixedBatchNorm,
    "batch": nn.BatchNorm2d,
    "sync": SyncBatchNorm,
}


def norm_layer(name: str) -> Callable[..., nn.Module]:
    """The class of a norm by name.

    Raises:
        ValueError: it is no key of NORMS.
    """
    if name not in NORMS:
        raise ValueError(f"norm: want one of {', '.join(NORMS)}, got {name!r}")
    return NORMS[name]


def freeze(modules: list[nn.Module]) -> None:
    """Take the parameters out of training and the modules into evaluation mode."""
    for module in modules:
        module.requires_grad_(False)
        module.eval()


def rounded(channels: float) -> int:
    """The multiple of 8 nearest to a channel count, at least 8."""
    return max(8, int(channels + 4) // 8 * 8)
