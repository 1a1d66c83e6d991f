"""Plain folders of images."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from aligndet.typed import shown

ENCODING = "utf-8-sig"  # of lists and labels: UTF-8, which Windows begins with a mark that is no part of the text
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def list_images(root: str | Path) -> list[str]:
    """The image files below a folder, by name: sorted paths relative to it, "/" between folders.

    Links are followed, to each real folder once, so that loops end; a folder that is also there itself has that name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"images {root}: no such folder")
    found, seen, tops = [], set[str](), [str(root)]
    while tops:
        links = []
        for folder, inner, files in os.walk(tops.pop(0)):
            real = os.path.realpath(folder)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            inner.sort()
            links += [path for name in inner if os.path.islink(path := os.path.join(folder, name))]
            here = Path(folder).relative_to(root)
            found += [(here / name).as_posix() for name in files if name.lower().endswith(SUFFIXES)]
        tops += links
    if not found:
        raise ValueError(f"images {root}: no file ends in {', '.join(SUFFIXES)}")
    return sorted(found)


def slashed(name: str) -> str:
    """A file name with "/" where one written on Windows has a backslash."""
    return name.replace("\\", "/")


def name_below(root: str | Path, name: str) -> str:
    """A file name of labels as it is below ``root``: labels written on Windows may have a backslash for each "/".

    The name as it stands is taken where there is such a file, and where there is neither.
    """
    if "\\" not in name or (Path(root) / name).exists():
        return name
    other = slashed(name)
    return other if (Path(root) / other).exists() else name


def place_of(root: str | Path, name: str) -> Path:
    """The file that a file name of labels means; see ``name_below``."""
    return Path(root) / name_below(root, name)


def check_name(name: str) -> None:
    """Raises ValueError for a file name that cannot be below a folder: absolute, with "..", or no name of a file.

    Backslashes are read in both ways, as ``name_below`` does.
    """
    pure = PurePosixPath(name)
    for read in (pure, PurePosixPath(slashed(name))):
        if read.is_absolute() or ".." in read.parts:
            raise ValueError(f"{shown(name)} leaves the image folder")
    try:
        ordinary = b"\0" not in os.fsencode(name) and len(pure.parts) > 0
    except UnicodeEncodeError:
        ordinary = False
    if not ordinary:
        raise ValueError(f"{shown(name)} is no name that a file can have")
