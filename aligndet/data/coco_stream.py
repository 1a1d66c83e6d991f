"""A COCO file read piece by piece: parsed whole, the one of train2017 takes more than 3 GiB."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 23  # characters
LONGEST = 1 << 26  # characters of one value; of lists that are read piece by piece: of one entry
TAIL = 1 << 22  # bytes at the end of the file, in which categories are looked for
IMAGE_KEYS = ("id", "file_name", "height", "width")
LISTS = ("images", "annotations", "categories")
_BLANK = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


class UnusualError(Exception):
    """The file has to be parsed as a whole: it is laid out otherwise than COCO's own files, or is no JSON."""


def stream_coco(path: Path) -> tuple[list[Any], list[Any], Iterator[Any]]:
    """The images (only their ``IMAGE_KEYS``), categories and annotations of a COCO file; the latter as they are read.

    Raises:
        UnusualError: images do not come before annotations, or categories neither before nor in the last 4 MiB; or
            the file cannot be read or is no JSON. The iterator raises it too, at the place where that shows.
    """
    entries = _entries(path)
    found: dict[str, Any] = {}
    for key, value in entries:
        if key != "annotations":
            found[key] = value
            continue
        if "images" not in found:
            raise UnusualError
        categories = found["categories"] if "categories" in found else _last_categories(path)
        return found["images"], categories, _annotations(value, entries, set(found), categories)
    raise UnusualError


def _annotations(
    values: Iterator[Any], entries: Iterator[tuple[str, Any]], seen: set[str], categories: list[Any]
) -> Iterator[Any]:
    """The annotations; then what follows them is held against what was assumed."""
    yield from values
    seen.add("annotations")
    for key, value in entries:
        if key in seen or (key == "categories" and value != categories):
            raise UnusualError
        seen.add(key)
    if "categories" not in seen:
        raise UnusualError


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys of the file with their values; that of "annotations" is an iterator, to be exhausted before going on."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = _Text(file)
            text.expect("{")
            while True:
                key = text.value()
                text.expect(":")
                if not isinstance(key, str) or (key in LISTS and text.next() != "["):
                    raise UnusualError
                if key == "annotations":
                    yield key, text.entries()
                elif key == "images":
                    yield key, [_shortened(image) for image in text.entries()]
                else:
                    yield key, text.value()
                if text.next() != ",":
                    break
                text.expect(",")
            text.expect("}")
            if text.next():
                raise UnusualError
    except (OSError, UnicodeDecodeError):
        raise UnusualError from None


def _shortened(image: Any) -> Any:
    return {key: image[key] for key in IMAGE_KEYS if key in image} if isinstance(image, dict) else image


def _last_categories(path: Path) -> list[Any]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        tail = file.read()
    place = tail.rfind(b'"categories"')
    try:
        text = tail[place:].decode()
        start = _BLANK.match(text, len('"categories"')).end()  # type: ignore[union-attr]
        value, _ = _decode(text, _BLANK.match(text, start + 1).end())  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        raise UnusualError from None
    if place < 0 or text[start] != ":" or not isinstance(value, list):
        raise UnusualError
    return value


class _Text:
    """JSON in a file, of which one piece at a time is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.place = file, "", 0

    def next(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            self.place = _BLANK.match(self.text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._more():
                return ""

    def expect(self, wanted: str) -> None:
        """Step over the character ``wanted``, which has to come next."""
        if self.next() != wanted:
            raise UnusualError
        self.place += 1

    def value(self) -> Any:
        """Step over the next value, and return it."""
        self.next()
        while True:
            try:
                value, end = _decode(self.text, self.place)
            except (ValueError, RecursionError):  # wrong, or not all there yet
                if not self._more():
                    raise UnusualError from None
                continue
            # A number at the end of the text may go on.
            if end < len(self.text) or not self._more():
                self.place = end
                return value

    def entries(self) -> Iterator[Any]:
        """Step through the list that comes next."""
        self.expect("[")
        if self.next() != "]":
            yield self.value()
            while self.next() == ",":
                self.expect(",")
                yield self.value()
        self.expect("]")

    def _more(self) -> bool:
        """Read on, and forget what lies behind; False at the end of the file."""
        if len(self.text) - self.place > LONGEST:
            raise UnusualError
        piece = self.file.read(CHUNK)
        self.text, self.place = self.text[self.place :] + piece, 0
        return bool(piece)
