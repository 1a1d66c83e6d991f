"""Feature pyramid; Lin et al. (arXiv:1612.03144)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.models.backbones.norm import norm_layer

# What the coarser levels are made of: 3 x 3 convolutions of stride 2 on the last output, or on the last input; or the
# last output, subsampled.
EXTRAS = ("output", "input", "pool")


class FPN(nn.Module):
    """Lateral 1 x 1 and output 3 x 3 convolutions of the given levels, and coarser levels after them.

    Args:
        inputs: channels of each backbone level, fine to coarse.
        channels: C of every output.
        extra: number of coarser levels.
        source: one of EXTRAS; each further level stands on the one before.
        relu: between the coarser convolutions.
        norm: None, or key of NORMS: after every convolution, which then has no bias.

    Source:
        Method section 1.1: FCOS "output" with ReLU, RetinaNet "input" without, Faster and Mask R-CNN "pool".
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        channels: int,
        extra: int,
        *,
        source: str = "output",
        relu: bool = True,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.source, self.relu, self.pools = source, relu, extra if source == "pool" else 0
        first = inputs[-1] if source == "input" else channels
        widths = [] if source == "pool" else [first] + [channels] * (extra - 1) if extra else []
        self.lateral = nn.ModuleList(_layer(nn.Conv2d(width, channels, 1), norm) for width in inputs)
        self.output = nn.ModuleList(_layer(nn.Conv2d(channels, channels, 3, padding=1), norm) for _ in inputs)
        self.extra = nn.ModuleList(_layer(nn.Conv2d(width, channels, 3, stride=2, padding=1), norm) for width in widths)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """``L inputs -> L + extra outputs`` of [B, C, H_l, W_l], fine to coarse."""
        merged = [layer(level) for layer, level in zip(self.lateral, features, strict=True)]
        for finer in range(len(merged) - 2, -1, -1):
            size = merged[finer].shape[-2:]
            # In place: nothing else reads the lateral layer's output, and the finest map is large.
            merged[finer] += F.interpolate(merged[finer + 1], size=size, mode="nearest")
        outputs = [layer(level) for layer, level in zip(self.output, merged, strict=True)]
        for _ in range(self.pools):
            outputs.append(outputs[-1][:, :, ::2, ::2])
        last = features[-1] if self.source == "input" else outputs[-1]
        for number, layer in enumerate(self.extra):
            last = layer(F.relu(last) if number and self.relu else last)
            outputs.append(last)
        return outputs


def _layer(convolution: nn.Conv2d, norm: str | None) -> nn.Module:
    if norm is None:
        return convolution
    convolution.bias = None
    make = norm_layer(norm)
    return nn.Sequential(convolution, make(convolution.out_channels))
