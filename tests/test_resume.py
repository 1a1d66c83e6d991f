"""Runs that are killed, stopped or go wrong, as a user meets them: the same command continues to the same bits."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from aligndet import cli
from aligndet.engine import runfolder
from aligndet.engine.log import read_log
from aligndet.pretrain import AlignDet
from tests.engine.test_checkpoint import same
from tests.test_pipeline import failure, pretrain_config, scenes, train

__all__ = ["scenes"]  # a fixture


def at_forward(patch: pytest.MonkeyPatch, number: int, act: object) -> None:
    """Does something in the ``number``-th forward pass."""
    calls, forward = 0, AlignDet.forward

    def watched(self: AlignDet, *views: object) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        losses = forward(self, *views)  # type: ignore[arg-type]
        return act(losses) if calls == number else losses  # type: ignore[operator]

    patch.setattr(AlignDet, "forward", watched)


def send(number: int) -> object:
    def act(losses: object) -> object:
        os.kill(os.getpid(), number)
        return losses

    return act


def test_killed_and_stopped_runs_end_at_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    train(pretrain_config(scenes, tmp_path / "whole"))
    config = pretrain_config(scenes, tmp_path / "cut")
    for at in (2, 5):  # before the first checkpoint, and after the one of step 3
        child = os.fork()
        if child == 0:
            at_forward(pytest.MonkeyPatch(), at, send(signal.SIGKILL))
            train(config)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        at_forward(patch, 2, send(signal.SIGTERM))
        train(config)
    assert caught.value.code == 128 + signal.SIGTERM
    assert runfolder.newest(tmp_path / "cut")[1]["step"] == 5, "the running step was finished and saved"
    train(config)
    whole, cut = (runfolder.newest(tmp_path / run)[1] for run in ("whole", "cut"))
    assert not [key for key in ("step", "model", "optimizer", "scaler") if not same(whole[key], cut[key])]
    assert not [
        key for key in ("torch", "cuda", "numpy", "python") if not same(whole["rng"][0][key], cut["rng"][0][key])
    ]
    assert whole["rng"][0]["python"][1] == list(random.Random(0).getstate()[1]), (
        "seeded with config.seed, drawn from never"
    )
    losses = [
        [(r["step"], r["losses"]) for r in read_log(tmp_path / run / "log.jsonl") if "losses" in r]
        for run in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def spoilt(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: loss * float("nan") for name, loss in losses.items()}


@pytest.mark.parametrize("watched", [True, False])
def test_a_bad_step_leaves_a_dump_that_repeats_it(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    watched: bool,
) -> None:
    config = pretrain_config(scenes, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        if not watched:  # as on a GPU: the step is noticed at the next reading of losses only
            patch.setattr("aligndet.engine.guard.mark", _late(patch))
        at_forward(patch, 5, spoilt)
        message = failure(capsys, lambda: train(config, "log_every=6"))
    assert "step 5: loss is not finite" in message
    dump = tmp_path / "run/dump-00000005.pt"
    state = torch.load(dump, weights_only=True)
    assert state["state"]["step"] == (4 if watched else 3)
    assert len(state["images"][0]) == 4
    with pytest.MonkeyPatch.context() as patch:
        at_forward(patch, 1 if watched else 2, spoilt)
        assert cli.main(["replay", str(dump)]) == 0
    assert "reproduced: step 5" in capsys.readouterr().out
    assert cli.main(["replay", str(dump)]) == 1


def _late(patch: pytest.MonkeyPatch) -> object:
    from aligndet.engine import guard
    from aligndet.engine.loop import Training

    init = Training.__post_init__

    def unwatched(self: Training) -> None:
        init(self)
        self.watched = False

    patch.setattr(Training, "__post_init__", unwatched)
    return guard.mark


def test_a_bad_step_is_left_out_on_request(scenes: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_forward(patch, 2, spoilt)
        train(pretrain_config(scenes, tmp_path / "run"), "nonfinite=skip")
    state = runfolder.newest(tmp_path / "run")[1]
    assert (state["step"], state["bad_steps"]) == (6, 1)
    assert all(value.isfinite().all() for value in state["model"].values())
