"""SoCo's selective search by its definition: scikit-image's graph segmentation restated as a loop, then our grouping.

The grouping is held against a slow loop by tests/data/test_grouping.py, so only the segmentation is written again.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from aligndet.data.grouping import group_segments
from aligndet.data.selective_search import filter_proposals

SCALE, SIGMA, MIN_SIZE = 300.0, 0.9, 100


def definition(image: np.ndarray) -> np.ndarray:
    """Proposals of an image uint8 [H, W, 3] as SoCo and the paper have them: float32 [m, 4] xyxy px."""
    boxes = group_segments(image, segments(image), quirks=True)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    return filter_proposals(boxes, (image.shape[0], image.shape[1]), min_size=32)


def segments(image: np.ndarray) -> np.ndarray:
    """Felzenszwalb's segments with eight neighbours, numbered by their first pixel: int32 [H, W]."""
    smooth = np.stack([ndimage.gaussian_filter(image[..., c] / 255.0, SIGMA) for c in range(3)], axis=-1)
    height, width = image.shape[:2]
    pixels = np.arange(height * width).reshape(height, width)
    steps = [
        (np.s_[:, 1:], np.s_[:, :-1]),
        (np.s_[1:], np.s_[:-1]),
        (np.s_[1:, 1:], np.s_[:-1, :-1]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ]
    costs = np.concatenate([np.sqrt(((smooth[a] - smooth[b]) ** 2).sum(axis=-1)).ravel() for a, b in steps])
    edges = np.concatenate([np.stack([pixels[a].ravel(), pixels[b].ravel()], axis=1) for a, b in steps])
    order = np.argsort(costs, kind="stable")
    parents, sizes = list(range(pixels.size)), [1] * pixels.size
    _join_alike(edges[order].tolist(), costs[order].tolist(), parents, sizes)
    left = edges[order][_differ(edges[order], parents)]
    for a, b in left.tolist():
        a, b = _root(parents, a), _root(parents, b)
        if a != b and min(sizes[a], sizes[b]) < MIN_SIZE:
            _join(parents, sizes, a, b)
    roots = [_root(parents, pixel) for pixel in range(pixels.size)]
    return np.unique(roots, return_inverse=True)[1].reshape(height, width).astype(np.int32)


def _join_alike(edges: list[list[int]], costs: list[float], parents: list[int], sizes: list[int]) -> None:
    """Join the two ends of each edge, cheapest first, whose cost is below what either end allows."""
    allowed = [SCALE / 255.0] * len(parents)  # largest cost inside + scale / size
    for (a, b), cost in zip(edges, costs, strict=True):
        a, b = _root(parents, a), _root(parents, b)
        if a != b and cost < allowed[a] and cost < allowed[b]:
            root = _join(parents, sizes, a, b)
            allowed[root] = cost + SCALE / 255.0 / sizes[root]


def _join(parents: list[int], sizes: list[int], a: int, b: int) -> int:
    root, other = min(a, b), max(a, b)
    parents[other] = root
    sizes[root] += sizes[other]
    return root


def _root(parents: list[int], pixel: int) -> int:
    while parents[pixel] != pixel:
        parents[pixel] = pixel = parents[parents[pixel]]
    return pixel


def _differ(edges: np.ndarray, parents: list[int]) -> np.ndarray:
    roots = np.array([_root(parents, pixel) for pixel in range(len(parents))])
    return roots[edges[:, 0]] != roots[edges[:, 1]]
