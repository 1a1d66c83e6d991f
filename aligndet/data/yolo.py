"""YOLO: a yaml file with class names and image folders, and one text file of boxes or polygons per image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aligndet import typed
from aligndet.data.annotations import Annotations, LabelledObject, Listing, assemble, check_once
from aligndet.data.folder import ENCODING, SUFFIXES, list_images, place_of
from aligndet.data.headers import image_size

SPLITS = ("train", "val", "test")
LABELS_UNREADABLE = "label file that cannot be read"
PART_MISSING = "part that is named and not there"


def load_yolo(
    path: str | Path,
    *,
    split: str | None = None,
    classes: Sequence[str] = (),
    masks: bool = False,
    on_error: str = "skip",
) -> Annotations:
    """Read a YOLO data set; arguments and rules of ``load_annotations``.

    Lines are ``class x y width height``, centre and sizes as shares of the image, or ``class x y x y x y ...`` for the
    polygon of a mask, of which the box is taken too; where the yaml has ``kpt_shape``, points follow the box, which are
    not read. An image without a label file has no objects. Category ids are the class numbers. A label file that cannot
    be read is left out with its image, and reported.

    Args:
        path: the yaml file: ``names`` (list, or numbers to names), ``train``, ``val``, ``test`` (a folder of images, a
            text file that lists images, or a list of those), optionally ``path``, which those are relative to.
        split: which of the three; None: all that the file names. One of those without a folder is reported, since
            exports of annotation tools name parts that they did not write.

    Raises:
        FileNotFoundError: no such file; the folder of ``split`` does not exist, or that of no part.
        ValueError: not such a yaml file; no such split.
    """
    path = Path(path)
    tree = read_yaml(path)
    categories = _categories(tree, path)
    report: dict[str, list[str]] = {}
    images = _images(tree, path, split, report)
    root = Path(os.path.commonpath([image.parent for image in images]))
    kept, texts = [], []
    for image in images:
        labels = _label_file(image)
        try:
            text = labels.read_text(ENCODING) if labels.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            report.setdefault(LABELS_UNREADABLE, []).append(f"{labels} ({error})")
            continue
        kept.append(image)
        texts.append(text)
    listing = Listing(
        path=str(path),
        image_ids=range(1, len(kept) + 1),
        file_names=[image.relative_to(root).as_posix() for image in kept],
        sizes=[image_size(image) for image in kept],
        categories=categories,
        report=report,
        root=root,
    )
    points = tree.get("kpt_shape") is not None
    return assemble(listing, _objects(texts, listing.sizes, points), classes=classes, masks=masks, on_error=on_error)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YOLO yaml file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no yaml mapping with ``names``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"annotations {path}: no such file")
    try:
        tree = typed.read_yaml(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"annotations {path}: {error}") from None
    if not isinstance(tree, dict) or "names" not in tree:
        raise ValueError(f"annotations {path}: want YOLO yaml with names, and train, val or test; names is not there")
    return tree


def _categories(tree: dict[str, Any], path: Path) -> dict[int, str]:
    names = tree["names"]
    pairs = names if isinstance(names, dict) else dict(enumerate(names)) if isinstance(names, list) else {}
    if not pairs or not all(isinstance(key, int) and key >= 0 for key in pairs):
        raise ValueError(
            f"annotations {path}: names: want a list of names, or numbers to names, got {typed.shown(names)}"
        )
    if isinstance(tree.get("nc"), int) and tree["nc"] != len(pairs):
        raise ValueError(f"annotations {path}: nc: want the {len(pairs)} of names, got {tree['nc']}")
    check_once([str(name) for name in pairs.values()], "class name", path)
    return {key: str(name) for key, name in pairs.items()}


def _images(tree: dict[str, Any], path: Path, split: str | None, report: dict[str, list[str]]) -> list[Path]:
    """The images of a split in the order of its lists, folders by name; each once. None: of all that are there."""
    there = [name for name in SPLITS if tree.get(name)]
    if not there or (split is not None and split not in there):
        want = split or " or ".join(SPLITS)
        raise ValueError(f"annotations {path}: no split {want}; it has {', '.join(there) or 'none'}")
    found: list[Path] = []
    missing: list[Exception] = []
    for name in there if split is None else [split]:
        try:
            found += _part(tree, name, path)
        except (FileNotFoundError, ValueError) as error:
            missing.append(error)
            report.setdefault(PART_MISSING, []).append(
                f"part {name}: {str(error).removeprefix(f'annotations {path}: ')}"
            )
    if missing and (split is not None or not found):
        raise missing[0]
    if not found:
        raise ValueError(f"annotations {path}: no images in {', '.join(there)}")
    return list(dict.fromkeys(_plain(image) for image in found))


def _plain(image: Path) -> Path:
    """An absolute path without "..". What comes after is not resolved: labels lie beside links, not what they mean."""
    parts = image.absolute().parts
    last = max((place for place, part in enumerate(parts) if part == ".."), default=-1)
    return Path(*parts[: last + 1]).resolve().joinpath(*parts[last + 1 :]) if last >= 0 else image.absolute()


def _part(tree: dict[str, Any], name: str, path: Path) -> list[Path]:
    """The images of a part; FileNotFoundError, ValueError where a folder or list of it is not there, or has none."""
    found: list[Path] = []
    for entry in tree[name] if isinstance(tree[name], list) else [tree[name]]:
        place = _place(str(entry), tree, path)
        if place.is_dir():
            found += [place / image for image in list_images(place)]
        else:
            try:
                lines = [line.strip() for line in place.read_text(ENCODING).splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise ValueError(f"annotations {path}: {place} is no list of images: {error}") from None
            found += [_beside(place, line, tree, path) for line in lines if line.lower().endswith(SUFFIXES)]
    return found


def _place(entry: str, tree: dict[str, Any], path: Path) -> Path:
    bases = list(dict.fromkeys([path.parent / str(tree.get("path") or ""), path.parent]))
    # Exports of annotation tools write ../train/images for the folder train/images beside the yaml.
    candidates = [base / text for base in bases for text in (entry, entry.removeprefix("../"))]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    places = f"not in {bases[0]}" if len(bases) == 1 else f"neither in {bases[0]} nor in {bases[1]}"
    raise FileNotFoundError(f"annotations {path}: {entry} is {places}")


def _beside(listing: Path, line: str, tree: dict[str, Any], path: Path) -> Path:
    """An image of a list: relative to the list or to the data set; a missing file is the data set's affair."""
    roots = (listing.parent, path.parent / str(tree.get("path") or ""))
    candidates = [place_of(root, line) for root in roots]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def _label_file(image: Path) -> Path:
    """``.../labels/....txt`` for ``.../images/....jpg``, the last folder of that name; else beside the image."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    file = Path(*parts).with_suffix(".txt")
    shouted = file.with_suffix(".TXT")
    return shouted if not file.is_file() and shouted.is_file() else file


def unpaired(images: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Images without a label file, and label files in the folders of theirs that no image there belongs to."""
    files = {image: _label_file(image) for image in images}
    folders = {file.parent: image.parent for image, file in files.items() if file.parent.is_dir()}
    lonely = []
    for folder, beside in sorted(folders.items()):
        stems = {Path(name).stem for name in os.listdir(beside) if name.lower().endswith(SUFFIXES)}
        texts = sorted(name for name in os.listdir(folder) if name.lower().endswith(".txt") and name != "classes.txt")
        lonely += [folder / name for name in texts if Path(name).stem not in stems]
    return [image for image, file in files.items() if not file.is_file()], lonely


def _objects(texts: Sequence[str], sizes: Sequence[tuple[int, int]], points: bool) -> Iterator[LabelledObject]:
    """The lines of each image; with ``points`` those of a person's joints follow the box and are left out."""
    for image, text in enumerate(texts):
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                words = line.split()[:5] if points else line.split()
                yield _object(words, f"line {number} of the labels", image, sizes[image])


def _object(words: Sequence[str], name: str, image: int, size: tuple[int, int]) -> LabelledObject:
    height, width = size
    try:
        category, *values = (float(word) for word in words)
        category = int(category) if category == category // 1 else -1
    except (ValueError, OverflowError):
        return LabelledObject(name, image, _whole(words[0]), " ".join(words))
    if len(values) == 4:
        x, y, w, h = values
        box: Any = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
        return LabelledObject(name, image, category, box)
    xs, ys = [x * width for x in values[0::2]], [y * height for y in values[1::2]]
    if len(values) < 6 or len(values) % 2:
        return LabelledObject(name, image, category, " ".join(words))
    polygon = [value for point in zip(xs, ys, strict=True) for value in point]
    box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
    return LabelledObject(name, image, category, box, segmentation=[polygon])


def _whole(word: str) -> int:
    return int(word) if word.isdecimal() else -1
