"""Pascal VOC xml: VOCdevkit, one of its years, one of its image sets, or any folder of xml files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from aligndet.data.annotations import Annotations, LabelledObject, Listing, assemble
from aligndet.data.folder import ENCODING, SUFFIXES, check_name, slashed
from aligndet.data.headers import image_size

UNREADABLE = "xml file that cannot be read"
SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class _Data:
    """What the xml files say, in their order; paths of images are absolute."""

    images: list[Path] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    objects: list[tuple[int, str, str, tuple[float, ...] | None, bool]] = field(default_factory=list)
    report: dict[str, list[str]] = field(default_factory=dict)


def load_voc(
    path: str | Path, *, split: str | None = None, classes: Sequence[str] = (), on_error: str = "skip"
) -> Annotations:
    """Read VOC xml; arguments and rules of ``load_annotations``.

    A corner (1, 1) is the first pixel and belongs to the box: xmin, ymin, xmax, ymax become xmin - 1, ymin - 1, xmax,
    ymax (method section 5.3). Objects marked difficult are no targets. Category ids are 1 .. K by name, over all xml
    files of the folder and not only those of the split; or the lines of a file ``classes.txt`` beside ``Annotations``.
    An xml file that cannot be read is left out with its image, and reported.

    Args:
        path: a list of names in ``ImageSets/Main``, where "*" may stand for several years or lists, all of whose names
            count (``VOCdevkit/VOC20*/ImageSets/Main/trainval.txt``); a folder with ``Annotations`` and ``JPEGImages``;
            a folder of such folders; or one with xml files beside the images.
        split: name of a list in ``ImageSets/Main``; read where ``path`` is a folder that has it.

    Raises:
        FileNotFoundError: no such file, folder or split.
        ValueError: no xml files.
    """
    names = _names(Path(path), split)
    data = _Data()
    for base, stems in names.items():
        _read_base(base, stems, data)
    if not data.images and not data.report:
        raise ValueError(f"annotations {path}: no xml files")
    categories = _categories(list(names), data)
    id_of = {name: category for category, name in categories.items()}
    folders = {str(image.parent) for image in data.images}
    root = Path(os.path.commonpath(folders)) if folders else Path(path)
    listing = Listing(
        path=str(path),
        image_ids=range(1, len(data.images) + 1),
        file_names=[image.relative_to(root).as_posix() for image in data.images],
        sizes=data.sizes,
        categories=categories,
        report=data.report,
        root=root,
    )
    objects = (
        LabelledObject(where, image, id_of.get(name, -1), _one_based(corners), difficult)
        for image, where, name, corners, difficult in data.objects
    )
    return assemble(listing, objects, classes=classes, on_error=on_error)


def has_xml(folder: Path) -> bool:
    """Whether a folder is one that ``load_voc`` reads."""
    return any(_xml_files(place) for base in _bases(folder) for place in (base / "Annotations", base))


def has_lists(folder: Path) -> bool:
    """Whether a folder of ``load_voc`` has lists of names, its parts."""
    return any(lists.is_dir() for lists in _lists(folder))


def _names(path: Path, split: str | None) -> dict[Path, list[str]]:
    """Stems of the xml files by base folder, the one above ``Annotations``."""
    if path.is_dir():
        lists = _lists(path)
        if split is None or not any(folder.is_dir() for folder in lists):
            return {base: list(_xml_files(_xml_folder(base))) for base in _bases(path)}
        files = [folder / f"{split}.txt" for folder in lists if (folder / f"{split}.txt").is_file()]
        there = sorted({file.stem for folder in lists for file in folder.glob("*.txt")})
        if not files:
            raise FileNotFoundError(f"annotations {path}: no split {split!r} in ImageSets/Main; there are {there}")
    else:
        pattern = "*" in str(path)
        files = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))) if pattern else [path]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"annotations {path}: no such file")
    try:
        read = [(file.absolute().parents[2], file.read_text(ENCODING).splitlines()) for file in files]
    except UnicodeDecodeError as error:
        raise ValueError(f"annotations {path}: not a list of names: {error}") from None
    found: dict[Path, list[str]] = {}
    for base, lines in read:  # a pattern may mean several lists of a folder, and train is part of trainval
        earlier = set(found.setdefault(base, []))
        found[base] += [name for name in map(str.strip, lines) if name and name not in earlier]
    return found


def _bases(folder: Path) -> list[Path]:
    folder = folder.absolute()
    if (folder / "Annotations").is_dir():
        return [folder]
    return sorted(inner.parent for inner in folder.glob("*/Annotations")) or [folder]


def _lists(folder: Path) -> list[Path]:
    return [base / "ImageSets" / "Main" for base in _bases(folder)]


def _xml_folder(base: Path) -> Path:
    return base / "Annotations" if (base / "Annotations").is_dir() else base


def _xml_files(folder: Path) -> dict[str, Path]:
    """Files by stem, in order; the ending in any case."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {Path(name).stem: folder / name for name in names if name.lower().endswith(".xml")}


def _image_folder(base: Path) -> Path:
    return next((base / name for name in ("JPEGImages", "images") if (base / name).is_dir()), base)


def _read_base(base: Path, stems: Sequence[str], data: _Data) -> None:
    folder = _image_folder(base)
    by_stem: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        if name.lower().endswith(SUFFIXES):
            by_stem.setdefault(Path(name).stem, []).append(name)
    files, seen = _xml_files(_xml_folder(base)), set[str]()
    for stem in stems:
        file = files.get(stem, _xml_folder(base) / f"{stem}.xml")
        if stem in seen:
            data.report.setdefault("listed twice", []).append(str(file))
            continue
        seen.add(stem)
        try:
            check_name(stem)
            tree = ElementTree.parse(file).getroot()
            if tree.tag != "annotation":
                raise ValueError(f"want <annotation>, got <{tree.tag}>")
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            data.report.setdefault(UNREADABLE, []).append(f"{file} ({reason})")
            continue
        stated = Path(slashed(tree.findtext("filename", "").strip())).name
        known = by_stem.get(stem, by_stem.get(Path(stated).stem, [stated or f"{stem}.jpg"]))
        _add(tree, folder / (stated if stated in known else known[0]), data)


def _add(tree: ElementTree.Element, image: Path, data: _Data) -> None:
    size = tuple(_number(tree, f"size/{side}") for side in ("height", "width"))
    whole = all(value == value // 1 and 0 < value < 2**31 for value in size)
    data.sizes.append((int(size[0]), int(size[1])) if whole else image_size(image))
    for number, found in enumerate(tree.findall("object"), start=1):
        corners = tuple(_number(found, f"bndbox/{side}") for side in SIDES)
        missing = any(found.findtext(f"bndbox/{side}") is None for side in SIDES)
        label = (found.findtext("name") or "").strip()
        difficult = _number(found, "difficult") > 0
        where = f"object {number} ({label or 'without a name'})"
        data.objects.append((len(data.images), where, label, None if missing else corners, difficult))
    data.images.append(image)


def _number(tree: ElementTree.Element, path: str) -> float:
    """A number of the tree; nan where there is none."""
    try:
        return float(tree.findtext(path) or "nan")
    except ValueError:
        return float("nan")


def _one_based(corners: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """x, y, width, height px of inclusive corners that count from 1; corners that coincide are a slip, not a pixel."""
    if corners is None:
        return None
    x0, y0, x1, y1 = corners
    return x0 - 1, y0 - 1, *(side + 1 if side >= 1 else side for side in (x1 - x0, y1 - y0))


def _categories(bases: Sequence[Path], data: _Data) -> dict[int, str]:
    listed = [base / "classes.txt" for base in bases if (base / "classes.txt").is_file()]
    if listed:
        try:
            lines = [line.strip() for line in listed[0].read_text(ENCODING).splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"annotations {listed[0]}: not a list of names: {error}") from None
        return dict(enumerate(dict.fromkeys(lines), start=1))
    names = {label for _, _, label, _, _ in data.objects} | set(_other_names(bases))
    return dict(enumerate(sorted(names - {""}), start=1))


def _other_names(bases: Sequence[Path]) -> Iterator[str]:
    """The classes of every xml file of the folders, so that the ids of all splits agree."""
    for base in bases:
        for file in _xml_files(_xml_folder(base)).values():
            try:
                tree = ElementTree.parse(file).getroot()
            except (ElementTree.ParseError, OSError, ValueError, LookupError):
                continue
            yield from ((found.findtext("name") or "").strip() for found in tree.findall("object"))
