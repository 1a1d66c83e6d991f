"""Pascal VOC's average precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligndet.data.annotations import Annotations
from aligndet.engine.truth import by_image, check_detections, read_truth, tell, true_records
from aligndet.structures import Detections

WAYS = ("11-point", "area")
THRESHOLDS = np.arange(10) * 0.05 + 0.5  # IoU


def voc_metrics(
    annotations: str | Path | Annotations,
    detections: Mapping[int, Detections] | Sequence[Detections],
    *,
    way: str,
    classes: Sequence[str] = (),
    per_class: bool = False,
) -> dict[str, Any]:
    """VOC's metrics of detections.

    For each class the detections of all images are taken from the highest score on. One belongs to the object that it
    overlaps most, and is right if their IoU reaches the threshold and no detection before it was right for that object;
    otherwise it is wrong. Detections of objects marked difficult (of crowds, in COCO files) count neither way, nor do
    those objects. There is no limit of detections per image.

    Args:
        annotations, detections, classes, per_class: as for ``coco_metrics``.
        way: "11-point" is the mean of the highest precision at recalls of at least 0, 0.1 ... 1 (VOC 2007); "area" is
            the area under that highest precision (VOC 2010 and later).

    Returns:
        AP (mean over IoU 0.5, 0.55 ... 0.95), AP50, AP75 in 0 .. 1: means over the classes with an object to find; nan
        where there is none.

    Raises:
        FileNotFoundError, ValueError: as ``coco_metrics``.

    Source:
        The development kits of VOC 2007 and 2012. Their widths have a + 1, since their corners are inclusive; half-open
        boxes have it already. Mean over IoUs as in method section 5.4.
    """
    if way not in WAYS:
        raise ValueError(f"way: want one of {', '.join(WAYS)}, got {way!r}")
    truth = read_truth(annotations, classes)
    found = by_image(detections, truth)
    for image_id, item in found.items():
        check_detections(item, image_id, len(truth.categories))
    true, left_out = true_records(truth, "bbox")
    tell(truth, left_out, "VOC's metrics")
    objects = _objects(true)
    precisions = {
        category: _class_precision(label, category, objects, found, way)
        for label, category in enumerate(truth.categories)
    }
    known = np.array([row for row in precisions.values() if not np.isnan(row).any()]).reshape(-1, len(THRESHOLDS))
    metrics: dict[str, Any] = _named(known.mean(axis=0) if len(known) else np.full(len(THRESHOLDS), math.nan))
    if per_class:
        metrics["classes"] = {truth.names[category]: _named(row) for category, row in precisions.items()}
    return metrics


def average_precision(hits: np.ndarray, number: int, way: str) -> float:
    """Average precision of a ranking.

    Args:
        hits: bool [n], whether each detection is right, from the highest score on.
        number: of objects to find, at least 1.
        way: see ``voc_metrics``.
    """
    right = np.cumsum(hits)  # [n]
    recall, precision = right / number, right / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    if way == "11-point":
        # The least rank that reaches each recall; in whole numbers, since 0.1 * 3 is not 0.3.
        ranks = np.searchsorted(10 * right, np.arange(11) * number)
        return float(np.append(best, 0.0)[np.minimum(ranks, len(hits))].mean())
    return float((np.diff(recall, prepend=0.0) * best).sum())


def _named(row: np.ndarray) -> dict[str, float]:
    """The metrics of one row of average precisions, float [T]."""
    return {"AP": float(row.mean()), "AP50": float(row[0]), "AP75": float(row[5])}


def _objects(true: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Boxes, float64 [m, 4] xyxy px, and bool [m], whether to be found; by category and image id."""
    rows: dict[tuple[int, int], list[tuple[Sequence[float], bool]]] = {}
    for record in true:
        x, y, width, height = record["bbox"]
        key = record["category_id"], record["image_id"]
        rows.setdefault(key, []).append(((x, y, x + width, y + height), not record["iscrowd"]))
    return {
        key: (np.array([box for box, _ in part]), np.array([counts for _, counts in part]))
        for key, part in rows.items()
    }


def _class_precision(
    label: int,
    category: int,
    objects: Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]],
    found: Mapping[int, Detections],
    way: str,
) -> np.ndarray:
    """Average precision of one class at each threshold: float64 [T], nan where there is nothing to find."""
    number = sum(int(counts.sum()) for (kind, _), (_, counts) in objects.items() if kind == category)
    if number == 0:
        return np.full(len(THRESHOLDS), math.nan)
    scores, ious, places, counted = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, np.int64)], [np.ones(0, bool)]
    first = 0
    for image, item in found.items():
        mine = (item.labels == label).numpy()
        boxes, counts = objects.get((category, image), (np.zeros((0, 4)), np.ones(0, bool)))
        iou = _pairwise_iou(item.boxes.numpy()[mine], np.concatenate([boxes, np.full((1, 4), np.nan)]))  # [n, m + 1]
        best = iou.argmax(axis=1)
        scores.append(item.scores.double().numpy()[mine])
        ious.append(iou.max(axis=1, initial=-1.0))
        places.append(first + best)
        counted.append(np.append(counts, True)[best])
        first += len(boxes) + 1
    order = np.argsort(-np.concatenate(scores), kind="stable")
    iou, place, counts = (np.concatenate(part)[order] for part in (ious, places, counted))
    return np.array([_at(threshold, iou, place, counts, number, way) for threshold in THRESHOLDS])


def _at(threshold: float, iou: np.ndarray, place: np.ndarray, counts: np.ndarray, number: int, way: str) -> float:
    """Average precision at one threshold; ``place`` int64 [n] says which object each detection overlaps most."""
    near = iou >= threshold - 1e-12  # [n]
    hits = np.zeros(len(iou), dtype=bool)
    _, earliest = np.unique(place[near], return_index=True)
    hits[np.flatnonzero(near)[earliest]] = True
    return average_precision(hits[counts | ~near], number, way)


def _pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes xyxy px, [n, 4] and [m, 4]: float64 [n, m]; -1 for rows of ``b`` that are nan."""
    a, b = a.astype(np.float64)[:, None], b.astype(np.float64)[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides.prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - shared
    return np.nan_to_num(shared / np.where(union > 0, union, np.inf), nan=-1.0)
