"""Checkpoints: nested plain values and tensors in one file, written whole or not at all, loaded without running code."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import platform
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from aligndet.version import __version__

PLAIN = (int, float, str, bool, type(None))
PACKAGES = ("torch", "torchvision", "numpy", "opencv-contrib-python", "pycocotools", "scipy", "pyyaml")


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state so that a reader, also after a crash or a power cut, finds the old file or the new one, never a part.

    Args:
        path: the file; its folder must exist.
        state: dicts, lists and tuples of tensors, numbers, strings and None.

    Raises:
        ValueError: a value is of another type (``load`` would refuse the file), or the file cannot be written, for
            example because the disk is full; an older file at ``path`` is untouched then.
    """
    path = Path(path)
    _check_plain(state, f"checkpoint {path}: state")
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: str | Path) -> dict[str, Any]:
    """What ``save`` wrote, bit for bit, with all tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off or damaged (every byte is checked), or holds more than tensors and plain values;
            nothing of it has been executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"checkpoint {path}: cut off, or no checkpoint at all ({_one_line(error)})") from None
    if damaged is not None:
        raise ValueError(f"checkpoint {path}: damaged, the checksum of its part {damaged} is wrong")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"checkpoint {path}: refused, it holds more than tensors and plain values ({_one_line(error)})") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: damaged ({_one_line(error)})") from None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path}: want names with values, got {type(state).__name__}")
    return state


def write_atomically(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, bring it to the disk, and put it in the place of ``path``.

    The temporary file has one fixed name, so one that a killed process left behind is overwritten by the next write.

    Raises:
        ValueError: the file cannot be written; an older file at ``path`` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written: {_one_line(error)}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def rng_state() -> dict[str, Any]:
    """The states of the global random number generators of torch (CPU and, once used, all GPUs), numpy and Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    version, words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), python_gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators into the state that ``rng_state`` returned.

    GPUs of the state that this machine lacks are passed over, and the other way round.
    """
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(generator, index)
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, python_gauss = state["python"]
    random.setstate((version, tuple(words), python_gauss))


def versions() -> dict[str, str]:
    """Names and versions of what computes: aligndet, Python and the libraries; "unknown" where one is not a package."""
    found = {"aligndet": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def _check_plain(value: Any, where: str) -> None:
    """Exact types: a numpy float is a float too, but its pickle is one that ``load`` refuses."""
    if isinstance(value, Tensor) or type(value) in PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in PLAIN:
                raise ValueError(f"{where}: want keys that are strings or numbers, got {key!r}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise ValueError(f"{where}: want tensors, numbers, strings, lists and dicts, got {type(value).__name__}")


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk as well; where folders cannot be opened (Windows) the system sees to it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
