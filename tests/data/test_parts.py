"""Claims about parts: folds come from what training takes, and a part that an export only names stops nothing."""

import json
import shutil
from pathlib import Path

import pytest

from aligndet import cli
from aligndet.data.check import check
from aligndet.data.formats import has_parts, load_annotations
from aligndet.data.yolo import PART_MISSING
from tests.data import same

VAL = "v.png"  # of the part val alone


def with_val(folder: Path, kind: str) -> Path:
    """The data set of ``same`` as the part train, and one image of a dog as val."""
    path = same.WRITERS[kind](folder)
    if kind == "coco":
        tree = json.loads(path.read_text())
        tree["images"], tree["annotations"] = [tree["images"][0] | {"file_name": VAL}], tree["annotations"][:1]
        (folder / "annotations/instances_val.json").write_text(json.dumps(tree))
        shutil.copytree(folder / "train", folder / "val")
        shutil.copy(folder / "train/c.png", folder / "val" / VAL)
    elif kind == "voc":
        shutil.copy(folder / "JPEGImages/c.png", folder / "JPEGImages" / VAL)
        (folder / "Annotations/v.xml").write_text(same.xml(VAL, same.xml_object("dog", 1, 1, 30, 30)))
        (folder / "ImageSets/Main/val.txt").write_text("v\n")
    else:
        (folder / "images/val").mkdir()
        (folder / "labels/val").mkdir()
        shutil.copy(folder / "images/train/c.png", folder / "images/val" / VAL)
        (folder / "labels/val/v.txt").write_text("1 0.5 0.5 0.5 0.5")
        path.write_text(path.read_text().replace('"val": "images/train"', '"val": "images/val"'))
    return path


def folds(out: Path, capsys: pytest.CaptureFixture[str], data: Path, percent: str = "70") -> tuple[set[str], str]:
    """The images of five folds together, and the first line that is said."""
    assert cli.main(["split", str(data), "--out", str(out), "--percent", percent]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    trees = [json.loads(file.read_text()) for file in sorted(out.iterdir())]
    assert len(trees) == 5
    return {Path(image["file_name"]).name for tree in trees for image in tree["images"]}, line


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_folds_are_drawn_from_the_part_that_training_takes(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    path = with_val(data, kind)
    assert has_parts(data, kind)
    drawn, line = folds(tmp_path / "folds", capsys, data)
    trained = load_annotations(data, split="train")
    assert drawn == {Path(name).name for name in trained.file_names} == set(same.BOXES)
    assert line == f"{path if kind == 'coco' else data}: part train, 3 images"
    assert (tmp_path / "folds/instances_train.1@70.json").is_file()
    assert cli.main(["split", str(data), "--split", "val", "--out", str(tmp_path / "v"), "--percent", "100"]) == 0
    assert ": part val, 1 images\n" in capsys.readouterr().out
    (tree,) = {file.read_text() for file in (tmp_path / "v").iterdir()}
    assert [image["file_name"].rpartition("/")[2] for image in json.loads(tree)["images"]] == [VAL]


def test_a_source_without_parts_is_taken_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of labels, a folder with one COCO file whatever its name, VOC without lists."""
    data = tmp_path / "coco"
    path = with_val(data, "coco")
    assert folds(tmp_path / "1", capsys, path)[1] == f"{path}: all, 3 images"
    path.unlink()
    other = data / "annotations/instances_val.json"
    assert folds(tmp_path / "2", capsys, data, "100") == ({VAL}, f"{other}: all, 1 images")
    data = tmp_path / "voc"
    path = with_val(data, "voc")
    assert folds(tmp_path / "3", capsys, path)[1] == f"{path}: all, 3 images"
    shutil.rmtree(data / "ImageSets")
    assert folds(tmp_path / "4", capsys, data, "100") == ({*same.BOXES, VAL}, f"{data}: all, 4 images")


def test_parts_without_train_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = with_val(tmp_path, "yolo")
    path.write_text(path.read_text().replace('"train": "images/train", ', ""))
    with pytest.raises(SystemExit):
        cli.main(["split", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "no split train; it has val" in capsys.readouterr().err


def roboflow(folder: Path) -> Path:
    """An export that names ``../test/images``, and has no such folder."""
    path = with_val(folder, "yolo")
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / part).mkdir(exist_ok=True)
            (folder / kind / part).rename(folder / part / kind)
    parts = "train: ../train/images\nval: ../val/images\ntest: ../test/images\n"
    path.write_text(f"{parts}\nnc: 3\nnames: {list(same.CLASSES)!r}\n")
    return path


def test_an_export_without_one_of_its_parts_is_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = roboflow(tmp_path)
    report = check(path, format="yolo")
    assert report.usable and (report.images, report.readable, report.boxes) == (4, 4, 6)
    assert report.problems == {PART_MISSING: [f"part test: ../test/images is not in {tmp_path}"]}
    assert not check(path, format="yolo", on_error="fail").usable
    assert len(load_annotations(path, split="train")) == 3
    assert cli.main(["check", str(path)]) == 0
    assert f"problem: {PART_MISSING}: 1\n" in capsys.readouterr().out
    assert cli.main(["check", str(path), "--split", "val"]) == 0
    assert "problem" not in capsys.readouterr().out
    assert cli.main(["check", str(path), "--split", "test"]) == 1
    assert f"NOT usable: annotations {path}: ../test/images is not in {tmp_path}\n" in capsys.readouterr().out


def test_a_folder_without_images_is_such_a_part_too(tmp_path: Path) -> None:
    path = roboflow(tmp_path)
    (tmp_path / "test/images").mkdir(parents=True)
    report = check(path, format="yolo")
    assert report.usable and len(report.problems[PART_MISSING]) == 1
    assert "part test: images" in report.problems[PART_MISSING][0] and "no file ends in" in str(report.problems)


def test_without_the_part_train_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    path = roboflow(tmp_path)
    shutil.rmtree(tmp_path / "train")
    report = check(path, format="yolo")
    assert not report.usable and (report.images, report.readable, report.boxes) == (1, 1, 1)
    assert check(path, format="yolo", split="val").usable


def test_no_part_at_all_is_not_usable(tmp_path: Path) -> None:
    path = roboflow(tmp_path)
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / part)
    report = check(path, format="yolo")
    assert not report.usable and "../train/images is not in" in report.error
    with pytest.raises(FileNotFoundError, match="train/images is not in"):
        load_annotations(path)


def test_two_places_are_named_where_two_were_tried(tmp_path: Path) -> None:
    path = same.write_yolo(tmp_path)
    path.write_text("names: [a]\npath: deep\ntrain: nowhere")
    with pytest.raises(FileNotFoundError, match=f"nowhere is neither in {tmp_path}/deep nor in {tmp_path}$"):
        load_annotations(path)
