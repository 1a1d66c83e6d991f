"""COCO's three ways to write a mask, as one."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as rle

LONGEST = 2_000_000  # px around a polygon: pycocotools keeps some 100 bytes for each
FARTHEST = 1_000_000  # px: pycocotools keeps five times that in 32 bits
_CONTINUES, _SIGN = 0x20, 0x10  # bits of a character of compressed run lengths


def run_lengths(segmentation: Any, size: tuple[int, int], *, empty: bool = False) -> tuple[bytes, str]:
    """A mask as compressed run lengths, or why it is none.

    Args:
        segmentation: list of polygons (x, y, x, y ... px), or {"size", "counts"} with run lengths in plain or in
            compressed form.
        size: (height, width) px of the image.
        empty: whether a mask without a pixel is one.

    Returns:
        The bytes and "", or b"" and the reason.
    """
    if min(size) <= 0:
        return b"", "the file does not say how large the image is, which masks need"
    if size[0] * size[1] >= 2**31:
        return b"", "of an image too large for run lengths"
    if not segmentation:
        return b"", "without a segmentation"
    try:
        if isinstance(segmentation, list):
            polygons = [[float(x) for x in polygon] for polygon in segmentation if len(polygon) >= 6]
            if not polygons or any(len(polygon) % 2 for polygon in polygons):
                return b"", "with a polygon of fewer than three points or half a point"
            if not all(_fits(polygon) for polygon in polygons):
                return b"", "with a polygon that is not finite or far larger than an image"
            encoded = rle.merge(rle.frPyObjects(polygons, *size))
        elif list(segmentation["size"]) != list(size):
            return b"", "with a mask of another size than the image"
        elif isinstance(segmentation["counts"], list):
            if not _covers(np.array(segmentation["counts"], dtype=np.int64), size):
                return b"", "with run lengths that do not make up the image"
            encoded = rle.frPyObjects(segmentation, *size)
        else:
            encoded = {"size": list(size), "counts": segmentation["counts"].encode("ascii")}
            if not _covers(_decoded(encoded["counts"]), size):
                return b"", "with run lengths that do not make up the image"
        if not empty and rle.area(encoded) == 0:
            return b"", "with an empty mask"
        counts: bytes = encoded["counts"]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return b"", "with a segmentation that is no mask"
    return counts, ""


def _fits(polygon: list[float]) -> bool:
    """Whether pycocotools, which checks nothing, can draw a polygon without running out of numbers or memory."""
    points = np.array(polygon).reshape(-1, 2)
    if not (np.abs(points) <= FARTHEST).all():  # nan is not
        return False
    return bool(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() <= LONGEST)


def _covers(counts: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether run lengths, int64 [n], are those of an image of ``size``; pycocotools writes beyond it if not."""
    total = size[0] * size[1]
    return counts.ndim == 1 and bool(((counts >= 0) & (counts <= total)).all()) and int(counts.sum()) == total


def _decoded(text: bytes) -> np.ndarray:
    """The run lengths of COCO's compressed form: int64 [n].

    Each is written in groups of five bits, lowest first, from the fourth on as the difference to the last but one.

    Raises:
        ValueError: no such text.
    """
    groups = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48  # [characters]
    ends = np.flatnonzero((groups & _CONTINUES) == 0)  # [n]
    if not len(ends) or ends[-1] != len(groups) - 1 or groups.min() < 0 or groups.max() > 63:
        raise ValueError("want characters 0 to o, the last one without continuation")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("want numbers of at most 35 bits")
    shift = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    values = np.add.reduceat((groups & 0x1F) << shift, starts)
    values -= np.where(groups[ends] & _SIGN, 1 << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
