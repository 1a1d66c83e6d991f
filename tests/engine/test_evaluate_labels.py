"""Evaluation reads labels by the rules of training: what they leave out is counted, all else is pycocotools' figure."""

import contextlib
import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aligndet import cli
from aligndet.data.coco import load_coco
from aligndet.engine.evaluate import METRICS, coco_metrics, load_predictions, save_predictions
from aligndet.engine.voc import voc_metrics
from aligndet.structures import Detections
from tests.engine.test_cocoeval import scene
from tests.test_config import minimal


def theirs(path: Path, found: dict[int, Detections], iou_type: str, folder: Path) -> list[float]:
    """pycocotools alone, on files."""
    tree = json.loads(path.read_text())
    for number, row in enumerate(tree["annotations"], start=1):
        row["id"] = number
        row.setdefault("area", row["bbox"][2] * row["bbox"][3])
    (folder / "clean.json").write_text(json.dumps(tree | {"info": {}}))
    save_predictions(folder / "found.json", path, found)
    rows = json.loads((folder / "found.json").read_text())
    if iou_type == "segm":  # else loadRes takes areas of boxes
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    (folder / "found.json").write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "clean.json"))
        if iou_type == "segm":
            for row, known in zip(tree["annotations"], json.loads(path.read_text())["annotations"], strict=True):
                if "area" not in known:
                    truth.anns[row["id"]]["area"] = float(truth.annToMask(row).sum())
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "found.json")), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [math.nan if value < 0 else float(value) for value in evaluation.stats]


def figures(path: Path, found: dict[int, Detections], iou_type: str) -> list[float]:
    metrics = coco_metrics(path, found, iou_type)
    return [metrics[name] for name in METRICS]


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    tree = json.loads(path.read_text())
    change(tree)
    changed = path.with_name("changed.json")
    changed.write_text(json.dumps(tree))
    return changed


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_clean_files_have_pycocotools_figures_to_the_last_digits(iou_type: str, seed: int, tmp_path: Path) -> None:
    path, found = scene(seed, tmp_path, iou_type == "segm")
    expected = theirs(path, found, iou_type, tmp_path)
    assert figures(path, found, iou_type) == pytest.approx(expected, abs=1e-12, nan_ok=True)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no numbers": ({"bbox": []}, "bbox is not four numbers"),
    "null": ({"bbox": None}, "bbox is not four numbers"),
    "nan": ({"bbox": [float("nan"), 1, 9, 9]}, "bbox is not finite"),
    "narrow": ({"bbox": [20, 20, 0.5, 90]}, "a side is below 1 px"),
    "crowd": ({"iscrowd": "yes"}, "iscrowd is neither 0 nor 1"),
    "crowds": ({"iscrowd": [1]}, "iscrowd is neither 0 nor 1"),
    "image": ({"image_id": 777}, "image unknown"),
    "category": ({"category_id": 777}, "category unknown"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_what_training_leaves_out_is_not_looked_for(
    name: str, iou_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three faulty copies among good annotations change no figure; the report of training has the same three."""
    path, found = scene(5, tmp_path, iou_type == "segm")
    change, reason = FAULTS[name]

    def spoil(tree: dict[str, Any]) -> None:
        for place in (0, 3, 7):
            tree["annotations"].insert(place, copy.deepcopy(tree["annotations"][place]) | {"id": 900 + place} | change)

    spoilt = rewritten(path, spoil)
    expected = figures(path, found, iou_type)
    assert capsys.readouterr().err == ""
    assert np.array_equal(figures(spoilt, found, iou_type), expected, equal_nan=True)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"3 annotations left out, {reason}; the first: annotation 900" in error, error
    assert {key: len(lines) for key, lines in load_coco(spoilt).report.items()} == {reason: 3}
    if iou_type == "bbox":
        assert voc_metrics(spoilt, found, way="area") == voc_metrics(path, found, way="area")
        assert f"3 annotations left out, {reason}" in capsys.readouterr().err


@pytest.mark.parametrize("without", [{"segmentation": []}, {"segmentation": None}, {"segmentation": "none"}])
def test_objects_without_a_mask_are_not_looked_for_among_masks(
    without: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, found = scene(5, tmp_path, True)

    def spoil(tree: dict[str, Any]) -> None:
        tree["annotations"].insert(2, copy.deepcopy(tree["annotations"][2]) | {"iscrowd": 0} | without)

    spoilt = rewritten(path, spoil)
    expected = figures(path, found, "segm")
    assert np.array_equal(figures(spoilt, found, "segm"), expected, equal_nan=True)
    assert capsys.readouterr().err.count("1 annotations left out, with") == 1
    everything = rewritten(path, lambda tree: [row.update(segmentation=[]) for row in tree["annotations"]] and None)
    assert all(math.isnan(value) for value in figures(everything, found, "segm"))


def as_texts(tree: dict[str, Any]) -> None:
    for row in tree["annotations"]:
        row["bbox"] = [str(value) for value in row["bbox"]]


def crowds_otherwise(tree: dict[str, Any]) -> None:
    ways: list[tuple[Any, ...]] = [(0, None, False, "0", 0.0), (1, True, "1", 1.0)]
    for number, row in enumerate(tree["annotations"]):
        row["iscrowd"] = ways[row["iscrowd"]][number % len(ways[row["iscrowd"]])]


def ids_as_texts(tree: dict[str, Any]) -> None:
    for row in tree["images"] + tree["categories"]:
        row["id"] = str(row["id"])
    for number, row in enumerate(tree["annotations"]):  # half of them stay numbers
        if number % 2:
            row["image_id"], row["category_id"] = str(row["image_id"]), str(row["category_id"])


@pytest.mark.parametrize("change", [as_texts, crowds_otherwise, ids_as_texts])
def test_other_ways_to_write_the_same_labels(
    change: Callable[[dict[str, Any]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers as texts and every way to say 0 and 1; in training the same boxes and crowds too."""
    path, found = scene(4, tmp_path, False)
    changed = rewritten(path, change)
    assert np.array_equal(figures(changed, found, "bbox"), figures(path, found, "bbox"), equal_nan=True)
    assert voc_metrics(changed, found, way="11-point") == voc_metrics(path, found, way="11-point")
    assert capsys.readouterr().err == ""
    one, other = load_coco(path), load_coco(changed)
    assert 0 < one.crowd.sum() < len(one.crowd)
    for name in ("image_ids", "boxes", "labels", "crowd", "category_ids", "offsets"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("prefix", ["", "scan_"])
def test_predictions_have_the_ids_of_the_file(prefix: str, tmp_path: Path) -> None:
    path, found = scene(4, tmp_path, False)

    def rename(tree: dict[str, Any]) -> None:
        for row in tree["images"]:
            row["id"] = f"{prefix}{row['id']}"
        for row in tree["annotations"]:
            row["image_id"] = f"{prefix}{row['image_id']}"

    renamed = rewritten(path, rename)
    ids = load_coco(renamed).image_ids.tolist()
    by_number = {ids[[40, 2, 13, 9, 21, 5].index(image)]: item for image, item in found.items()}
    save_predictions(tmp_path / "p.json", renamed, by_number)
    written = {row["image_id"] for row in json.loads((tmp_path / "p.json").read_text())}
    assert written == {f"{prefix}{image}" for image, item in found.items() if len(item)}
    again = load_predictions(tmp_path / "p.json", renamed)
    assert sorted(again) == sorted(ids)
    assert all(len(again[image]) == len(item) for image, item in by_number.items())
    assert coco_metrics(renamed, again)["AP"] == pytest.approx(coco_metrics(renamed, by_number)["AP"])


def test_eval_without_labels_asks_for_data_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in ({}, {"train": "labels.json"}):
        (tmp_path / "c.yaml").write_text(json.dumps(minimal(data=data)))
        with pytest.raises(SystemExit) as stop:
            cli.evaluate_weights(["--cfg", str(tmp_path / "c.yaml"), "--weights", str(tmp_path / "model.pt")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert "data.val: eval needs it, labels in COCO, VOC or YOLO format" in error


STRANGE: list[Any] = [None, [], {}, "", "7", "x", True, -1, 0, 1.5, 1e400, -1e400, float("nan"), 2**70, [1, 2], ["3"]]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_what_can_be_trained_on_can_be_evaluated_on(iou_type: str, tmp_path: Path) -> None:
    """Values of one to three keys replaced by strange ones, 300 times: a file that is read is measured, too."""
    path, found = scene(5, tmp_path, iou_type == "segm")
    whole, rng, read = json.loads(path.read_text()), np.random.default_rng(3), 0
    for _ in range(300):
        tree = copy.deepcopy(whole)
        for _ in range(rng.integers(1, 4)):
            part = tree[str(rng.choice(["annotations"] * 8 + ["images", "categories"]))]
            row = part[rng.integers(len(part))]
            row[str(rng.choice([*row, "iscrowd", "area"]))] = copy.deepcopy(STRANGE[rng.integers(len(STRANGE))])
        path.write_text(json.dumps(tree))
        try:
            load_coco(path, masks=iou_type == "segm")
        except ValueError:
            continue
        read += 1
        try:
            known = all(tree[key] == whole[key] for key in ("images", "categories"))
            values = figures(path, found if known else {}, iou_type)
        except ValueError as error:
            raise AssertionError(f"{tree}") from error
        assert all(0 <= value <= 1 or math.isnan(value) for value in values)
        save_predictions(tmp_path / "p.json", path, {})
    assert read > 100


def test_one_of_several_ranks_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = scene(4, tmp_path, False)
    spoilt = rewritten(path, lambda tree: tree["annotations"][0].update(bbox=[]))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        coco_metrics(spoilt, {})
        assert capsys.readouterr().err.count("\n") == 1 - rank
