"""JSON lines and the progress line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from aligndet.engine.distributed import single
from aligndet.engine.log import Log, read_log

TIMES = {"lr": 0.01, "gradient_norm": 2.0, "data_time": 0.25, "step_time": 0.5, "images_per_second": 16.0}


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in read_log(folder / "log.jsonl") if "losses" in record]


def test_records_come_back_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, single())
    losses = {"box": 1 / 3, "contrast": torch.rand(1).item()}
    log.note("two\nlines")
    log.warning(3, "skipped image a.jpg")
    log.progress(5, 17, losses, TIMES)
    note, warning, progress = read_log(tmp_path / "log.jsonl")
    assert note["note"] == "two\nlines"
    assert (warning["step"], warning["warning"]) == (3, "skipped image a.jpg")
    assert progress["losses"] == losses
    assert (progress["step"], progress["lr"], progress["data_time"]) == (5, 0.01, 0.25)
    lines = capsys.readouterr().err.splitlines()
    assert lines[2].startswith("warning: ")
    for text in ("step 5/17", "box 0.3333", "lr 0.01", "data 0.250 s", "step 0.500 s"):
        assert text in lines[3]


def test_a_continued_run_has_each_step_once(tmp_path: Path) -> None:
    log = Log(tmp_path, single())
    for step in (1, 2, 3, 4, 5):
        log.progress(step, 7, {"box": 1.0}, TIMES)
    log = Log(tmp_path, single())
    log.note("starts again")
    log.truncate(3)
    log.progress(4, 7, {"box": 2.0}, TIMES)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert any("note" in record for record in read_log(tmp_path / "log.jsonl"))


def test_an_unfinished_line_does_not_stop_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "losses": {}}\n{"step": 2, "los')
    assert len(read_log(path)) == 1
    log = Log(tmp_path, single())
    log.note("one")
    log.note("two")
    log.truncate(1)
    assert [record.get("note") for record in read_log(path)] == [None, "one", "two"]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl: line 2"):
        read_log(path)


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    Log(tmp_path, single()).progress(1, 2, {"box": 1.0}, TIMES | {"gradient_norm": float("inf")})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["gradient_norm"] is None


def test_eta_is_the_mean_rate_times_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, single())
    monkeypatch.setattr("aligndet.engine.log.time.time", lambda: 1000.0)
    log.progress(1, 101, {"box": 1.0}, TIMES)
    monkeypatch.setattr("aligndet.engine.log.time.time", lambda: 1060.0)
    log.progress(21, 101, {"box": 1.0}, TIMES)
    assert "ETA 0:04:00" in capsys.readouterr().err


def test_one_rewriting_line_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = Log(tmp_path, single())
    for step in (1, 2, 3):
        log.progress(step, 3, {"box": 1.0}, TIMES)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.count("\r") == 3
    assert text.endswith("\n")
