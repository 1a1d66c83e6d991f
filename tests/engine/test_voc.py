"""VOC metrics by hand and against the development kit written down slowly; VOC and YOLO sets under COCO's metrics."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from aligndet.data.formats import load_annotations
from aligndet.engine.evaluate import coco_metrics, load_predictions, save_predictions
from aligndet.engine.voc import average_precision, voc_metrics
from aligndet.structures import Detections
from tests.data import same
from tests.reference_voc import voc_ap
from tests.truth import detections_of


def found(rows: Iterable[tuple[float, int, tuple[float, ...]]]) -> Detections:
    """(score, label, xyxy)."""
    rows = list(rows)
    boxes = torch.tensor([list(row[2]) for row in rows]).reshape(-1, 4)
    labels = torch.tensor([row[1] for row in rows], dtype=torch.int64)
    return Detections(boxes, torch.tensor([row[0] for row in rows]), labels)


def test_average_precision_by_hand() -> None:
    """Right, wrong, right of three objects: recalls 1/3, 1/3, 2/3; precisions 1, 1/2, 2/3."""
    hits = np.array([True, False, True])
    # recalls 0 .. 0.3: 1 (four points); 0.4 .. 0.6: 2/3 (three points); 0.7 .. 1: 0
    assert average_precision(hits, 3, "11-point") == pytest.approx((4 + 3 * 2 / 3) / 11)
    assert average_precision(hits, 3, "area") == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert average_precision(np.array([True] * 3 + [False] * 7), 10, "11-point") == pytest.approx(4 / 11), (
        "0.3 is reached"
    )
    assert average_precision(np.zeros(0, bool), 2, "11-point") == average_precision(np.zeros(0, bool), 2, "area") == 0
    assert average_precision(np.ones(4, bool), 4, "area") == average_precision(np.ones(4, bool), 4, "11-point") == 1


def test_matching_by_hand(tmp_path: Path) -> None:
    """The second detection of an object is wrong, that of a difficult object counts neither way."""
    path = same.write_voc(tmp_path)
    objects = same.xml_object("dog", 1, 1, 20, 20) + same.xml_object("dog", 41, 1, 60, 20, difficult=1)
    for name in ("a b", "ü"):
        (tmp_path / f"Annotations/{name}.xml").write_text(same.xml(f"{name}.png", ""), encoding="utf-8")
    (tmp_path / "Annotations/c.xml").write_text(same.xml("c.png", objects))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = load_annotations(path)
    easy, difficult = (0.0, 0.0, 20.0, 20.0), (40.0, 0.0, 60.0, 20.0)
    rows = {
        2: found([(0.9, 1, difficult), (0.8, 1, difficult), (0.7, 1, (80.0, 0, 90, 9)), (0.6, 1, easy), (0.5, 1, easy)])
    }
    for way, value in (("11-point", 0.5), ("area", 0.5)):  # wrong, right, wrong: precision 1/2 at recall 1
        metrics = voc_metrics(data, rows, way=way, per_class=True)
        assert metrics["AP50"] == metrics["AP75"] == metrics["AP"] == pytest.approx(value)
        assert math.isnan(metrics["classes"]["cat"]["AP"]), "no cat to find"
        assert metrics["classes"]["dog"]["AP50"] == pytest.approx(value)
    # Above its best object the IoU decides: 20 x 20 against 20 x 15 is 0.75, right up to that threshold.
    metrics = voc_metrics(data, {2: found([(0.9, 1, (0.0, 0, 20, 15))])}, way="area")
    assert (metrics["AP50"], metrics["AP75"], metrics["AP"]) == pytest.approx((1, 1, 6 / 10))
    with pytest.raises(ValueError, match="want one of 11-point, area, got 'voc07'"):
        voc_metrics(data, {}, way="voc07")
    with pytest.raises(ValueError, match="no image with id 9"):
        voc_metrics(data, {9: found([])}, way="area")
    assert voc_metrics(data, {}, way="area")["AP"] == 0


@pytest.mark.parametrize("way", ["11-point", "area"])
@pytest.mark.parametrize("seed", range(4))
def test_against_the_development_kit_written_down_slowly(tmp_path: Path, way: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, records, rows = [], [], {}
    truth: dict[int, dict[int, list[tuple[tuple[float, ...], bool]]]] = {0: {}, 1: {}}
    kit: dict[int, list[tuple[float, int, tuple[float, ...]]]] = {0: [], 1: []}
    for image in range(1, 12):
        images.append({"id": image, "file_name": f"{image}.png", "height": 211, "width": 307})
        boxes = []
        for _ in range(int(rng.integers(0, 7))):
            x0, y0 = rng.integers(0, 60, 2).tolist()
            width, height = rng.integers(10, 60, 2).tolist()
            label, difficult = int(rng.integers(2)), bool(rng.random() < 0.3)
            boxes.append((label, (x0, y0, x0 + width, y0 + height)))
            truth[label].setdefault(image, []).append(((x0 + 1, y0 + 1, x0 + width, y0 + height), difficult))
            record = {"image_id": image, "category_id": label + 1, "bbox": [x0, y0, width, height]}
            records.append(record | {"iscrowd": int(difficult)})
        drawn = []
        for label, box in boxes * 2 + boxes[:1]:
            moved = np.array(box) + rng.integers(-6, 7, 4)
            moved[2:] = np.maximum(moved[2:], moved[:2] + 3)
            score = float(np.float32(rng.random()))
            drawn.append((score, label, tuple(moved.astype(float).tolist())))
            x0, y0, x1, y1 = moved.tolist()
            kit[label].append((score, image, (x0 + 1, y0 + 1, x1, y1)))
        rows[image] = found(drawn)
    path = tmp_path / "a.json"
    categories = [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}]
    path.write_text(json.dumps({"images": images, "annotations": records, "categories": categories}))
    metrics = voc_metrics(path, rows, way=way, per_class=True)
    each = [
        [voc_ap(truth[label], kit[label], 0.5 + 0.05 * step - 1e-9, way == "11-point") for step in range(10)]
        for label in (0, 1)
    ]
    expected = np.array(each, dtype=float)
    assert 0.2 < expected[:, 0].mean() < 0.95
    assert metrics["AP"] == pytest.approx(expected.mean())
    assert metrics["AP50"] == pytest.approx(expected[:, 0].mean())
    assert metrics["AP75"] == pytest.approx(expected[:, 5].mean())
    assert metrics["classes"]["two"]["AP50"] == pytest.approx(expected[1, 0])


def test_every_format_has_the_same_metrics(tmp_path: Path) -> None:
    """Detections with one miss: COCO's and VOC's metrics of the three formats agree with those of the COCO file."""
    coco = same.write_coco(tmp_path / "coco")
    results = []
    for source in (coco, *(load_annotations(same.WRITERS[kind](tmp_path / kind)) for kind in ("voc", "yolo"))):
        truth = load_annotations(coco)
        detections = []
        for image in range(3):
            kept = truth.rows_of(image)
            moved = truth.boxes[kept] + np.random.default_rng(image).integers(0, 4, (len(kept), 4))
            rows = zip(np.linspace(0.9, 0.5, len(kept)), truth.labels[kept], moved, strict=True)
            detections.append(found([(score, int(label), tuple(box.tolist())) for score, label, box in rows]))
        values = coco_metrics(source, detections)
        results.append(values | {"voc": voc_metrics(source, detections, way="area")["AP"]})
    assert 0.1 < results[0]["AP"] < 0.99
    for other in results[1:]:
        assert other == pytest.approx(results[0], nan_ok=True)


def test_predictions_of_a_voc_set_on_disk(tmp_path: Path) -> None:
    data = load_annotations(same.write_voc(tmp_path))
    box = (10.0, 20.0, 42.0, 36.0)
    save_predictions(tmp_path / "p.json", data, {1: found([(0.5, 1, box)])})
    (record,) = json.loads((tmp_path / "p.json").read_text())
    assert record == {"image_id": 1, "category_id": 2, "bbox": [10, 20, 32, 16], "score": 0.5}
    assert load_predictions(tmp_path / "p.json", data)[1].boxes.tolist() == [list(box)]


def test_the_truth_of_real_labels_is_perfect(shared: Path) -> None:
    path = shared / "data/bccd/annotations/instances_val.json"
    for way in ("11-point", "area"):
        metrics = voc_metrics(path, detections_of(path), way=way)
        assert metrics["AP"] > 0.99
    voc = load_annotations(shared / "data/bccd", format="voc", split="val")
    truth = {}
    for row, image in enumerate(voc.image_ids.tolist()):
        boxes, labels = (torch.from_numpy(part[voc.rows_of(row)]) for part in (voc.boxes, voc.labels))
        truth[image] = Detections(boxes, torch.ones(len(labels)), labels)
    assert coco_metrics(voc, truth)["AP"] > 0.99
