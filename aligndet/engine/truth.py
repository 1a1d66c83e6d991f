"""What is to be found: the objects that detections are measured against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligndet.data.annotations import Annotations
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
    """

    path: Path
    sizes: dict[int, tuple[int, int]]
    categories: dict[int, str]
    all_categories: frozenset[int]
    annotations: list[dict[str, Any]]

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
        ValueError: it is no COCO file or lacks a class.
    """
    if isinstance(source, Annotations):
        path, content = Path(source.path), source.to_coco()
    else:
        path, content = Path(source), read_json(source, "annotations")
    try:
        sizes = {image["id"]: (image.get("height", 0), image.get("width", 0)) for image in content["images"]}
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        annotations = content["annotations"]
        categories = {category_id: names[category_id] for category_id in sorted(names)}
    except (KeyError, TypeError, AttributeError) as error:
        want = "images, annotations and categories with their ids, as in COCO"
        raise ValueError(f"annotations {path}: want {want}; problem: {type(error).__name__} {error}") from None
    if classes:
        by_name = {name: category_id for category_id, name in categories.items()}
        twice = [name for name in classes if list(classes).count(name) + list(names.values()).count(name) > 2]
        if twice:
            raise ValueError(
                f"annotations {path}: want each class once in classes and in the file, got {twice[0]!r} twice"
            )
        missing = [name for name in classes if name not in by_name]
        if missing:
            raise ValueError(f"annotations {path}: no category {missing[0]!r}; it has {', '.join(by_name)}")
        categories = {by_name[name]: name for name in classes}
    return Truth(path, sizes, categories, frozenset(names), annotations)


def by_image(detections: Mapping[int, Detections] | Sequence[Detections], truth: Truth) -> dict[int, Detections]:
    """Detections by image id, of a sequence in the order of the file; ValueError for an image that it does not have."""
    if not isinstance(detections, Mapping):
        if len(detections) != len(truth.sizes):
            counts = f"{len(truth.sizes)} images, got detections of {len(detections)}"
            raise ValueError(f"annotations {truth.path}: want one Detections for each of its {counts}")
        return dict(zip(truth.sizes, detections, strict=True))
    unknown = [image_id for image_id in detections if image_id not in truth.sizes]
    if unknown:
        raise ValueError(f"annotations {truth.path}: no image with id {unknown[0]!r}, but there are detections of it")
    return dict(detections)


def check_detections(item: Detections, image_id: int, classes: int) -> None:
    """Raises ValueError for what is no Detections, numbers that are not finite, and labels beyond the classes."""
    where = f"detections of image {image_id}"
    if not isinstance(item, Detections):
        raise ValueError(f"{where}: want Detections, got {type(item).__name__}")
    shapes = [list(part.shape) for part in (item.boxes, item.scores, item.labels)]
    number = len(item.scores) if item.scores.ndim else 0
    if shapes != [[number, 4], [number], [number]]:
        raise ValueError(f"{where}: want boxes [n, 4], scores [n] and labels [n], got {', '.join(map(str, shapes))}")
    if item.labels.is_floating_point():
        raise ValueError(f"{where}: want whole numbers as labels, got {item.labels.dtype}")
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
    except ValueError as error:
        raise ValueError(f"{kind} {path}: not readable as JSON: {error}") from None
