"""Runs that are killed, stopped or go wrong, as a user meets them: the same command continues to the same bits."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import nn

from aligndet import cli
from aligndet.engine import finish, guard, runfolder
from aligndet.engine.log import read_log
from aligndet.finetune import FineTune
from aligndet.pretrain import AlignDet
from aligndet.structures import Batch
from tests.engine.test_checkpoint import Malicious, same
from tests.test_pipeline import failure, finetune_config, pretrain_config, scenes, train

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


def dies_while_writing(number: int) -> None:
    """SIGKILL in the ``number``-th checkpoint, of which the first half is on the disk."""
    calls, write = 0, torch.save

    def dying(state: object, file: IO[bytes]) -> None:
        nonlocal calls
        calls += 1
        write(state, file)
        if calls == number:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    pytest.MonkeyPatch().setattr(torch, "save", dying)


def dies_before_pointing(number: int) -> None:
    """SIGKILL before the ``number``-th rename of a pointer: its checkpoint is written, but does not count yet."""
    calls, replace = 0, os.replace

    def dying(source: Path, target: Path) -> None:
        nonlocal calls
        calls += Path(target).name == runfolder.POINTER
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    pytest.MonkeyPatch().setattr(os, "replace", dying)


def test_fine_tuning_killed_inside_its_saves_ends_at_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    """With a loader worker, too; the other run has none."""
    whole, cut = (finetune_config(scenes, tmp_path / run, save_every=1) for run in ("whole", "cut"))
    train(whole, "data.val=null")
    for die, number, steps in ((dies_while_writing, 2, 1), (dies_before_pointing, 2, 2), (dies_while_writing, 1, 2)):
        child = os.fork()
        if child == 0:
            die(number)
            train(cut, "data.val=null", "data.workers=1")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert (tmp_path / "cut/checkpoint-00000003.pt").exists() == (steps == 2)
        assert runfolder.newest(tmp_path / "cut")[1]["step"] == steps
    train(cut, "data.val=null", "data.workers=1")
    states = [runfolder.newest(tmp_path / run)[1] for run in ("whole", "cut")]
    keys = ("step", "model", "optimizer", "scaler", "rng", "skipped")
    assert not [key for key in keys if not same(states[0][key], states[1][key])]
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("whole", "cut")]
    losses = [[(record["step"], record["losses"]) for record in log if "losses" in record] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 4


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


def test_a_step_that_is_left_out_moves_no_running_statistics() -> None:
    """A forward pass with infinite values leaves a mean of nan, and no later value would take it away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    statistics = guard.Statistics(model, wanted=True)
    model(torch.randn(2, 3, 4, 4))
    statistics.keep()
    before = [buffer.clone() for buffer in model.buffers()]
    model(torch.full((2, 3, 4, 4), torch.inf))
    assert not all(buffer.isfinite().all() for buffer in model.buffers())
    statistics.restore()
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
    off = guard.Statistics(model, wanted=False)
    model(torch.randn(2, 3, 4, 4))
    off.restore()
    assert not all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


def test_norms_that_learn_survive_a_bad_step_of_a_run(scenes: Path, tmp_path: Path) -> None:
    passes, forward = 0, FineTune.forward

    def overflowing(self: FineTune, batch: Batch) -> dict[str, torch.Tensor]:
        nonlocal passes
        passes += 1
        factor = torch.inf if passes == 2 else 1.0
        hook = self.detector.backbone.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor,))
        losses = forward(self, batch)
        hook.remove()
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTune, "forward", overflowing)
        options = ("optim.steps=4", "nonfinite=skip", "model.norm=batch", "model.frozen_stages=0")
        train(finetune_config(scenes, tmp_path / "run"), *options)
    state = runfolder.newest(tmp_path / "run")[1]
    assert (state["step"], state["bad_steps"]) == (4, 1)
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_gradient_that_no_scale_keeps_finite_ends_a_run_in_fp16(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scaler leaves out steps that overflow, without end where the loss is finite and its gradient is NaN."""
    forward = AlignDet.forward

    def without_gradient(self: AlignDet, *views: object) -> dict[str, torch.Tensor]:
        losses = forward(self, *views)  # type: ignore[arg-type]
        return losses | {"box": losses["box"] + (losses["box"] * 0).sqrt()}  # 0, of derivative infinity times 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignDet, "forward", without_gradient)
        line = failure(capsys, lambda: train(pretrain_config(scenes, tmp_path / "run", steps=60), "optim.amp=fp16"))
    # 65536 is halved 30 times before it is below 1e-4.
    assert line.startswith("aligndet: step 31: loss is not finite or its gradient is not"), line


BROKEN = """
import sys
import torch
from aligndet import cli
from aligndet.pretrain import AlignDet

def forward(self, *views):
    raise RuntimeError("a mistake of ours")

if sys.argv.pop() == "step":
    AlignDet.forward = forward
if __name__ == "__main__":
    sys.exit(cli.train(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [("worker", 2, "aligndet: not one of 11 images can be read"), ("step", 1, "RuntimeError: a mistake of ours")],
)
def test_a_run_with_loader_workers_ends_after_an_error(
    place: str, code: int, words: str, scenes: Path, tmp_path: Path
) -> None:
    """The traceback of an error keeps the loader alive, and its workers take no SIGTERM: Python waited for them."""
    images = tmp_path / "images"
    images.mkdir()
    for name in os.listdir(scenes / "images"):
        (images / name).write_bytes(b"" if place == "worker" else (scenes / "images" / name).read_bytes())
    command = [sys.executable, "-c", BROKEN, "--cfg", str(pretrain_config(scenes, tmp_path / "run"))]
    command += ["data.workers=2", f"data.images={images}", place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=Path(__file__).parents[1])
    assert done.returncode == code and words in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr


def test_checkpoints_that_do_not_belong_are_refused_in_one_line(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another model, of a newer version, of another kind, and one with code in it, which does not run."""
    config, run = pretrain_config(scenes, tmp_path / "run", steps=1), tmp_path / "run"
    train(config)
    path, state, _ = runfolder.newest(run)
    assert path is not None
    other = {name: value.flatten()[:3] for name, value in state["model"].items()}
    strange = {name: value for name, value in state["model"].items() if "neck" not in name}
    for wrong, message in (
        ({"model": other}, "does not fit this model: .*size mismatch"),
        ({"model": strange}, "does not fit this model: .*Missing key"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "does not fit this model: .*parameter group"),
        ({"format": runfolder.FORMAT + 1}, f"of format {runfolder.FORMAT + 1}, newer than {runfolder.FORMAT}; update"),
        ({"kind": "pretrained"}, "want a checkpoint of a training run, got pretrained"),
        ({"code": Malicious(tmp_path / "made")}, "no checkpoint can be read .*damaged or refused"),
    ):
        (run / runfolder.POINTER).unlink(missing_ok=True)  # not even its checksum speaks against it
        torch.save(state | wrong, path)
        line = failure(capsys, lambda: train(config))
        assert re.search(message, line), line
        assert len(line) < 900
    assert not (tmp_path / "made").exists()
    fine = finetune_config(scenes, tmp_path / "fine")
    assert "damaged or refused" in failure(capsys, lambda: train(fine, f"weights={path}"))
    assert not (tmp_path / "made").exists()
    assert runfolder.names(run) == [path.name], "nothing was thrown away"


def test_a_result_without_its_checkpoints_is_not_overwritten(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = pretrain_config(scenes, tmp_path / "run", steps=1), tmp_path / "run"
    train(config)
    before = (run / "pretrained.pt").read_bytes()
    for path in (*run.glob("checkpoint-*.pt"), run / runfolder.POINTER):
        path.unlink()
    for steps in (1, 2):
        line = failure(capsys, lambda steps=steps: train(config, f"optim.steps={steps}"))
        assert "holds pretrained.pt and no checkpoint to continue from" in line
    assert (run / "pretrained.pt").read_bytes() == before
    (run / "pretrained.pt").rename(tmp_path / "kept.pt")
    train(config)
    assert (run / "pretrained.pt").exists()


def test_results_are_not_computed_for_a_folder_that_cannot_be_written(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(scenes, tmp_path / "run")
    train(config, "optim.steps=1")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(finish, "detections_on", lambda *_: pytest.fail("detected first"))
    arguments = [
        "--cfg",
        str(config),
        "--weights",
        str(tmp_path / "run/model.pt"),
        "--out",
        str(tmp_path / "file/eval"),
    ]
    line = failure(capsys, lambda: cli.evaluate_weights(arguments))
    assert "file/eval: cannot write there" in line


def test_a_folder_that_cannot_be_written_is_named(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretrain_config(scenes, tmp_path / "run", steps=2)
    if Path("/proc/self").exists():  # where not even root makes folders
        assert "run /proc/run: cannot write there" in failure(capsys, lambda: train(config, "run=/proc/run"))
    (tmp_path / "file").write_text("")
    inside = f"run={tmp_path}/file/run"
    assert "file/run: cannot write there" in failure(capsys, lambda: train(config, inside))
    train(config, "optim.steps=1")
    replace, before = os.replace, runfolder.newest(tmp_path / "run")[1]["step"]

    def read_only(source: object, target: object) -> None:
        if str(target).endswith(".pt"):
            raise OSError(30, "Read-only file system")
        replace(source, target)  # type: ignore[call-overload]

    fresh = pretrain_config(scenes, tmp_path / "fresh", steps=2)
    monkeypatch.setattr(os, "replace", read_only)
    assert "cannot be written, an older one stays as it was: [Errno 30] Read-only" in failure(
        capsys, lambda: train(fresh)
    )
    assert before == 1 and runfolder.newest(tmp_path / "run")[1]["step"] == 1


def test_out_of_memory_names_the_images(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(losses: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSecond line.")

    with pytest.MonkeyPatch.context() as patch:
        at_forward(patch, 2, full)
        line = failure(capsys, lambda: train(pretrain_config(scenes, tmp_path / "run")))
    assert line.startswith("aligndet: step 2: out of memory with the images ")
    named = re.findall(r"([^ ]+\.\w+) \((\d+) x (\d+) px\)", line)
    assert len(named) == 4, line
    assert all((scenes / "images" / name).exists() and max(int(w), int(h)) <= 128 for name, w, h in named)
    assert "optim.accumulate" in line and "Tried to allocate 2.00 GiB" in line and "Second line" not in line


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("aligndet.engine.loop.on_device", "step 1: out of memory before its images were there"),
        ("torch.amp.GradScaler.step", "step 1: out of memory with the images "),
    ],
)
def test_out_of_memory_elsewhere_is_one_line_too(
    place: str,
    words: str,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a batch is sent to the device, and in the first step of an optimizer, which makes its averages."""

    def full(*arguments: object) -> Iterator[object]:
        raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    def full_at_once(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(place, full if place.endswith("on_device") else full_at_once)
    line = failure(capsys, lambda: train(pretrain_config(scenes, tmp_path / "run")))
    assert line.startswith(f"aligndet: {words}")


def test_out_of_memory_in_a_validation_names_what_to_change() -> None:
    with pytest.raises(MemoryError, match=r"validation: out of memory; .*data\.eval_short_side"), guard.memory_of(None):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="other"), guard.memory_of(None):
        raise RuntimeError("other")
