"""ResNet with torchvision's topology and weight names; He et al. (arXiv:1512.03385), stride on the 3 x 3 layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aligndet.models.backbones.blocks import BasicBlock, Bottleneck, normalised
from aligndet.models.backbones.norm import NORMS, freeze, rounded

RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """``[B, 3, H, W] -> [C2, C3, C4, C5]``.

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each of the four stages.
        width: channel multiplier; the stem is rounded to a multiple of 8, everything else follows from it.
        norm: key of NORMS.
        frozen_stages: 0 .. 4; 1 is stem and first stage.
        stride_in_1x1: a bottleneck's stride is in its first convolution, as in the first published weights (detectron2,
            caffe), not in the 3 x 3 one.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        width: float = 1.0,
        norm: str = "frozen",
        frozen_stages: int = 1,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        stem = rounded(64 * width)
        self.strides = (4, 8, 16, 32)
        self.stride_in_1x1 = stride_in_1x1
        self.channels = tuple(stem * 2**stage * block.expansion for stage in range(4))
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = NORMS[norm](stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = (stem, *self.channels[:-1])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            _stage(block, inputs[stage], stem * 2**stage, depths[stage], 1 if stage == 0 else 2, norm)
            for stage in range(4)
        )
        for module in self.modules():
            if stride_in_1x1 and isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
        _initialise(self, norm)
        self.freeze(frozen_stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at strides 4, 8, 16, 32."""
        x = self.maxpool(self.relu(normalised(self.conv1, self.bn1, x)))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features

    def train(self, mode: bool = True) -> ResNet:
        """Training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self.freeze(self.frozen_stages)
        return self

    def freeze(self, stages: int) -> None:
        """Keep the first ``stages`` out of training from now on; a stage once frozen is not thawed by fewer."""
        self.frozen_stages = stages
        layers = [self.layer1, self.layer2, self.layer3, self.layer4][:stages]
        freeze([self.conv1, self.bn1, *layers] if stages else [])


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, depth: int, stride: int, norm: str
) -> nn.Sequential:
    outputs = planes * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        downsample = nn.Sequential(shortcut, NORMS[norm](outputs))
    blocks = [block(inputs, planes, stride, downsample, norm_layer=NORMS[norm])]
    blocks += [block(outputs, planes, norm_layer=NORMS[norm]) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


@torch.no_grad()
def _initialise(model: nn.Module, norm: str) -> None:
    """Kaiming convolutions; the last norm of each block zero where it can learn to open (method section 1.7)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif norm != "frozen" and isinstance(module, Bottleneck):
            module.bn3.weight.zero_()
        elif norm != "frozen" and isinstance(module, BasicBlock):
            module.bn2.weight.zero_()
