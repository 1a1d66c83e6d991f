"""A detector on the validation images of a config: its detections and their metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from aligndet.config import Config
from aligndet.data.batch import collate
from aligndet.data.coco import find_images, load_coco
from aligndet.data.labelled import EvaluationImages
from aligndet.engine.distributed import World
from aligndet.engine.evaluate import coco_metrics, evaluate_detector
from aligndet.models import folded
from aligndet.protocol import Detector
from aligndet.structures import Detections


def validation_file(config: Config) -> str:
    """``data.val``.

    Raises:
        ValueError: it is not set.
    """
    if config.data.val is None:
        raise ValueError("data.val: evaluation needs it, a COCO json")
    return config.data.val


def detections_on(config: Config, detector: Detector, classes: Sequence[str], world: World) -> dict[int, Detections]:
    """The detections on ``data.val`` by image id; the same on every rank; detector and random numbers stay."""
    data, path = config.data, validation_file(config)
    annotations = load_coco(path, classes=classes)
    root = find_images(path, data.val_images, annotations.file_names)
    sides = {"short_side": data.eval_short_side, "long_side": data.long_side}
    dataset = EvaluationImages(annotations, root, **sides, on_error=data.on_error)
    share = Subset(dataset, range(world.rank, len(dataset), world.size))
    # A generator of its own: otherwise each loader draws from the global one, and training would go on differently.
    loader = DataLoader(share, batch_size=1, collate_fn=collate, num_workers=data.workers, generator=torch.Generator())
    return evaluate_detector(folded(detector).to(world.device), loader, world, amp=config.optim.amp)


def metrics_of(
    config: Config,
    detector: Detector,
    classes: Sequence[str],
    detections: Mapping[int, Detections],
    per_class: bool = False,
) -> dict[str, Any]:
    """The metrics of ``coco_metrics`` for boxes, and for detectors with masks those of masks under "masks"."""
    path = validation_file(config)
    metrics = coco_metrics(path, detections, classes=classes, per_class=per_class)
    if detector.needs_masks:
        metrics["masks"] = coco_metrics(path, detections, "segm", classes=classes, per_class=per_class)
    return metrics


def without_nan(value: Any) -> Any:
    """JSON has no nan (metrics of sizes that no object has): null instead."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
