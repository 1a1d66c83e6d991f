"""Detectors and their parts."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from aligndet.models.backbones import build_backbone
from aligndet.models.backbones.norm import FrozenBatchNorm
from aligndet.models.detr import DETR
from aligndet.models.faster_rcnn import FasterRCNN
from aligndet.models.fcos import FCOS
from aligndet.models.folding import folded
from aligndet.models.mask_rcnn import MaskRCNN
from aligndet.models.pointwise import with_pointwise
from aligndet.models.retinanet import RetinaNet
from aligndet.protocol import Detector

DETECTORS: dict[str, type[FCOS | RetinaNet | FasterRCNN | MaskRCNN | DETR]] = {
    "fcos": FCOS,
    "retinanet": RetinaNet,
    "faster_rcnn": FasterRCNN,
    "mask_rcnn": MaskRCNN,
    "detr": DETR,
}


def build_detector(
    name: str,
    backbone: str = "resnet50",
    num_classes: int = 80,
    *,
    width: float = 1.0,
    norm: str = "frozen",
    frozen_stages: int = 1,
    stride_in_1x1: bool = False,
    norm_eps: float | None = None,
    pixel_mean: tuple[float, float, float] | None = None,
    pixel_std: tuple[float, float, float] | None = None,
    **options: Any,
) -> Detector:
    """A detector by name, with random weights; ``aligndet.weights`` fills it.

    Args:
        name: one of DETECTORS.
        backbone: one of ``models.backbones.BACKBONES``.
        num_classes: K.
        width, norm, frozen_stages, stride_in_1x1: of the backbone, see ``build_backbone``.
        norm_eps: added to the variances of its batch norms, if another than torch's 1e-5.
        pixel_mean, pixel_std: normalisation of images (see Detector), if another than the usual.
        options: keyword arguments of the detector's class.

    Raises:
        ValueError: an unknown name or option (with the nearest one) or an impossible number.
    """
    kind = detector_class(name)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: want a whole number of at least 1, got {num_classes}")
    for what, triple in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
        if triple is not None and (len(triple) != 3 or not all(map(math.isfinite, triple))):
            raise ValueError(f"{what}: want three numbers, of red, green and blue, got {triple}")
    if pixel_std is not None and min(pixel_std) <= 0:
        raise ValueError(f"pixel_std: want three numbers above 0, got {pixel_std}")
    if norm_eps is not None and not norm_eps >= 0:
        raise ValueError(f"norm_eps: want a number of at least 0, got {norm_eps}")
    for what in ("score_threshold", "dropout"):
        if not 0 <= options.get(what, 0.0) <= 1:
            raise ValueError(f"{what}: want a number in 0 .. 1, got {options[what]}")
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: no option of {name}, which has {', '.join(known)}; {_nearest(option, known)}")
    body = build_backbone(backbone, width=width, norm=norm, frozen_stages=frozen_stages, stride_in_1x1=stride_in_1x1)
    detector = kind(body, num_classes, **options)
    for module in body.modules():
        if norm_eps is not None and isinstance(module, (FrozenBatchNorm, nn.BatchNorm2d)):
            module.eps = norm_eps
    detector.pixel_mean = pixel_mean or detector.pixel_mean
    detector.pixel_std = pixel_std or detector.pixel_std
    with_pointwise(detector)
    return detector


def detector_class(name: str) -> type[FCOS | RetinaNet | FasterRCNN | MaskRCNN | DETR]:
    """The class of a detector by name.

    Raises:
        ValueError: an unknown name (with the nearest one).
    """
    if name not in DETECTORS:
        raise ValueError(f"detector: want one of {', '.join(DETECTORS)}, got {name!r}; {_nearest(name, DETECTORS)}")
    return DETECTORS[name]


def options_of(name: str) -> tuple[str, ...]:
    """The keyword arguments of a detector's class."""
    parameters = inspect.signature(detector_class(name).__init__).parameters.values()
    return tuple(item.name for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY)


def option_of(build: Mapping[str, Any], option: str) -> Any:
    """What arguments of ``build_detector`` give an option of the detector's class; None where it has no such option."""
    parameter = inspect.signature(detector_class(build["name"]).__init__).parameters.get(option)
    return None if parameter is None else build.get(option, parameter.default)


def _nearest(name: str, known: Any) -> str:
    return f"the nearest is {difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]!r}"


__all__ = [
    "DETECTORS",
    "DETR",
    "FCOS",
    "FasterRCNN",
    "MaskRCNN",
    "RetinaNet",
    "build_backbone",
    "build_detector",
    "detector_class",
    "folded",
    "option_of",
    "options_of",
]
