"""Data sets of legal but unusual form: links, "..", byte order marks, backslashes, points of a pose, slivers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from aligndet.data.coco import load_coco
from aligndet.data.folder import list_images
from aligndet.data.formats import detect_format, load_annotations
from aligndet.data.labelled import LabelledImages
from aligndet.data.proposals import write_proposals
from aligndet.data.shards import merge_proposals
from aligndet.engine.partial import Partial

SIDES: dict[str, Any] = {"short_sides": (64,), "long_side": 128}
MARK = "\ufeff"


def picture(path: Path, width: int = 200, height: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), dtype=np.uint8))


def yolo(folder: Path, text: str, label: str = "0 0.5 0.5 0.5 0.5\n", **more: object) -> Path:
    """Two images, the first with a box of 100 x 50 px in its middle."""
    for name in ("a", "b"):
        picture(folder / f"images/train/{name}.png")
    (folder / "labels/train").mkdir(parents=True, exist_ok=True)
    (folder / "labels/train/a.txt").write_text(label)
    path = folder / "data.yaml"
    path.write_text(json.dumps({"names": ["cat"], "train": text} | more))
    return path


BOX = [[50.0, 25.0, 150.0, 75.0]]


@pytest.mark.parametrize("whole_folder", [True, False])
def test_labels_lie_beside_links_to_images_whatever_leads_there(whole_folder: bool, tmp_path: Path) -> None:
    path = yolo(tmp_path / "sets/cells", "images/train", path="../cells")
    train, pool = tmp_path / "sets/cells/images/train", tmp_path / "pool"
    train.rename(pool)
    if whole_folder:
        train.symlink_to(pool)
    else:
        train.mkdir()
        for image in pool.iterdir():
            (train / image.name).symlink_to(image)
    assert load_annotations(path).boxes.tolist() == BOX
    path.write_text(path.read_text().replace('"../cells"', json.dumps(str(tmp_path / "sets/cells"))))
    assert load_annotations(path).boxes.tolist() == BOX


def test_marks_and_backslashes_of_windows_cost_no_labels(tmp_path: Path) -> None:
    path = yolo(tmp_path, "train.txt", label=MARK + "0 0.5 0.5 0.5 0.5\r\n")
    for text in ("images/train/a.png\nimages/train/b.png\n", "images\\train\\a.png\r\nimages\\train\\b.png\r\n"):
        (tmp_path / "train.txt").write_text(MARK + text, encoding="utf-8")
        found = load_annotations(path)
        assert found.boxes.tolist() == BOX and len(found) == 2 and not found.report


def test_lists_of_another_encoding_are_named(tmp_path: Path) -> None:
    path = yolo(tmp_path, "train.txt")
    (tmp_path / "train.txt").write_bytes("bär.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.yaml: .*train\.txt is no list of images"):
        load_annotations(path)


def test_image_sets_and_classes_of_voc_may_begin_with_a_mark(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages/a.png")
    (tmp_path / "Annotations").mkdir()
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation><object><name>cat</name>{box}</object></annotation>")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text(MARK + "a\r\n", encoding="utf-8")
    (tmp_path / "classes.txt").write_text(MARK + "cat\r\ndog\r\n", encoding="utf-8")
    found = load_annotations(tmp_path, split="train")
    assert found.class_names == ("cat", "dog") and found.labels.tolist() == [0] and not found.report
    (tmp_path / "classes.txt").write_bytes("bär\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt: not a list of names"):
        load_annotations(tmp_path, split="train")


@pytest.mark.parametrize("points", [[2, 2], [2, 3]])
def test_points_of_a_pose_are_neither_box_nor_polygon(points: list[int], tmp_path: Path) -> None:
    values = "0.1 0.1 0.9 0.2" if points[1] == 2 else "0.1 0.1 2 0.9 0.2 2"
    path = yolo(tmp_path, "images/train", label=f"0 0.5 0.5 0.5 0.5 {values}\n", kpt_shape=points)
    assert load_annotations(path).boxes.tolist() == BOX


def test_a_dangling_yaml_does_not_hide_the_data_set(tmp_path: Path) -> None:
    yolo(tmp_path, "images/train")
    (tmp_path / "old.yaml").symlink_to(tmp_path / "gone.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert detect_format(tmp_path) == "yolo"


def test_a_folder_keeps_its_name_beside_links_to_it(tmp_path: Path) -> None:
    picture(tmp_path / "train/x.png")
    picture(tmp_path / "elsewhere/y.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "train").rename(tmp_path / "set/train")
    (tmp_path / "set/all").symlink_to(tmp_path / "set/train")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/more").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "set") == ["more/y.png", "train/x.png"]


@pytest.mark.parametrize("x", [-3.3, -49.99999, 639.99999])
def test_a_sliver_at_the_border_is_outside(x: float, tmp_path: Path) -> None:
    """In float32 less than a hundredth of a pixel is inside; mirrored, nothing would be left of it."""
    width = 1.1 + 2.2 if x == -3.3 else 50.0
    picture(tmp_path / "a.png", 640, 480)
    boxes = [[x, 10.0, width, 50.0], [100.0, 100.0, 50.0, 50.0]]
    annotations = [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    image = {"id": 1, "file_name": "a.png", "width": 640, "height": 480}
    tree = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "c.json").write_text(json.dumps(tree))
    found = load_coco(tmp_path / "c.json")
    assert found.boxes.tolist() == [[100.0, 100.0, 150.0, 150.0]]
    assert list(found.report) == ["box outside the image"]
    for short_side in (97, 480):
        data = LabelledImages(found, tmp_path, short_sides=(short_side,), long_side=1000)
        for position in range(6):
            boxes_now = data[0, position].boxes
            assert (boxes_now[:, 2:] > boxes_now[:, :2]).all() and len(boxes_now) == 1


def test_a_sample_is_asked_for_with_its_position(tmp_path: Path) -> None:
    data = LabelledImages(load_annotations(yolo(tmp_path, "images/train")), tmp_path / "images/train", **SIDES)
    with pytest.raises(ValueError, match=r"want \(image, position in the stream\), as StepSampler gives them, got 0"):
        data[0]  # type: ignore[index]


def test_shards_with_pseudo_classes_are_not_merged(tmp_path: Path) -> None:
    boxes, labels = [np.array([[0, 0, 9, 9]], dtype=np.float32)], np.array([1])
    shard = {"shard": {"number": 1, "of": 1, "images": "x"}, "clusters": 2}
    write_proposals(tmp_path / "s.npz", ["a.png"], np.array([[10, 10]]), boxes, shard, labels=labels)
    with pytest.raises(ValueError, match=r"s\.npz: has pseudo-classes, which mean other things in each shard"):
        merge_proposals([tmp_path / "s.npz"], tmp_path / "all.npz")


def test_finished_work_is_never_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.partial"
    with Partial(path, {"a": 1}) as partial:
        for number in range(50):
            partial.add(f"image {number}", [number])
    whole = path.read_bytes()
    with open(path, "ab") as file:
        file.write(b'["image 50", [5')  # killed here
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("written again"))
    monkeypatch.setattr(Path, "write_text", lambda *_: pytest.fail("written again"))
    with Partial(path, {"a": 1}) as again:
        assert len(again.done) == 50
        assert path.read_bytes() == whole
        again.add("image 50", None)
    with Partial(path, {"a": 1}) as last:
        assert list(last.done)[-1] == "image 50"
    monkeypatch.undo()
    with Partial(path, {"a": 2}) as other:
        assert not other.done
    with pytest.raises(ValueError, match=r"none/p\.partial: cannot be written"):
        Partial(tmp_path / "none/p.partial", {})
