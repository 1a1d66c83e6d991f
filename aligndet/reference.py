"""Mistakes of the authors' code, one by one, to measure what each costs; nothing here is meant to be used otherwise.

``method.mistakes`` of a config names some of them, ``method.reference_compatible: true`` stands for all that apply.
Four belong elsewhere: ``padding`` and ``first`` to the data (``ViewPairs(pad_first=True, order="first")``),
``fallback`` and ``start`` to the method (``AlignDet(own_keys=True, start=...)``). What merely crashes there is not
reproduced, nor that DETR's mask and the limits of regions keep the image's own width there after ``padding``: here they
follow the padded one. Method section 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aligndet.models.detr import DETR
from aligndet.models.fcos import FCOS
from aligndet.models.retinanet import RetinaNet
from aligndet.protocol import Detector


def with_mistakes(detector: Detector, mistakes: tuple[str, ...]) -> None:
    """Give ``detector`` those of its own mistakes that are named.

    "strides": the points of FCOS stand at half their coordinates (8.2). "labels": the embedding of an anchor of
    RetinaNet is that of another one as soon as a batch has two images (8.1). "background": a query of DETR without a
    box counts as much as one with, in a class loss that is divided by the number of those with, at least 1 (2.8, 8.9);
    of several ranks by the mean of their numbers, as without the mistake.
    """
    if "strides" in mistakes and isinstance(detector, FCOS):
        detector.strides = tuple(stride // 2 for stride in detector.strides)
    if "labels" in mistakes and isinstance(detector, RetinaNet):
        detector.misplaced = level_by_level
    if "background" in mistakes and isinstance(detector, DETR):
        detector.background_weights = (1.0, 0.0)


def level_by_level(rows: Tensor, counts: tuple[int, ...], images: int) -> Tensor:
    """The row, image by image, of what stands at place ``rows`` of a list that goes level by level.

    Args:
        rows: int64 [n], places in 0 .. images * sum(counts) - 1.
        counts: anchors per level of one image.
        images: B.
    """
    number = torch.tensor(counts, device=rows.device)
    ends = (number * images).cumsum(0)
    level = torch.searchsorted(ends, rows, right=True)
    inside = rows - (ends - number * images)[level]  # place within the level
    image, anchor = inside // number[level], inside % number[level]
    return image * sum(counts) + (number.cumsum(0) - number)[level] + anchor
