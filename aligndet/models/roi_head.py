"""Heads on the features of regions: what is in a box, where exactly, and which of its pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aligndet.models.backbones.norm import norm_layer

# 3 x 3 convolutions and fully connected layers of the box head.
BOX_HEADS = {"4conv1fc": (4, 1), "2fc": (0, 2)}


class BoxHead(nn.Module):
    """``[N, C, S, S] -> [N, width]``: what score, box and embedding layers read.

    Args:
        channels: C.
        size: S.
        kind: key of BOX_HEADS.
        width: of the fully connected layers.
        norm: None or key of NORMS: after the convolutions, which then have no bias.

    Source:
        Method section 1.4.
    """

    def __init__(self, channels: int, size: int, kind: str, width: int = 1024, norm: str | None = None) -> None:
        super().__init__()
        if kind not in BOX_HEADS:
            raise ValueError(f"box_head: want one of {', '.join(BOX_HEADS)}, got {kind!r}")
        convolutions, layers = BOX_HEADS[kind]
        self.width = width
        self.convolutions = convolution_tower(channels, convolutions, norm)
        inputs = [channels * size * size] + [width] * (layers - 1)
        self.fully_connected = nn.ModuleList(linear(number, width) for number in inputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """See the class."""
        x = self.convolutions(pooled).flatten(1)
        for layer in self.fully_connected:
            x = layer(x).relu()
        return x


class MaskHead(nn.Module):
    """``[N, C, S, S] -> [N, C, 2S, 2S]``: what the mask layer reads.

    Args:
        channels: C.
        norm: None or key of NORMS.

    Source:
        Method section 1.4: four 3 x 3 convolutions and a transposed one.
    """

    def __init__(self, channels: int, norm: str | None = None) -> None:
        super().__init__()
        self.convolutions = convolution_tower(channels, 4, norm)
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        kaiming(self.upsample)

    def forward(self, pooled: Tensor) -> Tensor:
        """See the class."""
        upsampled: Tensor = self.upsample(self.convolutions(pooled))
        return upsampled.relu()


def convolution_tower(channels: int, number: int, norm: str | None) -> nn.Sequential:
    """3 x 3 convolutions with ReLU and, where ``norm`` is a key of NORMS, norm; Kaiming initialisation."""
    layers: list[nn.Module] = []
    for _ in range(number):
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=norm is None)
        kaiming(layer)
        layers.append(layer)
        if norm is not None:
            layers.append(norm_layer(norm)(channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def kaiming(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Kaiming-normal by fan-out for ReLU, bias 0."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def linear(inputs: int, outputs: int, std: float | None = None) -> nn.Linear:
    """A linear layer with bias 0 and weights N(0, std), or Xavier-uniform."""
    layer = nn.Linear(inputs, outputs)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def own_class(values: Tensor, labels: Tensor) -> Tensor:
    """``[N, K, ...] -> [N, ...]``: the entry of each row's class, int64 [N] in 0 .. K-1.

    A layer with a single entry speaks for all classes (class-agnostic).
    """
    column = torch.zeros_like(labels) if values.shape[1] == 1 else labels
    return values[torch.arange(len(values), device=values.device), column]
