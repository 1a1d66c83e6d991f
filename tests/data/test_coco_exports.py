"""COCO files as labelling tools export them: ids that are texts, names from Windows, folders, labels without masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligndet import cli
from aligndet.data import coco as reader
from aligndet.data import coco_stream
from aligndet.data.check import check
from aligndet.data.coco import find_images, load_coco
from aligndet.data.folder import name_below
from aligndet.data.formats import coco_file
from aligndet.data.labelled import EvaluationImages, LabelledImages
from tests.data import same
from tests.data.test_foreign import coco as labels_of_foreign
from tests.data.test_foreign import imported


def changed(folder: Path, **columns: Any) -> Path:
    """The data set of ``same`` with a function of ids or file names over all images and annotations."""
    path = same.write_coco(folder)
    tree = json.loads(path.read_text())
    for image in tree["images"]:
        image["id"] = columns.get("ids", int)(image["id"])
        image["file_name"] = columns.get("names", str)(image["file_name"])
    for annotation in tree["annotations"]:
        annotation["image_id"] = columns.get("of", columns.get("ids", int))(annotation["image_id"])
    path.write_text(json.dumps(tree))
    return path


def refuse(path: Path) -> None:
    raise AssertionError(f"{path}: parsed whole")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (str, [7, 14, 21]),
        (lambda number: f"{number:012}", [1, 2, 3]),
        (lambda number: f"scan {100 - number}", [3, 2, 1]),  # scan 93, scan 86, scan 79
        (float, [7, 14, 21]),
    ],
)
def test_image_ids_may_be_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Any, expected: list[int]) -> None:
    """Whole numbers are read as such, other texts are numbered in their order; piece by piece and whole."""
    path = changed(tmp_path, ids=ids)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_coco", refuse)
        found = load_coco(path)
    assert found.image_ids.tolist() == expected
    assert found.labels.tolist() == [1, 0, 2, 1, 1] and found.offsets.tolist() == [0, 2, 2, 5]
    assert found.report == {}
    with monkeypatch.context() as patch:
        patch.setattr(coco_stream, "CHUNK", 11)
        assert load_coco(path).image_ids.tolist() == expected


def test_texts_and_numbers_are_not_confused(tmp_path: Path) -> None:
    """ "007" is no 7; a number is none of the numbers that texts are given; a text for one image alone is refused."""
    path = changed(tmp_path, ids=lambda number: f"{number:03}", of=lambda number: number // 7)
    assert [len(lines) for lines in load_coco(path).report.values()] == [5]
    assert "image unknown" in load_coco(path).report
    tree = json.loads(path.read_text())
    tree["images"][1]["id"] = 12
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"images\[0\]\.id: want a whole number, or a text for every image, got '007'"):
        load_coco(path)
    tree["images"][0]["id"], tree["images"][1]["id"], tree["images"][2]["id"] = "1", 1, 2
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="image id 1 occurs twice"):
        load_coco(path)


def test_texts_as_ids_in_folds_and_results(tmp_path: Path) -> None:
    path = changed(tmp_path, ids=str, of=int)
    assert cli.main(["split", str(path), "--out", str(tmp_path / "f"), "--percent", "100", "--folds", "1"]) == 0
    fold = json.loads((tmp_path / "f/instances_train.1@100.json").read_text())
    assert len(fold["annotations"]) == 5
    for own, results in ((["7", "3"], [7, "3"]), (["x7", "x3"], ["x7", "x3"])):
        labels = labels_of_foreign(tmp_path / "labels.json", ["cat"], [])
        tree = json.loads(labels.read_text())
        for image, text in zip(tree["images"], own, strict=True):
            image["id"] = text
        labels.write_text(json.dumps(tree))
        rows = [{"image_id": image, "bbox": [1, 1, 5 + n, 9], "score": 1} for n, image in enumerate(results)]
        (tmp_path / "r.json").write_text(json.dumps(rows))
        file = imported(tmp_path / "r.json", "--from", "results", "--annotations", str(labels))
        assert [(file.boxes_of(row)[:, 2] - file.boxes_of(row)[:, 0]).tolist() for row in (0, 1)] == [[5], [6]]


CROWD: list[tuple[Any, bool | None]] = [
    (0, False),
    (1, True),
    (False, False),
    (True, True),
    (None, False),
    ("0", False),
    ("1", True),
    (0.0, False),
    (2, None),
    ("true", None),
    ("", None),
    ([1], None),
    ({}, None),
]


@pytest.mark.parametrize(("value", "meant"), CROWD)
def test_every_way_to_say_crowd(tmp_path: Path, value: Any, meant: bool | None) -> None:
    path = same.write_coco(tmp_path)
    tree = json.loads(path.read_text())
    tree["annotations"][0]["iscrowd"] = value
    path.write_text(json.dumps(tree))
    found, report = load_coco(path), check(path, format="coco")
    if meant is None:
        assert list(report.problems) == ["iscrowd is neither 0 nor 1"]
        assert (report.boxes, report.crowds, len(found.boxes)) == (4, 0, 4)
        return
    assert report.problems == {}
    assert found.crowd.tolist().count(True) == report.crowds == int(meant)


def test_names_with_backslashes(tmp_path: Path) -> None:
    r"""``train\a b.png`` is ``train/a b.png``, unless there is a file of that name; nothing leaves the folder by it."""
    path = changed(tmp_path, names=lambda name: f"train\\{name}")
    found = load_coco(path)
    root = find_images(path, None, found.file_names)
    assert root == tmp_path
    report = check(path, format="coco")
    assert report.usable and report.readable == 3 and report.problems == report.notes == {}
    sides = {"long_side": 200, "on_error": "fail"}
    training = LabelledImages(found, root, short_sides=(64,), fast_decode=False, flip_probability=0.0, **sides)
    assert training[(1, 0)].image.unique().tolist() == [80], "of the third image"
    assert EvaluationImages(found, root, short_side=64, **sides)[1].image.unique().tolist() == [40]
    (root / "train\\c.png").write_bytes((root / "train/ü.png").read_bytes())
    assert name_below(root, "train\\c.png") == "train\\c.png"
    assert EvaluationImages(found, root, short_side=64, **sides)[1].image.unique().tolist() == [80]
    for name in ("..\\x.png", "a\\..\\..\\x.png", "\\etc\\passwd"):
        (tmp_path / name[:1]).mkdir(exist_ok=True)
        tree = json.loads(path.read_text())
        tree["images"][0]["file_name"] = name
        (tmp_path / "bad.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match="leaves the image folder"):
            load_coco(tmp_path / "bad.json")


def test_unlabelled_boxes_of_images_with_backslashes_are_proposed(tmp_path: Path) -> None:
    path = changed(tmp_path, names=lambda name: f"train\\{name}")
    out = tmp_path / "p.npz"
    assert cli.main(["propose", "--annotations", str(path), "--out", str(out), "--workers", "1"]) == 0
    names = [str(name) for name in np.load(out)["names"].tolist()]
    assert sorted(names) == sorted(f"train/{name}" for name in same.BOXES)


@pytest.mark.parametrize(
    "name", ["/home/x/{}", "C:\\Users\\x\\{}", "/data/local-files/?d=images/{}", "http://host/{}", "elsewhere/{}"]
)
def test_names_that_are_not_below_the_folder_say_what_to_do(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(tmp_path, names=name.format)
    report = check(path, format="coco")
    assert not report.usable
    assert "file names have to be relative to the image folder (data.train_images, data.val_images" in report.error
    assert cli.main(["check", str(path)]) == 1
    assert "--images" in capsys.readouterr().out


def test_the_only_file_of_a_folder(tmp_path: Path) -> None:
    """Roboflow's layout: a folder for each part with its images and ``_annotations.coco.json``."""
    for part in ("train", "valid"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "_annotations.coco.json").write_text("{}")
    train, valid = (tmp_path / part / "_annotations.coco.json" for part in ("train", "valid"))
    assert coco_file(tmp_path, "train") == train and coco_file(tmp_path, "val") == valid
    for split in (None, "train", "val"):
        assert coco_file(tmp_path / "train", split) == train
    valid.unlink()
    with pytest.raises(FileNotFoundError, match="no COCO json of split val"):
        coco_file(tmp_path, "val")  # the only file, but it says that it is of another part
    own = tmp_path / "own"
    own.mkdir()
    (own / "labels v2.json").write_text("{}")
    assert coco_file(own, "train") == own / "labels v2.json"
    (own / "labels v2.json").rename(own / "my_val2017.json")
    assert coco_file(own, "val") == own / "my_val2017.json"
    with pytest.raises(FileNotFoundError, match="no COCO json of split train"):
        coco_file(own, "train")


def test_labels_without_masks_say_why_nothing_is_usable(tmp_path: Path) -> None:
    path = same.write_coco(tmp_path)
    tree = json.loads(path.read_text())
    for annotation in tree["annotations"]:
        annotation["segmentation"] = []
    path.write_text(json.dumps(tree))
    sides = {"short_sides": (64,), "long_side": 200}
    assert len(LabelledImages(load_coco(path), tmp_path / "train", **sides)) == 2
    message = (
        r"none of the 3 images has a usable box \(5 annotations left out: without a segmentation; "
        r"this detector needs a mask for each object\)$"
    )
    with pytest.raises(ValueError, match=message):
        LabelledImages(load_coco(path, masks=True), tmp_path / "train", **sides)
    tree["annotations"] = [row | {"bbox": None} for row in tree["annotations"]]
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"usable box \(5 annotations left out: bbox is not four numbers\)$"):
        LabelledImages(load_coco(path), tmp_path / "train", **sides)
