"""Feature pyramid; Lin et al. (arXiv:1612.03144)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """Lateral 1 x 1 and output 3 x 3 convolutions of the given levels, and coarser levels on top of the last output.

    Args:
        inputs: channels of each backbone level, fine to coarse.
        channels: C of every output.
        extra: coarser levels, each a 3 x 3 convolution of stride 2 on the one before (ReLU in between).

    Source:
        Method section 1.1, the FCOS column: P6 from P5's output, P7 from ReLU(P6). No norm, no activation.
    """

    def __init__(self, inputs: tuple[int, ...], channels: int, extra: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in inputs)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in inputs)
        self.extra = nn.ModuleList(nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(extra))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """``L inputs -> L + extra outputs`` of [B, C, H_l, W_l], fine to coarse."""
        merged = [layer(level) for layer, level in zip(self.lateral, features, strict=True)]
        for finer in range(len(merged) - 2, -1, -1):
            size = merged[finer].shape[-2:]
            merged[finer] = merged[finer] + F.interpolate(merged[finer + 1], size=size, mode="nearest")
        outputs = [layer(level) for layer, level in zip(self.output, merged, strict=True)]
        for number, layer in enumerate(self.extra):
            last = outputs[-1] if number == 0 else F.relu(outputs[-1])
            outputs.append(layer(last))
        return outputs
