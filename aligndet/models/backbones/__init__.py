"""Backbones: ``[B, 3, H, W] -> [C2, C3, C4, C5]``, strides 4, 8, 16, 32."""

from __future__ import annotations

import difflib

from aligndet.models.backbones.mobilenet import MobileNetV2
from aligndet.models.backbones.norm import NORMS
from aligndet.models.backbones.resnet import RESNETS, ResNet
from aligndet.models.backbones.swin import SWINS, Swin

Backbone = ResNet | MobileNetV2 | Swin
BACKBONES = (*RESNETS, "mobilenet_v2", *SWINS)


def build_backbone(
    name: str, *, width: float = 1.0, norm: str = "frozen", frozen_stages: int = 1, stride_in_1x1: bool = False
) -> Backbone:
    """A backbone by name, with random weights.

    Args:
        name: one of BACKBONES.
        width: multiplies all channel counts; 1 is the published network.
        norm: "frozen" (statistics and affine parameters are constants), "affine"
            (statistics only), "batch" or "sync".
        frozen_stages: 0 none, 1 stem and first stage, ... 4 everything.
        stride_in_1x1: of ResNet-50 and -101, see ``ResNet``.

    Returns:
        A module with ``channels`` and ``strides`` of its four outputs.

    Raises:
        ValueError: unknown name or norm, or impossible numbers.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: want one of {', '.join(NORMS)}, got {norm!r}")
    if not 0 <= frozen_stages <= 4:
        raise ValueError(f"frozen_stages: want 0 .. 4, got {frozen_stages}")
    if not width > 0:
        raise ValueError(f"width: want a positive multiplier, got {width}")
    if stride_in_1x1 and name not in ("resnet50", "resnet101"):
        raise ValueError(f"stride_in_1x1: want resnet50 or resnet101, which have such convolutions, got {name}")
    if name == "mobilenet_v2":
        return MobileNetV2(width, norm, frozen_stages)
    if name in SWINS:
        if norm != "frozen":
            raise ValueError(f"norm: {name} has no batch norm; want frozen (the default), got {norm!r}")
        return Swin(name, width, frozen_stages)
    if name not in RESNETS:
        near = difflib.get_close_matches(name, BACKBONES, n=1, cutoff=0.0)[0]
        raise ValueError(f"backbone: want one of {', '.join(BACKBONES)}, got {name!r}; the nearest is {near!r}")
    block, depths = RESNETS[name]
    return ResNet(block, depths, width, norm, frozen_stages, stride_in_1x1)


__all__ = ["BACKBONES", "Backbone", "MobileNetV2", "ResNet", "Swin", "build_backbone"]
