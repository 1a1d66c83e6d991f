"""Labels in any format as one type: which format a path has, and how to read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from aligndet.data.annotations import Annotations, Listing, assemble
from aligndet.data.coco import find_images, load_coco
from aligndet.data.folder import list_images
from aligndet.data.voc import has_lists, has_xml, load_voc
from aligndet.data.yolo import SPLITS, load_yolo, read_yaml

FORMATS = ("coco", "voc", "yolo", "folder")
PARTS = "train|val|valid|validation|test|minival|trainval|unlabeled"  # that names of COCO files say


def load_annotations(
    path: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    classes: Sequence[str] = (),
    masks: bool = False,
    on_error: str = "skip",
) -> Annotations:
    """The labels of a data set, alike for all formats.

    Left out and reported: boxes with a side below 1 px, with an area that is not positive or without a number, boxes
    outside their image, objects of unknown images or categories. Boxes that reach over the border are clipped.
    (method section 1.0)

    Args:
        path: COCO json, VOC image set (``ImageSets/Main/*.txt``), YOLO yaml; or a folder with one of them, or with
            images alone, which then have no boxes.
        format: "coco", "voc", "yolo" or "folder"; None: as ``detect_format`` says.
        split: which part of a folder or yaml that has parts ("train", "val", ...); None: all of VOC and YOLO, the only
            file of a COCO folder.
        classes: keep only these, as labels 0 .. K-1 in this order; empty: all, by ascending category id.
        masks: keep the masks of objects too; those without one are left out and reported.
        on_error: "fail" raises for the first thing that would be left out.

    Raises:
        FileNotFoundError: there is no such file, folder or split.
        ValueError: the files are not of this format, or cannot be used; the message names file and key.
    """
    kind = detect_format(path) if format is None else format
    if kind not in FORMATS:
        raise ValueError(f"format: want one of {', '.join(FORMATS)}, got {format!r}")
    if on_error not in ("skip", "fail"):
        raise ValueError(f"on_error: want skip or fail, got {on_error!r}")
    if masks and kind in ("voc", "folder"):
        raise ValueError(f"annotations {path}: this detector needs masks, which {kind} does not have")
    if kind == "coco":
        return load_coco(coco_file(path, split), classes=classes, masks=masks, on_error=on_error)
    if kind == "voc":
        return load_voc(path, split=split, classes=classes, on_error=on_error)
    if kind == "yolo":
        return load_yolo(yolo_file(path), split=split, classes=classes, masks=masks, on_error=on_error)
    names = list_images(path)
    sizes = [(0, 0)] * len(names)
    listing = Listing(str(path), range(1, len(names) + 1), names, sizes, categories={}, root=Path(path))
    return assemble(listing, (), classes=classes)


def images_of(annotations: Annotations, folder: str | Path | None) -> Path:
    """The image folder of a data set: ``folder`` where it is given, else where the format says or where they are found.

    Raises:
        FileNotFoundError: no folder tried has them.
    """
    if folder is None and annotations.root is not None:
        return annotations.root
    return find_images(annotations.path, folder, annotations.file_names)


def detect_format(path: str | Path) -> str:
    """The format of a data set, by the ending of a file or by what a folder holds.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is none of the formats, or several.
    """
    path = Path(path)
    if "*" in str(path):
        return "voc"
    endings = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}
    if path.suffix.lower() in endings and not path.is_dir():
        return endings[path.suffix.lower()]
    if path.suffix == ".txt" and "ImageSets" in path.parts:
        return "voc"
    if path.is_file():
        raise ValueError(f"data {path}: want COCO .json, YOLO .yaml, a VOC list in ImageSets, or a folder")
    if not path.is_dir():
        raise FileNotFoundError(f"data {path}: no such file or folder")
    tests = {"coco": _coco_files(path), "voc": has_xml(path), "yolo": _yolo_files(path)}
    found = [name for name, evidence in tests.items() if evidence]
    if len(found) > 1:
        raise ValueError(f"data {path}: could be {' or '.join(found)}; name the format, or give the file")
    return found[0] if found else "folder"


def coco_file(path: str | Path, split: str | None = None) -> Path:
    """The COCO json that a path means: itself, or the one of a folder for ``split``.

    The only one of a folder is of any split, unless its name says which; Roboflow's "valid" is "val".

    Raises:
        FileNotFoundError, ValueError: the folder has none, or several that fit.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    every = files = _coco_files(path) or sorted(path.glob("*.json"))
    if split is not None:
        names = "val|valid|validation" if split == "val" else re.escape(split)
        files = [file for file in every if _names_part(file.relative_to(path), names)]
        if not files and len(every) == 1 and not _names_part(every[0].relative_to(path), PARTS):
            files = every
    wanted = _instances(files)
    if not wanted:
        raise FileNotFoundError(f"annotations {path}: no COCO json{f' of split {split}' if split else ''}")
    if len(wanted) > 1:
        raise ValueError(f"annotations {path}: several COCO files, name one or a split: {', '.join(map(str, wanted))}")
    return wanted[0]


def has_parts(path: str | Path, kind: str) -> bool:
    """Whether a data set of format ``kind`` has parts to choose from; training takes "train" of one that has.

    A file of labels has none, nor has a folder with a single COCO file or one with VOC xml without lists.
    """
    if kind == "coco":
        return Path(path).is_dir() and len(_instances(_coco_files(Path(path)))) > 1
    return kind == "yolo" or (kind == "voc" and Path(path).is_dir() and has_lists(Path(path)))


def yolo_file(path: str | Path) -> Path:
    """The YOLO yaml that a path means: itself, or the only one of a folder.

    Raises:
        FileNotFoundError, ValueError: the folder has none, or several.
    """
    path = Path(path)
    files = _yolo_files(path) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"annotations {path}: no YOLO yaml with names and {', '.join(SPLITS)}")
    if len(files) > 1:
        raise ValueError(f"annotations {path}: several YOLO files, name one: {', '.join(map(str, files))}")
    return files[0]


def _instances(files: list[Path]) -> list[Path]:
    return [file for file in files if file.name.startswith("instances")] or files


def _names_part(file: Path, names: str) -> bool:
    return re.search(rf"(^|[_./-])({names})(\d{{4}})?([./]|$)", file.as_posix()) is not None


def _coco_files(folder: Path) -> list[Path]:
    patterns = ("annotations/*.json", "instances*.json", "_annotations.coco.json", "*/_annotations.coco.json")
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def _yolo_files(folder: Path) -> list[Path]:
    found = []
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            tree = read_yaml(file)
        except (ValueError, FileNotFoundError):  # not of YOLO, or a link to nothing
            continue
        if any(name in tree for name in SPLITS):
            found.append(file)
    return found
