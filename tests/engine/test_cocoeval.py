"""Both packages give the same metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aligndet.engine import cocoeval
from aligndet.engine.cocoeval import FAST, SLOW
from aligndet.engine.evaluate import METRICS, coco_metrics
from aligndet.structures import Detections

SIDE = 150  # px of the images: 22,500 px², so that small, medium and large objects fit


def needs_fast() -> None:
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed (extra `fast`)")


def box(rng: np.random.Generator) -> list[float]:
    width, height = rng.uniform(4, 130, 2)
    x, y = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
    return [float(x), float(y), float(width), float(height)]


def ellipse(x: float, y: float, width: float, height: float) -> list[list[float]]:
    angle = np.linspace(0, 2 * np.pi, 11, endpoint=False)
    points = np.stack([x + width / 2 * (1 + np.cos(angle)), y + height / 2 * (1 + np.sin(angle))], axis=1)
    return [points.flatten().tolist()]


def scene(seed: int, folder: Path, masks: bool) -> tuple[Path, dict[int, Detections]]:
    """A file and detections with what tells evaluators apart.

    Crowds, areas that are not those of the boxes, objects without an area, images without objects or detections, a
    class without objects, equal scores, and more than 100 detections of one class in an image.
    """
    rng = np.random.default_rng(seed)
    categories, images, annotations = [11, 3, 90, 7], [40, 2, 13, 9, 21, 5], []
    found: dict[int, Detections] = {}
    for number, image_id in enumerate(images):
        mine = []
        for _ in range(0 if number == 1 else int(rng.integers(1, 9))):
            row: dict[str, Any] = {"id": len(annotations), "image_id": image_id, "bbox": box(rng)}
            row |= {"category_id": int(rng.choice([3, 7, 90])), "segmentation": ellipse(*row["bbox"])}
            row["iscrowd"] = 0
            if rng.random() < 0.7:
                row["area"] = float(row["bbox"][2] * row["bbox"][3] * rng.uniform(0.3, 1.2))
            if rng.random() < 0.2 and not masks:
                row["iscrowd"] = 1
            elif rng.random() < 0.2 and masks:
                row |= crowd(row["bbox"])
            mine.append(row)
            annotations.append(row)
        if number != 2:
            found[image_id] = detections(rng, mine, 260 if number == 3 else 12, masks)
    path = folder / f"{seed}.json"
    content = {"images": [{"id": i, "height": SIDE, "width": SIDE, "file_name": f"{i}.png"} for i in images]}
    content |= {"annotations": annotations, "categories": [{"id": c, "name": f"class {c}"} for c in categories]}
    path.write_text(json.dumps(content))
    return path, found


def crowd(sides: list[float]) -> dict[str, Any]:
    """A crowd as plain run lengths: its box, column by column."""
    x, y, width, height = (int(value) for value in sides)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y : y + height, x : x + width] = 1
    flat = np.concatenate([[0], mask.flatten(order="F"), [2]])
    ends = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], ends])).tolist()
    return {"iscrowd": 1, "segmentation": {"size": [SIDE, SIDE], "counts": counts}}


def detections(rng: np.random.Generator, objects: list[dict[str, Any]], number: int, masks: bool) -> Detections:
    """Moved objects and strangers; scores of one digit, so that many are equal; mostly of one class."""
    label_of = {3: 0, 7: 1, 11: 2, 90: 3}
    boxes, labels = [], []
    for _ in range(number):
        if objects and rng.random() < 0.6:
            near = objects[rng.integers(len(objects))]
            boxes.append([value + rng.normal(0, 4) for value in near["bbox"]])
            labels.append(label_of[near["category_id"]] if rng.random() < 0.9 else 2)
        else:
            boxes.append(box(rng))
            labels.append(0)
    x, y, width, height = torch.tensor(boxes).abs().clamp(1, SIDE - 2).unbind(1)
    corners = torch.stack([x, y, (x + width).clamp(max=SIDE), (y + height).clamp(max=SIDE)], dim=1)
    scores = torch.tensor(rng.integers(1, 10, number) / 10).float().sort(descending=True).values
    pasted = None
    if masks:
        pasted = torch.zeros(number, SIDE, SIDE, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(pasted, corners.int().tolist(), strict=True):
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return Detections(corners, scores, torch.tensor(labels), pasted)


def both(patch: pytest.MonkeyPatch, *arguments: Any, **keywords: Any) -> list[dict[str, Any]]:
    results = []
    for package in (FAST, SLOW):
        patch.setattr(cocoeval, "evaluator", lambda package=package: package)
        results.append(coco_metrics(*arguments, **keywords))
    return results


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_random_scenes_measure_alike(iou_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_fast()
    seen = []
    for seed in range(40 if iou_type == "bbox" else 12):
        path, found = scene(seed, tmp_path, iou_type == "segm")
        for chosen in ((), ("class 90", "class 3")):
            kept = {key: item if not chosen else item.chosen(item.labels < 2) for key, item in found.items()}
            fast, slow = both(monkeypatch, path, kept, iou_type, classes=chosen, per_class=True)
            for name in METRICS:
                assert fast[name] == pytest.approx(slow[name], abs=1e-12, nan_ok=True), (seed, name)
            assert list(fast["classes"]) == list(slow["classes"])
            for name, row in slow["classes"].items():
                assert fast["classes"][name] == pytest.approx(row, abs=1e-12, nan_ok=True), (seed, name)
            seen.append([slow[name] for name in METRICS])
    values = np.array(seen)
    assert (np.nanstd(values, axis=0) > 0.01).all(), "every metric takes many values in these scenes"


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_nothing_to_find_and_nothing_found(iou_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_fast()
    path, found = scene(3, tmp_path, iou_type == "segm")
    fast, slow = both(monkeypatch, path, {}, iou_type)
    assert fast == slow and fast["AP"] == 0.0
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"annotations": []}))
    for fast, slow in (both(monkeypatch, path, found, iou_type), both(monkeypatch, path, {}, iou_type)):
        assert all(np.isnan(fast[name]) and np.isnan(slow[name]) for name in METRICS)
    path.write_text(json.dumps(tree | {"annotations": [], "images": []}))
    fast, slow = both(monkeypatch, path, {}, iou_type)
    assert all(np.isnan(fast[name]) and np.isnan(slow[name]) for name in METRICS)


def test_which_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cocoeval.importlib.util, "find_spec", lambda name: None)
    assert cocoeval.evaluator() == SLOW
    assert cocoeval.evaluator_note().startswith("COCO metrics by pycocotools 2.")


def test_image_ids_may_be_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = scene(1, tmp_path, False)
    tree = json.loads(path.read_text())
    for row in tree["images"]:
        row["id"] = f"image {row['id']:03}"
    for row in tree["annotations"]:
        row["image_id"] = f"image {row['image_id']:03}"
    expected = coco_metrics(path, found)
    path.write_text(json.dumps(tree))
    named = {f"image {key:03}": item for key, item in found.items()}
    for package in (SLOW, cocoeval.evaluator()):
        monkeypatch.setattr(cocoeval, "evaluator", lambda package=package: package)
        assert coco_metrics(path, named)["AP"] == pytest.approx(expected["AP"], abs=1e-12)  # type: ignore[arg-type]
