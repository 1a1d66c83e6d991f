"""Known numbers on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constants(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers as a tensor on the device of ``like``.

    ``torch.tensor(values, device=...)`` would wait until a GPU has done all it was given so far; this only hands the
    numbers over.
    """
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)
