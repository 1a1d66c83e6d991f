"""What is to be found: the objects that detections are measured against."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pycocotools import mask as rle

from aligndet.data.annotations import Annotations, LabelledObject, check_once, describe, report_lines, unfit
from aligndet.data.coco import image_numbers, plain_id, read_objects
from aligndet.data.segmentation import run_lengths
from aligndet.structures import Detections


@dataclass(frozen=True)
class Truth:
    """An annotation file, of which only some categories may be asked for.

    Attributes:
        path: the file.
        sizes: (height, width) px by image id, in the order of the file; zeros where the file has none.
        categories: names by category id, in the order of labels.
        all_categories: the ids of every category of the file.
        annotations: as in a COCO file.
        own_ids: what the file has for image ids and for ids of categories, by those here: texts may stand there.
        texts: whether its image ids are texts, not all of them of whole numbers; those here are places then.
        report: what was left out of annotations that were read before, reason -> lines; None: a file as it stands.
    """

    path: Path
    sizes: dict[int, tuple[int, int]]
    categories: dict[int, str]
    all_categories: frozenset[int]
    annotations: list[Any]
    own_ids: tuple[dict[int, Any], dict[int, Any]]
    texts: bool = False
    report: dict[str, list[str]] | None = None

    @property
    def names(self) -> dict[int, str]:
        """Names by category id in the order of labels; those that occur twice with their id."""
        every = list(self.categories.values())
        return {key: name if every.count(name) == 1 else f"{name} ({key})" for key, name in self.categories.items()}


def read_truth(source: str | Path | Annotations, classes: Sequence[str]) -> Truth:
    """The truth of a COCO file as it stands there, or of annotations of any format.

    Args:
        classes: only these, in this order; empty: all, by ascending id.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no COCO file, an id occurs twice, or it lacks a class.
    """
    if isinstance(source, Annotations):
        path, content = Path(source.path), source.to_coco()
    else:
        path, content = Path(source), read_json(source, "annotations")
    try:
        images = [(image["id"], _size(image)) for image in content["images"]]
        check_once([plain_id(category["id"]) for category in content["categories"]], "category id", path)
        names = {plain_id(category["id"]): str(category["name"]) for category in content["categories"]}
        own_categories = {plain_id(category["id"]): category["id"] for category in content["categories"]}
        annotations = list(content["annotations"])
        categories = {category_id: names[category_id] for category_id in sorted(names)}
    except (KeyError, TypeError, AttributeError) as error:
        want = "images, annotations and categories with their ids, as in COCO"
        raise ValueError(f"annotations {path}: want {want}; problem: {type(error).__name__} {error}") from None
    numbers, texts = image_numbers([image_id for image_id, _ in images], path)
    check_once(texts or numbers, "image id", path)
    sizes = {number: size for number, (_, size) in zip(numbers, images, strict=True)}
    own_images = {number: image_id for number, (image_id, _) in zip(numbers, images, strict=True)}
    if classes:
        by_name = {name: category_id for category_id, name in categories.items()}
        twice = [name for name in classes if list(classes).count(name) + list(names.values()).count(name) > 2]
        if twice:
            raise ValueError(
                f"annotations {path}: want each class once in classes and in the file, got {twice[0]!r} twice"
            )
        missing = [name for name in classes if name not in by_name]
        if missing:
            raise ValueError(f"annotations {path}: no category {missing[0]!r}; it has {', '.join(by_name) or 'none'}")
        categories = {by_name[name]: name for name in classes}
    report = source.report if isinstance(source, Annotations) else None
    every = frozenset(names)
    return Truth(path, sizes, categories, every, annotations, (own_images, own_categories), bool(texts), report)


def true_records(truth: Truth, iou_type: str) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """The objects to find as pycocotools needs them, and what the rules of labels leave out: reason -> lines.

    Boxes are those of the file, not clipped. Records are numbered anew: pycocotools takes a match with annotation id 0
    for none, and mixes up equal ids.

    Args:
        iou_type: "bbox"; or "segm", where crowds need a mask too.

    Raises:
        ValueError: an annotation lacks a key; annotations that were read without masks, for "segm".
    """
    records: list[dict[str, Any]] = []
    if truth.report is not None:
        return _of_annotations(truth, iou_type)
    report: dict[str, list[str]] = {}
    numbers, own_images = list(truth.sizes), truth.own_ids[0]
    known = [own_images[number] for number in numbers] if truth.texts else numbers
    for item in read_objects(truth.annotations, known, truth.path):
        image_id = numbers[item.image] if item.image >= 0 else None
        record, reason = _record(item, image_id, truth, iou_type)
        if reason:
            where = f" of image {own_images[image_id]}" if image_id is not None else ""
            report.setdefault(reason, []).append(describe(item, where, truth.all_categories))
        elif item.category in truth.categories:
            records.append(record | {"id": len(records) + 1})
    return records, report


def _of_annotations(truth: Truth, iou_type: str) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    records: list[dict[str, Any]] = []
    report = dict(truth.report or {})
    for record in truth.annotations:
        if iou_type == "bbox" or "segmentation" in record:
            records.append(record | {"id": len(records) + 1})
        elif record["iscrowd"]:
            report.setdefault("without a segmentation", []).append(f"a crowd of image {record['image_id']}")
        else:
            raise ValueError(f"annotations {truth.path}: read without masks, which segm needs")
    return records, report


def tell(truth: Truth, report: Mapping[str, list[str]], what: str) -> None:
    """One line on stderr for each reason for which objects are not in an evaluation; of several ranks the first."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
        for line in report_lines(truth.path, report):
            print(f"warning: evaluation of {what}: {line}", file=sys.stderr, flush=True)


def _record(item: LabelledObject, image_id: int | None, truth: Truth, iou_type: str) -> tuple[dict[str, Any], str]:
    if image_id is None:
        return {}, "image unknown"
    if item.category not in truth.categories:
        return {}, "" if item.category in truth.all_categories else "category unknown"
    size = truth.sizes[image_id]
    _, reason = unfit(item, size)
    if reason:
        return {}, reason
    x, y, width, height = map(float, item.box)
    record = {"image_id": image_id, "category_id": item.category, "bbox": [x, y, width, height]}
    area: float = width * height
    if iou_type == "segm":
        counts, reason = run_lengths(item.segmentation, size)
        if reason:
            return {}, reason
        record["segmentation"] = {"size": list(size), "counts": counts}
        area = float(rle.area(record["segmentation"]))
    said = isinstance(item.area, int | float) and not isinstance(item.area, bool)
    return record | {"area": item.area if said else area, "iscrowd": int(bool(item.crowd))}, ""


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) px of an image record; zeros where they are not whole numbers."""
    height, width = image.get("height"), image.get("width")
    if any(isinstance(side, bool) or not isinstance(side, int | float | str) for side in (height, width)):
        return 0, 0
    try:
        return int(plain_id(height)), int(plain_id(width))
    except (ValueError, OverflowError):
        return 0, 0


def by_image(detections: Mapping[int, Detections] | Sequence[Detections], truth: Truth) -> dict[int, Detections]:
    """Detections by image id, of a sequence in the order of the file; ValueError for an image that it does not have.

    A mapping may have the file's own ids, where those are texts.
    """
    if not isinstance(detections, Mapping):
        strange = [item for item in detections if not isinstance(item, Detections)] if _is_list(detections) else []
        if strange or not _is_list(detections):
            got = f"a list of {type(strange[0]).__name__}" if strange else type(detections).__name__
            raise ValueError(
                f"detections: want Detections, by image id or in the order of {truth.path}, got {got}; "
                "load_predictions reads files of results"
            )
        if len(detections) != len(truth.sizes):
            counts = f"{len(truth.sizes)} images, got detections of {len(detections)}"
            raise ValueError(f"annotations {truth.path}: want one Detections for each of its {counts}")
        return dict(zip(truth.sizes, detections, strict=True))
    number_of = image_ids(truth)
    unknown = [image_id for image_id in detections if image_id not in number_of]
    if unknown:
        raise ValueError(f"annotations {truth.path}: no image with id {unknown[0]!r}, but there are detections of it")
    return {number_of[image_id]: item for image_id, item in detections.items()}


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def image_ids(truth: Truth) -> dict[Any, int]:
    """Image ids by themselves and by what the file has for them."""
    return {number: number for number in truth.sizes} | {own: number for number, own in truth.own_ids[0].items()}


def check_detections(item: Detections, image_id: int, classes: int) -> None:
    """Raises ValueError for what is no Detections: other shapes or kinds of numbers, and labels beyond the classes."""
    where = f"detections of image {image_id}"
    if not isinstance(item, Detections):
        raise ValueError(f"{where}: want Detections, got {type(item).__name__}")
    shapes = [list(part.shape) for part in (item.boxes, item.scores, item.labels)]
    number = len(item.scores) if item.scores.ndim else 0
    if shapes != [[number, 4], [number], [number]]:
        raise ValueError(f"{where}: want boxes [n, 4], scores [n] and labels [n], got {', '.join(map(str, shapes))}")
    if item.labels.is_floating_point():
        raise ValueError(f"{where}: want whole numbers as labels, got {item.labels.dtype}")
    if item.masks is not None and (item.masks.ndim != 3 or len(item.masks) != number or item.masks.dtype != torch.bool):
        got = f"{str(item.masks.dtype).removeprefix('torch.')} {list(item.masks.shape)}"
        raise ValueError(f"{where}: want masks as bool [{number}, height, width], got {got}")
    if item.encoded is not None and len(item.encoded) != number:
        raise ValueError(f"{where}: want run lengths of {number} masks, got {len(item.encoded)}")
    if len(item) == 0:
        return
    if not bool(item.boxes.isfinite().all() and item.scores.isfinite().all()):
        raise ValueError(f"detections of image {image_id}: want finite boxes and scores")
    low, high = int(item.labels.min()), int(item.labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"detections of image {image_id}: want labels in 0 .. {classes - 1}, got {low} .. {high}")


def read_json(path: str | Path, kind: str) -> Any:
    """The content of a JSON file; ``kind`` is what error messages call it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {path}: no such file")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind} {path}: not readable as JSON: {error}") from None
