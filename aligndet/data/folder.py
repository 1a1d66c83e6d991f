"""Plain folders of images."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def list_images(root: str | Path) -> list[str]:
    """The image files below a folder, by name: sorted paths relative to it, "/" between folders.

    Links to folders are followed, each real folder once, so that loops end.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"images {root}: no such folder")
    found, seen = [], set()
    for folder, inner, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        here = Path(folder).relative_to(root)
        found += [(here / name).as_posix() for name in files if name.lower().endswith(SUFFIXES)]
    if not found:
        raise ValueError(f"images {root}: no file ends in {', '.join(SUFFIXES)}")
    return sorted(found)
