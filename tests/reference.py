"""Slow, obviously right versions: one candidate, one box, one pair at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aligndet.structures import BACKGROUND, IGNORED


def box_contrastive_loss(
    query: Tensor, query_ids: list[int], key: Tensor, key_ids: list[int], temperature: float
) -> Tensor:
    """Mean over boxes of the mean over (query, key) pairs of -log(e^s / (e^s + sum of e^negatives))."""

    online = [row / row.norm() for row in query]
    momentum = [(row / row.norm()).detach() for row in key]
    everyone = list(zip([*query_ids, *key_ids], [row.detach() for row in online] + momentum, strict=True))
    costs: dict[int, list[Tensor]] = {}
    for row, box in zip(online, query_ids, strict=True):
        if box < 0:
            continue
        rest = query.new_zeros(())
        for other, negative in everyone:
            if other != box and other != IGNORED:
                rest = rest + (row @ negative / temperature).exp()
        for other, candidate in zip(key_ids, momentum, strict=True):
            if other == box:
                positive = (row @ candidate / temperature).exp()
                costs.setdefault(box, []).append(-(positive / (positive + rest)).log())
    if not costs:
        return query.sum() * 0
    return torch.stack([torch.stack(pairs).mean() for pairs in costs.values()]).mean()


def assign_center(
    points: list[tuple[float, float]],
    ranges: list[tuple[float, float]],
    boxes: list[list[float]],
    radius: list[float] | None = None,
) -> list[int]:
    """For each point of one image the row of its box, or BACKGROUND."""
    rows = []
    for index, ((x, y), (low, high)) in enumerate(zip(points, ranges, strict=True)):
        best, best_area = BACKGROUND, math.inf
        for row, (x0, y0, x1, y1) in enumerate(boxes):
            sides = (x - x0, y - y0, x1 - x, y1 - y)
            central = radius is None or (
                abs(x - (x0 + x1) / 2) <= radius[index] and abs(y - (y0 + y1) / 2) <= radius[index]
            )
            area = (x1 - x0) * (y1 - y0)
            if min(sides) > 0 and low <= max(sides) <= high and central and area < best_area:
                best, best_area = row, area
        rows.append(best)
    return rows


def focal_loss(scores: list[list[float]], labels: list[int], alpha: float, gamma: float) -> float:
    """Summed over candidates and classes; IGNORED rows cost nothing."""
    total = 0.0
    for row, label in zip(scores, labels, strict=True):
        for k, score in enumerate(row):
            p = 1 / (1 + math.exp(-score))
            p_true, weight = (p, alpha) if k == label else (1 - p, 1 - alpha)
            total += 0 if label == IGNORED else -weight * (1 - p_true) ** gamma * math.log(p_true)
    return total
