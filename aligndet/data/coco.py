"""COCO json into flat arrays; what does not serve is counted and reported, never silently shifted."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle

from aligndet.data.segmentation import run_lengths


@dataclass(frozen=True)
class CocoAnnotations:
    """The boxes of a COCO file; those of image i are rows offsets[i] .. offsets[i + 1].

    Attributes:
        path: of the file.
        image_ids: int64 [n].
        file_names: n, relative to the image folder.
        sizes: int64 [n, 2], (height, width) px; 0 where the file does not say.
        offsets: int64 [n + 1].
        boxes: float32 [M, 4] xyxy px, clipped to the image.
        labels: int64 [M], 0 .. K-1.
        crowd: bool [M]; regions of many objects, no targets.
        category_ids: int64 [K], the file's ids of the labels.
        class_names: K names of the labels.
        masks: uint8 [...], the compressed run lengths of all boxes one after another; None where not asked for.
        mask_offsets: int64 [M + 1], where those of each box start; a crowd has none.
        report: reason -> lines that name the annotations left out.
    """

    path: str
    image_ids: np.ndarray
    file_names: tuple[str, ...]
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    category_ids: np.ndarray
    class_names: tuple[str, ...]
    masks: np.ndarray | None = None
    mask_offsets: np.ndarray | None = None
    report: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.file_names)

    def rows_of(self, image: int) -> np.ndarray:
        """The rows of the boxes of image ``image`` that are targets: int64 [m]."""
        rows = np.arange(self.offsets[image], self.offsets[image + 1])
        return rows[~self.crowd[rows]]

    def crowds_of(self, image: int) -> np.ndarray:
        """The boxes of the crowd regions of image ``image``: float32 [r, 4] xyxy px."""
        rows = np.arange(self.offsets[image], self.offsets[image + 1])
        return self.boxes[rows[self.crowd[rows]]]

    def masks_of(self, rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The masks of boxes of one image of ``size`` (height, width) px: bool [m, H, W].

        Raises:
            ValueError: the file was read without masks.
        """
        if self.masks is None or self.mask_offsets is None:
            raise ValueError(f"annotations {self.path}: read without masks")
        decoded = np.zeros((len(rows), *size), dtype=bool)
        for place, row in zip(decoded, rows.tolist(), strict=True):
            counts = self.masks[self.mask_offsets[row] : self.mask_offsets[row + 1]].tobytes()
            place[:] = rle.decode({"size": list(size), "counts": counts})
        return decoded

    def report_lines(self) -> list[str]:
        """One line for each reason for which annotations were left out."""
        return [
            f"{self.path}: {len(lines)} annotations left out, {reason}; the first: {lines[0]}"
            for reason, lines in self.report.items()
        ]


def load_coco(path: str | Path, *, classes: Sequence[str] = (), masks: bool = False) -> CocoAnnotations:
    """Read a COCO file.

    Left out and reported: boxes with a side below 1 px, with an area that is not positive or without a number, boxes
    outside their image, annotations of unknown images or categories. Boxes that reach over the border are clipped where
    the file says how large the image is. (method section 1.0)

    Args:
        masks: keep the masks of objects too (polygons and both forms of run lengths); those without one are left out
            and reported, and the file has to say how large its images are. Crowd regions count by their boxes.
        classes: keep only these categories, as labels 0 .. K-1 in this order; empty: all, by ascending id.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not COCO json; a missing or malformed key; an id or file name that occurs twice; a file name that
            leaves the folder; an unknown class name.
    """
    tree = _read(Path(path))
    categories = _categories(tree["categories"], path)
    wanted = _wanted(categories, classes, path)
    image_ids, names, sizes = _images(tree["images"], path)
    row_of = {image: row for row, image in enumerate(image_ids)}
    label_of = {category: label for label, category in enumerate(wanted)}
    report: dict[str, list[str]] = {}
    kept = []
    for index, annotation in enumerate(tree["annotations"]):
        image = _whole(annotation, "image_id", path, "annotations", index)
        category = _whole(annotation, "category_id", path, "annotations", index)
        box = _key(annotation, "bbox", path, "annotations", index)
        name = f"annotation {annotation.get('id', f'number {index}')}"
        if image not in row_of:
            report.setdefault("image unknown", []).append(f"{name}, image_id {image}")
        elif category not in categories:
            report.setdefault("category unknown", []).append(f"{name}, category_id {category}")
        elif category in label_of:
            corners, reason = _corners(box, annotation.get("area"), sizes[row_of[image]])
            mask, crowd = b"", bool(annotation.get("iscrowd", 0))
            if masks and not reason and not crowd:
                mask, reason = run_lengths(annotation.get("segmentation"), sizes[row_of[image]])
            if reason:
                report.setdefault(reason, []).append(f"{name} of {names[row_of[image]]}, bbox {box}")
            else:
                kept.append((row_of[image], label_of[category], crowd, corners, mask))
    kept.sort(key=lambda item: item[0])
    counts = np.bincount([row for row, *_ in kept], minlength=len(names)) if kept else np.zeros(len(names), np.int64)
    return CocoAnnotations(
        path=str(path),
        image_ids=np.array(image_ids, dtype=np.int64),
        file_names=tuple(names),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([corners for *_, corners, _ in kept], dtype=np.float32).reshape(-1, 4),
        labels=np.array([label for _, label, *_ in kept], dtype=np.int64),
        crowd=np.array([crowd for _, _, crowd, *_ in kept], dtype=bool),
        category_ids=np.array(wanted, dtype=np.int64),
        class_names=tuple(categories[category] for category in wanted),
        masks=np.frombuffer(b"".join(mask for *_, mask in kept), dtype=np.uint8) if masks else None,
        mask_offsets=np.cumsum([0] + [len(mask) for *_, mask in kept]) if masks else None,
        report=report,
    )


def find_images(annotation_path: str | Path, folder: str | Path | None, file_names: Sequence[str]) -> Path:
    """The folder that the file names of an annotation file are relative to.

    Args:
        folder: where they are; None looks beside the annotation file for the first folder that has the first names.

    Raises:
        FileNotFoundError: no folder tried has them; the message lists the folders.
    """
    first = list(file_names[:3])
    tried = [Path(folder)] if folder is not None else list(_likely_folders(Path(annotation_path)))
    for candidate in tried:
        if all((candidate / name).is_file() for name in first):
            return candidate
    if folder is not None and tried[0].is_dir() and any((tried[0] / name).is_file() for name in file_names):
        return tried[0]  # single missing files are the data set's affair
    where = ", ".join(str(path) for path in tried)
    raise FileNotFoundError(f"images of {annotation_path}: {first[0] if first else 'nothing'} is not in {where}")


def _read(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path}: no such file")
    try:
        tree = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"annotations {path}: not JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            raise ValueError(
                f"annotations {path}: want COCO json with lists images, annotations, categories; {key} is not there"
            )
    return tree


def _key(record: Any, key: str, path: str | Path, kind: str, index: int) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"annotations {path}: {kind}[{index}] has no {key!r}")
    return record[key]


def _whole(record: Any, key: str, path: str | Path, kind: str, index: int, *, least: int | None = None) -> int:
    value = _key(record, key, path, kind, index)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or abs(value) >= 2**63:
        raise ValueError(f"annotations {path}: {kind}[{index}].{key}: want a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"annotations {path}: {kind}[{index}].{key}: want at least {least}, got {value!r}")
    return int(value)


def _categories(records: list[Any], path: str | Path) -> dict[int, str]:
    ids = [_whole(record, "id", path, "categories", index) for index, record in enumerate(records)]
    names = [str(_key(record, "name", path, "categories", index)) for index, record in enumerate(records)]
    if not ids:
        raise ValueError(f"annotations {path}: no categories")
    _once(ids, "category id", path)
    _once(names, "category name", path)
    return dict(zip(ids, names, strict=True))


def _wanted(categories: dict[int, str], classes: Sequence[str], path: str | Path) -> list[int]:
    if not classes:
        return sorted(categories)
    ids = {name: category for category, name in categories.items()}
    for name in classes:
        if name not in ids:
            near = difflib.get_close_matches(name, list(ids), n=1, cutoff=0.0)[0]
            raise ValueError(f"annotations {path}: no class {name!r}; the nearest is {near!r}")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes: one occurs twice in {list(classes)}")
    return [ids[name] for name in classes]


def _images(records: list[Any], path: str | Path) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    ids, names, sizes = [], [], []
    for index, record in enumerate(records):
        name = _key(record, "file_name", path, "images", index)
        if not isinstance(name, str) or not name:
            raise ValueError(f"annotations {path}: images[{index}].file_name: want a file name, got {name!r}")
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError(f"annotations {path}: images[{index}].file_name {name!r} leaves the image folder")
        ids.append(_whole(record, "id", path, "images", index))
        names.append(name)
        known = record.get("height") is not None and record.get("width") is not None
        height, width = (
            (_whole(record, side, path, "images", index, least=0) if known else 0) for side in ("height", "width")
        )
        sizes.append((height, width))
    _once(ids, "image id", path)
    _once(names, "file name", path)
    return ids, names, sizes


def _once(values: Sequence[int | str], what: str, path: str | Path) -> None:
    seen: set[int | str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"annotations {path}: {what} {value} occurs twice")
        seen.add(value)


def _corners(box: Any, area: Any, size: tuple[int, int]) -> tuple[tuple[float, ...], str]:
    """Clipped corners of an x, y, width, height box, or the reason for which it does not serve."""
    try:
        x, y, width, height = (float(value) for value in box)
    except (TypeError, ValueError):
        return (), "bbox is not four numbers"
    if not np.isfinite([x, y, width, height]).all():
        return (), "bbox is not finite"
    if width < 1 or height < 1:
        return (), "a side is below 1 px"
    if isinstance(area, int | float) and area <= 0:
        return (), "its area is not positive"
    limit_y, limit_x = size if min(size) > 0 else (np.inf, np.inf)
    # In float32, in which they are kept: a sliver at the border must not round to nothing.
    corners = np.array([max(x, 0), max(y, 0), min(x + width, limit_x), min(y + height, limit_y)], dtype=np.float32)
    if not (np.isfinite(corners).all() and corners[2] > corners[0] and corners[3] > corners[1]):
        return (), "box outside the image"
    return tuple(corners.tolist()), ""


def _likely_folders(annotations: Path) -> Iterator[Path]:
    here, above = annotations.parent, annotations.parent.parent
    split = annotations.stem.rpartition("_")[2]
    for base in (here, above):
        yield from (base, base / split, base / "images", base / "images" / split, base / "JPEGImages")
