"""Batch norms of a trained detector taken into the convolutions before them: the same results in fewer passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from aligndet.models.backbones.blocks import BasicBlock, Bottleneck
from aligndet.models.backbones.norm import FrozenBatchNorm
from aligndet.models.backbones.resnet import ResNet

Module = TypeVar("Module", bound=nn.Module)
Norm = FrozenBatchNorm | nn.modules.batchnorm._BatchNorm


def folded(module: Module) -> Module:
    """A copy for inference, in evaluation mode, channels-last, with batch norms folded into convolutions.

    Pairs are taken where the order of computation is certain: neighbours in a Sequential, and in the blocks of ResNet.
    Parameters need no gradient. Results differ by rounding only; a module without such pairs is just copied.
    """
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    for part in list(copied.modules()):
        for first, second in _pairs(part):
            convolution, norm = part.get_submodule(first), part.get_submodule(second)
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, Norm):
                _fold(convolution, norm)
                setattr(part, second, nn.Identity())
    return copied.to(memory_format=torch.channels_last)


def _pairs(part: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of children of which the second computes on what the first returns."""
    names = [name for name, _ in part.named_children()]
    if isinstance(part, nn.Sequential):
        yield from pairwise(names)
    elif isinstance(part, (BasicBlock, Bottleneck, ResNet)):
        yield from ((name, name.replace("conv", "bn")) for name in names if name.startswith("conv"))


def _fold(convolution: nn.Conv2d, norm: Norm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    convolution.weight, convolution.bias = weight, bias
