"""A detector on the validation images of a config: its detections and their metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from aligndet.config import Config
from aligndet.data.annotations import Annotations
from aligndet.data.batch import collate
from aligndet.data.coco import load_coco
from aligndet.data.formats import coco_file, detect_format, images_of, load_annotations
from aligndet.data.labelled import EvaluationImages
from aligndet.engine.distributed import World
from aligndet.engine.evaluate import coco_metrics, evaluate_detector
from aligndet.engine.truth import read_truth
from aligndet.engine.voc import voc_metrics
from aligndet.models import folded
from aligndet.protocol import Detector
from aligndet.structures import Detections


def validation_truth(config: Config, classes: Sequence[str], masks: bool = False) -> Path | Annotations:
    """What ``data.val`` says is to be found: a COCO file as it stands, or annotations of another format.

    Raises:
        ValueError: it is not set.
    """
    data = config.data
    if data.val is None:
        raise ValueError("data.val: eval needs it, labels in COCO, VOC or YOLO format")
    if (data.format or detect_format(data.val)) == "coco":
        return coco_file(data.val, "val")
    return load_annotations(
        data.val, format=data.format, split="val", classes=classes, masks=masks, on_error=data.on_error
    )


def open_validation(config: Config, classes: Sequence[str], masks: bool) -> None:
    """Read what ``data.val`` names, so that what is wrong with it is said before the first step, not after the last.

    Raises:
        ValueError, FileNotFoundError: labels or images are not there, or the labels do not serve.
    """
    read_truth(validation_truth(config, classes, masks), classes)
    _images(config, classes)


def detections_on(config: Config, detector: Detector, classes: Sequence[str], world: World) -> dict[int, Detections]:
    """The detections on ``data.val`` by image id; the same on every rank; detector and random numbers stay."""
    data, dataset = config.data, _images(config, classes)
    share = Subset(dataset, range(world.rank, len(dataset), world.size))
    # A generator of its own: otherwise each loader draws from the global one, and training would go on differently.
    join, own = partial(collate, multiple=detector.size_divisor), torch.Generator()
    loader = DataLoader(share, batch_size=1, collate_fn=join, num_workers=data.workers, generator=own)
    return evaluate_detector(folded(detector).to(world.device), loader, world, amp=config.optim.amp)


def _images(config: Config, classes: Sequence[str]) -> EvaluationImages:
    data, truth = config.data, validation_truth(config, classes)
    annotations = truth if isinstance(truth, Annotations) else load_coco(truth, classes=classes, on_error=data.on_error)
    root = images_of(annotations, data.val_images)
    sides = {"short_side": data.eval_short_side, "long_side": data.long_side}
    return EvaluationImages(annotations, root, **sides, on_error=data.on_error)


def metrics_of(
    config: Config,
    detector: Detector,
    classes: Sequence[str],
    detections: Mapping[int, Detections],
    per_class: bool = False,
) -> dict[str, Any]:
    """The metrics of ``coco_metrics`` for boxes; for detectors with masks those of masks under "masks".

    With ``data.voc_metrics`` also those of ``voc_metrics`` under "voc".
    """
    truth = validation_truth(config, classes, detector.needs_masks)
    metrics = coco_metrics(truth, detections, classes=classes, per_class=per_class)
    if config.data.voc_metrics is not None:
        way = config.data.voc_metrics
        metrics["voc"] = voc_metrics(truth, detections, way=way, classes=classes, per_class=per_class)
    if detector.needs_masks:
        metrics["masks"] = coco_metrics(truth, detections, "segm", classes=classes, per_class=per_class)
    return metrics


def without_nan(value: Any) -> Any:
    """JSON has no nan (metrics of sizes that no object has): null instead."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
