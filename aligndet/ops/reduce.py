"""Numbers that all ranks agree on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, without a graph; the value itself in a single process.

    Normalisers of losses go through it: DDP averages gradients, so dividing by the mean count of a rank gives the
    gradient of one process with all images. Source: method section 1.2 (mean over GPUs).
    """
    value = value.detach()
    if not several_ranks():
        return value
    total = value.to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total / dist.get_world_size()


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, with a graph: every rank's loss depends on every rank's value.

    The order of calls is the same on all ranks, forward and backward.
    """

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        """float [...] -> float [...]."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """The sum of the gradients of all ranks."""
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def several_ranks() -> bool:
    """Whether this process is one of several in a group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
