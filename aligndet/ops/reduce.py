"""Numbers that all ranks agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, without a graph; the value itself in a single process.

    Normalisers of losses go through it: DDP averages gradients, so dividing by the mean count of a rank gives the
    gradient of one process with all images. Source: method section 1.2 (mean over GPUs).
    """
    value = value.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.to(torch.float32, copy=True)
    dist.all_reduce(total)
    return total / dist.get_world_size()
