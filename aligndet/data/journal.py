"""A file of finished work that survives a kill: one self-delimiting record per image, appended as results come in."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

if sys.platform != "win32":
    import fcntl

MAGIC = b"aligndet proposal journal 1\n"
_FRAME = struct.Struct("<II")  # bytes of the record, its CRC-32
_SYNC_SECONDS = 5.0  # between flushes to the disk itself; a killed process loses nothing, a power cut so much


class Journal:
    """Results of the images searched so far, by name; boxes stay on disk, only their places are held in memory.

    A record that was being written when the process died, and anything after a damaged one, is dropped on opening:
    these images are searched again.

    Attributes:
        found: for each searched image (height, width, number of boxes, place of the boxes in the file).
        failures: reason for each image that could not be searched.
        dropped: bytes of an incomplete record that were cut off on opening.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Open the journal at ``path`` or start one.

        Args:
            path: of the journal.
            made_with: JSON values that the results depend on; a journal made with others is refused.
            overwrite: discard a journal that was made with others; one made with the same is continued all the same.

        Raises:
            ValueError: another run holds the journal, it was made with other settings, is another kind of file, or
                cannot be written.
        """
        self.path = path
        self.found: dict[str, tuple[int, int, int, int]] = {}
        self.failures: dict[str, str] = {}
        self.dropped = 0
        self._synced = time.monotonic()
        with _naming(path):
            self._file = open(path, "a+b")  # noqa: SIM115  (closed by close)
        try:
            self._lock()
            self._load(dict(made_with), overwrite)
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self.found) + len(self.failures)

    def __contains__(self, name: str) -> bool:
        return name in self.found or name in self.failures

    def add_boxes(self, name: str, size: tuple[int, int], boxes: np.ndarray) -> None:
        """Append the float32 [m, 4] boxes of an image of ``size`` (height, width) px."""
        height, width = int(size[0]), int(size[1])
        values = {"name": name, "size": [height, width]}
        start = self._append(values, np.ascontiguousarray(boxes, dtype="<f4").tobytes())
        self.found[name] = height, width, len(boxes), start

    def add_failure(self, name: str, reason: str) -> None:
        """Append that an image could not be searched."""
        self._append({"name": name, "failure": reason})
        self.failures[name] = reason

    def boxes(self, names: Sequence[str]) -> Sequence[np.ndarray]:
        """The boxes of the named images, each read from the journal when it is asked for."""
        return _Boxes(self, names)

    def read(self, name: str) -> np.ndarray:
        """float32 [m, 4], the boxes of one image."""
        _, _, count, start = self.found[name]
        self._file.seek(start)
        return np.frombuffer(self._file.read(count * 16), dtype="<f4").reshape(-1, 4)

    def close(self) -> None:
        """Let the journal go; it stays on disk."""
        self._file.close()

    def remove(self) -> None:
        """Delete the journal: its results are in the proposal file."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _lock(self) -> None:
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path}: another run is writing this file; wait for it or stop it") from None

    def _load(self, made_with: dict[str, Any], overwrite: bool) -> None:
        self._file.seek(0, os.SEEK_END)
        end = self._file.tell()
        self._file.seek(0)
        magic = self._file.read(len(MAGIC))
        if not MAGIC.startswith(magic):
            raise ValueError(f"{self.path}: want a journal of `aligndet propose`, got another file; move it away")
        records = self._records() if magic == MAGIC else iter(())
        head = next(records, None)
        if head is None or (overwrite and head[0]["made_with"] != made_with):
            self._file.truncate(0)
            self._write(MAGIC + _frame(_encode({"made_with": made_with})))
            return
        _check_same(self.path, head[0]["made_with"], made_with)
        complete = self._file.tell()
        for values, start, boxes in records:
            if "failure" in values:
                self.failures[values["name"]] = values["failure"]
            else:
                height, width = values["size"]
                self.found[values["name"]] = (height, width, boxes // 16, start)
            complete = self._file.tell()
        self.dropped = end - complete
        self._file.truncate(complete)

    def _records(self) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Values of each complete record, with place and bytes of its boxes; ends at the first damaged record."""
        while True:
            frame = self._file.read(_FRAME.size)
            if len(frame) < _FRAME.size:
                return
            length, checksum = _FRAME.unpack(frame)
            start = self._file.tell()
            payload = self._file.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            text, _, boxes = payload.partition(b"\n")
            yield json.loads(text), start + len(text) + 1, len(boxes)

    def _append(self, values: dict[str, Any], boxes: bytes = b"") -> int:
        text = _encode(values)
        self._file.seek(0, os.SEEK_END)
        start = self._file.tell() + _FRAME.size + len(text)
        self._write(_frame(text + boxes))
        return start

    def _write(self, data: bytes) -> None:
        with _naming(self.path):
            self._file.write(data)
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()


class _Boxes(Sequence[np.ndarray]):
    def __init__(self, journal: Journal, names: Sequence[str]) -> None:
        self.journal, self.names = journal, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, row: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, row: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(row, slice):
            return _Boxes(self.journal, self.names[row])
        return self.journal.read(self.names[row])


def _encode(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _frame(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = changes(before, now)
    if changed:
        raise ValueError(
            f"{path}: unfinished work made with other settings ({changed}); repeat the command with those to finish "
            "it, take another --out, or add --overwrite to discard it"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``key: before -> now`` for each key that differs; empty where none does."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in keys)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A disk that is full or read-only is the caller's to mend: say which file, without a traceback."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot write ({error.strerror})") from None
