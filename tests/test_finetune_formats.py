"""Fine-tuning and evaluation as a user runs them, from one data set in each format: same weights, same metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from aligndet import cli
from tests.data import same


def run(path: Path, folder: Path, **data: Any) -> Path:
    tree = {
        "task": "finetune",
        "run": str(folder),
        "device": "cpu",
        "model": {"backbone": "resnet18", "width": 0.25, "channels": 32, "convolutions": 1, "levels": 3},
        "data": {"train": str(path), "val": str(path), "workers": 0, "short_side": 64, "long_side": 128}
        | {"eval_short_side": 64, "voc_metrics": "11-point"}
        | data,
        "optim": {"name": "sgd", "lr": 0.01, "batch": 2, "steps": 3, "warmup": 0},
    }
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    assert cli.train(["--cfg", str(config)]) == 0
    return config


def test_all_formats_train_the_same_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, metrics = [], []
    for kind, write in same.WRITERS.items():
        folder = tmp_path / f"run-{kind}"
        config = run(write(tmp_path / kind), folder)
        content = torch.load(folder / "model.pt", weights_only=True)
        assert list(content["classes"]) == list(same.CLASSES)
        weights.append(content["detector"])
        metrics.append(json.loads((folder / "metrics.json").read_text()))
        capsys.readouterr()
        assert cli.evaluate_weights(["--cfg", str(config), "--weights", str(folder / "model.pt")]) == 0
        assert "VOC: AP " in capsys.readouterr().out
        assert json.loads((folder / "eval/metrics.json").read_text()) == metrics[-1]
    assert set(metrics[0]["voc"]) == {"AP", "AP50", "AP75", "classes"}
    for other in range(1, 3):
        assert weights[0].keys() == weights[other].keys()
        assert all(torch.equal(weights[0][name], weights[other][name]) for name in weights[0])
        assert metrics[0] == metrics[other]


def test_faulty_labels_are_counted_or_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = same.write_voc(tmp_path / "voc")
    objects = same.xml_object("cat", 9, 9, 5, 5) + same.xml_object("dog", 5, 5, 19, 19)
    (tmp_path / "voc/Annotations/c.xml").write_text(same.xml("c.png", objects))
    run(path, tmp_path / "run")
    told = capsys.readouterr()
    assert "1 annotations left out, a side is below 1 px; the first: object 1 (cat) of c.png" in told.out + told.err
    with pytest.raises(SystemExit) as stopped:
        run(path, tmp_path / "strict", on_error="fail")
    assert stopped.value.code == 2
    assert "object 1 (cat) of c.png" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["missing", "class", "images"])
def test_labels_to_validate_with_are_looked_at_before_the_first_step(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = same.write_coco(tmp_path / "coco")
    other, words = path.with_name("other.json"), "no such file"
    if wrong != "missing":
        text = path.read_text()
        other.write_text(text.replace('"dog"', '"wolf"') if wrong == "class" else text.replace(".png", ".jpg"))
        words = "dog" if wrong == "class" else "file names have to be relative"
    with pytest.raises(SystemExit) as stopped:
        run(path, tmp_path / "run", val=str(other), voc_metrics=None)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert words in last and "other.json" in last
    assert not (tmp_path / "run/model.pt").exists()
    assert '"step"' not in (tmp_path / "run/log.jsonl").read_text()


def test_a_run_without_validation_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = same.write_coco(tmp_path / "coco")
    for val, times in ((None, 1), (str(path), 0)):
        folder = tmp_path / f"run-{times}"
        run(path, folder, val=val, voc_metrics=None)
        told = capsys.readouterr()
        assert (told.out + told.err).count("data.val is not set: not evaluated") == times
        assert (folder / "log.jsonl").read_text().count("data.val is not set: not evaluated") == times
        assert (folder / "metrics.json").exists() == (times == 0)


def test_an_experiment_file_of_another_detector_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run(same.write_coco(tmp_path / "coco"), tmp_path / "run", voc_metrics=None)
    weights = ["--weights", str(tmp_path / "run/model.pt")]
    for said, told in (("retinanet", 1), ("fcos", 0)):
        tree = yaml.safe_load(config.read_text())
        tree["model"]["detector"] = said
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
        capsys.readouterr()
        assert cli.evaluate_weights(["--cfg", str(tmp_path / "other.yaml"), *weights]) == 0
        line = "model.pt holds a FCOS, which is evaluated; model.detector retinanet is not read"
        assert capsys.readouterr().err.count(line) == told


@pytest.mark.parametrize("dashes", [["--run=r/x"], ["--batch", "4"], ["optim.batch=4", "--run", "r/x"]])
@pytest.mark.parametrize("command", [cli.train, cli.evaluate_weights])
def test_keys_with_dashes_are_told_how_they_are_written(
    command: Callable[[list[str]], int], dashes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = ["--weights", "w.pt"] if command is cli.evaluate_weights else []
    with pytest.raises(SystemExit) as stopped:
        command(["--cfg", "none.yaml", *weights, *dashes])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    name = next(word for word in dashes if word.startswith("--"))
    assert f"unrecognized arguments: {name}" in error and "; keys are written run=r/x" in error


def test_overrides_stand_before_and_after_options(tmp_path: Path) -> None:
    """As README writes them: eval.py --cfg C data.val=V --weights W --per-class."""
    path = same.write_coco(tmp_path / "coco")
    config = run(path, tmp_path / "run", voc_metrics=None, val=None)
    arguments = ["device=cpu", "--cfg", str(config), f"data.val={path}", "--weights", str(tmp_path / "run/model.pt")]
    assert cli.evaluate_weights([*arguments, "--per-class", "data.eval_short_side=32"]) == 0
    assert (tmp_path / "run/eval/metrics.json").is_file()
