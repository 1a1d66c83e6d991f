"""Detectors and their parts."""

from __future__ import annotations

import difflib

from aligndet.models.backbones import build_backbone
from aligndet.models.fcos import FCOS
from aligndet.protocol import Detector

DETECTORS = ("fcos",)


def build_detector(
    name: str,
    backbone: str = "resnet50",
    num_classes: int = 80,
    *,
    channels: int = 256,
    convolutions: int = 4,
    levels: int = 5,
    centre_radius: float | None = None,
    score_threshold: float = 0.05,
    width: float = 1.0,
    norm: str = "frozen",
    frozen_stages: int = 1,
) -> Detector:
    """A detector by name, with random weights; ``aligndet.weights`` fills it.

    Args:
        name: one of DETECTORS.
        backbone: one of ``models.backbones.BACKBONES``.
        num_classes: K.
        channels: C of neck and head.
        convolutions: of each head tower.
        levels: pyramid levels from stride 8 on.
        centre_radius: centre sampling in units of a level's stride; None: any point inside a box.
        score_threshold: detections below it are dropped.
        width, norm, frozen_stages: of the backbone, see ``build_backbone``.

    Raises:
        ValueError: an unknown name (with the nearest one) or an impossible number.
    """
    if name not in DETECTORS:
        near = difflib.get_close_matches(name, DETECTORS, n=1, cutoff=0.0)[0]
        raise ValueError(f"detector: want one of {', '.join(DETECTORS)}, got {name!r}; the nearest is {near!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes: want at least 1, got {num_classes}")
    return FCOS(
        build_backbone(backbone, width=width, norm=norm, frozen_stages=frozen_stages),
        num_classes,
        channels=channels,
        convolutions=convolutions,
        levels=levels,
        centre_radius=centre_radius,
        score_threshold=score_threshold,
    )


__all__ = ["DETECTORS", "FCOS", "build_backbone", "build_detector"]
