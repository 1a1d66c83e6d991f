"""COCO's matching and averaging, by faster-coco-eval where that optional package is installed, else by pycocotools."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from importlib.metadata import version
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aligndet.engine.truth import Truth

Records = list[dict[str, Any]]
FAST, SLOW = "faster-coco-eval", "pycocotools"


def evaluator() -> str:
    """The package that metrics come from: faster-coco-eval (``pip install aligndet[fast]``) or pycocotools."""
    return SLOW if importlib.util.find_spec("faster_coco_eval") is None else FAST


def evaluator_note() -> str:
    """A line that says so, with the version."""
    return f"COCO metrics by {evaluator()} {version(evaluator())}"


def averaged(
    truth: Truth, true: Records, found: Records, iou_type: str, package: str | None = None
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """COCO's evaluation of records in its own format.

    Args:
        true, found: objects and detections, numbered from 1 on; of detections the best 100 per image and class count.
        iou_type: "bbox" or "segm".
        package: FAST or SLOW; None: ``evaluator()``.

    Returns:
        float64 [12], AP ... ARl; float64 [T, R, K], precision at each IoU threshold and recall for each class, all
        sizes, 100 detections; and the K category ids, ascending. -1 where there is nothing to find.
    """
    package = package or evaluator()
    of_files, of_metrics = _classes(package)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = of_metrics(_coco(of_files, truth, true), _coco(of_files, truth, found), iou_type)
        evaluation.params.catIds = list(truth.categories)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # [T, R, K, A, M]: IoU thresholds, recalls, categories by ascending id, areas (0 = all), limits (last = 100)
    precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]
    return np.asarray(evaluation.stats[:12]), precision, [int(number) for number in evaluation.params.catIds]


def _classes(package: str) -> tuple[Any, Any]:
    if package == SLOW:
        return COCO, COCOeval
    from faster_coco_eval import COCO as FastCOCO  # noqa: N811
    from faster_coco_eval import COCOeval_faster

    return FastCOCO, COCOeval_faster


def _coco(kind: Any, truth: Truth, records: Records) -> Any:
    """A COCO object from memory; unlike ``loadRes`` it works without detections and without "info"."""
    coco = kind()
    images = [{"id": image_id, "height": size[0], "width": size[1]} for image_id, size in truth.sizes.items()]
    categories = [{"id": category_id, "name": name} for category_id, name in truth.categories.items()]
    known = [record for record in records if record["category_id"] in truth.categories]
    coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": known}
    coco.createIndex()
    return coco
