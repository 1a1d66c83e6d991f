"""COCO metrics by hand and against a slow version; detections of a data set; predictions on disk."""

import contextlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from aligndet.engine.distributed import single
from aligndet.engine.evaluate import METRICS, coco_metrics, evaluate_detector, load_predictions, save_predictions
from aligndet.structures import Detections
from tests.reference_ap import average_precision
from tests.scenes import batch_of, boxes_for, small_detector
from tests.test_detectors import small

NAMES = {7: "cat", 3: "dog", 19: "owl"}  # by category id: neither contiguous nor ascending in the file


def written(folder: Path, boxes: dict[int, list[tuple[int, list[float]]]], **extra: object) -> Path:
    """A COCO file of (category id, xyxy) by image id; annotation ids start at 0; no "info", "area" or "iscrowd"."""
    annotations = []
    for image_id, rows in boxes.items():
        for category_id, (x0, y0, x1, y1) in rows:
            box = {"id": len(annotations), "image_id": image_id, "category_id": category_id}
            annotations.append(box | {"bbox": [x0, y0, x1 - x0, y1 - y0]} | extra)
    images = [{"id": image_id, "file_name": f"{image_id}.png", "height": 211, "width": 307} for image_id in boxes]
    categories = [{"id": category_id, "name": name} for category_id, name in NAMES.items()]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def found(rows: Iterable[tuple[float, int, list[float]]], masks: Tensor | None = None) -> Detections:
    """(score, label, xyxy), best first."""
    rows = sorted(rows, key=lambda row: -row[0])
    boxes = torch.tensor([row[2] for row in rows]).reshape(-1, 4)
    labels = torch.tensor([row[1] for row in rows], dtype=torch.int64)
    return Detections(boxes, torch.tensor([row[0] for row in rows]), labels, masks)


NOTHING = found([])
A, B, C = [10.0, 10, 50, 50], [100.0, 20, 220, 140], [5.0, 150, 25, 170]


def test_the_truth_as_detections_is_perfect(tmp_path: Path) -> None:
    path = written(tmp_path, {11: [(3, A), (19, B)], 2: [(7, C), (3, B)], 5: []})
    right = {11: found([(0.9, 0, A), (0.8, 2, B)]), 2: found([(0.7, 1, C), (0.6, 0, B)])}
    metrics = coco_metrics(path, right, per_class=True)
    assert set(metrics) == {*METRICS, "classes"}
    for name in METRICS:
        assert metrics[name] == pytest.approx(1.0), name
    assert list(metrics["classes"]) == ["dog", "cat", "owl"], "order of labels"
    assert metrics["classes"]["cat"] == pytest.approx({"AP": 1.0, "AP50": 1.0})
    in_order = [right[11], right[2], NOTHING]
    assert coco_metrics(path, in_order) == coco_metrics(path, right)


def test_two_images_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three dogs. Ranked: hit (0.9), miss (0.8), hit (0.7): precision 1 up to recall 1/3, then 2/3 up to 2/3, then 0.

    Of the 101 recalls 0, 0.01, ... 34 lie at or below 1/3 and 33 between 1/3 and 2/3. The hit at 0.7 overlaps by
    exactly 0.6 (40 x 24 of 40 x 40 px): it counts for the IoU thresholds 0.5, 0.55 and 0.6 of ten.
    """
    path = written(tmp_path, {1: [(3, A), (3, B)], 2: [(3, A)]})
    rows = {1: found([(0.9, 0, B), (0.8, 0, C)]), 2: found([(0.7, 0, [10.0, 10, 50, 34])])}
    metrics = coco_metrics(path, rows, per_class=True)
    with_both, with_one = (34 + 33 * 2 / 3) / 101, 34 / 101
    assert metrics["AP50"] == pytest.approx(with_both)
    assert metrics["AP75"] == pytest.approx(with_one)
    assert metrics["AP"] == pytest.approx((3 * with_both + 7 * with_one) / 10)
    assert metrics["AR100"] == pytest.approx((3 * 2 / 3 + 7 / 3) / 10)
    assert metrics["classes"]["dog"]["AP50"] == pytest.approx(with_both)
    assert math.isnan(metrics["classes"]["owl"]["AP"])
    assert math.isnan(metrics["APs"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seed", range(6))
def test_against_the_slow_version(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def box() -> list[float]:
        corner = rng.uniform(0, 60, 2)
        return [*corner.tolist(), *(corner + rng.uniform(20, 60, 2)).tolist()]

    truth = {i: [(int(rng.choice([3, 7])), box()) for _ in range(rng.integers(0, 7))] for i in (31, 5, 17, 2, 23)}
    rows: dict[int, list[tuple[float, int, list[float]]]] = {}
    for image_id, true_rows in truth.items():
        near = [(c, [v + rng.normal(0, 3) for v in b]) for c, b in true_rows if rng.random() < 0.8]
        drawn = near + [(int(rng.choice([3, 7])), box()) for _ in range(3)]
        rows[image_id] = [(float(rng.random()), {3: 0, 7: 1}[c], np.float32(b).tolist()) for c, b in drawn]
    detections = {image_id: found(item) for image_id, item in rows.items()}
    metrics = coco_metrics(written(tmp_path, truth), detections, per_class=True)
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        each = []
        for category_id, label in ((3, 0), (7, 1)):
            of_class = {i: [tuple(b) for c, b in item if c == category_id] for i, item in truth.items()}
            mine = {i: [(s, tuple(b)) for s, k, b in item if k == label] for i, item in rows.items()}
            expected = average_precision(of_class, mine, threshold)
            assert expected is not None
            each.append(expected)
            if name == "AP50":
                assert metrics["classes"][NAMES[category_id]][name] == pytest.approx(expected)
        assert metrics[name] == pytest.approx(sum(each) / 2)


def test_nothing_found_is_zero_and_nothing_to_find_is_nan(tmp_path: Path) -> None:
    path = written(tmp_path, {1: [(3, A)], 2: []})
    for nothing in ({}, {1: NOTHING}, [NOTHING, NOTHING]):
        metrics = coco_metrics(path, nothing)
        assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0.0
    empty = coco_metrics(written(tmp_path, {1: [], 2: []}), {1: found([(0.5, 0, A)])})
    assert all(math.isnan(empty[name]) for name in METRICS)
    assert all(math.isnan(value) for value in coco_metrics(written(tmp_path, {}), {}).values())


def test_only_the_classes_that_are_asked_for_count(tmp_path: Path) -> None:
    path = written(tmp_path, {1: [(3, A), (19, B), (7, C)]})
    rows = {1: found([(0.9, 0, B), (0.8, 1, A)])}
    metrics = coco_metrics(path, rows, classes=("owl", "dog"), per_class=True)
    assert metrics["AP"] == pytest.approx(1.0)
    assert list(metrics["classes"]) == ["owl", "dog"]
    assert coco_metrics(path, rows, classes=("dog", "owl"))["AP"] == 0.0
    with pytest.raises(ValueError, match=r"no category 'cow'; it has dog, cat, owl"):
        coco_metrics(path, rows, classes=("dog", "cow"))
    with pytest.raises(ValueError, match=r"'dog' twice"):
        coco_metrics(path, rows, classes=("dog", "dog"))


def test_crowds_are_neither_found_nor_missed(tmp_path: Path) -> None:
    path = written(tmp_path, {1: [(3, A)]}, iscrowd=1)
    assert math.isnan(coco_metrics(path, {1: found([(0.9, 0, A)])})["AP"])


@pytest.mark.parametrize("form", ["list", "text"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_detections_on_a_crowd_cost_nothing(tmp_path: Path, iou_type: str, form: str) -> None:
    """Two surer detections lie in the crowd B, one on the object A: precision stays 1, as pycocotools itself says."""
    crowd = mask_of(B).numpy().astype(np.uint8)
    text = rle.encode(np.asfortranarray(crowd))["counts"].decode()
    path = written(tmp_path, {1: [(3, A), (3, B)]})
    tree = json.loads(path.read_text())
    tree["annotations"][0] |= {
        "segmentation": [[10.0, 10, 50, 10, 50, 50, 10, 50]],
        "iscrowd": 0,
        "area": 1600,
        "id": 1,
    }
    lengths = rle_list(crowd) if form == "list" else text
    tree["annotations"][1] |= {"segmentation": {"size": [211, 307], "counts": lengths}, "id": 2}
    tree["annotations"][1] |= {"iscrowd": 1, "area": 14400}
    path.write_text(json.dumps(tree))
    inside = [[110.0, 30, 150, 60], [120.0, 60, 180, 130]]
    rows = [(0.9, 0, inside[0]), (0.8, 0, inside[1]), (0.7, 0, A)]
    item = found(rows, torch.stack([mask_of(box) for _, _, box in rows]))
    metrics = coco_metrics(path, {1: item}, iou_type)
    assert metrics["AP"] == pytest.approx(1.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        results = truth.loadRes(
            [
                {"image_id": 1, "category_id": 3, "score": score}
                | {"segmentation": rle.encode(np.asfortranarray(mask_of(box).numpy().astype(np.uint8)))}
                | {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
                for score, _, box in rows
            ]
        )
        theirs = COCOeval(truth, results, iou_type)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    expected = [math.nan if value < 0 else value for value in theirs.stats]
    assert [metrics[name] for name in METRICS] == pytest.approx(expected, nan_ok=True)


def rle_list(mask: np.ndarray) -> list[int]:
    """Plain run lengths of a mask, column by column, zeros first."""
    columns = mask.flatten(order="F").tolist()
    lengths, current = [0], 0
    for value in columns:
        if value != current:
            lengths.append(0)
            current = value
        lengths[-1] += 1
    return lengths


def test_bad_detections_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, {1: [(3, A)], 4: []})
    with pytest.raises(ValueError, match=r"instances\.json: no image with id 9"):
        coco_metrics(path, {9: NOTHING})
    with pytest.raises(ValueError, match=r"image 4: want labels in 0 \.\. 2, got 0 \.\. 3"):
        coco_metrics(path, {4: found([(0.9, 0, A), (0.8, 3, A)])})
    with pytest.raises(ValueError, match=r"2 images, got detections of 1"):
        coco_metrics(path, [NOTHING])
    for other, got in (("p.json", "str"), (tmp_path / "p.json", "PosixPath"), ([{"image_id": 1}], "a list of dict")):
        with pytest.raises(ValueError, match=f"want Detections, by image id .*, got {got}; load_predictions reads"):
            coco_metrics(path, other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"image 4: want finite"):
        coco_metrics(path, {4: found([(0.9, 0, [1.0, math.nan, 3, 4])])})
    with pytest.raises(ValueError, match="want one of bbox, segm, got 'box'"):
        coco_metrics(path, {}, "box")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("boxes", "want Detections, got str"),
        (replace(NOTHING, boxes=torch.zeros(4)), r"want boxes \[n, 4\], .* got \[4\], \[0\], \[0\]"),
        (replace(found([(0.5, 0, A)]), scores=torch.rand(2)), r".*got \[1, 4\], \[2\], \[1\]"),
        (replace(found([(0.5, 0, A)]), labels=torch.zeros(1)), "want whole numbers as labels, got torch.float32"),
    ],
)
def test_what_is_no_detections_is_named(tmp_path: Path, item: object, words: str) -> None:
    with pytest.raises(ValueError, match=f"detections of image 1: {words}"):
        coco_metrics(written(tmp_path, {1: [(3, A)]}), {1: item})  # type: ignore[dict-item]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        coco_metrics(tmp_path / "none.json", {})
    path = tmp_path / "a.json"
    for content in ("{", "[]", '{"images": []}', '{"images": [{}], "annotations": [], "categories": []}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"a\.json: (not readable as JSON|want images)"):
            coco_metrics(path, {})
    path = written(tmp_path, {1: [(3, A)]})
    tree = json.loads(path.read_text())
    del tree["annotations"][0]["bbox"]
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"annotations\[0\] has no 'bbox'"):
        coco_metrics(path, {})


def mask_of(box: list[float]) -> Tensor:
    mask = torch.zeros(211, 307, dtype=torch.bool)
    x0, y0, x1, y1 = map(int, box)
    mask[y0:y1, x0:x1] = True
    return mask


def test_masks_are_compared_as_masks(tmp_path: Path) -> None:
    polygon = [[10.0, 10, 50, 10, 50, 50, 10, 50]]
    path = written(tmp_path, {1: [(3, A)]}, segmentation=polygon)
    other_box = found([(0.9, 0, C)], masks=mask_of(A)[None])
    assert coco_metrics(path, {1: other_box}, "segm")["AP"] == pytest.approx(1.0)
    assert coco_metrics(path, {1: other_box})["AP"] == 0.0
    half = found([(0.9, 0, A)], masks=mask_of([10.0, 10, 50, 34])[None])
    assert coco_metrics(path, {1: half}, "segm")["AP"] == pytest.approx(0.3)
    with pytest.raises(ValueError, match="image 1: iou_type segm wants masks"):
        coco_metrics(path, {1: found([(0.9, 0, A)])}, "segm")
    with pytest.raises(ValueError, match=r"image 1: want masks of the size .*, got \[13, 17\]"):
        coco_metrics(path, {1: found([(0.9, 0, A)], masks=torch.ones(1, 13, 17, dtype=torch.bool))}, "segm")
    assert coco_metrics(path, {1: NOTHING}, "segm")["AP"] == 0.0


def same(a: Detections, b: Detections) -> bool:
    return torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores) and torch.equal(a.labels, b.labels)


def test_predictions_on_disk(tmp_path: Path) -> None:
    path = written(tmp_path, {1: [(3, A)], 8: []}, segmentation=[[10.0, 10, 50, 10, 50, 50, 10, 50]])
    rows = {1: found([(1 / 3, 2, boxes_for(1, 96, torch.Generator().manual_seed(1))[0].tolist()), (0.2, 0, A)])}
    save_predictions(tmp_path / "p.json", path, rows)
    records = json.loads((tmp_path / "p.json").read_text())
    assert records[1] | {"score": 0} == {"image_id": 1, "category_id": 3, "bbox": [10, 10, 40, 40], "score": 0}
    assert records[0]["category_id"] == 19
    loaded = load_predictions(tmp_path / "p.json", path)
    assert same(loaded[1], rows[1])
    assert len(loaded[8]) == 0
    assert len(load_predictions(tmp_path / "p.json", path, classes=("owl",))[1]) == 1
    masked = {1: found([(0.5, 0, A)], masks=mask_of(A)[None])}
    save_predictions(tmp_path / "m.json", path, masked)
    masks = load_predictions(tmp_path / "m.json", path)[1].masks
    assert masks is not None
    assert torch.equal(masks, mask_of(A)[None])
    (tmp_path / "p.json").write_text('[{"image_id": 77, "category_id": 3, "score": 1, "bbox": [1, 2, 3, 4]}]')
    with pytest.raises(ValueError, match=r"p\.json, row 0: image 77, category 3 is not in"):
        load_predictions(tmp_path / "p.json", path)
    (tmp_path / "p.json").write_text('[{"image_id": 1}]')
    with pytest.raises(ValueError, match=r"p\.json, row 0: want image_id"):
        load_predictions(tmp_path / "p.json", path)


def test_detections_of_a_data_set_are_in_px_of_the_files() -> None:
    detector = small_detector(score_threshold=0.0).train()
    frozen = [module.training for module in detector.modules()]
    batch = batch_of([boxes_for(2, 96, torch.Generator().manual_seed(0))])
    height, width = batch.sizes[0].tolist()
    larger = type(batch)(batch.images, batch.sizes, batch.sizes * torch.tensor([2, 3]), (41,), batch.targets)
    plain = evaluate_detector(detector, [batch], single())
    both = evaluate_detector(detector, [larger, batch], single())
    assert list(both) == [0, 41]
    assert len(plain[0]) > 0
    assert same(both[0], plain[0])
    assert torch.allclose(both[41].boxes, plain[0].boxes * torch.tensor([3.0, 2, 3, 2]), atol=1e-3)
    assert plain[0].boxes[:, 2].max() <= width
    assert plain[0].boxes[:, 3].max() <= height
    assert not plain[0].boxes.is_inference()
    assert [module.training for module in detector.modules()] == frozen


def test_masks_of_a_data_set_are_kept_as_run_lengths_and_score_the_same(tmp_path: Path) -> None:
    """Half a kilobyte an image here; as masks it is 0.9 MB for 100 detections of 96 x 96 px."""
    torch.manual_seed(0)
    detector = small("mask_rcnn", score_threshold=0.0)
    batch = batch_of([boxes_for(2, 96, torch.Generator().manual_seed(0))])
    batch = type(batch)(batch.images, batch.sizes, batch.sizes, (1,), batch.targets)
    kept = evaluate_detector(detector, [batch], single())[1]
    with torch.no_grad():
        detector.eval()
        candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes)
        size = tuple(batch.sizes[0].tolist())
        whole = detector.detect(candidates, batch.sizes)[0].resized(size, size)
    assert whole.masks is not None and kept.masks is None and kept.encoded is not None and len(kept) > 10
    decoded = [torch.from_numpy(rle.decode(item)).bool() for item in kept.encoded]
    assert torch.equal(torch.stack(decoded), whole.masks)
    rows = torch.arange(len(kept)) % 3 == 1
    few, numbered = kept.chosen(rows), kept.chosen(rows.nonzero().squeeze(1))
    assert few.encoded == numbered.encoded == kept.encoded[1::3]
    path = tmp_path / "a.json"
    image = {"id": 1, "width": size[1], "height": size[0], "file_name": "1.jpg"}
    categories = [{"id": k + 1, "name": str(k)} for k in range(3)]
    polygon = [[10.0, 10, 50, 10, 50, 50, 10, 50]]
    truth = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40], "segmentation": polygon}
    path.write_text(json.dumps({"images": [image], "categories": categories, "annotations": [truth]}))
    assert coco_metrics(path, {1: kept}, "segm") == coco_metrics(path, {1: whole}, "segm")
    for name, item in (("kept", kept), ("whole", whole)):
        save_predictions(tmp_path / name, path, {1: item})
    assert (tmp_path / "kept").read_text() == (tmp_path / "whole").read_text()


def test_the_mode_returns_after_an_error_and_skipped_images_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    detector = small_detector().train()
    batch = batch_of([boxes_for(1, 96, torch.Generator().manual_seed(0))])
    told = type(batch)(batch.images, batch.sizes, batch.sizes, (1,), batch.targets, ("a.jpg is broken",))
    evaluate_detector(detector, [told], single())
    assert "a.jpg is broken" in capsys.readouterr().err
    broken = type(batch)(batch.images[:, :2], batch.sizes, batch.sizes, (1,), batch.targets)
    with pytest.raises(RuntimeError):
        evaluate_detector(detector, [broken], single())
    assert detector.training
