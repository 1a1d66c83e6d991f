"""The checkpoints of a run folder: written whole, named by a pointer, found again after any kind of crash.

``checkpoint-00000500.pt`` is the state after 500 steps; ``checkpoints.json``, the pointer, names the newest and
the best and has the SHA-256 of each. A checkpoint counts from the moment the pointer names it. Runs of earlier versions
have one ``checkpoint.pt`` and no pointer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligndet.engine import checkpoint

POINTER, LOCK, OLD = "checkpoints.json", "run.lock", "checkpoint.pt"
RESULTS = {"pretrain": "pretrained.pt", "finetune": "model.pt", "image_domain": "backbone.pt"}  # by task
FORMAT = 2  # of checkpoints; 1 is the single file of earlier versions
NAME = re.compile(r"checkpoint-(\d{8,})\.pt")


def lock(folder: Path) -> None:
    """Make the folder and hold it against other processes until this one ends, however it ends.

    A record lock: unlike that of ``flock`` it is not inherited by loader processes, which outlive a killed run by
    seconds. Its file stays open on purpose; a process may lock a folder again that it holds already.

    Raises:
        ValueError: the folder cannot be written, or another process trains there.
    """
    with _plainly(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(file, 20).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise ValueError(f"run {folder}: another process (id {holder}) trains there; wait for it or stop it") from None
    with _plainly(folder):
        os.truncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        for leftover in folder.glob("*.tmp"):  # of a killed run: nobody else writes here now
            leftover.unlink(missing_ok=True)


def writable(folder: Path) -> None:
    """Make the folder of results and see that files can be written there, before what takes long.

    Raises:
        ValueError: they cannot.
    """
    with _plainly(folder, "results"):
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{os.getpid()}.tmp"
        trial.touch()
        trial.unlink()


def write(folder: Path, state: dict[str, Any], *, keep: int, best: bool = False) -> None:
    """Write the checkpoint of ``state["step"]``, point to it, then remove those that are no longer wanted.

    Whatever fails or is killed on the way, the pointer names a complete checkpoint before and after.

    Args:
        keep: how many of the last checkpoints stay, this one included.
        best: this one is the best so far, and stays until a better one comes.

    Raises:
        ValueError: it cannot be written; the checkpoints there stay as they were.
    """
    name = f"checkpoint-{state['step']:08d}.pt"
    checkpoint.save(folder / name, state)
    with _plainly(folder, "checkpoint"):
        try:
            before = read_pointer(folder) or {}
        except ValueError:
            before = {}  # damaged: this one replaces it
        sums = {**before.get("sha256", {}), name: _sha256(folder / name)}
        last = sorted((other for other in names(folder) if step_of(other) <= state["step"]), key=step_of)[-keep:]
        chosen = name if best else before.get("best")
        wanted = {*last, chosen}
        pointer = {
            "format": FORMAT,
            "newest": name,
            "best": chosen,
            "sha256": {other: value for other, value in sums.items() if other in wanted},
        }
        checkpoint.replace(folder / POINTER, json.dumps(pointer, indent=1).encode())
        for other in names(folder):
            if other not in wanted:
                (folder / other).unlink(missing_ok=True)


def newest(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole.

    Returns:
        Its path and state, and a line for each damaged thing passed over; (None, {}, []) in a folder without any.

    Raises:
        ValueError: there are checkpoints, but none can be read: starting afresh would lose the run silently.
    """
    warnings = []
    try:
        pointer = read_pointer(folder)
        if pointer is None and any(name != OLD for name in names(folder)):
            warnings.append(f"{folder / POINTER} is missing: the checkpoints are tried from the last step on")
    except ValueError as error:
        pointer = {}
        warnings.append(f"{error}: the checkpoints are tried from the last step on")
    pointed = (pointer or {}).get("newest")
    order = sorted(names(folder), key=lambda name: (name == pointed, step_of(name)), reverse=True)
    if pointed is not None and pointed not in order:
        warnings.append(f"{folder / POINTER} names {pointed}, which is not there")
    for name in order:
        try:
            return folder / name, verified(folder / name, (pointer or {}).get("sha256", {}).get(name)), warnings
        except (ValueError, FileNotFoundError) as error:
            warnings.append(f"{error}; falling back to the one before")
    if warnings:
        raise ValueError(
            f"run {folder}: no checkpoint can be read ({'; '.join(warnings)[:600]}); delete its checkpoints and "
            f"{POINTER} to start afresh"
        )
    return None, {}, []


def best(folder: Path) -> Path | None:
    """The best checkpoint, where the run was validated on the way."""
    name = (read_pointer(folder) or {}).get("best")
    return folder / name if name and (folder / name).exists() else None


def verified(path: Path, sha256: str | None) -> dict[str, Any]:
    """The state in a checkpoint whose every byte is as it was written; ``sha256`` is None where nobody noted it."""
    if sha256 is not None and path.exists() and _sha256(path) != sha256:
        raise ValueError(f"checkpoint {path}: damaged: its checksum is not the one in {POINTER}")
    return checkpoint.load(path)


def names(folder: Path) -> list[str]:
    """The file names of all checkpoints in a folder."""
    return sorted(path.name for path in folder.glob("checkpoint*.pt") if path.name == OLD or NAME.fullmatch(path.name))


def step_of(name: str) -> int:
    """The step of a checkpoint by its file name; -1 for the single file of earlier versions."""
    match = NAME.fullmatch(name)
    return int(match.group(1)) if match else -1


def read_pointer(folder: Path) -> dict[str, Any] | None:
    """The content of the pointer; None where there is none.

    Raises:
        ValueError: it is damaged, or from a newer version.
    """
    path = folder / POINTER
    if not path.exists():
        return None
    try:
        pointer = json.loads(path.read_bytes())
        sums, best = pointer["sha256"], pointer["best"]
        files = [pointer["newest"], *sums, *([] if best is None else [best])]
        if not all(NAME.fullmatch(name) for name in files) or not all(isinstance(sums[name], str) for name in sums):
            raise ValueError("it names what is no checkpoint")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())[:100]})") from None
    return dict(pointer)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


@contextlib.contextmanager
def _plainly(folder: Path, what: str = "run") -> Iterator[None]:
    """A folder that is read-only or full is the caller's to mend."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what} {folder}: cannot write there: {error.strerror or error}") from None
