"""Files that are whole or not there, and that run no code."""

import os
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aligndet.engine import checkpoint


def state() -> dict[str, object]:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 7, 11)).square().sum().backward()
    optimizer.step()
    inner = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "half": torch.randn(3).half()}
    return inner | {"list": [1, 2.5, "text", None, True, (1, 2)], "nan": torch.tensor([float("nan"), -0.0])}


def same(a: object, b: object) -> bool:
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    before = state()
    checkpoint.save(tmp_path / "c.pt", before)
    after = checkpoint.load(tmp_path / "c.pt")
    assert same(before, after)
    assert not same(before, after | {"half": torch.zeros(3).half()}), "the comparison can fail"
    assert isinstance(after["model"], OrderedDict)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_a_failure_before_the_last_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "c.pt", {"step": 1})

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ValueError, match=r"c\.pt: cannot be written.*No space"):
            checkpoint.save(tmp_path / "c.pt", {"step": 2})
    assert checkpoint.load(tmp_path / "c.pt") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "c.pt", {"step": 1})

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "c.pt", {"step": 2})
    assert checkpoint.load(tmp_path / "c.pt") == {"step": 1}
    (tmp_path / "c.pt.tmp").write_bytes(b"left by a killed process")
    checkpoint.save(tmp_path / "c.pt", {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(FileNotFoundError, match=r"c\.pt: no such file"):
        checkpoint.load(path)
    values = torch.arange(1000.0)
    checkpoint.save(path, {"values": values})
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"c\.pt: (cut short|damaged)"):
            checkpoint.load(path)
    position = whole.index(values[500:502].numpy().tobytes())
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 64]) + whole[position + 1 :])
    with pytest.raises(ValueError, match=r"c\.pt: damaged.*checksum"):
        checkpoint.load(path)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": Malicious(tmp_path / "made")}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: damaged or refused") as caught:
        checkpoint.load(tmp_path / "c.pt")
    assert "\n" not in str(caught.value)
    assert "mkdir" in str(caught.value), "what it wanted is said"
    assert "weights_only" not in str(caught.value), "torch's advice to execute it all the same is not passed on"
    assert not (tmp_path / "made").exists()


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", {"step": 1})
    with pytest.raises(ValueError, match=r"\['a'\]\[1\]: want tensors and plain values, got float64"):
        checkpoint.save(tmp_path / "c.pt", {"a": [1.0, np.float64(1)]})
    assert checkpoint.load(tmp_path / "c.pt") == {"step": 1}


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    np.random.seed(5)
    random.seed(7)
    random.gauss(0, 1)
    np.random.standard_normal()
    checkpoint.save(tmp_path / "c.pt", checkpoint.rng_state())

    def draw() -> list[float]:
        return [
            torch.rand(1).item(),
            np.random.standard_normal(),
            np.random.rand(),
            random.random(),
            random.gauss(0, 1),
        ]

    first, second = draw(), draw()
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "c.pt"))
    assert draw() == first
    assert first != second


def test_versions_name_the_libraries() -> None:
    found = checkpoint.versions()
    assert found["torch"] == torch.__version__
    assert {"aligndet", "python", "torchvision", "numpy"} <= set(found)
    assert all(type(value) is str for value in found.values())
