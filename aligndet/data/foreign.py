"""Boxes that other programs found, as proposals: the same rules for all, those of labels."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from aligndet.data.annotations import Annotations, LabelledObject, Listing, assemble, check_once
from aligndet.data.coco import plain_id, read_coco
from aligndet.data.folder import list_images, place_of, slashed
from aligndet.data.headers import image_size
from aligndet.data.proposals import open_proposals
from aligndet.data.selective_search import largest_first

FORMATS = ("npz", "reference", "coco", "soco", "results")
NAME = "selective_search"  # the only category of the reference's files, which looks it up by name
CLUSTER = re.compile(r"cluster_([1-9]\d*)")  # its categories of pseudo-classes: cluster_1 .. cluster_K
UNKNOWN = (0, 0)  # px, the size of an image whose file does not say


@dataclass(frozen=True)
class Foreign:
    """Proposals as they were read, before they are written.

    Attributes:
        found: the boxes, largest area first within an image, no crowds; its only class is ``NAME``, or its classes are
            cluster_1 .. cluster_K. ``found.report`` tells what was left out.
        clustered: whether the boxes have pseudo-classes.
        parameters: what is known of how they were made.
        failures: reason for each image that could not be searched; only from proposal files.
    """

    found: Annotations
    clustered: bool
    parameters: dict[str, Any]
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    """The images of a file and its boxes as they stand there."""

    listing: Listing
    objects: Iterator[LabelledObject]
    clusters: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def read_foreign(
    path: str | Path,
    format: str,
    *,
    images: str | Path | None = None,
    annotations: str | Path | None = None,
    min_score: float | None = None,
    limit: int | None = None,
) -> Foreign:
    """Read boxes of another program.

    Left out and reported as labels are (``load_annotations``): boxes with a side below 1 px, without four finite
    numbers or outside their image, and those of unknown images. Boxes that reach over the border are clipped. Crowd
    regions are left out. Image sizes are those of the file where it has them, else those of the image itself.

    Args:
        path: of the file.
        format: "npz": a proposal file of ours, or any npz with names [n], offsets [n + 1] and boxes [M, 4] xyxy px
            where image i has the rows offsets[i] .. offsets[i + 1], and perhaps sizes [n, 2] (height, width);
            "reference": COCO json whose only category is selective_search, or whose categories are the pseudo-classes
            cluster_1 .. cluster_K; "coco": COCO json of any categories, which do not matter; "soco": {basename: [[x,
            y, width, height], ...]}; "results": a list of {image_id, bbox, score}, as detectors write it for COCO.
        images: folder of the images; "soco" needs it, the others where they do not say how large an image is.
        annotations: COCO json that the image ids of "results" are from; only there, and needed there.
        min_score: only for "results": boxes with a lower score are left out; None keeps all.
        limit: only for "results": at most so many boxes of an image, best scores first, equal ones in the order of
            the file; None keeps all.

    Raises:
        FileNotFoundError: a file, folder or image is not there.
        ValueError: the file is not of this format, an image is not known or ambiguous, no box is left, or an argument
            does not belong to the format.
    """
    _check_arguments(format, images, annotations, min_score, limit)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"proposals {path}: no such file")
    if format == "npz":
        source = _read_npz(path)
    elif format in ("reference", "coco"):
        source = _read_coco(path, format)
    elif format == "soco":
        source = _read_soco(path, str(images))
    else:
        source = _read_results(path, str(annotations), min_score)
    listing = replace(source.listing, path=str(path), sizes=_complete_sizes(source.listing, images, path))
    classes = [f"cluster_{number + 1}" for number in range(source.clusters or 0)]
    found = _arranged(assemble(listing, source.objects, classes=classes), limit)
    if not len(found.boxes):
        why = "; ".join(found.report_lines()) or "it has none"
        raise ValueError(f"proposals {path}: no box is left of it: {why}")
    if not source.clusters:
        found = replace(found, labels=np.zeros_like(found.labels), class_names=(NAME,))
    found = replace(found, category_ids=np.arange(1, len(found.class_names) + 1))
    given = {"min_score": min_score, "limit": limit}
    parameters = {"mode": format, "source": path.name} | {
        key: value for key, value in given.items() if value is not None
    }
    return Foreign(found, bool(source.clusters), source.parameters or parameters, source.failures)


def _check_arguments(
    format: str, images: object, annotations: object, min_score: float | None, limit: int | None
) -> None:
    if format not in FORMATS:
        raise ValueError(f"format: want one of {', '.join(FORMATS)}, got {format!r}")
    if format == "results":
        if annotations is None:
            raise ValueError("results name images by id: --annotations has to name the COCO json that has the ids")
        if min_score is not None and not math.isfinite(min_score):
            raise ValueError(f"--min-score: want a finite number, got {min_score}")
        if limit is not None and limit < 1:
            raise ValueError(f"--limit: want at least 1, got {limit}")
        return
    for name, value in (("--annotations", annotations), ("--min-score", min_score), ("--limit", limit)):
        if value is not None:
            raise ValueError(f"{name} is for results of a detector; {format} has no use for it")
    if format == "soco" and images is None:
        raise ValueError("SoCo's json has neither folders nor sizes: --images has to name the image folder")


def _read_npz(path: Path) -> _Source:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"proposals {path}: not an npz file ({error})") from None
    if "meta.npy" in members:
        ours = open_proposals(path)
        listing = _listing(path, ours.names, ours.sizes, ours.clusters)
        objects = _rows(ours.offsets, ours.boxes, ours.labels)
        return _Source(listing, objects, ours.clusters, ours.parameters, ours.failures)
    names, offsets, boxes, sizes = _read_arrays(path)
    check_once(names.tolist(), "name", path)
    for name in map(PurePosixPath, names.tolist()):
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"proposals {path}: name {str(name)!r} leaves the image folder")
    return _Source(_listing(path, names.tolist(), sizes, None), _rows(offsets, boxes, None))


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """names, offsets, boxes and sizes of an npz that another program wrote."""
    wanted = {"names": "U", "offsets": "iu", "boxes": "fiu"}
    try:
        with np.load(path, allow_pickle=False) as file:
            absent = [name for name in wanted if name not in file.files]
            if absent:
                raise ValueError(f"want names, offsets and boxes, there is no {', '.join(absent)}")
            arrays = {name: file[name] for name in wanted}
            number = len(arrays["names"])
            sizes = file["sizes"] if "sizes" in file.files else np.zeros((number, 2), np.int64)
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"proposals {path}: {error}") from None
    names, offsets, boxes = arrays.values()
    for name, array, shape, kinds in (
        ("names", names, (number,), "U"),
        ("offsets", offsets, (number + 1,), "iu"),
        ("boxes", boxes, (boxes.size // 4, 4), "fiu"),
        ("sizes", sizes, (number, 2), "iu"),
    ):
        if array.shape != shape or array.dtype.kind not in kinds:
            raise ValueError(
                f"proposals {path}: {name}: want {list(shape)} of kind {kinds}, got {list(array.shape)} {array.dtype}"
            )
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != len(boxes) or (np.diff(offsets) < 0).any():
        raise ValueError(f"proposals {path}: offsets: want them ascending from 0 to {len(boxes)}")
    return names, offsets, boxes, sizes


def _read_coco(path: Path, format: str) -> _Source:
    listing, objects = read_coco(path)
    names = list(listing.categories.values())
    if format == "coco" or names == [NAME]:
        return _Source(listing, objects)
    numbers = sorted(int(match[1]) for match in map(CLUSTER.fullmatch, names) if match)
    if numbers != list(range(1, len(names) + 1)):
        raise ValueError(
            f"proposals {path}: want the category {NAME} alone, or cluster_1 .. cluster_K, got {', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}; labels are read with --from coco"
        )
    return _Source(listing, objects, len(names))


def _read_soco(path: Path, folder: str) -> _Source:
    tree = _read_json(path)
    if not isinstance(tree, dict) or not all(isinstance(rects, list) for rects in tree.values()):
        raise ValueError(f"proposals {path}: want SoCo's json, an object with a list of boxes for each file name")
    known = list_images(folder)
    by_basename: dict[str, list[str]] = {}
    for name in known:
        by_basename.setdefault(PurePosixPath(name).name, []).append(name)
    exact = set(known)
    names: list[str] = []
    for key in tree:
        plain = key if key in exact else slashed(key)
        candidates = [plain] if plain in exact else by_basename.get(plain, [])
        if len(candidates) != 1:
            which = f"could be {' or '.join(candidates[:2])}" if candidates else "is not there"
            raise ValueError(f"proposals {path}: image {key!r} {which} in {folder}")
        names += candidates
    check_once(names, "image", path)
    objects = (
        LabelledObject(f"box {number}", image, 1, rect)
        for image, rects in enumerate(tree.values())
        for number, rect in enumerate(rects)
    )
    return _Source(_listing(path, names, [UNKNOWN] * len(names), None), objects)


def _read_results(path: Path, annotations: str, min_score: float | None) -> _Source:
    tree = _read_json(path)
    if not isinstance(tree, list):
        raise ValueError(f"proposals {path}: want a list of results, got {type(tree).__name__}")
    scores = np.zeros(len(tree))
    for index, record in enumerate(tree):
        for key in ("image_id", "bbox", "score"):
            if not isinstance(record, dict) or key not in record:
                raise ValueError(f"proposals {path}: result {index} has no {key!r}")
        score = record["score"]
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < math.inf:
            raise ValueError(f"proposals {path}: result {index}: score: want a finite number, got {score!r}")
        scores[index] = min(max(score, -1e300), 1e300)  # a whole number may be too large for a float
    listing, _ = read_coco(annotations)
    row_of: dict[Any, int] = {image: row for row, image in enumerate(listing.texts or listing.image_ids)}
    order = np.argsort(-scores, kind="stable")
    if min_score is not None:
        order = order[scores[order] >= min_score]
    return _Source(replace(listing, categories={1: NAME}, texts=()), _results(tree, order, row_of))


def _results(tree: list[Any], order: np.ndarray, row_of: dict[Any, int]) -> Iterator[LabelledObject]:
    for index in order.tolist():
        image = tree[index]["image_id"]
        row = row_of.get(image, row_of.get(plain_id(image), -1)) if isinstance(image, int | float | str) else -1
        name = f"result {index}" if row >= 0 else f"result {index}, image {image!r}"
        yield LabelledObject(name, row, 1, tree[index]["bbox"])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # among them numbers of too many digits
        raise ValueError(f"proposals {path}: not JSON: {error}") from None


def _listing(path: Path, names: Sequence[str], sizes: Any, clusters: int | None) -> Listing:
    pairs = [(int(height), int(width)) for height, width in sizes]
    categories = {number + 1: f"cluster_{number + 1}" for number in range(clusters)} if clusters else {1: NAME}
    return Listing(str(path), range(1, len(names) + 1), names, pairs, categories)


def _rows(offsets: np.ndarray, boxes: np.ndarray, labels: np.ndarray | None) -> Iterator[LabelledObject]:
    for image, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for row, (x0, y0, x1, y1) in enumerate(np.asarray(boxes[start:end]).tolist(), start=start):
            category = 1 if labels is None else int(labels[row]) + 1
            yield LabelledObject(f"box {row}", image, category, [x0, y0, x1 - x0, y1 - y0])


def _complete_sizes(listing: Listing, folder: str | Path | None, path: Path) -> list[tuple[int, int]]:
    """(height, width) px of all images of a listing; those it lacks are those of the files in ``folder``."""
    sizes = []
    for name, size in zip(listing.file_names, listing.sizes, strict=True):
        if min(size) < 1:
            if folder is None:
                raise ValueError(
                    f"proposals {path}: does not say how large {name!r} is; --images names the image folder"
                )
            file = place_of(folder, name)
            if not file.is_file():
                raise FileNotFoundError(f"image {file}: no such file; {path} has boxes for it")
            size = image_size(file)
            if size == UNKNOWN:
                raise ValueError(f"image {file}: cannot be read, so its size is not known")
        sizes.append(size)
    return sizes


def _arranged(found: Annotations, limit: int | None) -> Annotations:
    """Without crowds, the first ``limit`` boxes of each image, largest area first."""
    order, counts = [np.zeros(0, np.int64)], []
    for image in range(len(found)):
        rows = found.rows_of(image)[:limit]
        order.append(rows[largest_first(found.boxes[rows])])
        counts.append(len(rows))
    chosen = np.concatenate(order)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    report = dict(found.report)
    if found.crowd.any():
        report["crowd region"] = [f"box {found.boxes[row].tolist()}" for row in np.flatnonzero(found.crowd)]
    return replace(
        found,
        offsets=offsets,
        boxes=found.boxes[chosen],
        labels=found.labels[chosen],
        crowd=found.crowd[chosen],
        report=report,
    )
