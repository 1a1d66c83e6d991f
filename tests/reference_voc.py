"""VOC's average precision written down slowly, as in the development kit: loops, inclusive corners with + 1."""

from __future__ import annotations

import itertools
from fractions import Fraction

Box = tuple[float, float, float, float]  # inclusive corners that count from 1


def overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def voc_ap(
    truth: dict[int, list[tuple[Box, bool]]], found: list[tuple[float, int, Box]], least: float, eleven: bool
) -> Fraction | None:
    """One class. ``truth``: (box, difficult) by image; ``found``: (score, image, box), scores all different."""
    number = sum(not difficult for rows in truth.values() for _, difficult in rows)
    if not number:
        return None
    taken: set[tuple[int, int]] = set()
    right = wrong = 0
    points: list[tuple[Fraction, Fraction]] = []  # recall, precision
    for _, image, box in sorted(found, reverse=True):
        best, place = -1.0, -1
        for index, (other, _) in enumerate(truth.get(image, [])):
            if overlap(box, other) > best:
                best, place = overlap(box, other), index
        if best >= least:
            if truth[image][place][1]:
                continue
            if (image, place) in taken:
                wrong += 1
            else:
                taken.add((image, place))
                right += 1
        else:
            wrong += 1
        points.append((Fraction(right, number), Fraction(right, right + wrong)))

    def highest(recall: Fraction) -> Fraction:
        return max((precision for at, precision in points if at >= recall), default=Fraction(0))

    if eleven:
        return sum((highest(Fraction(step, 10)) for step in range(11)), Fraction(0)) / 11
    recalls = [Fraction(0), *sorted({recall for recall, _ in points})]
    return sum(
        ((b - a) * highest(b) for a, b in itertools.pairwise(recalls)),
        Fraction(0),
    )
