"""Results as other programs write them, and evaluation at its edges: no sizes, no image, equal ids, strange masks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from aligndet.data.batch import collate
from aligndet.data.coco import load_coco
from aligndet.data.labelled import EvaluationImages
from aligndet.engine.distributed import single
from aligndet.engine.evaluate import coco_metrics, evaluate_detector, load_predictions, save_predictions
from tests.engine.test_evaluate import A, found, mask_of, written
from tests.scenes import small_detector

SQUARE = [[10.0, 10, 50, 10, 50, 50, 10, 50]]  # the mask of A
PLAIN = {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [10, 10, 40, 40]}


def loaded(folder: Path, record: Any) -> Any:
    path = written(folder, {1: [(3, A)]})
    (folder / "r.json").write_text(json.dumps([PLAIN, record]))
    return load_predictions(folder / "r.json", path)[1]


@pytest.mark.parametrize(
    "record",
    [
        [],
        PLAIN | {"score": "0.5"},
        PLAIN | {"score": None},
        PLAIN | {"score": True},
        PLAIN | {"score": float("nan")},
        PLAIN | {"bbox": [1, 2, 3, None]},
        PLAIN | {"bbox": [1, 2, 3, 4, 5]},
        PLAIN | {"bbox": [1, 2, 3]},
        PLAIN | {"bbox": "1234"},
        PLAIN | {"bbox": [1, 2, 3, float("inf")]},
        {key: value for key, value in PLAIN.items() if key != "bbox"},
        {key: value for key, value in PLAIN.items() if key != "image_id"},
    ],
)
def test_a_row_that_is_no_result_is_named(tmp_path: Path, record: Any) -> None:
    with pytest.raises(ValueError, match=r"r\.json, row 1: want image_id, category_id, a finite score, and a bbox"):
        loaded(tmp_path, record)


@pytest.mark.parametrize(
    "mask",
    [[[1.0, 2, 3]], {"size": [211, 307]}, {"size": [5, 5], "counts": [25]}, {"size": [211, 307], "counts": [3]}, "x"],
)
def test_a_mask_that_is_none_is_named(tmp_path: Path, mask: Any) -> None:
    with pytest.raises(ValueError, match=r"r\.json, row 1: want a mask as polygons or run lengths of its image, got"):
        loaded(tmp_path, PLAIN | {"segmentation": mask})


def test_masks_are_read_in_all_three_forms_and_give_the_box_where_there_is_none(tmp_path: Path) -> None:
    array = np.asfortranarray(mask_of(A).numpy().astype(np.uint8))
    packed = rle.encode(array)
    flat = array.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()  # the first pixel is background
    forms = [SQUARE, {"size": [211, 307], "counts": counts}, packed | {"counts": packed["counts"].decode()}]
    path = written(tmp_path, {1: [(3, A)]}, segmentation=SQUARE)
    for form in forms:
        row = {"image_id": 1, "category_id": 3, "score": 0.5, "segmentation": form}
        (tmp_path / "r.json").write_text(json.dumps([row]))
        result = load_predictions(tmp_path / "r.json", path)
        assert result[1].masks is not None and torch.equal(result[1].masks[0], mask_of(A))
        assert result[1].boxes.tolist() == [A]
        assert coco_metrics(path, result, "segm")["AP"] == pytest.approx(1.0)


def test_an_empty_segmentation_is_none(tmp_path: Path) -> None:
    """Programs without masks write it beside the box."""
    result = loaded(tmp_path, PLAIN | {"segmentation": []})
    assert result.masks is None and result.boxes.tolist() == [A, A]


def test_a_mask_without_a_pixel_is_written_and_read(tmp_path: Path) -> None:
    path = written(tmp_path, {1: [(3, A)]}, segmentation=SQUARE)
    save_predictions(tmp_path / "r.json", path, {1: found([(0.5, 0, A)], masks=torch.zeros_like(mask_of(A))[None])})
    result = load_predictions(tmp_path / "r.json", path)[1]
    assert result.masks is not None and not result.masks.any()
    assert result.boxes.tolist() == [A]


def test_json_nested_without_end_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for read in (lambda path: coco_metrics(path, {}), lambda path: load_predictions(path, written(tmp_path, {1: []}))):
        with pytest.raises(ValueError, match=r"deep\.json: not readable as JSON"):
            read(tmp_path / "deep.json")


def test_masks_without_sizes_in_the_file_cost_neither_boxes_nor_predictions(tmp_path: Path) -> None:
    path = written(tmp_path, {1: [(3, A)]}, segmentation=SQUARE)
    content = json.loads(path.read_text())
    for image in content["images"]:
        del image["height"], image["width"]
    path.write_text(json.dumps(content))
    detections = {1: found([(0.9, 0, A)], masks=mask_of(A)[None])}
    assert coco_metrics(path, detections)["AP"] == pytest.approx(1.0)
    assert np.isnan(coco_metrics(path, detections, "segm")["AP"]), "how large its masks are nobody knows"
    save_predictions(tmp_path / "r.json", path, detections)
    masks = load_predictions(tmp_path / "r.json", path)[1].masks
    assert masks is not None and torch.equal(masks[0], mask_of(A))


@pytest.mark.parametrize(
    ("masks", "got"),
    [
        (0.9 * mask_of(A)[None].float(), r"float32 \[1, 211, 307\]"),
        (mask_of(A)[None, None], r"bool \[1, 1, 211, 307\]"),
        (mask_of(A)[None].repeat(2, 1, 1), r"bool \[2, 211, 307\]"),
        (mask_of(A)[None][:0], r"bool \[0, 211, 307\]"),
    ],
)
def test_masks_of_another_kind_are_refused(tmp_path: Path, masks: torch.Tensor, got: str) -> None:
    path = written(tmp_path, {1: [(3, A)]}, segmentation=SQUARE)
    with pytest.raises(ValueError, match=rf"image 1: want masks as bool \[1, height, width\], got {got}"):
        coco_metrics(path, {1: found([(0.9, 0, A)], masks=masks)}, "segm")
    one = found([(0.9, 0, A)])
    with pytest.raises(ValueError, match="image 1: want run lengths of 1 masks, got 0"):
        coco_metrics(path, {1: replace(one, encoded=())}, "segm")


@pytest.mark.parametrize("part", ["images", "categories"])
def test_ids_that_occur_twice_are_refused(tmp_path: Path, part: str) -> None:
    path = written(tmp_path, {1: [(3, A)]})
    content = json.loads(path.read_text())
    content[part].append(content[part][0])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json: (image id 1|category id 7) occurs twice"):
        coco_metrics(path, {})


def test_an_image_that_cannot_be_read_has_no_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a detector that finds something everywhere; beside it in the batch is one that can be read."""
    import cv2

    path = written(tmp_path, {1: [(3, A)], 8: [(3, A)]})
    cv2.imwrite(str(tmp_path / "8.png"), np.zeros((211, 307, 3), dtype=np.uint8))
    images = EvaluationImages(load_coco(path), tmp_path, short_side=96, long_side=160)
    batch = collate([images[0], images[1]])
    assert batch.blank == (1,)
    detections = evaluate_detector(small_detector(score_threshold=0.0), [batch], single())
    assert list(detections) == [8] and len(detections[8]) > 0
    assert "1.png" in capsys.readouterr().err
