"""Checkpoints that survive a fault at any step of a save, and damage of any kind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from aligndet.engine import checkpoint, runfolder

CALLS = 13  # torch.save once; fsync, replace, open, fsync, unlink for each of two files; then one old file


def filled(folder: Path, steps: tuple[int, ...] = (1, 2, 3)) -> None:
    for step in steps:
        runfolder.write(folder, {"step": step, "values": torch.full((99,), float(step))}, keep=2)


def in_process(folder: Path, number: int, monkeypatch: pytest.MonkeyPatch, kill: bool = False) -> int:
    """A save whose ``number``-th call to the system fails; how many calls it made."""
    calls = 0

    def faulty(real):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == number and kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if calls == number:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "open"), (torch, "save"), (Path, "unlink")):
            patch.setattr(owner, name, faulty(getattr(owner, name)))
        runfolder.write(folder, {"step": 4, "values": torch.full((99,), 4.0)}, keep=2)
    return calls


def test_the_last_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 7):
        runfolder.write(tmp_path, {"step": step}, keep=2, best=step == 2)
    assert runfolder.names(tmp_path) == [f"checkpoint-0000000{step}.pt" for step in (2, 5, 6)]
    best = runfolder.best(tmp_path)
    assert best is not None
    assert best.name == "checkpoint-00000002.pt"
    assert runfolder.newest(tmp_path)[1:] == ({"step": 6}, [])


@pytest.mark.parametrize("number", range(1, CALLS + 2))
def test_a_full_disk_at_any_step_of_a_save(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    try:
        assert in_process(tmp_path, number, monkeypatch) <= CALLS
        expected = (4.0,)  # no fault came: more than CALLS, or where the failure of clearing up is harmless
    except ValueError as error:
        message, expected = str(error), (3.0, 4.0)
    else:
        message = "No space left"
    assert "No space left" in message
    assert "\n" not in message
    _, state, warnings = runfolder.newest(tmp_path)
    assert state["values"].unique().tolist()[0] in expected
    assert not warnings
    filled(tmp_path, (5,))
    assert runfolder.newest(tmp_path)[1]["step"] == 5


@pytest.mark.parametrize("number", range(1, CALLS))
def test_a_kill_at_any_step_of_a_save(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    child = os.fork()
    if child == 0:
        in_process(tmp_path, number, monkeypatch, kill=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    runfolder.lock(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    _, state, warnings = runfolder.newest(tmp_path)
    assert state["values"].unique().tolist()[0] in (3.0, 4.0)
    assert not warnings
    filled(tmp_path, (4,))
    assert runfolder.newest(tmp_path)[1]["step"] == 4


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


DAMAGES = [
    *(("cut", share) for share in (0.0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)),
    *(("flip", share) for share in (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)),
    ("gone", 0),
    ("pickle", 0),
    ("text", 0),
    ("zeros", 0),
    ("grown", 0),
    ("pointer gone", 0),
    ("pointer cut", 0),
    ("pointer strange", 0),
]


@pytest.mark.parametrize(("kind", "share"), DAMAGES)
def test_damage_is_noticed_and_the_one_before_taken(tmp_path: Path, kind: str, share: float) -> None:
    filled(tmp_path)
    path, pointer = tmp_path / "checkpoint-00000003.pt", tmp_path / runfolder.POINTER
    whole = path.read_bytes()
    place = int(share * len(whole))
    damaged = {
        "cut": whole[:place],
        "flip": whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :],
        "text": b"no checkpoint",
        "zeros": bytes(len(whole)),
        "grown": whole + b"x",
    }
    if kind in damaged:
        path.write_bytes(damaged[kind])
    elif kind == "gone":
        path.unlink()
    elif kind == "pickle":
        torch.save({"step": 3, "code": Malicious(tmp_path / "made")}, path)
        pointer.unlink()  # not even the checksum speaks against it
    elif kind == "pointer gone":
        pointer.unlink()
    elif kind == "pointer cut":
        pointer.write_bytes(pointer.read_bytes()[:-20])
    else:
        pointer.write_text(json.dumps({"newest": "../elsewhere.pt", "best": None, "sha256": {}}))
    _, state, warnings = runfolder.newest(tmp_path)
    assert warnings
    assert state["step"] == (3 if kind.startswith("pointer") else 2)
    assert not (tmp_path / "made").exists()


def test_nothing_whole_is_refused_instead_of_starting_afresh(tmp_path: Path) -> None:
    assert runfolder.newest(tmp_path) == (None, {}, [])
    filled(tmp_path)
    for name in runfolder.names(tmp_path):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        runfolder.newest(tmp_path)
    for name in runfolder.names(tmp_path):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"names checkpoint-00000003\.pt, which is not there"):
        runfolder.newest(tmp_path)


def test_the_single_file_of_earlier_versions_continues_and_is_replaced(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt", {"step": 7})
    path, state, warnings = runfolder.newest(tmp_path)
    assert (path, state, warnings) == (tmp_path / "checkpoint.pt", {"step": 7}, [])
    filled(tmp_path, (8, 9))
    assert runfolder.names(tmp_path) == ["checkpoint-00000008.pt", "checkpoint-00000009.pt"]


def test_a_folder_is_locked_until_its_process_dies(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        runfolder.lock(tmp_path)
        os.write(writing, b"held")
        signal.pause()
    try:
        assert os.read(reading, 4) == b"held"
        with pytest.raises(ValueError, match=f"another process .id {child}. trains there"):
            runfolder.lock(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    runfolder.lock(tmp_path)
