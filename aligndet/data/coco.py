"""COCO json, and the image folder that belongs to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aligndet.data.annotations import Annotations, LabelledObject, Listing, assemble, check_once
from aligndet.data.coco_stream import UnusualError, stream_coco
from aligndet.data.folder import check_name, place_of
from aligndet.typed import shown

CROWD: dict[Any, bool] = {0: False, 1: True, None: False, "0": False, "1": True}  # what iscrowd may be; True is 1
WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")
RELATIVE = "file names have to be relative to the image folder (data.train_images, data.val_images; --images of tools)"


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
    names, sizes = _images(images, path)
    numbers, texts = image_numbers([_key(image, "id", path, "images", row) for row, image in enumerate(images)], path)
    check_once(texts or numbers, "image id", path)
    check_once(names, "file name", path)
    listing = Listing(str(path), numbers, names, sizes, names_of, texts=texts)
    return listing, read_objects(annotations, texts or numbers, path)


def image_numbers(ids: Sequence[Any], path: str | Path) -> tuple[list[int], list[str]]:
    """The ids of the images of a COCO file as numbers: its own, also written as texts ("52"), or places of other texts.

    Places are those among the sorted texts, from 1 on, so that images stay in the order in which pycocotools has them.

    Returns:
        The numbers; and the file's own ids where they are texts, not all of them of whole numbers, else [].

    Raises:
        ValueError: only some are texts, or one is neither a text nor a whole number.
    """
    strange = [index for index, value in enumerate(ids) if isinstance(value, str) and plain_id(value) is value]
    if not strange:
        return [_number(value, f"annotations {path}: images[{index}].id") for index, value in enumerate(ids)], []
    if not all(isinstance(value, str) for value in ids):
        where = f"annotations {path}: images[{strange[0]}].id"
        raise ValueError(f"{where}: want a whole number, or a text for every image, got {shown(ids[strange[0]])}")
    place_of_text = {text: place for place, text in enumerate(sorted(set(ids)), start=1)}
    return [place_of_text[text] for text in ids], list(ids)


def plain_id(value: Any) -> Any:
    """An id, as a number where it is the text of a whole one: "52" is 52, but "052" stays."""
    return int(value) if isinstance(value, str) and WHOLE.fullmatch(value) else value


def read_objects(
    annotations: Iterable[Any], image_ids: Sequence[int] | Sequence[str], path: str | Path
) -> Iterator[LabelledObject]:
    """The entries of a list of COCO annotations, by the rows of their images in ``image_ids``.

    Raises:
        ValueError: an entry lacks a key, or an id is no whole number; texts of images that are not there are no error.
    """
    row_of: dict[Any, int] = {image: row for row, image in enumerate(image_ids)}
    texts = bool(image_ids) and isinstance(image_ids[0], str)
    for index, annotation in enumerate(annotations):
        if texts:
            image = _key(annotation, "image_id", path, "annotations", index)
            row = row_of.get(image, -1) if isinstance(image, str) else -1
        else:
            image = _whole(annotation, "image_id", path, "annotations", index)
            row = row_of.get(image, -1)
        number = annotation.get("id")
        said = number if type(number) is int else shown(number) if "id" in annotation else f"number {index}"
        crowd = annotation.get("iscrowd")
        yield LabelledObject(
            name=f"annotation {said}" if row >= 0 else f"annotation {said}, image {shown(image)}",
            image=row,
            category=_whole(annotation, "category_id", path, "annotations", index),
            box=_key(annotation, "bbox", path, "annotations", index),
            crowd=CROWD.get(crowd) if isinstance(crowd, int | float | str | None) else None,
            area=annotation.get("area"),
            segmentation=annotation.get("segmentation"),
        )


def find_images(annotation_path: str | Path, folder: str | Path | None, file_names: Sequence[str]) -> Path:
    """The folder that the file names of an annotation file are relative to.

    Args:
        folder: where they are; None looks beside the annotation file for the first folder that has the first names, or
            else one of them: single missing files are the data set's affair.

    Raises:
        FileNotFoundError: no folder tried has them; the message lists the folders.
    """
    first = list(file_names[:3])
    tried = [Path(folder)] if folder is not None else list(dict.fromkeys(_likely_folders(Path(annotation_path))))
    for candidate in tried:
        if all(place_of(candidate, name).is_file() for name in first):
            return candidate
    for candidate in tried:
        some = file_names if folder is not None else file_names[:100]
        if candidate.is_dir() and any(place_of(candidate, name).is_file() for name in some):
            return candidate
    where = ", ".join(str(path) for path in tried)
    missing = first[0] if first else "nothing"
    raise FileNotFoundError(f"images of {annotation_path}: {missing} is not in {where}; {RELATIVE}")


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
    value = _number(value, f"annotations {path}: {kind}[{index}].{key}")
    if least is not None and value < least:
        raise ValueError(f"annotations {path}: {kind}[{index}].{key}: want at least {least}, got {value!r}")
    return value


def _number(value: Any, where: str) -> int:
    number = plain_id(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1 or abs(number) >= 2**63:
        raise ValueError(f"{where}: want a whole number, got {shown(value)}")
    return int(number)


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


def _images(records: list[Any], path: str | Path) -> tuple[list[str], list[tuple[int, int]]]:
    names, sizes = [], []
    for index, record in enumerate(records):
        name = _key(record, "file_name", path, "images", index)
        if not isinstance(name, str) or not name:
            raise ValueError(f"annotations {path}: images[{index}].file_name: want a file name, got {shown(name)}")
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"annotations {path}: images[{index}].file_name {error}; {RELATIVE}") from None
        names.append(name)
        known = record.get("height") is not None and record.get("width") is not None
        height, width = (
            (_whole(record, side, path, "images", index, least=0) if known else 0) for side in ("height", "width")
        )
        sizes.append((height, width))
    return names, sizes


def _likely_folders(annotations: Path) -> Iterator[Path]:
    here, above = annotations.parent, annotations.parent.parent
    split = annotations.stem.rpartition("_")[2]
    for base in (here, above):
        yield from (base, base / split, base / "images", base / "images" / split, base / "JPEGImages")
