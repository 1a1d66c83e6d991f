"""Ranks that fail, are killed, stop answering or are stopped: all end, one says why, and the run goes on later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aligndet.engine import distributed, runfolder
from aligndet.engine.log import read_log
from aligndet.models.backbones.norm import NORMS
from tests.engine.test_checkpoint import same
from tests.ranks import ROOT, forked
from tests.test_pipeline import pretrain_config, scenes, train
from tests.test_resume import at_forward, send

__all__ = ["scenes"]  # a fixture


def lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("aligndet: ")]


def training(config: Path, *overrides: str, fault: Callable[[int], None] = lambda rank: None) -> Callable[[int], None]:
    def act(rank: int) -> None:
        fault(rank)
        train(config, *overrides)

    return act


def on_rank_1(number: int, act: object) -> Callable[[int], None]:
    """Does something in the ``number``-th forward pass of rank 1."""
    return lambda rank: at_forward(pytest.MonkeyPatch(), number, act) if rank == 1 else None


def raised_on_rank_1(error: Exception, cause: Path) -> Callable[[int], None]:
    """An error in its second step; ``cause`` is the file from which torchrun learns why."""

    def act(losses: object) -> object:
        raise error

    def fault(rank: int) -> None:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(cause) if rank == 1 else ""
        on_rank_1(2, act)(rank)

    return fault


def test_an_error_of_one_rank_ends_all_and_is_told_once(scenes: Path, tmp_path: Path) -> None:
    config = pretrain_config(scenes, tmp_path / "run")
    for error, code in ((ValueError("box 7 is odd"), 2), (RuntimeError("a mistake of ours"), 1)):
        began = time.monotonic()
        ranks = forked(training(config, fault=raised_on_rank_1(error, tmp_path / "cause")), tmp_path)
        assert time.monotonic() - began < 30
        assert [found for found, _ in ranks] == [75, code]
        reason = str(error) if code == 2 else f"RuntimeError: {error}"
        assert json.loads((tmp_path / "cause").read_text())["message"]["message"] == f"rank 1: {reason}"
        assert lines(ranks[0][1]) == [f"aligndet: rank 0 ends: rank 1 failed: {reason}"]
        assert lines(ranks[1][1]) == (["aligndet: rank 1: box 7 is odd"] if code == 2 else [])
        assert ("Traceback" in ranks[1][1]) == (code == 1), "an error of ours shows where it arose"
        assert "Traceback" not in ranks[0][1]


def test_an_error_that_all_ranks_have_is_told_once(scenes: Path, tmp_path: Path) -> None:
    ranks = forked(training(pretrain_config(scenes, tmp_path / "run"), "data.images=nowhere"), tmp_path)
    assert [code for code, _ in ranks] == [2, 2]
    told = [line for _, output in ranks for line in lines(output)]
    assert len(told) == 1 and "nowhere" in told[0]


def test_a_rank_that_fails_later_still_learns_who_failed_first(scenes: Path, tmp_path: Path) -> None:
    config = pretrain_config(scenes, tmp_path / "run")
    ranks = forked(training(config, "data.images=nowhere", fault=slow_to_tell), tmp_path)
    assert [code for code, _ in ranks] == [2, 2]
    assert lines(ranks[0][1]) == ["aligndet: rank 0: images nowhere: no such folder"]
    assert lines(ranks[1][1]) == [], "the store, in rank 0, was gone when rank 1 asked it"


def slow_to_tell(rank: int) -> None:
    """Rank 1 needs a second from its error to its first word of it."""
    tell = distributed.first_failure

    def later(message: str) -> tuple[int, str]:
        time.sleep(1)
        return tell(message)

    if rank == 1:
        pytest.MonkeyPatch().setattr(distributed, "first_failure", later)


def test_a_killed_rank_is_named_by_the_other(scenes: Path, tmp_path: Path) -> None:
    config = pretrain_config(scenes, tmp_path / "run")
    ranks = forked(training(config, fault=on_rank_1(3, send(signal.SIGKILL))), tmp_path)
    assert [code for code, _ in ranks] == [75, -signal.SIGKILL]
    assert len(lines(ranks[0][1])) == 1 and "Traceback" not in ranks[0][1]
    assert "rank 0: rank 1 (process " in ranks[0][1] and ") is gone" in ranks[0][1]


def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_the_timeout(scenes: Path, tmp_path: Path) -> None:
    config = pretrain_config(scenes, tmp_path / "run")
    began = time.monotonic()
    ranks = forked(training(config, "timeout=4", fault=on_rank_1(2, send(signal.SIGSTOP))), tmp_path)
    assert 4 < time.monotonic() - began < 30
    assert [code for code, _ in ranks] == [75, -signal.SIGKILL]
    assert [line for line in lines(ranks[0][1]) if "does not answer in time (timeout)" in line]


def test_two_ranks_stop_together_and_continue_to_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    whole = pretrain_config(scenes, tmp_path / "whole")
    cut = pretrain_config(scenes, tmp_path / "cut")
    assert [code for code, _ in forked(training(whole), tmp_path)] == [0, 0]
    ranks = forked(training(cut, fault=on_rank_1(2, send(signal.SIGTERM))), tmp_path)
    assert [code for code, _ in ranks] == [128 + signal.SIGTERM] * 2
    assert sum(len(lines(output)) for _, output in ranks) == 1
    assert runfolder.newest(tmp_path / "cut")[1]["step"] == 2
    # Both at once, as a scheduler does it.
    assert [code for code, _ in forked(training(cut, fault=terminated_at_forward_2), tmp_path)] == [143, 143]
    assert [code for code, _ in forked(training(cut), tmp_path)] == [0, 0]
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def terminated_at_forward_2(rank: int) -> None:
    at_forward(pytest.MonkeyPatch(), 2, send(signal.SIGTERM))


def assert_same_end(whole: Path, cut: Path) -> None:
    """The last checkpoints and the loss curves are equal bit for bit."""
    states = [runfolder.newest(run)[1] for run in (whole, cut)]
    keys = ("step", "model", "optimizer", "scaler", "rng")
    assert not [key for key in keys if not same(states[0][key], states[1][key])]
    curves = [[(r["step"], r["losses"]) for r in read_log(run / "log.jsonl") if "losses" in r] for run in (whole, cut)]
    assert curves[0] == curves[1] and len(curves[0]) == states[0]["step"]
    exported = [torch.load(run / "pretrained.pt", weights_only=True)["detector"] for run in (whole, cut)]
    assert same(*exported)


def joint_batch_norm(rank: int) -> None:
    """Ranks with 2 and 3 images of different sizes against torch's batch norm of all values at once."""
    world = distributed.start("cpu")
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randn(n, 5, h, 7, generator=generator) * 3 + 2 for n, h in ((2, 11), (3, 13))]
    weights = [torch.randn(part.shape, generator=generator) for part in parts]
    flat = [torch.cat([v.transpose(0, 1).reshape(1, 5, -1, 1) for v in values], 2) for values in (parts, weights)]
    plain, ours = torch.nn.BatchNorm2d(5), NORMS["sync"](5)
    for layer in (plain, ours):
        layer.weight.data.copy_(torch.arange(1.0, 6))
        layer.bias.data.copy_(torch.arange(5.0))
    joint = flat[0].requires_grad_()
    (plain(joint).square() * flat[1]).sum().backward()
    x = parts[rank].requires_grad_()
    ours = torch.nn.parallel.DistributedDataParallel(ours)
    output = ours(x)
    (output.square() * weights[rank]).sum().backward()
    start = parts[0].numel() // 5 if rank else 0
    piece = slice(start, start + x.numel() // 5)
    for mine, all_of_it in ((output, plain(joint)), (x.grad, joint.grad)):
        assert torch.allclose(mine.transpose(0, 1).reshape(5, -1), all_of_it[0, :, piece, 0], atol=1e-4)
    for name in ("weight", "bias"):  # DDP has the mean over ranks
        assert torch.allclose(2 * getattr(ours.module, name).grad, getattr(plain, name).grad, rtol=1e-4, atol=1e-3)
    fresh = torch.nn.BatchNorm2d(5)
    fresh(flat[0])
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(ours.module, name), getattr(fresh, name), rtol=1e-5)
    distributed.stop(world)


def test_synchronised_batch_norm_is_that_of_the_joint_batch(scenes: Path, tmp_path: Path) -> None:
    ranks = forked(joint_batch_norm, tmp_path)
    assert [code for code, _ in ranks] == [0, 0], ranks
    config = pretrain_config(scenes, tmp_path / "run")
    more = ("model.norm=sync", "method.freeze_backbone=false", "optim.steps=2")
    ranks = forked(training(config, *more), tmp_path)
    assert [code for code, _ in ranks] == [0, 0], ranks


FAULTY = """
import os, signal, sys
from aligndet import cli
from aligndet.pretrain import AlignDet
calls, forward = 0, AlignDet.forward
def faulty(self, *views):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *views)
AlignDet.forward = faulty
sys.exit(cli.train())
"""


def test_torchrun_restarts_from_the_last_checkpoint(scenes: Path, tmp_path: Path) -> None:
    """Rank 1 is killed in its second step; 20 times: benchmarks/reliability.py."""
    whole, cut = (pretrain_config(scenes, tmp_path / run, steps=3) for run in ("whole", "cut"))
    assert [code for code, _ in forked(training(whole, "save_every=1"), tmp_path)] == [0, 0]
    (tmp_path / "faulty.py").write_text(FAULTY)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "1", str(tmp_path / "faulty.py"), "--cfg", str(cut), "save_every=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "output", "w+") as file:
        launched = subprocess.Popen(command, env=environment, stderr=file)
        try:
            code = launched.wait(180)
        finally:
            launched.terminate()  # it ends its ranks
        output = (tmp_path / "output").read_text()
    assert code == 0, output[-3000:]
    assert output.count("is gone: killed") == 1
    assert "continues at step 1 of 3" in output
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
