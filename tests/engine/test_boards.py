"""Figures for TensorBoard and W&B: each step once, also after a kill; nothing of it touches the training."""

from __future__ import annotations

import glob
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from aligndet.engine import boards, runfolder
from aligndet.engine.boards import TensorBoard, WeightsAndBiases
from aligndet.engine.distributed import single
from aligndet.engine.log import Log, _flat, memory_gib, read_log
from tests.engine.test_checkpoint import same
from tests.test_pipeline import failure, finetune_config, pretrain_config, scenes, train

__all__ = ["scenes"]  # a fixture


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `tensorboard`)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_continued_curve_has_each_step_once(tmp_path: Path) -> None:
    """Steps 1 to 5, a kill, and on from the checkpoint of step 3."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `tensorboard`)")
    first = TensorBoard(tmp_path, 0)
    for step in range(1, 6):
        first.write(step, {"loss": float(step)})
    second = TensorBoard(tmp_path, 3)
    for step in range(4, 8):
        second.write(step, {"loss": float(step)})
    second.close()
    assert curves(tmp_path / "tensorboard") == {"loss": [(step, float(step)) for step in range(1, 8)]}


def test_a_run_draws_its_curves_and_trains_the_same(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra `tensorboard`)")
    train(finetune_config(scenes, tmp_path / "plain", ema=0.5), "eval_every=3")
    train(finetune_config(scenes, tmp_path / "drawn", ema=0.5), "eval_every=3", "tensorboard=true")
    plain, drawn = (runfolder.newest(tmp_path / run)[1] for run in ("plain", "drawn"))
    assert same(plain["model"], drawn["model"]) and same(plain["rng"], drawn["rng"])
    found = curves(tmp_path / "drawn/tensorboard")
    records = [record for record in read_log(tmp_path / "drawn/log.jsonl") if "losses" in record]
    assert [step for step, _ in found["loss/total"]] == [1, 2, 3, 4]
    for record, (step, total) in zip(records, found["loss/total"], strict=True):
        assert record["step"] == step
        assert total == pytest.approx(sum(record["losses"].values()), rel=1e-6)
    assert [step for step, _ in found["validation/AP"]] == [3, 4]
    assert [step for step, _ in found["validation_raw/AP"]] == [3]
    assert found["momentum"][3][1] == pytest.approx(5 / 14), "the decay after 4 updates"


def test_records_say_momentum_epoch_rate_and_memory(scenes: Path, tmp_path: Path) -> None:
    train(pretrain_config(scenes, tmp_path / "run"))
    records = [record for record in read_log(tmp_path / "run/log.jsonl") if "losses" in record]
    for number, record in enumerate(records, start=1):
        assert record["epoch"] == pytest.approx(number * 4 / 11), "batches of 4 of 11 images"
        assert record["images_per_second"] == pytest.approx(4 / record["step_time"], rel=1e-9)
        assert 0.05 < record["memory_gib"] < 64
    assert records[0]["momentum"] == pytest.approx(0.996) and records[-1]["momentum"] > 0.999


def test_the_rate_is_that_of_all_steps_since_the_last_record(scenes: Path, tmp_path: Path) -> None:
    train(pretrain_config(scenes, tmp_path / "run"), "log_every=4", "save_every=99", "optim.steps=5")
    records = [record for record in read_log(tmp_path / "run/log.jsonl") if "losses" in record]
    assert [record["step"] for record in records] == [1, 4, 5]
    rates = [record["images_per_second"] * record["step_time"] / 4 for record in records]
    assert rates[0] == pytest.approx(1) and rates[2] == pytest.approx(1)
    assert rates[1] != pytest.approx(1, rel=1e-6)


def test_the_resident_memory_is_what_the_system_says() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system")
    before = memory_gib(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB
    after = memory_gib(torch.device("cpu"))
    said = int(status.read_text().partition("VmRSS:")[2].split()[0]) / 2**20
    assert after == pytest.approx(said, abs=0.02)
    assert after - before == pytest.approx(0.25, abs=0.05)
    del held


def test_nested_figures_get_joined_names_and_only_finite_numbers_count() -> None:
    values: dict[str, Any] = {"AP": 0.5, "masks": {"AP": 0.25, "APs": float("nan")}, "words": "none", "none": None}
    assert _flat({"validation": values}) == {"validation/AP": 0.5, "validation/masks/AP": 0.25}


@pytest.mark.parametrize(("key", "value"), [("tensorboard", "true"), ("wandb", "project")])
def test_a_package_that_is_missing_is_named(
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None if name == key else find(name))
    message = failure(capsys, lambda: train(pretrain_config(scenes, tmp_path / "run"), f"{key}={value}"))
    assert f"{key}: the package {key} is not installed; `pip install {key}`" in message
    assert not (tmp_path / "run").exists()


def test_w_and_b_gets_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: two processes, the second from the checkpoint of step 3 of 5 that were sent."""
    pytest.importorskip("wandb", reason="wandb is not installed (extra `wandb`)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sent: list[dict[str, float]] = []
        # The first process is killed in the validation after step 4, whose figures the second one must not lose.
        for after, last, steps in ((0, (0, 0), range(1, 5)), (3, (4, 2), range(4, 8))):
            board = WeightsAndBiases(tmp_path, "tests", {"seed": 3}, last)
            record = board.run.log
            board.run.log = lambda values, record=record: (  # type: ignore[method-assign, misc]
                sent.append(values),
                record(values),
            )
            for step in steps:
                board.write(step, {"loss": float(step)})
                if step % 2 == 0 and (after, step) != (0, 4):
                    board.write(step, {"validation/AP": step / 10})
            assert after < min(steps)
            board.close()
    assert [(row["step"], row["loss"]) for row in sent if "loss" in row] == [(n, float(n)) for n in range(1, 8)]
    assert [(row["step"], row["validation/AP"]) for row in sent if "loss" not in row] == [(2, 0.2), (4, 0.4), (6, 0.6)]
    assert json.loads((tmp_path / "wandb.json").read_text())["project"] == "tests"
    number = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert len(glob.glob(str(tmp_path / f"wandb/offline-run-*{number}/*.wandb"))) == 2, "one run, in two parts"


def test_the_last_step_before_the_truncation_is_known(tmp_path: Path) -> None:
    log = Log(tmp_path, single())
    for step in (1, 2, 3):
        log._write({"step": step, "losses": {}})
    log.truncate(2)
    assert log.last == (3, 0)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2]
