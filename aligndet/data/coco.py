"""COCO json, and the image folder that belongs to it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aligndet.data.annotations import Annotations, LabelledObject, Listing, assemble, check_once
from aligndet.data.coco_stream import UnusualError, stream_coco
from aligndet.data.folder import check_name
from aligndet.typed import shown


def load_coco(
    path: str | Path, *, classes: Sequence[str] = (), masks: bool = False, on_error: str = "skip"
) -> Annotations:
    """Read a COCO file; arguments and rules of ``load_annotations``.

    Boxes that reach over the border are clipped where the file says how large the image is. Masks may be polygons or
    run lengths in both forms, and the file has to say how large its images are; crowd regions count by their boxes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not COCO json; a missing or malformed key; an id or file name that occurs twice; a file name that
            leaves the folder; an unknown class name.
    """
    try:
        listing, objects = _listed(path, *stream_coco(Path(path)))
        return assemble(listing, objects, classes=classes, masks=masks, on_error=on_error)
    except (UnusualError, ValueError):  # what is wrong with a file is said after reading all of it
        listing, objects = read_coco(path)
        return assemble(listing, objects, classes=classes, masks=masks, on_error=on_error)


def read_coco(path: str | Path) -> tuple[Listing, Iterator[LabelledObject]]:
    """The images and categories of a COCO file, and its objects as they stand there; errors of ``load_coco``."""
    tree = _read(Path(path))
    return _listed(path, tree["images"], tree["categories"], tree["annotations"])


def _listed(
    path: str | Path, images: list[Any], categories: list[Any], annotations: Iterable[Any]
) -> tuple[Listing, Iterator[LabelledObject]]:
    names_of = _categories(categories, path)
    image_ids, names, sizes = _images(images, path)
    row_of = {image: row for row, image in enumerate(image_ids)}
    return Listing(str(path), image_ids, names, sizes, names_of), _objects(annotations, row_of, path)


def find_images(annotation_path: str | Path, folder: str | Path | None, file_names: Sequence[str]) -> Path:
    """The folder that the file names of an annotation file are relative to.

    Args:
        folder: where they are; None looks beside the annotation file for the first folder that has the first names, or
            else one of them: single missing files are the data set's affair.

    Raises:
        FileNotFoundError: no folder tried has them; the message lists the folders.
    """
    first = list(file_names[:3])
    tried = [Path(folder)] if folder is not None else list(_likely_folders(Path(annotation_path)))
    for candidate in tried:
        if all((candidate / name).is_file() for name in first):
            return candidate
    for candidate in tried:
        some = file_names if folder is not None else file_names[:100]
        if candidate.is_dir() and any((candidate / name).is_file() for name in some):
            return candidate
    where = ", ".join(str(path) for path in tried)
    raise FileNotFoundError(f"images of {annotation_path}: {first[0] if first else 'nothing'} is not in {where}")


def _read(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path}: no such file")
    try:
        tree = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"annotations {path}: not JSON that can be read: nested too deep") from None
    except (OSError, ValueError) as error:  # among them numbers of too many digits
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
    if type(value) is int and (least or 0) <= value < 2**63:  # nearly all; twice as fast for a million annotations
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or abs(value) >= 2**63:
        raise ValueError(f"annotations {path}: {kind}[{index}].{key}: want a whole number, got {shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"annotations {path}: {kind}[{index}].{key}: want at least {least}, got {value!r}")
    return int(value)


def _text(record: Any, key: str, path: str | Path, kind: str, index: int) -> str:
    value = _key(record, key, path, kind, index)
    if not isinstance(value, str | int | float):
        raise ValueError(f"annotations {path}: {kind}[{index}].{key}: want text, got {shown(value)}")
    return str(value)


def _categories(records: list[Any], path: str | Path) -> dict[int, str]:
    ids = [_whole(record, "id", path, "categories", index) for index, record in enumerate(records)]
    names = [_text(record, "name", path, "categories", index) for index, record in enumerate(records)]
    if not ids:
        raise ValueError(f"annotations {path}: no categories")
    check_once(ids, "category id", path)
    check_once(names, "category name", path)
    return dict(zip(ids, names, strict=True))


def _images(records: list[Any], path: str | Path) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    ids, names, sizes = [], [], []
    for index, record in enumerate(records):
        name = _key(record, "file_name", path, "images", index)
        if not isinstance(name, str) or not name:
            raise ValueError(f"annotations {path}: images[{index}].file_name: want a file name, got {shown(name)}")
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"annotations {path}: images[{index}].file_name {error}") from None
        ids.append(_whole(record, "id", path, "images", index))
        names.append(name)
        known = record.get("height") is not None and record.get("width") is not None
        height, width = (
            (_whole(record, side, path, "images", index, least=0) if known else 0) for side in ("height", "width")
        )
        sizes.append((height, width))
    check_once(ids, "image id", path)
    check_once(names, "file name", path)
    return ids, names, sizes


def _objects(annotations: Iterable[Any], row_of: dict[int, int], path: str | Path) -> Iterator[LabelledObject]:
    for index, annotation in enumerate(annotations):
        image = _whole(annotation, "image_id", path, "annotations", index)
        number = annotation.get("id")
        said = number if type(number) is int else shown(number) if "id" in annotation else f"number {index}"
        row = row_of.get(image, -1)
        yield LabelledObject(
            name=f"annotation {said}" if row >= 0 else f"annotation {said}, image {image}",
            image=row,
            category=_whole(annotation, "category_id", path, "annotations", index),
            box=_key(annotation, "bbox", path, "annotations", index),
            crowd=bool(annotation.get("iscrowd", 0)),
            area=annotation.get("area"),
            segmentation=annotation.get("segmentation"),
        )


def _likely_folders(annotations: Path) -> Iterator[Path]:
    here, above = annotations.parent, annotations.parent.parent
    split = annotations.stem.rpartition("_")[2]
    for base in (here, above):
        yield from (base, base / split, base / "images", base / "images" / split, base / "JPEGImages")
