"""Boxes of likely objects in one image: selective search, ours or OpenCV's, and the filter of the paper. No torch."""

from __future__ import annotations

import math

import cv2
import numpy as np

from aligndet.data.grouping import soco_search

MODES = ("soco", "single", "fast", "quality")
LARGEST = 2048  # px, upper bound of the longest side that is searched
SMALLEST = 4  # px, images with a shorter side hold no region worth a search
REFERENCE_SIDE, REFERENCE_MIN_SIZE = 640, 32.0  # px; the paper's 32 px were chosen for COCO, longest side 640
FIRST_K = {"soco": 300, "single": 200, "fast": 150, "quality": 150}  # SoCo's, and OpenCV's defaults
SIGMA = {"soco": 0.9, "single": 0.8, "fast": 0.8, "quality": 0.8}  # px
K_STEP = 150  # between the graph segmentations of "fast" (3) and "quality" (5); OpenCV's default


def selective_search(
    image: np.ndarray,
    *,
    mode: str = "soco",
    size: int | None = None,
    k: int | None = None,
    sigma: float | None = None,
    quirks: bool = False,
) -> np.ndarray:
    """Boxes around the regions that a hierarchical grouping of the image's segments passes through, unfiltered.

    OpenCV returns them in an order drawn from a generator that cannot be seeded; here the order is fixed: largest area
    first, equal areas by y0, x0, y1, x1. The same image gives the same boxes, with any number of threads.

    Args:
        image: uint8 [H, W, 3] RGB.
        mode: "soco" is SoCo's grouping (``soco_search``), which the paper's proposals come from. The others are
            OpenCV's: "single" (1 grouping), "fast" (12: 2 colour spaces x 3 segmentations x 2 similarities) and
            "quality" (100). About 1 : 1.5 : 9 : 30 in time (benchmarks/proposals.py).
        size: px, images with a longer side are shrunk to it before the search (never enlarged); None searches at full
            resolution. In either case never more than 2048 px: the memory of OpenCV's search grows with the square of
            the longest side and of the number of segments.
        k: scale of the first graph segmentation, larger gives fewer segments; None is 300 for "soco", 200 for
            "single", 150 for the others, which add 150 for each further one.
        sigma: px, Gaussian blur before the segmentation; None is 0.9 for "soco", 0.8 for the others.
        quirks: reproduce what SoCo's own code does differently from its text; only with "soco".

    Returns:
        float32 [M, 4] xyxy px of the given image, half-open, inside it, no two equal, x0 < x1 and y0 < y1. A flat image
        gives one box, the whole image; so does one with a side under 4 px, which is not searched.

    Raises:
        ValueError: unknown mode, an image of another kind, or a size, k or sigma out of range.

    Source:
        Uijlings et al., Selective Search for Object Recognition (IJCV 2013), as implemented in OpenCV's ximgproc.
    """
    check_search(mode=mode, size=size, k=k, sigma=sigma, quirks=quirks)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image: want uint8 [H, W, 3] with H, W >= 1, got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    longest = min(LARGEST, size or LARGEST)
    scale = min(1.0, longest / max(height, width))
    shrunk = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    if min(shrunk) < SMALLEST:
        return np.array([[0, 0, width, height]], dtype=np.float32)
    if scale < 1:
        image = cv2.resize(image, (shrunk[1], shrunk[0]), interpolation=cv2.INTER_AREA)
    k, sigma = FIRST_K[mode] if k is None else k, SIGMA[mode] if sigma is None else sigma
    found = soco_search(image, k, sigma, quirks=quirks) if mode == "soco" else _opencv_search(image, mode, k, sigma)
    found = np.unique(found[(found[:, 2:] > found[:, :2]).all(axis=1)], axis=0)
    # Width and height have factors of their own, since each was rounded.
    factors = np.array([width / shrunk[1], height / shrunk[0]] * 2)
    boxes = (found * factors).clip(0, [width, height, width, height]).astype(np.float32)
    return boxes[largest_first(boxes)]


def filter_proposals(
    boxes: np.ndarray,
    size: tuple[int, int],
    *,
    min_size: float | None = None,
    max_aspect: float = 3.0,
    max_ratio: float = 0.8,
    nms: float = 0.5,
    limit: int | None = None,
) -> np.ndarray:
    """The boxes of plausible objects: not too small, too long or too large, no two of them nearly the same.

    A box passes with ``w, h >= min_size``, ``1 / max_aspect <= w / h <= max_aspect`` and
    ``sqrt(w h) <= max_ratio sqrt(W H)``; all bounds are inclusive. Then greedy non-maximum suppression: proposals have
    no scores, so the larger box of an overlapping pair stays.

    Args:
        boxes: float [M, 4] xyxy px.
        size: (height, width) px of their image.
        min_size: px, taken literally; None is 32 px, scaled down in proportion for images whose longest side is under
            640 px: ``32 * min(1, longest / 640)``.
        max_aspect: >= 1, unitless.
        max_ratio: > 0, unitless.
        nms: a box is dropped where its IoU with a kept one is above this; 1 keeps all.
        limit: at most so many boxes, taken at even steps through the order by area so that all sizes stay represented;
            None keeps all.

    Returns:
        float32 [m, 4], largest area first, equal areas by y0, x0, y1, x1; [0, 4] where none is left.

    Raises:
        ValueError: a bound out of range, or boxes of another shape.

    Source:
        AlignDet's proposal files ("ratio3size0008@0.5"), whose order after the suppression is not published.
    """
    check_filter(min_size=min_size, max_aspect=max_aspect, max_ratio=max_ratio, nms=nms, limit=limit)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: want [M, 4], got {list(boxes.shape)}")
    if min_size is None:
        min_size = REFERENCE_MIN_SIZE * min(1.0, max(size) / REFERENCE_SIDE)
    boxes = boxes.astype(np.float32, copy=False)
    widths, heights = (boxes[:, 2:].astype(np.float64) - boxes[:, :2]).T
    keep = (np.minimum(widths, heights) >= min_size) & (widths * heights <= max_ratio**2 * size[0] * size[1])
    keep &= (widths <= max_aspect * heights) & (heights <= max_aspect * widths)
    boxes = boxes[keep]
    boxes = boxes[largest_first(boxes)]
    boxes = boxes[suppress(boxes, nms)]
    if limit is not None and len(boxes) > limit:
        boxes = boxes[np.linspace(0, len(boxes) - 1, limit).astype(np.int64)]
    return boxes


def largest_first(boxes: np.ndarray) -> np.ndarray:
    """int64 [M], the order of ``boxes`` [M, 4] by area, largest first; equal areas by y0, x0, y1, x1."""
    x0, y0, x1, y1 = boxes.astype(np.float64).T
    return np.lexsort((x1, y1, x0, y0, -(x1 - x0) * (y1 - y0)))


def suppress(boxes: np.ndarray, threshold: float) -> np.ndarray:
    """int64 [m], rows of ``boxes`` [M, 4] that greedy suppression keeps: of two with a higher IoU the earlier one."""
    corners = boxes.astype(np.float64)
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    rows, kept = np.arange(len(boxes)), []
    while len(rows):
        first, rows = rows[0], rows[1:]
        kept.append(first)
        low = np.maximum(corners[first, :2], corners[rows, :2])
        high = np.minimum(corners[first, 2:], corners[rows, 2:])
        overlap = (high - low).clip(min=0).prod(axis=1)
        rows = rows[overlap <= threshold * (areas[first] + areas[rows] - overlap)]
    return np.array(kept, dtype=np.int64)


def check_search(*, mode: str, size: int | None, k: int | None, sigma: float | None, quirks: bool) -> None:
    """Refuse settings that ``selective_search`` cannot work with: ValueError naming the setting."""
    if mode not in MODES:
        raise ValueError(f"mode: want one of {', '.join(MODES)}, got {mode!r}")
    _check_number("size", size, least=SMALLEST)
    _check_number("k", k, least=1)
    _check_number("sigma", sigma, least=0)
    if quirks and mode != "soco":
        raise ValueError(f"quirks: want mode soco, which alone has them, got {mode!r}")


def check_filter(*, min_size: float | None, max_aspect: float, max_ratio: float, nms: float, limit: int | None) -> None:
    """Refuse settings that ``filter_proposals`` cannot work with: ValueError naming the setting."""
    _check_number("min_size", min_size, least=0)
    _check_number("max_aspect", max_aspect, least=1)
    _check_number("max_ratio", max_ratio, least=0)
    _check_number("nms", nms, least=0, most=1)
    _check_number("limit", limit, least=1)


def _check_number(name: str, value: float | None, *, least: float, most: float = math.inf) -> None:
    if value is not None and not (least <= value <= most and math.isfinite(value)):
        bound = f"in {least:g} .. {most:g}" if math.isfinite(most) else f"of at least {least:g}"
        raise ValueError(f"{name}: want a finite number {bound}, got {value!r}")


def _opencv_search(image: np.ndarray, mode: str, k: int, sigma: float) -> np.ndarray:
    """The boxes of OpenCV's search, in its random order: float64 [M, 4] xyxy px."""
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR))
    if mode == "single":
        search.switchToSingleStrategy(k, sigma)
    elif mode == "fast":
        search.switchToSelectiveSearchFast(k, K_STEP, sigma)
    else:
        search.switchToSelectiveSearchQuality(k, K_STEP, sigma)
    rects = np.asarray(search.process(), dtype=np.float64)  # [M, 4] x, y, width, height
    return np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:]], axis=1)
