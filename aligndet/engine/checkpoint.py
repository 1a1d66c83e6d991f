"""Files that are whole or not there: tensors and plain values only."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision

from aligndet.version import __version__
from aligndet.weights import why_refused


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write nested tensors and plain values; a crash or a full disk leaves the file that was there before.

    Raises:
        ValueError: the folder cannot be written, the disk is full, or a value is neither tensor nor plain: ``load``
            would refuse the file.
    """
    path = Path(path)
    _check_plain(state, "state")
    try:
        replace(path, state)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a full disk as RuntimeError.
        raise ValueError(f"checkpoint {path}: cannot be written, an older one stays as it was: {error}") from None


def replace(path: Path, content: dict[str, Any] | bytes) -> None:
    """Write bytes, or a state as torch does, beside ``path``; then, once on the disk, in its place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):  # a second failure must not hide the first
            temporary.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read a file of ``save`` on the CPU; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"checkpoint {path}: cut short, or not a checkpoint; delete it to start afresh")
    try:
        # torch itself does not look at the checksums: a flipped bit would become a wrong weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum in its part {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises a dozen kinds of errors for damaged and for refused files; each means the same here.
        raise ValueError(f"checkpoint {path}: damaged or refused: {why_refused(error)}") from None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path}: want a mapping, got {type(state).__name__}")
    return state


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        # Of this process's own GPU: how many others it sees changes with the machine.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(internal), following],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on from a ``rng_state``."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))


def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {
        "aligndet": __version__,
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "python": platform.python_version(),
    }


def _check_plain(value: Any, where: str) -> None:
    """Exact types: a numpy float is a float too, but one that ``load`` refuses."""
    if isinstance(value, torch.Tensor) or type(value) in (int, float, str, bool, type(None)):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"key {key!r} of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise ValueError(f"checkpoint {where}: want tensors and plain values, got {type(value).__name__}")
