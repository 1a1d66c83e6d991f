"""Slow, obviously right versions: one candidate, one box, one pair at a time."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.models.transformer import Transformer
from aligndet.structures import BACKGROUND, IGNORED


def box_contrastive_loss(
    query: Tensor,
    query_ids: list[int],
    key: Tensor,
    key_ids: list[int],
    temperature: float,
    positives: str = "keys",
    own_keys: bool = False,
    reduction: str = "boxes",
) -> Tensor:
    """Mean over boxes of the mean over (query, key) pairs of -log(e^s / (e^s + sum of e^negatives))."""

    online = [row / row.norm() for row in query]
    momentum = [(row / row.norm()).detach() for row in key]
    constants = [row.detach() for row in online]
    everyone = list(zip([*query_ids, *key_ids], constants + momentum, strict=True))
    costs: dict[int, list[Tensor]] = {}
    means = []
    for number, (row, box) in enumerate(zip(online, query_ids, strict=True)):
        if box < 0:
            continue
        rest = query.new_zeros(())
        for other, negative in everyone:
            if other != box and other != IGNORED:
                rest = rest + (row @ negative / temperature).exp()
        keys = [candidate for other, candidate in zip(key_ids, momentum, strict=True) if other == box]
        mates = [constants[i] for i, other in enumerate(query_ids) if other == box and i != number]
        if not keys and own_keys:
            keys = [online[i] for i, other in enumerate(query_ids) if other == box]
        pairs = []
        for candidate in keys + (mates if positives == "both" else []):
            positive = (row @ candidate / temperature).exp()
            pairs.append(-(positive / (positive + rest)).log())
        costs.setdefault(box, []).extend(pairs)
        means += [torch.stack(pairs).mean()] if pairs else []
    filled = [pairs for pairs in costs.values() if pairs]
    if not filled:
        return query.sum() * 0
    if reduction == "sum":
        return torch.stack([pair for pairs in filled for pair in pairs]).sum()
    if reduction == "queries":
        return torch.stack(means).mean()
    return torch.stack([torch.stack(pairs).mean() for pairs in filled]).mean()


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
                abs(x - (x0 + x1) / 2) < radius[index] and abs(y - (y0 + y1) / 2) < radius[index]
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


def generalized_iou(a: list[float], b: list[float]) -> float:
    """Overlap over union less the uncovered share of the enclosing box; boxes with area."""
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    union = sum(area) - max(0.0, width) * max(0.0, height)
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return iou(a, b) - (hull - union) / hull


def hungarian_costs(
    queries: list[list[float]],
    probabilities: list[list[float]] | None,
    boxes: list[list[float]],
    labels: list[int],
    size: tuple[int, int],
) -> list[list[float]]:
    """For each box of one image and each query (centre x, centre y, width, height in shares): the cost of the pair."""
    height, width = size
    table = []
    for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
        shares = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
        row = []
        for number, (x, y, w, h) in enumerate(queries):
            corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            cost = 5 * sum(abs(a - b) for a, b in zip((x, y, w, h), shares, strict=True))
            cost -= 2 * generalized_iou(corners, [x0, y0, x1, y1])
            row.append(cost - (probabilities[number][label] if probabilities else 0.0))
        table.append(row)
    return table


def cheapest(table: list[list[float]]) -> float:
    """The smallest total cost of giving every row a column of its own (or every column a row), by trying all."""
    if len(table) > len(table[0]):
        table = [list(column) for column in zip(*table, strict=True)]
    orders = itertools.permutations(range(len(table[0])), len(table))
    return min(sum(row[column] for row, column in zip(table, order, strict=True)) for order in orders)


def attention(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, hidden: list[bool]) -> Tensor:
    """Multi-head attention of one image, one query and one head at a time: [Q, C], [P, C], [P, C] -> [Q, C]."""
    channels = query.shape[1]
    each = channels // module.num_heads
    weights, biases = module.in_proj_weight.split(channels), module.in_proj_bias.split(channels)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    seen = [number for number, away in enumerate(hidden) if not away]
    rows = []
    for row in q:
        heads = []
        for head in range(module.num_heads):
            part = slice(head * each, (head + 1) * each)
            scores = torch.stack([row[part] @ k[number, part] / math.sqrt(each) for number in seen])
            shares = scores.exp() / scores.exp().sum()
            heads.append(
                sum((share * v[number, part] for share, number in zip(shares, seen, strict=True)), q.new_zeros(each))
            )
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ module.out_proj.weight.T + module.out_proj.bias


def detr(head: Transformer, cells: Tensor, rows: int, columns: int) -> Tensor:
    """DETR's transformer on one image [C, H, W] of which ``rows`` and ``columns`` show the image: [L, Q, C]."""
    channels, height, width = cells.shape
    half = channels // 2
    positions, hidden, values = [], [], []
    for y in range(height):
        for x in range(width):
            position = []
            for number, last in ((min(y + 1, rows), rows), (min(x + 1, columns), columns)):
                angle = number / (last + 1e-6) * 2 * math.pi
                for wave in range(half):
                    turned = angle / 10000 ** (2 * (wave // 2) / half)
                    position.append(math.cos(turned) if wave % 2 else math.sin(turned))
            positions.append(position)
            hidden.append(y >= rows or x >= columns)
            values.append(cells[:, y, x])
    place, memory = torch.tensor(positions), torch.stack(values)

    def feed(layer: nn.Module, x: Tensor) -> Tensor:
        return layer.outer(F.relu(layer.inner(x)))  # type: ignore[operator, no-any-return]

    for layer in head.encoder:
        key = memory + place
        memory = layer.norms[0](memory + attention(layer.attention, key, key, memory, hidden))
        memory = layer.norms[1](memory + feed(layer.feed_forward, memory))
    queries = head.queries.weight
    objects, outputs = torch.zeros_like(queries), []
    for layer in head.decoder:
        own = objects + queries
        objects = layer.norms[0](objects + attention(layer.attention, own, own, objects, [False] * len(own)))
        seen = attention(layer.cross_attention, objects + queries, memory + place, memory, hidden)
        objects = layer.norms[1](objects + seen)
        objects = layer.norms[2](objects + feed(layer.feed_forward, objects))
        outputs.append(head.norm(objects))
    return torch.stack(outputs)


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
