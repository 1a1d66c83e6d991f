"""ResNet's blocks, torchvision's in all but speed: convolution and frozen norm are one operation."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import resnet

from aligndet.models.backbones.norm import FrozenBatchNorm
from aligndet.models.pointwise import convolved


class BasicBlock(resnet.BasicBlock):
    """Two 3 x 3 convolutions and a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', H', W']``."""
        out = normalised(self.conv1, self.bn1, x).relu_()
        return (normalised(self.conv2, self.bn2, out) + _shortcut(self.downsample, x)).relu_()


class Bottleneck(resnet.Bottleneck):
    """A 3 x 3 convolution (which has the stride) between two of 1 x 1, and a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C', H', W']``."""
        out = normalised(self.conv1, self.bn1, x).relu_()
        out = normalised(self.conv2, self.bn2, out).relu_()
        return (normalised(self.conv3, self.bn3, out) + _shortcut(self.downsample, x)).relu_()


def normalised(layer: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(layer(x))``.

    A frozen norm scales the weights instead of the features: one pass less over them, and no copy to keep for the
    gradient.
    """
    if not isinstance(norm, FrozenBatchNorm):
        normed: Tensor = norm(layer(x))
        return normed
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return convolved(x, layer, layer.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale)


def _shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    assert isinstance(downsample, nn.Sequential)
    layer, norm = downsample
    assert isinstance(layer, nn.Conv2d)
    return normalised(layer, norm, x)
