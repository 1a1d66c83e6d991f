"""Layers whose results 16 bits would spoil."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def in_float32(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What ``layer`` makes of ``inputs``, in float32: computed so under autocast, too.

    For the last layers of boxes: bfloat16 has eight significant bits, which are steps of 3 % at an exponent of 100 px
    and of 2 px in 800 before a sigmoid.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        result: Tensor = layer(inputs.to(torch.promote_types(inputs.dtype, torch.float32)))
    return result.float()
