"""The profile of a few steps, and batches on their way to the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aligndet.engine import profiling, runfolder
from aligndet.engine.log import read_log
from aligndet.engine.prefetch import on_device, one_ahead, tensors_of
from aligndet.structures import Batch
from tests.engine.test_checkpoint import same
from tests.scenes import batch_of, boxes_for, views_of
from tests.test_pipeline import pretrain_config, scenes, train

__all__ = ["scenes"]  # a fixture


def test_a_profile_is_written_and_training_stays_the_same(scenes: Path, tmp_path: Path) -> None:
    length = "optim.steps=11"
    train(pretrain_config(scenes, tmp_path / "plain"), length)
    train(pretrain_config(scenes, tmp_path / "watched"), length, "profile=true")
    plain, watched = (runfolder.newest(tmp_path / run)[1] for run in ("plain", "watched"))
    for key in ("model", "optimizer", "rng"):
        assert same(plain[key], watched[key]), key
    events = json.loads((tmp_path / "watched/trace.json").read_text())["traceEvents"]
    for name, number in (("data", 5), ("forward", 5), ("backward", 5), ("optimizer", 5), ("contrast", 5)):
        marked = [event for event in events if event.get("name") == name and event.get("cat") == "user_annotation"]
        assert len(marked) == number, f"{name}: once in each of the 5 recorded steps"
    text = (tmp_path / "watched/profile.txt").read_text()
    assert "aten::convolution_backward" in text or "aten::mkldnn" in text
    shares = {line.split()[0]: float(line.split("%")[0].split()[-1]) for line in text.splitlines()[:11] if "%" in line}
    outer = ("data", "forward", "backward", "optimizer", "average")
    other = float(next(line for line in text.splitlines() if line.startswith("other ")).split("%")[0].split()[-1])
    assert sum(shares[name] for name in outer) + other == pytest.approx(100, abs=0.5)
    assert shares["backbone"] + shares["assignment"] + shares["contrast"] < shares["forward"]
    assert any("trace.json" in record.get("note", "") for record in read_log(tmp_path / "watched/log.jsonl"))


def test_a_run_that_is_too_short_for_a_profile_is_refused_and_a_continued_one_goes_on(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pretrain_config(scenes, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        train(config, "profile=true", "optim.steps=8", "save_every=4")
    assert ended.value.code == 2 and "profile: want 9 steps to run, got 8" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("aligndet.engine.loop._report", stop_at(6))
        train(config, "optim.steps=9", "save_every=4", "log_every=1")
    train(config, "profile=true", "optim.steps=9", "save_every=4", "log_every=1")
    warnings = [record["warning"] for record in read_log(tmp_path / "run/log.jsonl") if "warning" in record]
    assert any("profile: want 9 steps to run, got 5; goes on without" in line for line in warnings)
    assert not (tmp_path / "run/trace.json").exists() and (tmp_path / "run/pretrained.pt").exists()


def stop_at(last: int) -> Callable[[object, int, list[str]], None]:
    """In place of the loop's report: ends the run after step ``last``."""

    def report(training: object, step: int, unread: list[str]) -> None:
        if step == last:
            raise ValueError("enough")

    return report


@pytest.mark.parametrize(
    ("start", "steps", "every", "words"),
    [
        (0, 9, None, ""),
        (0, 8, None, "want 9 steps to run, got 8"),
        (0, 20, 9, ""),  # after the last recorded step
        (0, 20, 8, "a validation after every 8 steps"),
        (8, 20, 8, "a validation after every 8 steps"),  # after step 16
        (9, 30, 18, ""),
    ],
)
def test_validations_are_not_recorded(start: int, steps: int, every: int | None, words: str) -> None:
    found = profiling.hindrance(start, steps, every)
    assert words in found and bool(found) == bool(words)


def test_the_table_by_hand() -> None:
    """Five steps of 20 ms: 10 forward (3 of them the backbone, 2 assignment), 6 backward, 4 nothing in particular."""

    def took(milliseconds: float) -> SimpleNamespace:
        return SimpleNamespace(cpu_time_total=5000 * milliseconds, device_time_total=2500 * milliseconds)

    averages = {"forward": took(10), "backbone": took(3), "assignment": took(2), "backward": took(6)}
    averages |= {f"ProfilerStep#{number}": took(4) for number in range(5)}
    rows = [line.split() for line in profiling.range_table(averages, on_gpu=True).splitlines()]
    found = {" ".join(row[: row.index("ms") - 1]): row[row.index("ms") - 1 :] for row in rows}
    assert {name: (row[0], *row[2:4]) for name, row in found.items()} == {
        "forward": ("10.00", "50.0%", "5.00"),
        "backbone": ("3.00", "15.0%", "1.50"),
        "assignment": ("2.00", "10.0%", "1.00"),
        "other parts of it": ("5.00", "25.0%", "2.50"),
        "backward": ("6.00", "30.0%"),
        "other": ("4.00", "20.0%"),
        "step": ("20.00", "100.0%"),
    }


def items() -> list[tuple[Batch, ...]]:
    return [views_of((number, 2)) for number in (3, 1, 2)]


def test_batches_come_in_order_and_unchanged() -> None:
    expected = items()
    found = list(on_device(iter(expected), torch.device("cpu")))
    assert [host is batches and batches is own for (host, batches), own in zip(found, expected, strict=True)] == [
        True
    ] * 3
    assert list(on_device([], torch.device("cpu"))) == []


def test_each_batch_is_sent_one_ahead_and_received_when_it_is_needed() -> None:
    events: list[str] = []
    expected = items()

    def number(batches: tuple[Batch, ...]) -> int:
        return next(i for i, item in enumerate(expected) if item is batches)

    def loader() -> Iterator[tuple[Batch, ...]]:
        for item in expected:
            events.append(f"load {number(item)}")
            yield item

    def send(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
        events.append(f"send {number(batches)}")
        return batches

    for host, sent in one_ahead(loader(), send, lambda batches: events.append(f"receive {number(batches)}")):
        assert host is sent
        events.append(f"step {number(sent)}")
    assert " ".join(events) == (
        "load 0 send 0 load 1 send 1 receive 0 step 0 load 2 send 2 receive 1 step 1 receive 2 step 2"
    )


def test_no_tensor_of_a_batch_is_forgotten() -> None:
    batch = batch_of([boxes_for(2, 96, torch.Generator().manual_seed(0))])
    assert {id(tensor) for tensor in tensors_of((batch,))} == {
        id(value) for value in (*vars(batch).values(), *vars(batch.targets).values()) if isinstance(value, torch.Tensor)
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_have_the_values_of_the_loader() -> None:
    expected = items()
    pinned = [tuple(batch.pin_memory() for batch in pair) for pair in expected]
    for (host, sent), own in zip(on_device(pinned, torch.device("cuda")), expected, strict=True):
        for mine, here, theirs in zip(tensors_of(sent), tensors_of(host), tensors_of(own), strict=True):
            assert mine.device.type == "cuda" and here.device.type == "cpu"
            assert torch.equal(mine.cpu(), theirs)
