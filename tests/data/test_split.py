"""Low-data folds: SoftTeacher's draw, sizes, names and order, as files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aligndet import cli
from aligndet.config import load_config
from aligndet.data.formats import load_annotations
from aligndet.data.splits import choose_labelled, share_of
from aligndet.engine.distributed import World
from aligndet.engine.log import Log
from aligndet.engine.stages import fine_tuning
from tests.data import same

ROOT = Path(__file__).parents[2]


def test_sizes_of_coco_s_folds() -> None:
    """method section 5.5: of 118,287 images."""
    assert [share_of(118_287, percent) for percent in (1, 5, 10, 20)] == [1182, 5914, 11828, 23657]
    assert share_of(100, 29) == 28, "29 / 100 * 100 is less than 29 in floating point, as in the original script"
    for percent in (0.5, 0, -3, 101):
        with pytest.raises(ValueError, match="want at least one image and at most all of 100"):
            share_of(100, percent)


def test_folds_of_coco_s_size_by_an_independent_draw() -> None:
    """numpy's legacy choice without replacement is the head of its permutation, which is a Fisher-Yates shuffle."""
    state = np.random.RandomState(2)
    order = np.arange(1000)
    for last in range(999, 0, -1):
        other = _masked(state, last)
        order[last], order[other] = order[other], order[last]
    assert choose_labelled(1000, 10, 2).tolist() == sorted(order[:10].tolist())
    assert set(choose_labelled(1000, 10, 2)) < set(choose_labelled(1000, 50, 2)) < set(choose_labelled(1000, 200, 2))


def _masked(state: np.random.RandomState, last: int) -> int:
    """A number in 0 .. last as the legacy generator draws it: bits of one word, until they fit."""
    mask = (1 << last.bit_length()) - 1
    while True:
        value = int.from_bytes(state.bytes(4), "little") & mask
        if value <= last:
            return value


def many(folder: Path, number: int) -> Path:
    images = [{"id": 900 - n, "file_name": f"{n}.jpg", "height": 9, "width": 9, "license": 3} for n in range(number)]
    annotations = [
        {"id": n, "image_id": 900 - n % number, "category_id": 1, "bbox": [0, 0, 5, 5]} for n in range(3 * number)
    ]
    tree = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    path = folder / "instances_train2017.json"
    path.write_text(json.dumps(tree | {"categories": [{"id": 1, "name": "a"}]}))
    return path


def test_fold_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """np.random.seed(1); np.random.permutation(10) begins 2 9 6 4 0: 30 % of ten images are 2, 6, 9, in this order."""
    path = many(tmp_path, 10)
    out = tmp_path / "semi_supervised_annotations"
    assert cli.main(["split", str(path), "--out", str(out), "--percent", "30", "50"]) == 0
    assert "3 of 10 images each" in capsys.readouterr().out
    names = sorted(file.name for file in out.iterdir())
    assert names == sorted(f"instances_train2017.{fold}@{percent}.json" for fold in range(1, 6) for percent in (30, 50))
    tree = json.loads((out / "instances_train2017.1@30.json").read_text())
    assert [image["file_name"] for image in tree["images"]] == ["2.jpg", "6.jpg", "9.jpg"]
    assert tree["images"][0] == {"id": 898, "file_name": "2.jpg", "height": 9, "width": 9, "license": 3}
    assert [annotation["id"] for annotation in tree["annotations"]] == [2, 6, 9, 12, 16, 19, 22, 26, 29]
    assert tree["info"] == {"year": 2017} and tree["categories"] == [{"id": 1, "name": "a"}]
    assert len(load_annotations(out / "instances_train2017.1@30.json").boxes) == 9


def test_percentages_of_less_than_an_image_are_left_out_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["split", str(many(tmp_path, 10)), "--out", str(out), "--folds", "1"]) == 0
    assert sorted(file.name.partition("@")[2] for file in out.iterdir()) == ["10.json", "20.json"]
    told = capsys.readouterr().out
    assert "no folds of 1 %, which is less than one image" in told and "no folds of 5 %" in told
    with pytest.raises(SystemExit):
        cli.main(["split", str(many(tmp_path, 4)), "--out", str(out)])
    assert "--percent 1: want at least one image and at most all of 4, got 0" in capsys.readouterr().err


def test_folds_of_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("voc", "yolo"):
        same.WRITERS[kind](tmp_path / kind)
        out = tmp_path / f"{kind}-folds"
        arguments = ["split", str(tmp_path / kind), "--split", "train", "--out", str(out), "--percent", "70"]
        assert cli.main(arguments) == 0
        assert "data.train_images=" in capsys.readouterr().out
        part = load_annotations(out / "instances_train.1@70.json")
        # np.random.seed(1); np.random.permutation(3) begins 0 2
        assert list(part.file_names) == ["a b.png", "ü.png"]
        assert part.labels.tolist() == [1, 0, 2, 1, 1]


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_training_reads_the_fold_that_was_written(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the command says: nothing is written where nobody reads it (method section 8.15)."""
    same.WRITERS[kind](tmp_path / kind)
    source = tmp_path / kind / ("annotations/instances_train.json" if kind == "coco" else "")
    out = tmp_path / "folds"
    assert cli.main(["split", str(source), "--split", "train", "--out", str(out), "--percent", "70"]) == 0
    root = capsys.readouterr().out.split("data.train_images=")[1].split()[0]
    fold = out / "instances_train.1@70.json"
    config = load_config(
        ROOT / "configs/finetune/fcos_mobilenet_v2_lowdata.yaml",
        [
            f"run={tmp_path}",
            f"data.train={fold}",
            f"data.train_images={root}",
            "data.val=null",
            "data.labelled=null",
            "data.on_error=fail",
        ],
    )
    world = World(0, 1, torch.device("cpu"))
    stage = fine_tuning(config, Log(tmp_path, world), world)
    read = [stage.dataset[(row, 0)].image_id for row in range(len(stage.dataset))]  # type: ignore[union-attr]
    assert [stage.name_of(number) for number in read] == ["a b.png", "ü.png"]


def test_bad_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = many(tmp_path, 10)
    same.write_images(tmp_path / "photos")
    for arguments, says in [
        ([str(path), "--percent", "5"], "--percent 5: want at least one image"),
        ([str(path), "--percent", "nan"], "--percent: want a finite number, got nan"),
        ([str(path), "--percent", "20", "inf"], "--percent: want a finite number, got inf"),
        ([str(path), "--percent", "20", "--folds", "1", "-1"], "--folds: want whole numbers 0 .. 4294967295, got -1"),
        ([str(path), "--percent", "20", "--folds", "4294967296"], "--folds: want whole numbers 0 .. 4294967295, got"),
        ([str(tmp_path / "photos")], "holds no labels to split"),
        ([str(tmp_path / "none.json")], "no such file"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["split", *arguments, "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
