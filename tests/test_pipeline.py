"""The pipeline as a user runs it: propose, pre-train, fine-tune, evaluate, predict; resume; two ranks; bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from aligndet import cli
from aligndet.data.synthetic import make_scenes
from aligndet.engine import precision
from aligndet.engine.log import read_log
from aligndet.pretrain import AlignDet

ROOT = Path(__file__).parents[1]
MODEL = {"backbone": "resnet18", "width": 0.25, "channels": 32, "convolutions": 1, "levels": 3}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, images=11, size=128, seed=3, name="train")
    make_scenes(folder, images=5, size=128, seed=4, name="val")
    arguments = ["propose", "--annotations", str(folder / "annotations/instances_train.json")]
    arguments += ["--images", str(folder / "images"), "--out", str(folder / "proposals.npz"), "--mode", "single"]
    assert cli.main([*arguments, "--workers", "1", "--min-size", "6"]) == 0
    return folder


def pretrain_config(scenes: Path, run: Path, **optim: object) -> Path:
    tree = {
        "task": "pretrain",
        "run": str(run),
        "device": "cpu",
        "log_every": 1,
        "save_every": 3,
        "model": MODEL,
        "data": {"images": str(scenes / "images"), "proposals": str(scenes / "proposals.npz"), "workers": 0}
        | {"short_side": [96, 128], "long_side": 128},
        "method": {"candidates": 256, "embedding": 32},
        "optim": {"name": "sgd", "lr": 0.01, "batch": 4, "steps": 6, "warmup": 0} | optim,
    }
    return written(run, tree)


def finetune_config(scenes: Path, run: Path, **top: object) -> Path:
    labels = scenes / "annotations"
    tree = {
        "task": "finetune",
        "run": str(run),
        "device": "cpu",
        "log_every": 1,
        "model": MODEL,
        "data": {"train": str(labels / "instances_train.json"), "val": str(labels / "instances_val.json"), "workers": 0}
        | {"short_side": 128, "long_side": 128, "eval_short_side": 128, "labelled": 7},
        "optim": {"name": "sgd", "lr": 0.01, "batch": 4, "steps": 4, "warmup": 0},
    }
    return written(run, tree | top)


def written(run: Path, tree: dict[str, object]) -> Path:
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def train(path: Path, *overrides: str) -> None:
    assert cli.train(["--cfg", str(path), *overrides]) == 0


def failure(capsys: pytest.CaptureFixture[str], command: Callable[[], object]) -> str:
    """The one line of stderr that starts with the program's name; exit code 2."""
    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("aligndet: ")]
    assert len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "argument command: invalid choice: 'nonsense'"),
        (["train"], "the following arguments are required: --cfg"),
        (["train", "--cfg", "a.yaml", "--foo"], "unrecognized arguments: --foo; keys are written"),
        (["propose", "--images", "photos"], "the following arguments are required: --out"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"aligndet: {message}")
    assert lines[0].endswith(" --help")


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["detector"]


def test_a_slow_precision_is_warned_of_and_a_constant_warm_up_is_followed(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda *dtypes: [0.001, 0.025])
    config = finetune_config(scenes, tmp_path / "fine")
    warm_up = ("optim.warmup=2", "optim.warmup_ratio=0.25", "optim.warmup_schedule=constant")
    train(config, "optim.amp=bf16", "optim.steps=3", *warm_up)
    assert "warning: optim.amp=bf16 is far slower on this processor" in capsys.readouterr().err
    rates = [record["lr"] for record in read_log(tmp_path / "fine/log.jsonl") if "lr" in record]
    assert rates == pytest.approx([0.0025, 0.0025, 0.01])
    words = ["--cfg", str(config), "--weights", str(tmp_path / "fine/model.pt")]
    for amp, said in (("off", 0), ("bf16", 1)):
        assert cli.evaluate_weights([*words, f"optim.amp={amp}"]) == 0
        assert capsys.readouterr().err.count(f"warning: optim.amp={amp} is far slower") == said


def test_from_images_to_metrics(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(pretrain_config(scenes, tmp_path / "pre"))
    config = finetune_config(scenes, tmp_path / "fine", weights=str(tmp_path / "pre/pretrained.pt"))
    train(config)
    metrics = json.loads((tmp_path / "fine/metrics.json").read_text())
    assert 0 <= metrics["AP"] <= metrics["AP50"] <= 1
    resolved = yaml.safe_load((tmp_path / "fine/config.yaml").read_text())
    assert resolved["optim"]["schedule"] == "step"
    assert torch.load(tmp_path / "fine/checkpoint-00000004.pt", weights_only=True)["config"] == resolved
    model = str(tmp_path / "fine/model.pt")
    assert cli.evaluate_weights(["--cfg", str(config), "--weights", model, "--per-class"]) == 0
    assert "not read by eval" not in capsys.readouterr().err
    others: list[str] = [
        "--cfg",
        str(config),
        "--weights",
        model,
        "data.train=nowhere",
        "model.channels=32",
        "data.workers=0",
    ]
    assert cli.evaluate_weights(others) == 0
    assert "not read by eval, the weights say it: data.train, model.channels\n" in capsys.readouterr().err
    line = failure(capsys, lambda: cli.evaluate_weights([*others, "data.classes=[owl]"]))
    assert "data.classes: " in line and "got owl; see --per-class" in line
    again = json.loads((tmp_path / "fine/eval/metrics.json").read_text())
    assert again["AP"] == metrics["AP"]
    predict = ["predict", str(scenes / "images"), "--weights", model, "--out", str(tmp_path / "found")]
    assert cli.main([*predict, "--short-side", "128", "--long-side", "128", "--score-threshold", "0.05"]) == 0
    records = json.loads((tmp_path / "found/detections.json").read_text())
    assert len(records["images"]) == 16
    assert len(list((tmp_path / "found/drawn").iterdir())) == 16


def test_validation_on_the_way_changes_nothing_but_the_log(scenes: Path, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("watched", ("eval_every=2",))):
        train(finetune_config(scenes, tmp_path / name), *more)
    plain, watched = (weights_of(tmp_path / name / "model.pt") for name in ("plain", "watched"))
    assert all(torch.equal(value, watched[key]) for key, value in plain.items())
    records = [record for record in read_log(tmp_path / "watched/log.jsonl") if "metrics" in record]
    assert [record["step"] for record in records] == [2], "the last step is measured after the run"
    assert 0 <= records[0]["metrics"]["AP"] <= 1


def test_image_domain_backbone_feeds_the_detector(scenes: Path, tmp_path: Path) -> None:
    tree = {
        "task": "image_domain",
        "run": str(tmp_path / "ssl"),
        "device": "cpu",
        "model": {"backbone": "resnet18", "width": 0.25, "norm": "batch"},
        "data": {"images": str(scenes / "images"), "short_side": 64, "workers": 0},
        "method": {"projection": 32, "bottleneck": 16},
        "optim": {"lr": 0.05, "batch": 5, "steps": 3, "warmup": 0},
    }
    train(written(tmp_path / "ssl", tree))
    backbone = torch.load(tmp_path / "ssl/backbone.pt", weights_only=True)["backbone"]
    weights = f"model.backbone_weights={tmp_path / 'ssl/backbone.pt'}"
    train(pretrain_config(scenes, tmp_path / "pre"), weights)
    after = weights_of(tmp_path / "pre/pretrained.pt")
    for name in ("conv1.weight", "bn1.running_mean", "layer4.1.conv2.weight"):
        assert torch.equal(after[f"backbone.{name}"], backbone[name]), name


def test_an_interrupted_run_continues_to_the_same_weights(scenes: Path, tmp_path: Path) -> None:
    train(pretrain_config(scenes, tmp_path / "whole"))
    config = pretrain_config(scenes, tmp_path / "cut")
    calls = 0
    forward = AlignDet.forward

    def interrupted(self: AlignDet, *views: object) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return forward(self, *views)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(AlignDet, "forward", interrupted)
        cli.train(["--cfg", str(config)])
    assert caught.value.code == 130
    assert not (tmp_path / "cut/pretrained.pt").exists()
    train(config)
    whole, cut = (weights_of(tmp_path / run / "pretrained.pt") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("whole", "cut")]
    losses = [[(r["step"], r["losses"]) for r in log if "losses" in r] for log in logs]
    assert losses[0] == losses[1]


def test_a_finished_run_does_nothing_and_another_config_is_refused(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretrain_config(scenes, tmp_path / "run")
    train(config)
    before = weights_of(tmp_path / "run/pretrained.pt")
    train(config, "log_every=2")
    after = weights_of(tmp_path / "run/pretrained.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    message = failure(capsys, lambda: train(config, "optim.lr=0.5"))
    assert "another config (optim.lr: 0.01 -> 0.5)" in message


def test_accumulation_is_close_to_one_large_batch(scenes: Path, tmp_path: Path) -> None:
    """Box losses of equal halves: two passes of two images give nearly the step of one pass of four."""
    common = ("method.contrast=0", "optim.steps=1", "data.flip=0", "method.candidates=100000")
    train(pretrain_config(scenes, tmp_path / "one"), *common)
    train(pretrain_config(scenes, tmp_path / "two"), *common, "optim.accumulate=2")
    one, two = (weights_of(tmp_path / run / "pretrained.pt") for run in ("one", "two"))
    name = next(n for n in one if n.startswith("neck.") and n.endswith("weight"))
    assert not torch.equal(one[name], two[name]), "normalisers are per pass, so the two are close, not equal"
    assert torch.allclose(one[name], two[name], atol=2e-3)


def test_two_ranks_train_and_evaluate(scenes: Path, tmp_path: Path) -> None:
    pre = pretrain_config(scenes, tmp_path / "pre")
    fine = finetune_config(scenes, tmp_path / "fine", weights=str(tmp_path / "pre/pretrained.pt"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for config in (pre, fine):
        command = [*launcher, str(ROOT / "train.py"), "--cfg", str(config)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "pre/pretrained.pt").exists()
    assert "AP" in json.loads((tmp_path / "fine/metrics.json").read_text())
    steps = [record["step"] for record in read_log(tmp_path / "pre/log.jsonl") if "losses" in record]
    assert steps == sorted(set(steps)), "one rank writes the log"


def test_three_frames_from_the_command_line_to_forward(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = []
    forward = AlignDet.forward

    def watched(self: AlignDet, *views: object) -> dict[str, torch.Tensor]:
        own = [f.name for f in traceback.extract_stack() if str(ROOT / "aligndet") in f.filename]
        stacks.append(own)
        return forward(self, *views)  # type: ignore[arg-type]

    monkeypatch.setattr(AlignDet, "forward", watched)
    train(pretrain_config(scenes, tmp_path / "run"), "optim.steps=1")
    assert stacks == [["train", "fit"]]


def test_a_broken_image_is_skipped_and_counted(scenes: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    victim = sorted((copy / "images").glob("*train*"))[0] if list((copy / "images").glob("*train*")) else None
    victim = victim or sorted((copy / "images").iterdir())[0]
    victim.write_bytes(b"")
    train(pretrain_config(copy, tmp_path / "run"), "optim.steps=8")
    warnings = [record for record in read_log(tmp_path / "run/log.jsonl") if "skipped image" in str(record)]
    assert warnings
    assert victim.name in str(warnings[0])


def test_bad_input_is_one_line_and_exit_code_2(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretrain_config(scenes, tmp_path / "run")
    assert "none.yaml: no such file" in failure(capsys, lambda: cli.train(["--cfg", str(tmp_path / "none.yaml")]))
    assert "none.npz" in failure(capsys, lambda: train(config, f"data.proposals={tmp_path}/none.npz"))
    assert "nowhere" in failure(capsys, lambda: train(config, f"data.images={tmp_path}/nowhere"))
    assert "none.pth: no such file" in failure(capsys, lambda: train(config, "model.backbone_weights=none.pth"))
    assert "fcos" in failure(capsys, lambda: train(config, "model.detector=fcoss"))
    fine = finetune_config(scenes, tmp_path / "fine")
    assert "none.json" in failure(capsys, lambda: train(fine, "data.train=none.json"))
    assert "'discc'" in failure(capsys, lambda: train(fine, "data.classes=[discc]"))
    assert "model.detector: want one of fcos" in failure(capsys, lambda: train(fine, "model.detector=fcoss"))
    assert "data.labelled" in failure(capsys, lambda: train(fine, "data.labelled=99"))
    arguments = ["--cfg", str(fine), "--weights", str(config)]
    assert "damaged or refused" in failure(capsys, lambda: cli.evaluate_weights(arguments))
    missing = ["propose", "--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "p.npz")]
    assert "nowhere" in failure(capsys, lambda: cli.main(missing))


def test_a_loss_that_explodes_stops_the_run(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = AlignDet.forward
    monkeypatch.setattr(
        AlignDet, "forward", lambda self, *views: {k: v * float("nan") for k, v in forward(self, *views).items()}
    )
    message = failure(capsys, lambda: train(pretrain_config(scenes, tmp_path / "run")))
    assert "step 1: loss is not finite" in message
    assert not list((tmp_path / "run").glob("checkpoint*"))
