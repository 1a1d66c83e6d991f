"""Rows of COCO's results format, as any program writes them, into detections."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from aligndet.data.segmentation import run_lengths
from aligndet.structures import Detections

WANTED = "image_id, category_id, a finite score, and a bbox of 4 finite numbers or a segmentation"


def result_of(record: Any, size: tuple[int, int], where: str) -> dict[str, Any]:
    """The score, the box and, where there is one, the mask of a row.

    Args:
        size: (height, width) px of its image; zeros where that is not known, and run lengths then have their own.
        where: file and row, for the message.

    Returns:
        "score"; "bbox" x, y, width, height px, of the mask where the row has none; "segmentation" as compressed run
        lengths.

    Raises:
        ValueError: one of them is missing or is none.
    """
    score, box, mask = record.get("score"), record.get("bbox"), record.get("segmentation") or None
    if mask is not None:
        if isinstance(mask, Mapping) and min(size) == 0:
            size = _size(mask)
        counts, reason = run_lengths(mask, size, empty=True)
        if reason:
            raise ValueError(f"{where}: want a mask as polygons or run lengths of its image, got one {reason}")
        mask = {"size": list(size), "counts": counts}
        box = rle.toBbox(mask).tolist() if box is None else box
    numbers: list[Any] = [score, *box] if isinstance(box, list) else []
    if len(numbers) != 5 or not all(_finite(value) for value in numbers):
        raise ValueError(f"{where}: want {WANTED}, got {str(record)[:100]}")
    found: dict[str, Any] = {"score": float(score), "bbox": [float(value) for value in box]}
    return found if mask is None else found | {"segmentation": mask}


def detections_of(results: Sequence[dict[str, Any]]) -> Detections:
    """The results of one image, each with its "label", by falling score; masks where all of them have one."""
    results = sorted(results, key=lambda result: -result["score"])
    boxes = torch.tensor([result["bbox"] for result in results], dtype=torch.float64).reshape(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1).float()
    scores = torch.tensor([result["score"] for result in results], dtype=torch.float32)
    labels = torch.tensor([result["label"] for result in results], dtype=torch.int64)
    return Detections(boxes, scores, labels, _masks(results))


def _masks(results: Sequence[dict[str, Any]]) -> Tensor | None:
    if not results or any("segmentation" not in result for result in results):
        return None
    with warnings.catch_warnings():
        # pycocotools still speaks to numpy as if it were version 1.
        warnings.simplefilter("ignore", DeprecationWarning)
        masks = np.stack([rle.decode(result["segmentation"]) for result in results])
    return torch.from_numpy(masks).bool()


def _size(mask: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) px that run lengths say they are of; zeros where they do not."""
    size = mask.get("size")
    if not isinstance(size, Sequence) or [type(side) for side in size] != [int, int]:
        return 0, 0
    return size[0], size[1]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
