"""MobileNetV2 with torchvision's topology and weight names; Sandler et al. (arXiv:1801.04381)."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from aligndet.models.backbones.norm import NORMS, freeze

# Last layer of the groups with 24, 32, 96 and (final 1 x 1 convolution) 1280 channels: strides 4, 8, 16, 32.
OUTPUTS = (3, 6, 13, 18)


class MobileNetV2(nn.Module):
    """``[B, 3, H, W] -> [C2, C3, C4, C5]`` with 24, 32, 96 and 1280 channels at width 1.

    Args:
        width: channel multiplier.
        norm: key of NORMS.
        frozen_stages: 0 .. 4; 1 is everything up to the 24-channel group.
    """

    def __init__(self, width: float = 1.0, norm: str = "frozen", frozen_stages: int = 1) -> None:
        super().__init__()
        self.strides, self.width = (4, 8, 16, 32), width
        # torchvision initialises only its own norm classes by type, and the frozen one starts as the identity anyway.
        self.features = mobilenet_v2(weights=None, width_mult=width, norm_layer=NORMS[norm]).features
        self.channels = tuple(_outputs(self.features[layer]) for layer in OUTPUTS)
        self.freeze(frozen_stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at strides 4, 8, 16, 32."""
        features = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in OUTPUTS:
                features.append(x)
        return features

    def train(self, mode: bool = True) -> MobileNetV2:
        """Training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self.freeze(self.frozen_stages)
        return self

    def freeze(self, stages: int) -> None:
        """Keep the first ``stages`` out of training from now on; a stage once frozen is not thawed by fewer."""
        self.frozen_stages = stages
        freeze(list(self.features[: OUTPUTS[stages - 1] + 1]) if stages else [])


def _outputs(layer: nn.Module) -> int:
    return [module for module in layer.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
