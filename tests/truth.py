"""Ground truth of an annotation file as detections."""

from __future__ import annotations

from pathlib import Path

import torch

from aligndet.data.coco import load_coco
from aligndet.structures import Detections


def detections_of(path: Path) -> dict[int, Detections]:
    """Every box of the file with score 1, by image id."""
    found = load_coco(path)
    result = {}
    for row, image in enumerate(found.image_ids.tolist()):
        rows = found.rows_of(row)
        boxes, labels = torch.from_numpy(found.boxes[rows]), torch.from_numpy(found.labels[rows])
        result[image] = Detections(boxes, torch.ones(len(rows)), labels)
    return result
