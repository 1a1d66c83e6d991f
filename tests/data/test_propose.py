"""The generator: bad images and dying workers are skipped, a kill loses nothing, the file does not depend on luck."""

import argparse
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from aligndet.data import progress
from aligndet.data.journal import MAGIC, Journal
from aligndet.data.proposals import open_proposals
from aligndet.data.propose import Found, Settings, add_arguments, propose, run, search_file
from aligndet.data.workers import Outcome, run_tasks

ROOT = Path(__file__).parents[2]
NAMES = [f"{number:02}.jpg" for number in range(13)]
QUICK = Settings(mode="single", size=64, min_size=4)
LINUX = sys.platform == "linux"


def fake_search(root: Path, settings: Settings, name: str) -> Found:
    """Boxes that depend on the name only; some names do harm. Never finishes if the folder says so."""
    if "crash" in name:
        os._exit(3)
    if "segfault" in name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in name:
        time.sleep(60)
    if "raise" in name:
        raise ValueError("two\nlines")
    if (root / "slow").is_dir():
        (root / "slow" / f"{os.getpid()}").touch()
        time.sleep(60 if name > NAMES[4] else 0.05)
    number = sum(map(ord, name)) % 5
    return (31, 37), np.full((number, 4), number, np.float32)


def harmless(item: str) -> str:
    return item * 2


def fake(root: Path, out: Path, *, workers: int = 2, timeout: float = 30, overwrite: bool = False) -> None:
    propose(NAMES, root, out, QUICK, workers=workers, timeout=timeout, overwrite=overwrite, search=fake_search)


def start_slow(root: Path, out: Path) -> subprocess.Popen:
    """The same as ``fake`` in a process of its own that gets stuck; returns when a few images are done."""
    (root / "slow").mkdir()
    code = (
        "import sys; from pathlib import Path; from tests.data.test_propose import fake; fake(*map(Path, sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, root, out], cwd=ROOT, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if partial(out).read_bytes().count(b'"size": [') >= 3:
                return process
        time.sleep(0.005)
    process.kill()
    raise AssertionError(process.communicate()[1].decode())


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.with_name(out.name + ".jsonl").read_text().splitlines()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two images in a subfolder, one that is text, and one that is flat."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, name in enumerate(("a.png", "sub/b.png")):
        image = generator.integers(90, 110, (61 + number, 89, 3)).astype(np.uint8)
        cv2.rectangle(image, (10, 12), (40, 44), (20, 30, 220), -1)
        cv2.rectangle(image, (50, 8), (80, 40), (20, 230, 20), -1)
        cv2.imwrite(str(folder / name), image)
    (folder / "c.jpg").write_text("no image")
    cv2.imwrite(str(folder / "d.png"), np.full((47, 53, 3), 99, np.uint8))
    return folder


def test_real_images_through_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "proposals.npz"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--images", str(photos), "--out", str(out), "--mode", "fast", "--min-size", "6", "--workers", "2"]
    assert run(parser.parse_args(arguments)) == 0
    file = open_proposals(out)
    assert file.names == ("a.png", "d.png", "sub/b.png")
    assert file.sizes.tolist() == [[61, 89], [47, 53], [62, 89]]
    assert list(file.failures) == ["c.jpg"]
    assert "ValueError" in file.failures["c.jpg"]
    assert file.parameters["mode"] == "fast"
    assert len(file.boxes_of(1)) == 0
    settings = Settings(mode="fast", min_size=6)
    for row in (0, 2):
        np.testing.assert_array_equal(file.boxes_of(row), search_file(photos, settings, file.names[row])[1])
        assert len(file.boxes_of(row)) > 1
    assert not partial(out).exists()
    captured = capsys.readouterr()
    assert "3 images" in captured.out
    assert "1 images without boxes, 1 skipped" in captured.out
    assert "c.jpg: skipped" in captured.err
    assert [event["event"] for event in events(out)] == ["start", "failure", "end"]
    assert events(out)[-1]["without_boxes"] == 1
    assert {"mean", "median", "min", "max", "seconds", "per_second"} <= set(events(out)[-1])


def test_annotations_choose_the_images(photos: Path, tmp_path: Path) -> None:
    listed = [("sub/b.png", 62), ("a.png", 61)]
    images = [{"id": n, "file_name": name, "height": height, "width": 89} for n, (name, height) in enumerate(listed)]
    tree = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "instances.json").write_text(json.dumps(tree))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--annotations", str(tmp_path / "instances.json"), "--images", str(photos)]
    run(parser.parse_args([*arguments, "--out", str(tmp_path / "p.npz"), "--mode", "single", "--size", "none"]))
    file = open_proposals(tmp_path / "p.npz")
    assert file.names == ("sub/b.png", "a.png")
    assert file.parameters["size"] is None


def test_options_have_the_defaults_of_settings() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = vars(parser.parse_args(["--out", "p.npz"]))
    assert Settings(**{name: args[name] for name in Settings.__dataclass_fields__}) == Settings()


@pytest.mark.parametrize("arguments", [[], ["--images", "nowhere"], ["--annotations", "nowhere.json"]])
def test_no_input(arguments: list[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere|want --images"):
        run(parser.parse_args([*arguments, "--out", str(tmp_path / "p.npz")]))
    assert not list(tmp_path.iterdir())


def test_harmful_images_are_recorded_and_skipped(tmp_path: Path) -> None:
    harmful = ["crash.jpg", "hang.jpg", "raise.jpg", "segfault.jpg"]
    names = [*NAMES[:3], *harmful, *NAMES[3:]]
    out = tmp_path / "p.npz"
    propose(names, tmp_path, out, QUICK, workers=2, timeout=1.5, search=fake_search)
    file = open_proposals(out)
    assert file.names == tuple(NAMES)
    assert list(file.failures) == harmful
    assert file.failures["crash.jpg"] == "killed its worker process: exit code 3"
    assert file.failures["hang.jpg"] == "took longer than 1.5 s"
    assert file.failures["raise.jpg"] == "ValueError: two lines"
    assert "signal 11" in file.failures["segfault.jpg"]
    for row, name in enumerate(NAMES):
        np.testing.assert_array_equal(file.boxes_of(row), fake_search(tmp_path, QUICK, name)[1])
    assert {event["image"] for event in events(out) if event["event"] == "failure"} == set(harmful)


def test_all_images_harmful(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of the 2 images could be searched; crash1: killed its worker"):
        propose(["crash1", "crash2"], tmp_path, tmp_path / "p.npz", QUICK, workers=1, search=fake_search)
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz.jsonl"]


def test_file_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 3):
        fake(tmp_path, tmp_path / f"{workers}.npz", workers=workers)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_continues_to_the_same_file(tmp_path: Path, number: signal.Signals) -> None:
    fake(tmp_path, tmp_path / "whole.npz")
    out = tmp_path / "p.npz"
    process = start_slow(tmp_path, out)
    with pytest.raises(ValueError, match="another run is writing this file"):
        fake(tmp_path, out)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == {signal.SIGTERM: 128 + number}.get(number, -number)
    assert not out.exists()
    pids = [int(path.name) for path in (tmp_path / "slow").iterdir()]
    end = time.monotonic() + 10
    while LINUX and any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(is_running, pids))
    (tmp_path / "slow").rename(tmp_path / "was slow")
    fake(tmp_path, out)
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not partial(out).exists()
    starts = [event for event in events(out) if event["event"] == "start"]
    assert starts[0]["done"] == 0
    assert 0 < starts[1]["done"] < len(NAMES)


def made_with(root: Path) -> dict:
    return {**vars(QUICK), "images": str(root), "opencv": cv2.__version__}


def interrupted(root: Path, out: Path, count: int) -> Journal:
    journal = Journal(partial(out), made_with(root))
    for name in NAMES[:count]:
        size, boxes = fake_search(root, QUICK, name)
        journal.add_boxes(name, size, boxes)
    journal.close()
    return journal


@pytest.mark.parametrize("damage", ["torn", "flipped", "torn header", "empty"])
def test_damaged_journal_is_used_up_to_the_damage(tmp_path: Path, damage: str) -> None:
    fake(tmp_path, tmp_path / "whole.npz")
    out = tmp_path / "p.npz"
    interrupted(tmp_path, out, 7)
    data = bytearray(partial(out).read_bytes())
    if damage == "flipped":
        data[len(data) - 50] ^= 1
    length = {"torn": len(data) - 3, "flipped": len(data), "torn header": len(MAGIC) + 9, "empty": 0}[damage]
    partial(out).write_bytes(data[:length])
    fake(tmp_path, out)
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert events(out)[0]["done"] == {"torn": 6, "torn header": 0, "empty": 0}.get(damage, events(out)[0]["done"])
    assert events(out)[0]["done"] < 7


def test_work_after_a_torn_record_is_found_again(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    interrupted(tmp_path, out, 7)
    partial(out).write_bytes(partial(out).read_bytes()[:-3])
    with contextlib.closing(Journal(partial(out), made_with(tmp_path))) as journal:
        assert journal.dropped > 0
        assert len(journal) == 6
        journal.add_failure("late.jpg", "reason")
    with contextlib.closing(Journal(partial(out), made_with(tmp_path))) as journal:
        assert journal.dropped == 0
        assert len(journal) == 7
        assert journal.failures == {"late.jpg": "reason"}
        np.testing.assert_array_equal(journal.read(NAMES[4]), fake_search(tmp_path, QUICK, NAMES[4])[1])


def test_journal_of_other_settings_is_kept_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    interrupted(tmp_path, out, 7)
    before = partial(out).read_bytes()
    other = Settings(mode="fast", size=64, min_size=4)
    with pytest.raises(ValueError, match=r"other settings \(mode: 'single' -> 'fast'\).*--overwrite"):
        propose(NAMES, tmp_path, out, other, search=fake_search)
    assert partial(out).read_bytes() == before
    propose(NAMES, tmp_path, out, other, workers=1, overwrite=True, search=fake_search)
    assert events(out)[0]["done"] == 0
    assert open_proposals(out).parameters["mode"] == "fast"


def test_overwrite_continues_unfinished_work_with_the_same_settings(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    interrupted(tmp_path, out, 7)
    fake(tmp_path, out, overwrite=True)
    assert events(out)[0]["done"] == 7


def test_journal_serves_another_list_of_images(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    interrupted(tmp_path, out, 7)
    propose(NAMES[3:9], tmp_path, out, QUICK, workers=1, search=fake_search)
    assert open_proposals(out).names == tuple(NAMES[3:9])
    assert events(out)[0]["done"] == 4


def test_failures_are_not_tried_again_on_continuing(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    journal = Journal(partial(out), made_with(tmp_path))
    journal.add_failure(NAMES[5], "killed its worker process")
    journal.close()
    fake(tmp_path, out)
    assert open_proposals(out).failures == {NAMES[5]: "killed its worker process"}


def test_foreign_journal_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    partial(out).write_text("my notes")
    with pytest.raises(ValueError, match="got another file; move it away"):
        fake(tmp_path, out, overwrite=True)
    assert partial(out).read_text() == "my notes"


def test_complete_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.npz"
    fake(tmp_path, out)
    before = out.stat().st_mtime_ns
    capsys.readouterr()
    fake(tmp_path, out)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings \(mode: 'single' -> 'soco', size: 64 -> 640.*--overwrite"):
        propose(NAMES, tmp_path, out, Settings(min_size=4), search=fake_search)
    with pytest.raises(ValueError, match=r"other images: it has 13, wanted are 12, for example '00.jpg'"):
        propose(NAMES[1:], tmp_path, out, QUICK, search=fake_search)
    assert out.stat().st_mtime_ns == before
    propose(NAMES[1:], tmp_path, out, QUICK, workers=1, overwrite=True, search=fake_search)
    assert open_proposals(out).names == tuple(NAMES[1:])


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    with pytest.raises(ValueError, match="no images to search"):
        propose([], tmp_path, out)
    with pytest.raises(ValueError, match="at least 1 worker"):
        propose(NAMES, tmp_path, out, workers=0)
    with pytest.raises(ValueError, match="got a folder"):
        propose(NAMES, tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"nms: want a finite number in 0 \.\. 1, got 2"):
        Settings(nms=2)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot make its folder"):
        propose(NAMES, tmp_path, tmp_path / "file" / "p.npz")


def test_progress_shows_rate_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FILE_SECONDS", 0.0)
    out = tmp_path / "p.npz"
    fake(tmp_path, out)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("propose 13/13  ") and "/s  left 0:00:00" in line for line in lines)
    seen = [event for event in events(out) if event["event"] == "progress"]
    assert seen[-1]["done"] == seen[-1]["total"] == 13
    assert {"eta_seconds", "per_second", "seconds"} <= set(seen[-1])


def test_tasks_finish_each_once() -> None:
    items = [str(number) for number in range(7)]
    outcomes = [outcome for outcome in run_tasks(harmless, items, workers=3, timeout=30) if outcome is not None]
    assert sorted(outcomes, key=lambda outcome: outcome.item) == [Outcome(item, item * 2, None) for item in items]
    assert list(run_tasks(harmless, [], workers=3, timeout=30)) == []


def test_workers_that_cannot_start_are_an_error_not_a_failure_of_the_images() -> None:
    broken = functools.partial(harmless)
    broken.__setstate__((Unloadable(), (), {}, {}))
    with pytest.raises(ValueError, match="worker processes end at their start"):
        list(run_tasks(broken, ["a"], workers=1, timeout=30))


class Unloadable:
    """Pickles, but ends the process that unpickles it."""

    def __call__(self, item: str) -> str:
        return item

    def __reduce__(self) -> tuple:
        return os._exit, (5,)
