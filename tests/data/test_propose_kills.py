"""`propose` killed at random twenty times: the same file at the end, nothing searched twice but what was in flight."""

import contextlib
import fcntl
import functools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from aligndet.data.journal import Journal
from aligndet.data.propose import Found, Settings, propose, search_file

ROOT = Path(__file__).parents[2]
TINY = Settings(mode="fast", size=48, min_size=4)
KILLS, AT_THE_END, WORKERS, IMAGES = 20, 4, 2, 240
NAMES = [f"{number:03}.png" for number in range(IMAGES)]


def logged_search(turn: int, root: Path, settings: Settings, name: str) -> Found:
    """``search_file`` that first notes in ``searched`` which run, the ``turn``-th, searches which image."""
    note = os.open(root / "searched", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(note, f"{turn} {name}\n".encode())
    os.close(note)
    return search_file(root, settings, name)


def searched(folder: Path) -> list[list[str]]:
    """[turn, name] of each search that began."""
    path = folder / "searched"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def begin(folder: Path, turn: int) -> int:
    """Fork a process that runs ``propose``, its workers forked too, which spares them seconds of imports; its id."""
    process = os.fork()
    if process == 0:
        fork = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]
        try:
            search = functools.partial(logged_search, turn)
            propose(NAMES, folder, folder / "p.npz", TINY, workers=WORKERS, search=search)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return process


def recorded(folder: Path) -> list[str]:
    """Names in the journal, as soon as its lock is free: forked workers hold it until they notice the death."""
    path, end = folder / "p.npz.partial", time.monotonic() + 20
    if not path.exists():
        return []
    with open(path, "a+b") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < end, "workers outlive their parent"
                time.sleep(0.001)
    copy = folder / "copy"
    copy.write_bytes(path.read_bytes())
    made_with = {**vars(TINY), "images": str(folder), "opencv": cv2.__version__}
    with contextlib.closing(Journal(copy, made_with)) as journal:
        return sorted(journal.found)


def whole_and_killed(whole: Path, folder: Path, seed: int) -> None:
    """One run in peace; then runs killed after a random number of searches and a random moment more, and a last one."""
    os.waitpid(begin(whole, 0), 0)
    generator, after = random.Random(seed), []
    for turn in range(KILLS + AT_THE_END):
        last = turn >= KILLS
        process, before = begin(folder, turn), len(searched(folder))
        aim = IMAGES if last else before + generator.randrange(8)
        while len({name for _, name in searched(folder)}) < IMAGES if last else len(searched(folder)) < aim:
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "it ended before it was killed"
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.02 if last or aim == before else 0.004))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if not os.WIFSIGNALED(status) or (folder / "p.npz").exists():
            assert last and (status == 0 or os.WIFSIGNALED(status))
            break
        after.append(recorded(folder))
    finished = os.waitpid(begin(folder, len(after)), 0)[1] == 0
    print(json.dumps({"after": after, "finished": finished}))


def test_twenty_kills(tmp_path: Path) -> None:
    generator, folders = np.random.default_rng(0), [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    for name in NAMES:
        coarse = generator.integers(0, 256, (6, 7, 3)).astype(np.uint8)
        data = cv2.imencode(".png", cv2.resize(coarse, (48, 41), interpolation=cv2.INTER_CUBIC))[1].tobytes()
        for folder in folders:
            (folder / name).write_bytes(data)
    code = "import sys; from pathlib import Path; from tests.data import test_propose_kills as t; "
    code += "t.whole_and_killed(*map(Path, sys.argv[1:]), seed=0)"
    command = [sys.executable, "-c", code, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["finished"]
    assert len(result["after"]) >= KILLS

    begun = [name for _, name in searched(folders[1])]
    lost = 0
    for turn, names in enumerate(result["after"]):
        in_flight = {name for number, name in searched(folders[1]) if int(number) == turn} - set(names)
        assert len(in_flight) <= WORKERS
        later = {name for number, name in searched(folders[1]) if int(number) > turn}
        assert not later & set(names)
        lost += len(in_flight)
    assert set(begun) == set(NAMES)
    assert len(begun) == IMAGES + lost
    assert 0 < lost <= WORKERS * len(result["after"])

    assert (folders[1] / "p.npz").read_bytes() == (folders[0] / "p.npz").read_bytes()
