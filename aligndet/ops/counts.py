"""How many rows each image or level has."""

from __future__ import annotations

import torch
from torch import Tensor


def counts_of(groups: Tensor, number: int) -> Tensor:
    """How often each of 0 .. ``number`` - 1 occurs: int64 [number], on the device of ``groups``.

    As ``torch.bincount`` does, which waits for a GPU twice, to look for the smallest and the largest value.

    Args:
        groups: int64 [N], 0 .. number-1.
    """
    return torch.zeros(number, dtype=torch.int64, device=groups.device).index_add_(0, groups, torch.ones_like(groups))
