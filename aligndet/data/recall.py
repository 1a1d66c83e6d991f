"""How well proposals find labelled objects: average recall, over numbers of boxes and sizes of objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aligndet.data.annotations import Annotations
from aligndet.data.folder import slashed
from aligndet.data.formats import load_annotations
from aligndet.data.proposals import ProposalFile

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # IoU
BUDGETS = (10, 100, 300)  # boxes per image
SIZE_EDGES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}  # px², COCO's


def evaluate_proposals(file: ProposalFile, annotations: Annotations | str | Path) -> dict[str, Any]:
    """Recall of the labelled boxes of all images that both files have; crowd regions and classes do not matter.

    In each image, proposals and objects are matched one to one: the pair of highest IoU first, then the highest among
    the rest, and so on. Recall at a threshold is the share of objects whose partner reaches it; average recall (AR) is
    its mean over 0.5, 0.55 ... 0.95. Proposals have no scores: at a budget of k boxes per image, k are taken at even
    steps through the order by area, as ``filter_proposals(limit=k)`` does.

    Args:
        file: proposals.
        annotations: labels of any format, or what ``load_annotations`` read from them.

    Returns:
        mode (with k where one was given, and quirks), size, images, objects, boxes (mean per image), AR@10, AR@100,
        AR@300, AR (all boxes), recall50 and recall50_small, _medium, _large (all boxes, IoU 0.5, COCO's sizes by box
        area); None where there is no object.

    Raises:
        FileNotFoundError: there are no such labels.
        ValueError: it is of no known format, or has no image in common with the proposals.
    """
    truth = annotations if isinstance(annotations, Annotations) else load_annotations(annotations)
    row_of = {slashed(name): row for row, name in enumerate(file.names)}
    names = enumerate(map(slashed, truth.file_names))
    common = [(row_of[name], image) for image, name in names if name in row_of]
    if not common:
        raise ValueError(
            f"evaluate {truth.path}: none of its {len(truth)} images is in {file.path}; file names have to agree"
        )
    objects = [truth.boxes[truth.rows_of(image)] for _, image in common]
    proposals = [file.boxes_of(row) for row, _ in common]
    areas = np.concatenate([(boxes[:, 2:] - boxes[:, :2]).prod(axis=1, dtype=np.float64) for boxes in objects])
    best = _best(proposals, objects, None)
    result: dict[str, Any] = {
        "mode": _mode(file.parameters),
        "size": file.parameters.get("size"),
        "images": len(common),
        "objects": len(areas),
        "boxes": round(float(np.mean([len(boxes) for boxes in proposals])), 1),
    }
    for budget in BUDGETS:
        result[f"AR@{budget}"] = average_recall(_best(proposals, objects, budget))
    result |= {"AR": average_recall(best), "recall50": _share(best >= 0.5)}
    for name, (low, high) in SIZE_EDGES.items():
        result[f"recall50_{name}"] = _share(best[(areas >= low) & (areas < high)] >= 0.5)
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Results of ``evaluate_proposals`` as text, a row each; shares in per cent."""
    shares = [*(f"AR@{budget}" for budget in BUDGETS), "AR", "recall50", *(f"recall50_{name}" for name in SIZE_EDGES)]
    titles = ["mode", "size", "images", "objects", "boxes", *shares]
    cells = [titles]
    for row in rows:
        percents = ["-" if row[name] is None else f"{100 * row[name]:.1f}" for name in shares]
        cells.append([row["mode"], str(row["size"]), *(str(row[name]) for name in titles[2:5]), *percents])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def match_best_first(proposals: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """IoU of each of M ``objects`` [M, 4] with the one of the ``proposals`` [N, 4] that is its own: float64 [M].

    0 for an object that is left without one.
    """
    overlaps = pairwise_iou(proposals, objects)
    best = np.zeros(len(objects))
    for _ in range(min(overlaps.shape)):
        row, column = np.unravel_index(int(overlaps.argmax()), overlaps.shape)
        if overlaps[row, column] <= 0:
            break
        best[column] = overlaps[row, column]
        overlaps[row, :] = overlaps[:, column] = 0
    return best


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of ``a`` [N, 4] with every box of ``b`` [M, 4]: float64 [N, M]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    overlap = sides.clip(min=0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (a, b)]
    result: np.ndarray = overlap / np.maximum(areas[0][:, None] + areas[1] - overlap, np.finfo(np.float64).tiny)
    return result


def average_recall(best: np.ndarray) -> float | None:
    """Mean over the thresholds of the share of objects whose IoU ``best`` [M] reaches it; None without objects."""
    return _share(best[:, None] >= THRESHOLDS)


def _mode(parameters: dict[str, Any]) -> str:
    k, quirks = parameters.get("k"), parameters.get("quirks")
    return f"{parameters.get('mode', '?')}{f' k={k}' if k is not None else ''}{' quirks' if quirks else ''}"


def _best(proposals: Sequence[np.ndarray], objects: Sequence[np.ndarray], budget: int | None) -> np.ndarray:
    found = [np.zeros(0)]
    for boxes, truth in zip(proposals, objects, strict=True):
        if budget is not None and len(boxes) > budget:
            boxes = boxes[np.linspace(0, len(boxes) - 1, budget).astype(np.int64)]
        found.append(match_best_first(boxes, truth))
    return np.concatenate(found)


def _share(reached: np.ndarray) -> float | None:
    return round(float(reached.mean()), 4) if reached.size else None
