"""COCO's average precision, detections of a whole data set, and predictions in COCO's format."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from aligndet.data.annotations import Annotations
from aligndet.data.coco import plain_id
from aligndet.engine.cocoeval import averaged
from aligndet.engine.distributed import World, gather_objects
from aligndet.engine.precision import autocast
from aligndet.engine.results import WANTED, detections_of, result_of
from aligndet.engine.truth import (
    Truth,
    by_image,
    check_detections,
    image_ids,
    read_json,
    read_truth,
    tell,
    true_records,
)
from aligndet.protocol import Detector
from aligndet.structures import Batch, Detections

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_TYPES = ("bbox", "segm")
REPORT_EVERY = 10.0  # s


class Batches(Protocol):
    """What can be walked through once and knows its length: a DataLoader, a list."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


def coco_metrics(
    annotation_file: str | Path | Annotations,
    detections: Mapping[int, Detections] | Sequence[Detections],
    iou_type: str = "bbox",
    *,
    classes: Sequence[str] = (),
    per_class: bool = False,
) -> dict[str, Any]:
    """COCO's twelve metrics of detections against an annotation file.

    What the rules of labels (``load_annotations``) leave out is not looked for, and told on stderr; for "segm" that are
    also objects without a mask. All else is measured as pycocotools does.

    Args:
        annotation_file: COCO json; "area", "iscrowd", annotation ids and "info" may be missing. Or annotations of any
            format, with masks for "segm": the clipped boxes; objects marked difficult are crowds.
        detections: by image id, or one per image in the order of the file; an image without an entry has no detections.
            Boxes in px of the original images; label k is the k-th of ``classes``, or without them the category with
            the k-th smallest id of the file.
        iou_type: "bbox" or "segm".
        classes: evaluate only these; names of the file's categories.
        per_class: add ``"classes": {name: {"AP": ..., "AP50": ...}}``.

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in 0 .. 1. A metric without a single object to
        find (no small ones, an empty file) is nan, where pycocotools gives -1. No detections give 0.

    Raises:
        FileNotFoundError: there is no annotation file.
        ValueError: it is no COCO file or lacks a class; a detection has an unknown image, label or a value that is not
            finite; masks are missing or of another size for "segm".
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type: want one of {', '.join(IOU_TYPES)}, got {iou_type!r}")
    truth = read_truth(annotation_file, classes)
    found = _records(by_image(detections, truth), truth, iou_type)
    true, left_out = true_records(truth, iou_type)
    tell(truth, left_out, "boxes" if iou_type == "bbox" else "masks")
    values, precision, columns = averaged(truth, true, found, iou_type)
    metrics: dict[str, Any] = dict(zip(METRICS, map(_known, values), strict=True))
    if per_class:
        rows = {category_id: precision[..., column] for column, category_id in enumerate(columns)}
        metrics["classes"] = {truth.names[category_id]: _of_class(rows[category_id]) for category_id in truth.names}
    return metrics


def evaluate_detector(detector: Detector, loader: Batches, world: World, amp: str = "off") -> dict[int, Detections]:
    """The detections of the images of all ranks by image id, on the CPU, in px of the original images.

    The detector runs in evaluation mode and is left in the mode it had. Images that could not be read have no entry of
    their own and are reported on stderr, as is the progress.

    Args:
        detector: on the device of ``world``.
        loader: this rank's share of the images.
        amp: "off", "bf16" or "fp16".

    Returns:
        The same on every rank, ascending by image id; masks ``encoded``: those of COCO's 5000 images would be 140 GiB.
    """
    found: dict[int, Detections] = {}
    began = reported = time.monotonic()
    with _evaluating(detector), torch.no_grad(), autocast(world.device, amp):
        for number, batch in enumerate(loader, start=1):
            for line in batch.skipped:
                print(f"warning: evaluation without an image: {line}", file=sys.stderr, flush=True)
            on_device = batch.to(world.device, non_blocking=True)
            pairs = zip(batch.image_ids, _detect(detector, on_device), strict=True)
            found |= {image_id: item for image_id, item in pairs if image_id not in batch.blank}
            now = time.monotonic()
            if world.rank == 0 and now - reported >= REPORT_EVERY:
                reported = now
                rate = len(found) / (now - began)
                left = (now - began) / number * (len(loader) - number)
                progress = f"evaluation: batch {number}/{len(loader)}  {rate:.1f} images/s  {left:.0f} s left"
                print(progress, file=sys.stderr, flush=True)
    gathered = gather_objects(found, world)
    return dict(sorted((image_id, item) for part in gathered for image_id, item in part.items()))


def save_predictions(
    path: str | Path,
    annotation_file: str | Path | Annotations,
    detections: Mapping[int, Detections] | Sequence[Detections],
    classes: Sequence[str] = (),
) -> None:
    """Write detections in COCO's results format: image and category ids of the file, boxes x, y, width, height px.

    Masks are written as run lengths where the detections have them. Arguments and errors as in ``coco_metrics``; the
    file at ``path`` is replaced whole.
    """
    truth = read_truth(annotation_file, classes)
    found = by_image(detections, truth)
    masked = any(item.masks is not None or item.encoded is not None for item in found.values())
    (own_images, own_categories), records = truth.own_ids, []
    for record in _records(found, truth, "segm" if masked else "bbox"):
        kept: dict[str, Any] = {
            "image_id": own_images[record["image_id"]],
            "category_id": own_categories[record["category_id"]],
            "bbox": record["bbox"],
            "score": record["score"],
        }
        if masked:
            mask = record["segmentation"]
            kept["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
        records.append(kept)
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_text(json.dumps(records))
    os.replace(temporary, path)


def load_predictions(
    path: str | Path, annotation_file: str | Path | Annotations, classes: Sequence[str] = ()
) -> dict[int, Detections]:
    """What ``save_predictions`` wrote, or another program in COCO's results format, with an entry for every image.

    Detections of categories that are not among ``classes`` are left out. Boxes of rows that have a mask alone are those
    of the mask; masks may be polygons or run lengths in either form.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no list of COCO results, an image or category is not in the annotation file, or a row has no
            finite score, neither box nor mask, or a mask that is none of its image.
    """
    truth = read_truth(annotation_file, classes)
    rows: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in truth.sizes}
    number_of = image_ids(truth)
    label_of = {category_id: label for label, category_id in enumerate(truth.categories)}
    records = read_json(path, "predictions")
    if not isinstance(records, list):
        raise ValueError(f"predictions {path}: want a list of results, got {type(records).__name__}")
    for number, record in enumerate(records):
        where = f"predictions {path}, row {number}"
        if not isinstance(record, dict) or not {"image_id", "category_id"} <= record.keys():
            raise ValueError(f"{where}: want {WANTED}, got {str(record)[:100]}")
        image_id, category_id = record["image_id"], plain_id(record["category_id"])
        known = all(isinstance(value, int | float | str) for value in (image_id, category_id))
        if not known or image_id not in number_of or category_id not in truth.all_categories:
            ids = f"image {image_id}, category {category_id}"
            raise ValueError(f"{where}: {ids} is not in {truth.path}")
        place = number_of[image_id]
        result = result_of(record, truth.sizes[place], where)
        if category_id in label_of:
            rows[place].append(result | {"label": label_of[category_id]})
    return {image_id: detections_of(part) for image_id, part in rows.items()}


@contextlib.contextmanager
def _evaluating(detector: Detector) -> Iterator[None]:
    """Evaluation mode; afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _detect(detector: Detector, batch: Batch) -> list[Detections]:
    """Detections of each image in px of its file, on the CPU."""
    candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes)
    found = detector.detect(candidates, batch.sizes)
    sizes = zip(found, batch.sizes.tolist(), batch.original_sizes.tolist(), strict=True)
    return [_compact(item.resized((h, w), (height, width)).to("cpu")) for item, (h, w), (height, width) in sizes]


def _compact(item: Detections) -> Detections:
    return item if item.masks is None else replace(item, masks=None, encoded=_run_lengths(item.masks))


def _run_lengths(masks: Tensor) -> tuple[dict[str, Any], ...]:
    """What pycocotools makes of bool [n, H, W]; nothing where there are none, which it refuses."""
    return tuple(rle.encode(np.asfortranarray(masks.permute(1, 2, 0).to(torch.uint8).numpy()))) if len(masks) else ()


def _records(detections: Mapping[int, Detections], truth: Truth, iou_type: str) -> list[dict[str, Any]]:
    """Detections as pycocotools wants them; areas of masks for "segm", else of boxes."""
    ids = list(truth.categories)
    records: list[dict[str, Any]] = []
    for image_id, item in detections.items():
        check_detections(item, image_id, len(ids))
        boxes = item.boxes.double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)  # x, y, width, height
        rows = zip(boxes.tolist(), item.scores.tolist(), item.labels.tolist(), strict=True)
        masks = _encoded(item, image_id, truth) if iou_type == "segm" else None
        for row, (box, score, label) in enumerate(rows):
            record = {
                "id": len(records) + 1,
                "image_id": image_id,
                "category_id": ids[label],
                "bbox": box,
                "score": score,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            if masks is not None:
                record |= {"segmentation": masks[row], "area": float(rle.area(masks[row]))}
            records.append(record)
    return records


def _encoded(item: Detections, image_id: int, truth: Truth) -> tuple[dict[str, Any], ...]:
    if len(item) == 0:
        return ()
    encoded = item.encoded
    if encoded is None:
        if item.masks is None:
            raise ValueError(f"detections of image {image_id}: iou_type segm wants masks, got boxes only")
        encoded = _run_lengths(item.masks)
    known = truth.sizes[image_id]
    other = [list(mask["size"]) for mask in encoded if tuple(mask["size"]) != known]
    if other and min(known) > 0:
        got = f"{other[0]}, in the file {list(known)}"
        raise ValueError(
            f"detections of image {image_id}: want masks of the size (height, width) px of the image, got {got}"
        )
    return encoded


def _of_class(precision: np.ndarray) -> dict[str, float]:
    """AP and AP50 of one class; ``precision`` [T, R] at each IoU threshold and recall."""
    return {"AP": _known(precision.mean()), "AP50": _known(precision[0].mean())}


def _known(value: float) -> float:
    return math.nan if value < 0 else float(value)
