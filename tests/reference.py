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


def iou(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes; 0 where the union is empty."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


def assign_iou(
    candidates: list[list[float]],
    boxes: list[list[float]],
    thresholds: tuple[float, float, float],
    low_quality: bool,
    ties: bool,
    allowed: list[bool],
) -> list[int]:
    """For each candidate of one image the row of its box, BACKGROUND or IGNORED; (positive, negative, least)."""
    positive, negative, least = thresholds
    overlaps = [[iou(candidate, box) for box in boxes] for candidate in candidates]
    rows = []
    for overlap, here in zip(overlaps, allowed, strict=True):
        best = max(overlap, default=0.0)
        row = overlap.index(best) if overlap and best >= positive else BACKGROUND if best < negative else IGNORED
        rows.append((row if overlap else BACKGROUND) if here else IGNORED)
    for box in range(len(boxes) if low_quality else 0):
        column = [overlap[box] if here else -1.0 for overlap, here in zip(overlaps, allowed, strict=True)]
        best = max(column, default=-1.0)
        if best <= 0 or best < least:
            continue
        for number, value in enumerate(column):
            if value == best and (ties or number == column.index(best)):
                rows[number] = box
    return rows


def encode(prior: list[float], box: list[float], stds: tuple[float, ...]) -> list[float]:
    """Centre offsets in sides of the prior and logarithms of ratios of sides, divided by ``stds``."""
    width, height = prior[2] - prior[0], prior[3] - prior[1]
    x, y = (box[0] + box[2] - prior[0] - prior[2]) / 2, (box[1] + box[3] - prior[1] - prior[3]) / 2
    offsets = (x / width, y / height, math.log((box[2] - box[0]) / width), math.log((box[3] - box[1]) / height))
    return [offset / std for offset, std in zip(offsets, stds, strict=True)]


def roi_align(
    features: Tensor, box: list[float], size: int, stride: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """[C, S, S] of one box on one map [C, H, W], sample by sample."""
    offset = 0.5 if aligned else 0.0
    x0, y0, x1, y1 = (side / stride - offset for side in box)
    width, height = x1 - x0, y1 - y0
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    down = sampling_ratio or math.ceil(height / size)
    across = sampling_ratio or math.ceil(width / size)
    pooled = []
    for row in range(size):
        for column in range(size):
            total = features.new_zeros(len(features))
            for j in range(down):
                for i in range(across):
                    y = y0 + (row + (j + 0.5) / down) * height / size
                    x = x0 + (column + (i + 0.5) / across) * width / size
                    total = total + _bilinear(features, y, x)
            pooled.append(total / max(down * across, 1))
    return torch.stack(pooled, dim=1).view(len(features), size, size)


def _bilinear(features: Tensor, y: float, x: float) -> Tensor:
    _, height, width = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return features.new_zeros(len(features))
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    total = features.new_zeros(len(features))
    for row in range(height):
        for column in range(width):
            weight = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
            if weight:
                total = total + weight * features[:, row, column]
    return total
