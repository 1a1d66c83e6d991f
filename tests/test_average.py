"""Averaged weights, validation on the way and early stop, as a user meets them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet import cli
from aligndet.config import from_dict, load_config
from aligndet.engine import runfolder
from aligndet.engine.log import read_log
from aligndet.finetune import FineTune
from aligndet.weights import load_detector
from tests.engine.test_checkpoint import same
from tests.ranks import on_two_ranks
from tests.test_pipeline import finetune_config, scenes, train, weights_of

__all__ = ["scenes"]  # a fixture


def records(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(run / "log.jsonl") if "metrics" in record]


def test_averaged_weights_follow_their_formula_and_are_exported(scenes: Path, tmp_path: Path) -> None:
    """A naive average over the weights after each of 4 steps, moving batch norms included."""
    config = finetune_config(scenes, tmp_path / "run", ema=0.3)
    seen: list[dict[str, torch.Tensor]] = []
    forward = FineTune.forward

    def watched(self: FineTune, batch: object) -> dict[str, torch.Tensor]:
        seen.append({key: value.clone() for key, value in self.detector.state_dict().items()})
        return forward(self, batch)  # type: ignore[arg-type]

    overrides = ("model.norm=batch", "eval_every=2", "save_every=4", "keep_checkpoints=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTune, "forward", watched)
        train(config, *overrides)
    state = runfolder.newest(tmp_path / "run")[1]
    raw = {key.removeprefix("detector."): value for key, value in state["model"].items()}
    naive = {key: value.double() for key, value in seen[0].items()}
    for number, after in enumerate([*seen[1:], raw], start=1):
        decay = min(0.3, (1 + number) / (10 + number))
        naive = {key: decay * value + (1 - decay) * after[key].double() for key, value in naive.items()}
    exported = weights_of(tmp_path / "run/model.pt")
    moved = 0
    for key, value in exported.items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), naive[key], atol=1e-6), key
            moved += not torch.equal(value, raw[key])
        else:
            assert torch.equal(value, raw[key]), key
    assert moved > 20 and state["average"]["updates"] == 4
    assert any("running_mean" in key and not torch.equal(exported[key], raw[key]) for key in exported)
    (record,) = records(tmp_path / "run")
    assert record["step"] == 2 and 0 <= record["metrics"]["AP"] <= 1 and 0 <= record["raw"]["AP"] <= 1
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(metrics["raw"]) == set(metrics) - {"raw", "classes"}

    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert best["of"] in ("weights", "average") and best["step"] in (2, 4)
    _, classes = load_detector(tmp_path / "run/best.pt")
    assert list(classes) == best["classes"]
    arguments = ["--cfg", str(config), "--weights", str(tmp_path / "run/best.pt")]
    assert cli.evaluate_weights(arguments) == 0
    again = json.loads((tmp_path / "run/eval/metrics.json").read_text())
    assert again["AP"] == pytest.approx(best["metrics"]["AP"], abs=1e-9)


def test_the_average_changes_nothing_in_training(scenes: Path, tmp_path: Path) -> None:
    train(finetune_config(scenes, tmp_path / "plain"))
    train(finetune_config(scenes, tmp_path / "averaged", ema=0.9), "eval_every=3")
    plain, averaged = (runfolder.newest(tmp_path / run)[1] for run in ("plain", "averaged"))
    assert same(plain["model"], averaged["model"]) and same(plain["optimizer"], averaged["optimizer"])
    assert plain["average"] is None and (tmp_path / "averaged/best.pt").exists()
    assert not (tmp_path / "plain/best.pt").exists()


def test_a_killed_run_with_an_average_ends_at_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    more = {"ema": 0.5, "eval_every": 3, "save_every": 2, "early_stop": 1}
    optim = {"name": "sgd", "lr": 0.01, "batch": 4, "steps": 8, "warmup": 0}
    whole = finetune_config(scenes, tmp_path / "whole", optim=optim, **more)
    cut = finetune_config(scenes, tmp_path / "cut", optim=optim, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aligndet.engine.stages.metrics_of", scripted([0.5, 0.25, 0.75, 0.125] * 2))
        train(whole)
        for at, aps in ((5, [0.5, 0.25]), (2, [])):
            child = os.fork()
            if child == 0:
                patch.setattr("aligndet.engine.stages.metrics_of", scripted(aps))
                killed_at(patch, at)
                train(cut)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        state = runfolder.newest(tmp_path / "cut")[1]
        assert (state["step"], state["average"]["updates"], state["best"]) == (4, 4, 0.5)
        patch.setattr("aligndet.engine.stages.metrics_of", scripted([0.75, 0.125] * 2))
        train(cut)
    states = [runfolder.newest(tmp_path / run)[1] for run in ("whole", "cut")]
    for key in ("step", "model", "average", "optimizer", "best", "stale"):
        assert same(states[0][key], states[1][key]), key
    for name in ("model.pt", "best.pt"):
        one, other = (weights_of(tmp_path / run / name) for run in ("whole", "cut"))
        assert same(one, other), name


def scripted(aps: list[float]) -> Any:
    """Metrics that were decided beforehand: of the weights themselves and of the average in turn."""
    left = list(aps)
    return lambda *_, **__: {"AP": left.pop(0), "AP50": 0.0}


def killed_at(patch: pytest.MonkeyPatch, number: int) -> None:
    calls, forward = 0, FineTune.forward

    def watched(self: FineTune, batch: object) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, batch)  # type: ignore[arg-type]

    patch.setattr(FineTune, "forward", watched)


def test_a_run_that_no_longer_improves_stops_and_says_so(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AP 0.3 after step 1, 0.4 after 2, then 0.4 and 0.1: two without a better one, so it ends after step 4 of 9."""
    optim = {"name": "sgd", "lr": 0.01, "batch": 4, "steps": 9, "warmup": 0}
    config = finetune_config(scenes, tmp_path / "run", eval_every=1, early_stop=2, save_every=9, optim=optim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aligndet.engine.stages.metrics_of", scripted([0.3, 0.4, 0.4, 0.1]))
        train(config)
        told = capsys.readouterr().err
        assert "stops early after step 4: no AP above 40.0 in the last 2 validations" in told
        assert "model.pt: written after 4 steps" in told
        state = runfolder.newest(tmp_path / "run")[1]
        assert (state["step"], state["stale"], state["best"]) == (4, 2, 0.4)
        assert runfolder.best(tmp_path / "run") == tmp_path / "run/checkpoint-00000002.pt"
        assert torch.load(tmp_path / "run/best.pt", weights_only=True)["step"] == 2
        before = weights_of(tmp_path / "run/model.pt")
        train(config)  # again: nothing to do
        assert "written after 4 steps" in capsys.readouterr().err
        assert same(before, weights_of(tmp_path / "run/model.pt"))
        patch.setattr("aligndet.engine.stages.metrics_of", scripted([0.1] * 4))
        train(config, "early_stop=null")
    assert "written after 9 steps" in capsys.readouterr().err
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_epochs_between_validations_are_steps(scenes: Path, tmp_path: Path) -> None:
    """7 labelled images in batches of 3: three steps an epoch."""
    optim = {"lr": 0.01, "batch": 3, "epochs": 3, "warmup": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aligndet.engine.stages.metrics_of", scripted([0.3, 0.4]))
        train(finetune_config(scenes, tmp_path / "run", eval_every_epochs=1, optim=optim))
    assert [record["step"] for record in records(tmp_path / "run")] == [3, 6]


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"ema": 1.0}, "ema: want a decay below 1"),
        ({"ema": 0}, "ema: want a finite number above 0"),
        ({"early_stop": 2}, "early_stop: has no effect without eval_every"),
        ({"eval_every": 2, "eval_every_epochs": 1}, "eval_every, eval_every_epochs: want one of the two"),
        ({"eval_every": 7}, "eval_every: 7 has no effect in a run of 7"),
        ({"eval_every": 3, "early_stop": 2}, "eval_every: 3 and early_stop 2 has no effect in a run of 7"),
        ({"eval_every": 3, "data": {"train": "t"}}, "eval_every: has no effect without data.val"),
        ({"eval_every_epochs": 3, "data": {"train": "t"}}, "eval_every_epochs: has no effect without data.val"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(top: dict[str, Any], message: str) -> None:
    tree = {"task": "finetune", "run": "r", "data": {"train": "t", "val": "v"}, "optim": {"steps": 7}}
    from_dict(tree | {"eval_every": 2, "early_stop": 2, "ema": 0.99})
    with pytest.raises(ValueError) as caught:
        from_dict(tree | top)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("optim", "keys", "shown"),
    [
        ({"epochs": 2}, {"eval_every": 6}, "every 6 steps has no effect in a run of 6 steps"),
        (
            {"epochs": 2},
            {"eval_every": 2, "early_stop": 2},
            "every 2 steps and early_stop 2 has no effect",
        ),
        ({"steps": 5}, {"eval_every_epochs": 2}, "every 6 steps has no effect in a run of 5 steps"),
    ],
)
def test_validations_that_never_come_are_refused_in_other_units_too(
    optim: dict[str, int],
    keys: dict[str, int],
    shown: str,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """7 labelled images in batches of 3: three steps an epoch."""
    length = {"lr": 0.01, "batch": 3, "warmup": 0} | optim
    with pytest.raises(SystemExit) as ended:
        train(finetune_config(scenes, tmp_path / "run", optim=length, **keys))
    assert ended.value.code == 2
    assert shown in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_one_line(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/metrics.json").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        train(finetune_config(scenes, tmp_path / "run"), "optim.steps=2")
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert last.startswith("aligndet: ") and "metrics.json" in last


def test_the_average_is_part_of_what_a_run_is(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finetune_config(scenes, tmp_path / "run", ema=0.5)
    train(config, "optim.steps=2")
    with pytest.raises(SystemExit):
        train(config, "optim.steps=2", "ema=0.75")
    assert "another config (ema: 0.5 -> 0.75)" in capsys.readouterr().err
    assert load_config(config).ema == 0.5


RANKS = """
import sys
import torch
torch.set_num_threads(1)
from aligndet.config import load_config
from aligndet.engine import best, distributed as d
from aligndet.engine.finish import finish
from aligndet.engine.loop import fit
from aligndet.engine.prepare import prepare
world = d.start("cpu")
config = load_config(CONFIG, ["model.norm=batch", "eval_every=2", "save_every=9"])
training = prepare(config, world)
fit(training)
module = training.average.module
def total(values):
    return [value.double().sum().item() for value in values]
mine = d.gather_objects(total(module.parameters()), world)
assert mine[0] == mine[1], "the average of weights is the same on all ranks"
moving = d.gather_objects(total(module.buffers()), world)
assert moving[0] != moving[1], "each rank has statistics of its own images"
best.same_buffers(module, world)
moving = d.gather_objects(total(module.buffers()), world)
assert moving[0] == moving[1]
decided = d.gather_objects([training.validation.best, training.validation.stale], world)
assert decided[0] == decided[1] and decided[0][0] is not None
finish(config, training)
d.stop(world)
"""


def test_ranks_average_measure_and_decide_alike(scenes: Path, tmp_path: Path) -> None:
    config = finetune_config(scenes, tmp_path / "run", ema=0.5, optim={"batch": 4, "steps": 5})
    on_two_ranks(RANKS.replace("CONFIG", repr(str(config))))
    content = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert content["step"] in (2, 4, 5)
    assert (tmp_path / "run/model.pt").exists()
