"""One bad image never ends a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def first_readable(load: Callable[[int], T], index: int, length: int, on_error: str) -> tuple[T, tuple[str, ...]]:
    """The first of the images index, index + 1, ... (round to the start) that loads, and a line for each that did not.

    Args:
        load: raises ValueError or FileNotFoundError for an image that does not serve.
        on_error: "skip", or "fail" to raise at the first.

    Raises:
        ValueError, FileNotFoundError: at once with "fail"; with "skip" when not one image loads.
    """
    skipped: list[str] = []
    for attempt in range(length):
        try:
            return load((index + attempt) % length), tuple(skipped)
        except (ValueError, FileNotFoundError) as error:
            if on_error == "fail":
                raise
            skipped.append(str(error))
    raise ValueError(f"not one of {length} images can be read; the first: {skipped[0]}")
