"""The labels of a data set in flat arrays, whatever its format; what does not serve is counted, never shifted."""

from __future__ import annotations

import difflib
import math
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from pycocotools import mask as rle

from aligndet.data.segmentation import run_lengths
from aligndet.typed import shown

LEAST_INSIDE = 0.01  # px of a side inside the image; less is an error of rounding and vanishes when images are resized


class Names(Sequence[str]):
    """Texts in one array of bytes, so that loader workers share them: reading a list of str would copy its pages."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.offsets = np.cumsum([0] + [len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        index = range(len(self))[row]
        return self.text[self.offsets[index] : self.offsets[index + 1]].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Annotations:
    """The boxes of a data set; those of image i are rows offsets[i] .. offsets[i + 1].

    Attributes:
        path: of the file or folder that they were read from.
        image_ids: int64 [n], of the file; where the format has none, 1 .. n.
        file_names: n, relative to the image folder.
        sizes: int64 [n, 2], (height, width) px; 0 where it is not known.
        offsets: int64 [n + 1].
        boxes: float32 [M, 4] xyxy px, clipped to the image.
        labels: int64 [M], 0 .. K-1.
        crowd: bool [M]; no targets: regions of many objects (COCO), objects marked difficult (VOC).
        category_ids: int64 [K], the ids of the labels.
        class_names: K names of the labels.
        masks: uint8 [...], the compressed run lengths of all boxes one after another; None where not asked for.
        mask_offsets: int64 [M + 1], where those of each box start; a crowd has none.
        report: reason -> lines that name what was left out.
        root: the image folder; None where the format does not say, ``find_images`` looks for it then.
    """

    path: str
    image_ids: np.ndarray
    file_names: Sequence[str]
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
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.file_names)

    def rows_of(self, image: int) -> np.ndarray:
        """The rows of the boxes of image ``image`` that are targets: int64 [m]."""
        rows = np.arange(self.offsets[image], self.offsets[image + 1])
        return rows[~self.crowd[rows]]

    def crowds_of(self, image: int) -> np.ndarray:
        """The boxes of image ``image`` that are no targets but no background either: float32 [r, 4] xyxy px."""
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
        """One line for each reason for which something was left out."""
        return report_lines(self.path, self.report)

    def to_coco(self, images: Iterable[int] | None = None) -> dict[str, Any]:
        """The data set as COCO json: x, y, width, height px; ids of images and categories as here.

        Masks, where there are any, as compressed run lengths.

        Args:
            images: rows of the images to write; None: all.
        """
        records: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in range(len(self)) if images is None else images:
            height, width = self.sizes[image].tolist()
            known = {"height": height, "width": width} if height and width else {}
            records.append({"id": int(self.image_ids[image]), "file_name": self.file_names[image]} | known)
            rows = range(self.offsets[image], self.offsets[image + 1])
            annotations += [self._coco_record(row, records[-1]["id"], [height, width]) for row in rows]
        ids = zip(self.category_ids.tolist(), self.class_names, strict=True)
        categories = [{"id": category, "name": name} for category, name in ids]
        return {"images": records, "annotations": annotations, "categories": categories}

    def _coco_record(self, row: int, image_id: int, size: list[int]) -> dict[str, Any]:
        x0, y0, x1, y1 = self.boxes[row].tolist()
        record = {
            "id": row + 1,
            "image_id": image_id,
            "category_id": int(self.category_ids[self.labels[row]]),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": int(self.crowd[row]),
        }
        if self.masks is not None and self.mask_offsets is not None and not self.crowd[row]:
            counts = self.masks[self.mask_offsets[row] : self.mask_offsets[row + 1]].tobytes()
            mask = {"size": size, "counts": counts.decode("ascii")}
            record |= {"segmentation": mask, "area": float(rle.area(mask))}
        return record


def report_lines(path: str | Path, report: Mapping[str, list[str]]) -> list[str]:
    """One line for each reason for which something was left out."""
    return [
        f"{path}: {len(lines)} annotations left out, {reason}; the first: {lines[0]}"
        for reason, lines in report.items()
    ]


class LabelledObject(NamedTuple):
    """An object as its file states it, before any rule."""

    name: str  # what messages call it
    image: int  # row of its image; -1: of none that the data set has
    category: int  # id
    box: Any  # x, y, width, height px
    crowd: bool | None = False  # None: the file says something that is neither yes nor no
    area: Any = None  # px^2, where the file says
    segmentation: Any = None  # COCO's


@dataclass(frozen=True)
class Listing:
    """The images and categories of a data set; ``report`` tells of files left out. See ``Annotations``."""

    path: str
    image_ids: Sequence[int]
    file_names: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    categories: dict[int, str]
    report: dict[str, list[str]] = field(default_factory=dict)
    root: Path | None = None
    texts: Sequence[str] = ()  # the ids that the file has for its images, where they are texts that are no numbers


@dataclass
class _Kept:
    rows: array[int] = field(default_factory=lambda: array("q"))
    labels: array[int] = field(default_factory=lambda: array("q"))
    crowd: bytearray = field(default_factory=bytearray)
    corners: array[float] = field(default_factory=lambda: array("f"))
    masks: list[bytes] = field(default_factory=list)


def assemble(
    listing: Listing,
    objects: Iterable[LabelledObject],
    *,
    classes: Sequence[str] = (),
    masks: bool = False,
    on_error: str = "skip",
) -> Annotations:
    """Objects into flat arrays; the rules are those of ``load_annotations``, the same for all formats.

    Raises:
        ValueError: a class that the data set does not have; with ``on_error`` "fail" the first thing
            that does not serve.
    """
    wanted = _wanted(listing, classes)
    label_of = {category: label for label, category in enumerate(wanted)}
    report = {reason: list(lines) for reason, lines in listing.report.items()}
    kept = _Kept()
    for item in objects:
        reason = _add(kept, item, listing, label_of, masks)
        if reason:
            where = f" of {listing.file_names[item.image]}" if item.image >= 0 else ""
            report.setdefault(reason, []).append(describe(item, where, listing.categories))
        if report and on_error == "fail":
            break
    if report and on_error == "fail":
        reason, lines = next(iter(report.items()))
        raise ValueError(f"annotations {listing.path}: {lines[0]}: {reason}")
    return _flat(listing, kept, wanted, masks, report)


def check_once(values: Sequence[int | str], what: str, path: str | Path) -> None:
    """Raises ValueError where one of the values occurs twice."""
    seen: set[int | str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"annotations {path}: {what} {value} occurs twice")
        seen.add(value)


def unfit(item: LabelledObject, size: tuple[int, int]) -> tuple[tuple[float, ...], str]:
    """The rules for one object of an image of ``size`` (height, width) px, zeros where it is not known.

    Returns:
        Its corners clipped to the image, xyxy px, and ""; or () and the reason for which it does not serve.
    """
    if item.crowd is None:
        return (), "iscrowd is neither 0 nor 1"
    return _corners(item.box, item.area, size)


def _add(kept: _Kept, item: LabelledObject, listing: Listing, label_of: dict[int, int], masks: bool) -> str:
    """Keep an object, if it is of a wanted class; or the reason why it does not serve."""
    if item.image < 0:
        return "image unknown"
    label = label_of.get(item.category)
    if label is None:
        return "" if item.category in listing.categories else "category unknown"
    corners, reason = unfit(item, listing.sizes[item.image])
    mask = b""
    if masks and not reason and not item.crowd:
        mask, reason = run_lengths(item.segmentation, listing.sizes[item.image])
    if not reason:
        kept.rows.append(item.image)
        kept.labels.append(label)
        kept.crowd.append(bool(item.crowd))
        kept.corners.extend(corners)
        kept.masks.append(mask)
    return reason


def describe(item: LabelledObject, where: str, categories: Collection[int]) -> str:
    """An object as reports name it; ``where`` follows its name."""
    unknown = "" if item.category in categories else f", category {item.category}"
    return f"{item.name}{where}{unknown}, box {item.box if isinstance(item.box, str) else shown(item.box)}"


def _flat(
    listing: Listing, kept: _Kept, wanted: Sequence[int], masks: bool, report: dict[str, list[str]]
) -> Annotations:
    rows = np.array(kept.rows, dtype=np.int64)
    order = np.argsort(rows, kind="stable")
    ordered = [kept.masks[row] for row in order.tolist()] if masks else []
    counts = np.bincount(rows, minlength=len(listing.file_names)) if len(rows) else np.zeros(len(listing.file_names))
    return Annotations(
        path=listing.path,
        image_ids=np.array(listing.image_ids, dtype=np.int64),
        file_names=Names(listing.file_names),
        sizes=np.array(listing.sizes, dtype=np.int64).reshape(-1, 2),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array(kept.corners, dtype=np.float32).reshape(-1, 4)[order],
        labels=np.array(kept.labels, dtype=np.int64)[order],
        crowd=np.frombuffer(bytes(kept.crowd), dtype=bool)[order],
        category_ids=np.array(wanted, dtype=np.int64),
        class_names=tuple(listing.categories[category] for category in wanted),
        masks=np.frombuffer(b"".join(ordered), dtype=np.uint8) if masks else None,
        mask_offsets=np.cumsum([0] + [len(mask) for mask in ordered]) if masks else None,
        report=report,
        root=listing.root,
    )


def _wanted(listing: Listing, classes: Sequence[str]) -> list[int]:
    if not classes:
        return sorted(listing.categories)
    ids = {name: category for category, name in listing.categories.items()}
    for name in classes:
        if name not in ids:
            near = difflib.get_close_matches(name, list(ids), n=1, cutoff=0.0)
            rest = f"the nearest is {near[0]!r}" if near else "it has no classes"
            raise ValueError(f"annotations {listing.path}: no class {name!r}; {rest}")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes: one occurs twice in {list(classes)}")
    return [ids[name] for name in classes]


def _corners(box: Any, area: Any, size: tuple[int, int]) -> tuple[tuple[float, ...], str]:
    """Clipped corners of an x, y, width, height box, or the reason for which it does not serve."""
    try:
        if not isinstance(box, (list, tuple)):
            return (), "bbox is not four numbers"
        x, y, width, height = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError):
        return (), "bbox is not four numbers"
    if not all(map(math.isfinite, (x, y, width, height))):
        return (), "bbox is not finite"
    if width < 1 or height < 1:
        return (), "a side is below 1 px"
    if isinstance(area, int | float) and area <= 0:
        return (), "its area is not positive"
    limit_y, limit_x = size if min(size) > 0 else (math.inf, math.inf)
    # In float32, in which they are kept: a sliver at the border must not round to nothing.
    corners = array("f", (max(x, 0), max(y, 0), min(x + width, limit_x), min(y + height, limit_y)))
    inside = corners[2] - corners[0] >= LEAST_INSIDE and corners[3] - corners[1] >= LEAST_INSIDE
    if not (all(map(math.isfinite, corners)) and inside):
        return (), "box outside the image"
    return tuple(corners), ""
