"""SoCo's grouping, slow and obviously right: one pixel, one bin, one pair of regions at a time."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

Region = dict[str, Any]  # pixels, colour, texture, box


def soco_boxes(image: np.ndarray, labels: np.ndarray, *, quirks: bool) -> list[tuple[int, ...]]:
    """Boxes of the segments ``labels`` of an RGB image and of all merged regions, in the order they come up."""
    regions = [describe(image, labels == label, quirks) for label in range(labels.max() + 1)]
    area = labels.size
    pairs: dict[tuple[int, int], float] = {}  # in the order they came up
    for j in range(len(regions)):
        for i in range(len(regions)):
            near = corner_inside(regions[i]["box"], regions[j]["box"]) if quirks else touch(labels, i, j)
            if i < j and near:
                pairs[i, j] = similarity(regions[i], regions[j], area)
    pairs = dict(sorted(pairs.items()))
    while pairs:
        i, j = sorted(pairs, key=lambda pair: pairs[pair])[-1]  # stable: of equal ones the last
        regions.append(union(regions[i], regions[j]))
        ended = [pair for pair in pairs if i in pair or j in pair]
        for pair in ended:
            del pairs[pair]
        for pair in ended:
            others = [row for row in pair if row not in (i, j)]
            for other in others:
                new = len(regions) - 1, other
                if new not in pairs:
                    pairs[new] = similarity(regions[-1], regions[other], area)
    return [region["box"] for region in regions]


def describe(image: np.ndarray, inside: np.ndarray, quirks: bool) -> Region:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    rows, columns = inside.nonzero()
    pixels = list(zip(rows.tolist(), columns.tolist(), strict=True))
    colour = [[0] * 25 for _ in range(3)]
    texture = [[0] * 10 for _ in range(3)]
    for y, x in pixels:
        for channel in range(3):
            value = hsv[y, x, channel] / 255 if quirks and channel < 2 else float(hsv[y, x, channel])
            colour[channel][min(math.floor(value * 25 / 255), 24)] += 1
            texture[channel][min(math.floor(pattern(image[..., channel], y, x) * 10 / 255), 9)] += 1
    last = 0 if quirks else 1
    box = min(columns), min(rows), max(columns) + last, max(rows) + last
    shares = [[[n / len(pixels) for n in bins] for bins in channels] for channels in (colour, texture)]
    return {"pixels": len(pixels), "colour": shares[0], "texture": shares[1], "box": tuple(map(int, box))}


def pattern(channel: np.ndarray, y: int, x: int) -> int:
    """Local binary pattern of one pixel; outside is 0."""

    def at(row: int, column: int) -> float:
        inside = 0 <= row < channel.shape[0] and 0 <= column < channel.shape[1]
        return float(channel[row, column]) if inside else 0.0

    code = 0
    for point in range(8):
        down, right = -math.sin(point * math.pi / 4), math.cos(point * math.pi / 4)
        towards_y, towards_x = round(math.copysign(1, down)), round(math.copysign(1, right))
        share_y, share_x = abs(down), abs(right)
        value = (1 - share_y) * ((1 - share_x) * at(y, x) + share_x * at(y, x + towards_x)) + share_y * (
            (1 - share_x) * at(y + towards_y, x) + share_x * at(y + towards_y, x + towards_x)
        )
        # Grey values are whole numbers: nearer than the rounding of the weights is equal.
        code += 2**point * (value >= at(y, x) - 0.004)
    return code


def touch(labels: np.ndarray, i: int, j: int) -> bool:
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            for other in ((y + 1, x), (y, x + 1)):
                if other[0] < height and other[1] < width and {labels[y, x], labels[other]} == {i, j}:
                    return True
    return False


def corner_inside(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether a corner of box b lies strictly inside box a."""
    return any(a[0] < x < a[2] and a[1] < y < a[3] for x in (b[0], b[2]) for y in (b[1], b[3]))


def similarity(a: Region, b: Region, area: int) -> float:
    shared = 0.0
    for kind in ("colour", "texture"):
        for one, other in zip(a[kind], b[kind], strict=True):
            shared += sum(min(p, q) for p, q in zip(one, other, strict=True))
    x0, y0, x1, y1 = hull(a["box"], b["box"])
    both = a["pixels"] + b["pixels"]
    return shared + (1 - both / area) + (1 - ((x1 - x0) * (y1 - y0) - both) / area)


def union(a: Region, b: Region) -> Region:
    both = a["pixels"] + b["pixels"]
    merged: Region = {"pixels": both, "box": hull(a["box"], b["box"])}
    for kind in ("colour", "texture"):
        merged[kind] = [
            [(a["pixels"] * p + b["pixels"] * q) / both for p, q in zip(one, other, strict=True)]
            for one, other in zip(a[kind], b[kind], strict=True)
        ]
    return merged


def hull(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
