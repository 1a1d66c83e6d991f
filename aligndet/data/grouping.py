"""Selective search of SoCo's kind: OpenCV's graph segmentation, then greedy grouping of its segments, in numpy."""

from __future__ import annotations

import heapq

import cv2
import numpy as np
from scipy import ndimage

LEAST_SEGMENT = 100  # px², smaller segments are joined to a neighbour by the graph segmentation
COLOUR_BINS, TEXTURE_BINS = 25, 10  # of each channel, over 0 .. 255
BINS = 3 * COLOUR_BINS + 3 * TEXTURE_BINS
# Bilinear weights of the point at distance 1 on the diagonal, in 1/16384: its corner, two edge pixels, the centre.
# Whole numbers, so that a flat neighbourhood compares as equal and not as its rounding would have it.
_CORNER, _EDGE, _CENTRE, _ONE = 8192, 3393, 1406, 16384


class Regions:
    """Segments and what they were merged into: row i < R is segment i, each later row the union of two earlier ones.

    Attributes:
        histograms: float64 [2R - 1, 105], 3 x 25 of colour and 3 x 10 of texture, each group of bins sums to 1.
        sizes: float64 [2R - 1] px².
        boxes: float64 [2R - 1, 4] xyxy px; half-open, with ``quirks`` up to the last pixel only.
        count: rows in use.
    """

    def __init__(self, image: np.ndarray, labels: np.ndarray, *, quirks: bool) -> None:
        """Describe the segments ``labels`` int32 [H, W], 0 .. R-1, of ``image`` uint8 [H, W, 3] RGB."""
        self.count = int(labels.max()) + 1
        self.area = float(labels.size)
        rows = 2 * self.count - 1
        self.histograms, self.sizes, self.boxes = np.zeros((rows, BINS)), np.zeros(rows), np.zeros((rows, 4))
        sizes = np.bincount(labels.ravel(), minlength=self.count)
        self.sizes[: self.count] = sizes
        self.histograms[: self.count] = _histograms(image, labels, self.count, quirks) / sizes[:, None]
        last = 1 if quirks else 0
        for row, (y, x) in enumerate(ndimage.find_objects(labels + 1)):
            self.boxes[row] = x.start, y.start, x.stop - last, y.stop - last

    def merge(self, i: int, j: int) -> int:
        """Append the union of rows i and j; returns its row."""
        row, size = self.count, self.sizes[i] + self.sizes[j]
        share = self.sizes[i] / size
        self.histograms[row] = share * self.histograms[i] + (1 - share) * self.histograms[j]
        self.sizes[row] = size
        self.boxes[row, :2] = np.minimum(self.boxes[i, :2], self.boxes[j, :2])
        self.boxes[row, 2:] = np.maximum(self.boxes[i, 2:], self.boxes[j, 2:])
        self.count += 1
        return row

    def similarity(self, i: int | np.ndarray, j: np.ndarray) -> np.ndarray:
        """How well rows ``i`` and ``j`` [n] go together: float64 [n], 0 .. 8; shared bins, smallness and tightness."""
        shared = np.minimum(self.histograms[i], self.histograms[j]).sum(axis=1)
        low = np.minimum(self.boxes[i, ..., :2], self.boxes[j, :2])
        sides = np.maximum(self.boxes[i, ..., 2:], self.boxes[j, 2:]) - low
        # (1 - (a + b) / im) + (1 - (hull - a - b) / im): the sizes a and b cancel.
        result: np.ndarray = shared + 2 - sides[:, 0] * sides[:, 1] / self.area
        return result


def soco_search(image: np.ndarray, k: float, sigma: float, *, quirks: bool = False) -> np.ndarray:
    """The boxes of all segments of an image and of all regions that a greedy grouping passes through.

    Args:
        image: uint8 [H, W, 3] RGB.
        k: scale of the graph segmentation, larger gives fewer segments.
        sigma: px, Gaussian blur before it.
        quirks: see ``group_segments``.

    Returns:
        float64 [M, 4] xyxy px, as from ``group_segments``. A flat image gives one.

    Source:
        SoCo (arXiv:2106.02637), its selective search; method of Uijlings et al. (IJCV 2013). Its segmentation is
        scikit-image's, with the same three parameters (scale 300, sigma 0.9, min_size 100), but there a pixel has eight
        neighbours and in OpenCV's four, which gives more segments (benchmarks/proposals.py).
    """
    segmentation = cv2.ximgproc.segmentation.createGraphSegmentation(sigma, float(k), LEAST_SEGMENT)
    return group_segments(image, segmentation.processImage(np.ascontiguousarray(image)), quirks=quirks)


def group_segments(image: np.ndarray, labels: np.ndarray, *, quirks: bool = False) -> np.ndarray:
    """The boxes of the segments ``labels`` of an image and of the regions that they are merged into one by one.

    Regions that touch (share the side of a pixel) are pairs. The most similar pair is merged into a new region, which
    inherits the neighbours of both; of equally similar pairs, the one that came up last. That goes on until no pair is
    left. Similarity is the intersection of the colour and of the texture histograms, plus 1 less the share of the
    image that both cover, plus 1 less the share of the image that their common box has in excess of them.

    Args:
        image: uint8 [H, W, 3] RGB.
        labels: int32 [H, W], 0 .. R-1, each of them somewhere.
        quirks: as SoCo's own code: hue and saturation fall into one bin, a pair is an earlier region that has a corner
            of a later one strictly inside its box, and boxes end on their last pixel, which also enters the similarity.

    Returns:
        float64 [M, 4] xyxy px, segments first, then unions as they were made; boxes may be equal, and with ``quirks``
        have no area.
    """
    regions = Regions(image, labels, quirks=quirks)
    pairs = corner_inside(regions.boxes[: regions.count]) if quirks else touching(labels)
    _group(regions, pairs)
    return regions.boxes[: regions.count]


def touching(labels: np.ndarray) -> np.ndarray:
    """The pairs of labels [H, W] that share the side of a pixel: int64 [P, 2], i < j, ascending, each once."""
    count, codes = int(labels.max()) + 1, []
    for a, b in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        border = a != b
        one, other = a[border].astype(np.int64), b[border].astype(np.int64)
        codes.append(np.minimum(one, other) * count + np.maximum(one, other))
    return np.stack(np.divmod(np.unique(np.concatenate(codes)), count), axis=1)


def corner_inside(boxes: np.ndarray) -> np.ndarray:
    """The pairs i < j of boxes [R, 4] where a corner of box j lies strictly inside box i: int64 [P, 2], ascending."""
    x, y = boxes[:, ::2], boxes[:, 1::2]  # [R, 2] each: both ends
    x_inside = (x[:, None, :1] < x[None]) & (x[None] < x[:, None, 1:])  # [R, R, 2]
    y_inside = (y[:, None, :1] < y[None]) & (y[None] < y[:, None, 1:])
    return np.argwhere(np.triu(x_inside.any(axis=2) & y_inside.any(axis=2), 1))


def local_binary_patterns(image: np.ndarray) -> np.ndarray:
    """Which of the 8 points at distance 1 around a pixel are at least as bright as it: uint8, of ``image``'s shape.

    ``image`` is uint8 [H, W, C]. Bit p is the point at the angle of p * 45 degrees from the right, counter-clockwise;
    those on diagonals are interpolated. Outside the image is 0.
    """
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    height, width = image.shape[:2]
    floats = image.astype(np.float32)
    codes = np.zeros_like(image)
    for bit, (down, right) in enumerate(((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))):
        if down == 0 or right == 0:
            at_least = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width] >= image
        else:
            kernel = np.zeros((3, 3), np.float32)
            kernel[1 + down, 1 + right], kernel[1, 1] = _CORNER, _CENTRE - _ONE
            kernel[1 + down, 1] = kernel[1, 1 + right] = _EDGE
            # Whole numbers below 2^24: exact in float32.
            at_least = cv2.filter2D(floats, cv2.CV_32F, kernel, borderType=cv2.BORDER_CONSTANT) >= 0
        codes |= at_least.reshape(image.shape).view(np.uint8) << bit
    return codes


def _histograms(image: np.ndarray, labels: np.ndarray, count: int, quirks: bool) -> np.ndarray:
    """Pixels of each segment in each bin: float64 [R, 105]."""
    hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV_FULL)
    if quirks:
        hsv[..., :2] = 0
    channels = [(hsv, COLOUR_BINS), (local_binary_patterns(image), TEXTURE_BINS)]
    start, columns = labels.ravel().astype(np.int64), []
    for values, bins in channels:
        bin_of = np.minimum(np.arange(256) * bins // 255, bins - 1)  # np.histogram(range=(0, 255)) of whole numbers
        for channel in range(3):
            index = start * bins + bin_of[values[..., channel].ravel()]
            columns.append(np.bincount(index, minlength=count * bins).reshape(count, bins))
    return np.concatenate(columns, axis=1).astype(np.float64)


def _group(regions: Regions, pairs: np.ndarray) -> None:
    """Merge the most similar pair until none is left; a pair [2] is rows of ``regions``, in the order they came up."""
    scores = regions.similarity(pairs[:, 0], pairs[:, 1])
    neighbours: dict[int, dict[int, int]] = {row: {} for row in range(regions.count)}  # neighbour -> when it came up
    queue = []
    for turn, ((i, j), score) in enumerate(zip(pairs.tolist(), scores.tolist(), strict=True)):
        neighbours[i][j] = neighbours[j][i] = turn
        queue.append((-score, -turn, i, j))
    heapq.heapify(queue)
    turn = len(queue)
    while queue:
        _, _, i, j = heapq.heappop(queue)
        if i not in neighbours or j not in neighbours:
            continue
        row = regions.merge(i, j)
        came = neighbours.pop(i)
        for other, when in neighbours.pop(j).items():
            came[other] = min(when, came.get(other, when))
        del came[i], came[j]
        others = sorted(came, key=came.__getitem__)
        neighbours[row] = {}
        if not others:
            continue
        for other, score in zip(others, regions.similarity(row, np.array(others)).tolist(), strict=True):
            for gone in (i, j):
                neighbours[other].pop(gone, None)
            neighbours[row][other] = neighbours[other][row] = turn
            heapq.heappush(queue, (-score, -turn, row, other))
            turn += 1
