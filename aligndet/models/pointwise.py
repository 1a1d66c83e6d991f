"""1 x 1 convolutions on the path that is fast with any number of threads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution that always reaches oneDNN on CPU.

    With one thread (what torchrun gives each rank) torch sends plain 1 x 1 convolutions of small batches to another
    routine, two to four times as slow. Dilated ones it does not, and dilation of a single tap means nothing.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', H', W']``."""
        return convolved(x, self, self.weight, self.bias)


def convolved(x: Tensor, layer: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What an undilated ``layer`` would return with another ``weight`` and ``bias``."""
    pointwise = layer.kernel_size == (1, 1) and x.device.type == "cpu"
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, 2 if pointwise else 1, layer.groups)


def with_pointwise(module: nn.Module) -> None:
    """Put a Pointwise with the same parameters in the place of every 1 x 1 convolution below ``module``."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and child.kernel_size == (1, 1):
                taken = (child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding)
                fast = skip_init(Pointwise, *taken, groups=child.groups, bias=child.bias is not None)
                fast.weight, fast.bias = child.weight, child.bias
                setattr(parent, name, fast)
