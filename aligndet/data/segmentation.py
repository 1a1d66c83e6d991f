"""COCO's three ways to write a mask, as one."""

from __future__ import annotations

from typing import Any

from pycocotools import mask as rle


def run_lengths(segmentation: Any, size: tuple[int, int]) -> tuple[bytes, str]:
    """A mask as compressed run lengths, or why it is none.

    Args:
        segmentation: list of polygons (x, y, x, y ... px), or {"size", "counts"} with run lengths in plain or in
            compressed form.
        size: (height, width) px of the image.

    Returns:
        The bytes and "", or b"" and the reason.
    """
    if min(size) <= 0:
        return b"", "the file does not say how large the image is, which masks need"
    if not segmentation:
        return b"", "without a segmentation"
    try:
        if isinstance(segmentation, list):
            polygons = [[float(x) for x in polygon] for polygon in segmentation if len(polygon) >= 6]
            if not polygons or any(len(polygon) % 2 for polygon in polygons):
                return b"", "with a polygon of fewer than three points or half a point"
            encoded = rle.merge(rle.frPyObjects(polygons, *size))
        elif list(segmentation["size"]) != list(size):
            return b"", "with a mask of another size than the image"
        elif isinstance(segmentation["counts"], list):
            encoded = rle.frPyObjects(segmentation, *size)
        else:
            encoded = {"size": list(size), "counts": segmentation["counts"].encode("ascii")}
        if rle.area(encoded) == 0:
            return b"", "with an empty mask"
        counts: bytes = encoded["counts"]
    except (TypeError, ValueError, KeyError, AttributeError, UnicodeEncodeError):
        return b"", "with a segmentation that is no mask"
    return counts, ""
