"""Recall and report: by hand, and matching against a naive loop."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from aligndet.data.proposals import ProposalFile, open_proposals, write_proposals
from aligndet.data.recall import evaluate_proposals, match_best_first, table
from aligndet.data.report import GAP, TILE, write_report
from tests.data.test_selective_search import iou, random_boxes


def proposals(folder: Path, boxes: list[list[list[float]]]) -> ProposalFile:
    arrays = [np.array(rows, np.float32).reshape(-1, 4) for rows in boxes]
    names = [f"{number}.png" for number in range(len(boxes))]
    write_proposals(folder / "p.npz", names, [(200, 300)] * len(boxes), arrays, {"mode": "soco", "size": 640})
    return open_proposals(folder / "p.npz")


def labels(folder: Path, boxes: list[list[list[float]]]) -> Path:
    """COCO json; boxes as x, y, width, height."""
    images = [{"id": n, "file_name": f"{n}.png", "height": 200, "width": 300} for n in range(len(boxes))]
    rows = [(image, box) for image, found in enumerate(boxes) for box in found]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (image, box) in enumerate(rows)
    ]
    path = folder / "instances.json"
    categories = [{"id": 1, "name": "thing"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_recall_by_hand(tmp_path: Path) -> None:
    # IoU: first image 1 (small), then 60 / 100 = 0.6 (medium); second image: a large object without a proposal.
    file = proposals(tmp_path, [[[0, 0, 20, 20], [100, 100, 200, 160]], []])
    truth = labels(tmp_path, [[[0, 0, 20, 20], [100, 100, 90, 100]], [[0, 0, 150, 150]]])
    overlap, union = 90 * 60, 100 * 60 + 90 * 100 - 90 * 60
    assert 0.55 < overlap / union < 0.6
    result = evaluate_proposals(file, truth)
    assert (result["images"], result["objects"], result["boxes"]) == (2, 3, 1.0)
    assert result["recall50"] == round(2 / 3, 4)
    assert [result[f"recall50_{size}"] for size in ("small", "medium", "large")] == [1.0, 1.0, 0.0]
    assert result["AR"] == result["AR@10"] == round((10 + 2 + 0) / 30, 4)  # 0.5625 reaches 0.5 and 0.55
    assert "66.7" in table([result])


def test_other_settings_are_told_apart(tmp_path: Path) -> None:
    truth = labels(tmp_path, [[[0, 0, 20, 20]]])
    for parameters, mode in (({"k": 50}, "soco k=50"), ({"k": None, "quirks": True}, "soco quirks"), ({}, "soco")):
        write_proposals(tmp_path / "p.npz", ["0.png"], [(200, 300)], [np.zeros((0, 4))], {"mode": "soco"} | parameters)
        assert evaluate_proposals(open_proposals(tmp_path / "p.npz"), truth)["mode"] == mode


def test_one_proposal_serves_one_object(tmp_path: Path) -> None:
    file = proposals(tmp_path, [[[0, 0, 100, 100]]])
    result = evaluate_proposals(file, labels(tmp_path, [[[0, 0, 100, 100], [0, 0, 100, 90]]]))
    assert result["recall50"] == 0.5
    assert result["recall50_small"] is None


def test_no_common_image_is_named(tmp_path: Path) -> None:
    file = proposals(tmp_path, [[]])
    path = labels(tmp_path, [[]])
    path.write_text(path.read_text().replace("0.png", "other.png"))
    with pytest.raises(ValueError, match="none of its 1 images"):
        evaluate_proposals(file, path)


@pytest.mark.parametrize(("number", "objects", "seed"), [(23, 7, 0), (5, 17, 1), (0, 3, 2), (3, 0, 3)])
def test_matching_equals_a_loop(number: int, objects: int, seed: int) -> None:
    boxes, truth = random_boxes(number, seed), random_boxes(objects, seed + 100)
    pairs = sorted(((iou(a, b), i, j) for i, a in enumerate(boxes) for j, b in enumerate(truth)), reverse=True)
    want, used = np.zeros(objects), set()
    for value, i, j in pairs:
        if value > 0 and ("box", i) not in used and ("object", j) not in used:
            used |= {("box", i), ("object", j)}
            want[j] = value
    np.testing.assert_allclose(np.sort(match_best_first(boxes, truth)), np.sort(want), atol=1e-12)


def test_report(tmp_path: Path) -> None:
    file = proposals(tmp_path, [[[0, 0, 60, 60], [10, 10, 70, 40]], []])
    for name in file.names:
        cv2.imwrite(str(tmp_path / name), np.full((200, 300, 3), 128, np.uint8))
    json_path, png_path = write_report(file, tmp_path)
    report = json.loads(json_path.read_text())
    assert (report["images"], report["boxes"], report["without_boxes"]) == (2, 2, 1)
    assert report["per_image"]["mean"] == 1.0
    assert sum(report["size_ratio"]["counts"]) == sum(report["aspect"]["counts"]) == 2
    # sqrt(3600 / 60000) = 0.245 and sqrt(1800 / 60000) = 0.173; width / height 1 and 2.
    assert report["size_ratio"]["counts"][2:4] == [1, 1]
    assert report["aspect"]["counts"] == [0, 0, 0, 0, 1, 0, 1, 0]
    assert report["sheet"] == ["0.png", "1.png"]
    sheet = cv2.imread(str(png_path))[..., ::-1]
    scale, left = (TILE - GAP) / 300, GAP // 2
    assert sheet.shape == (round(200 * scale) + GAP, 6 * TILE, 3)
    # The 60 px box has 0.306 of the way from red to blue, 37 of 120 degrees of hue: between yellow and green.
    red, green, blue = sheet[round(60 * scale) - 1, left + round(30 * scale)].tolist()
    assert green == 255 > red > 128 > blue == 0
