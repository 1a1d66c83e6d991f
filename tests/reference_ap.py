"""Average precision written down slowly: one class, one IoU threshold, no crowds, no area ranges."""

from __future__ import annotations

Box = tuple[float, float, float, float]


def iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def average_precision(
    truth: dict[int, list[Box]], found: dict[int, list[tuple[float, Box]]], threshold: float
) -> float | None:
    """Precision at 101 recalls; None where there is nothing to find.

    Args:
        truth: boxes by image.
        found: (score, box) by image; scores are all different.
    """
    number = sum(len(boxes) for boxes in truth.values())
    if number == 0:
        return None
    hits: list[tuple[float, bool]] = []
    for image, rows in found.items():
        free = list(truth.get(image, []))
        for score, box in sorted(rows, reverse=True)[:100]:
            best = max(free, key=lambda other: iou(box, other), default=None)
            hit = best is not None and iou(box, best) >= threshold
            if hit:
                free.remove(best)
            hits.append((score, hit))
    hits.sort(reverse=True)
    points = []
    right = 0
    for rank, (_, hit) in enumerate(hits, start=1):
        right += hit
        points.append((right / number, right / rank))
    total = 0.0
    for percent in range(101):
        total += max((precision for recall, precision in points if recall >= percent / 100 - 1e-12), default=0.0)
    return total / 101
