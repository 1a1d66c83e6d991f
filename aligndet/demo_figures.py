"""The pictures of the demo: proposals, views, loss curves, detections of both runs beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from aligndet.data.batch import collate_views
from aligndet.data.coco import load_coco
from aligndet.data.proposals import open_proposals
from aligndet.data.transforms import read_image
from aligndet.data.views import ViewPairs
from aligndet.engine.log import read_log
from aligndet.plots import figures
from aligndet.predict import predict
from aligndet.structures import Detections
from aligndet.weights import load_detector


def write_figures(out: Path, seed: int, train: str, val: str, proposals: str) -> None:
    """Write ``proposals.png``, ``views.png``, ``curves.png`` and ``detections.png`` into ``out/figures``."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    root = out / "scenes" / "images"
    found = open_proposals(proposals)
    rows = range(min(8, len(found.names)))
    images = [read_image(root / found.names[row]) for row in rows]
    figures.proposals_figure(folder / "proposals.png", images, [found.boxes_of(row) for row in rows])
    size = images[0].shape[0]
    pairs = ViewPairs(root, found, short_sides=(size * 3 // 4, size), long_side=size, proposals_per_image=8)
    view1, view2 = collate_views([pairs[(index, index)] for index in range(min(4, len(pairs)))])
    figures.views_figure(folder / "views.png", view1, view2, len(view1))
    runs = {"backbone only": "without", "AlignDet": "with"}
    logs = {title: read_log(_run(out, start, seed) / "log.jsonl") for title, start in runs.items()}
    figures.curves_figure(folder / "curves.png", logs, ("classification", "box", "centerness"))
    _detections(folder / "detections.png", [_run(out, start, seed) for start in runs.values()], val, root, size)


def _detections(path: Path, runs: Sequence[Path], val: str, root: Path, size: int) -> None:
    """Rows of (image, labels, detections of each run), the columns of ``detections_figure``."""
    annotations = load_coco(val)
    names = list(annotations.file_names[:5])
    columns = []
    for run in runs:
        detector, _ = load_detector(run / "model.pt")
        columns.append(predict(detector, [root / name for name in names], 0.3, short_side=size, long_side=size))
    truths = []
    for row in range(len(names)):
        part = slice(annotations.offsets[row], annotations.offsets[row + 1])
        labels = torch.from_numpy(np.array(annotations.labels[part]))
        truths.append(Detections(torch.from_numpy(np.array(annotations.boxes[part])), torch.ones(len(labels)), labels))
    rows = [
        (read_image(root / name), (truths[row], *(column[row] for column in columns))) for row, name in enumerate(names)
    ]
    figures.detections_figure(path, rows, ("labels", "backbone only", "AlignDet"), annotations.class_names)


def _run(out: Path, start: str, seed: int) -> Path:
    return out / f"3-finetune-{start}-seed{seed}"
