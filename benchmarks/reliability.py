"""Runs that are killed again and again by SIGKILL, and continued by the same command: do they end at the same bits?

    python benchmarks/reliability.py [--cases NAME ...] [--again] [--steps 10000]

Each case trains a tiny FCOS on generated scenes by a command as a user would type it: ``python train.py``, or torchrun
with one or two ranks, with and without loader workers. It is killed after a random step, or inside a save (as soon as
the temporary file of a checkpoint is seen); the same command follows, until it is through. Then the last checkpoint
(weights, momentum branch, optimizer, scaler, every random state), the exported weights and the losses of all steps are
compared, bit for bit, with a run of as many ranks that nobody disturbed. In cases named "fork" the command is a fork of
this process instead of a new one, which saves the seconds in which Python loads torch. "restarts" is one torchrun with
--max-restarts, one rank of which is killed.

``--steps N`` measures what N steps with four loader workers do to memory, open files and shared memory instead.

Writes benchmarks/results/reliability.json after each case; cases in it are not run again without --again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
import yaml
from environment import environment

from aligndet import cli
from aligndet.data.synthetic import make_scenes
from aligndet.engine import runfolder
from aligndet.engine.log import read_log

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.engine.test_checkpoint import same  # noqa: E402

RESULTS = ROOT / "benchmarks/results/reliability.json"
STEPS, SAVE_EVERY = 60, 2
MODEL = {"backbone": "resnet18", "width": 0.25, "channels": 32, "convolutions": 1, "levels": 3}
EXPORTS = {"pretrain": "pretrained.pt", "finetune": "model.pt"}
RESTARTS = 20
PATIENCE = 600  # s without a new step; then the case has hung


@dataclass(frozen=True)
class Case:
    """One kind of run and of kill.

    Attributes:
        ranks: 0 is ``python train.py``, more are torchrun's.
        kills: how many.
        inside_save: kill when a checkpoint's temporary file is there, instead of after a random step.
        restarts: torchrun starts the ranks again itself.
        fork: the command is a fork of this process; without torchrun only.
    """

    task: str
    ranks: int
    workers: int
    kills: int
    inside_save: bool = False
    restarts: bool = False
    fork: bool = False

    @property
    def name(self) -> str:
        how = "restarts" if self.restarts else "save" if self.inside_save else "step"
        command = "fork" if self.fork else f"torchrun{self.ranks}" if self.ranks else "python"
        return f"{self.task}-{command}-{self.workers}workers-{how}"


CASES = (
    Case("pretrain", 0, 0, 12, fork=True),
    Case("pretrain", 0, 0, 12, fork=True, inside_save=True),
    Case("finetune", 0, 0, 10, fork=True),
    Case("finetune", 0, 0, 10, fork=True, inside_save=True),
    Case("pretrain", 0, 2, 6, fork=True),
    Case("finetune", 0, 2, 6, fork=True),
    Case("pretrain", 2, 0, RESTARTS, restarts=True),
    Case("pretrain", 0, 0, 5),
    Case("pretrain", 1, 0, 4),
    Case("finetune", 1, 2, 3),
    Case("pretrain", 2, 0, 4),
    Case("finetune", 2, 2, 4),
    Case("finetune", 0, 2, 4),
)


class Forked:
    """A fork of this process that trains, with the little of Popen that is needed here."""

    def __init__(self, path: Path, output: int) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                code = cli.train(["--cfg", str(path)])
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def wait(self) -> int:
        """The exit code, once it has ended."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)


Command = subprocess.Popen | Forked


def scenes(folder: Path) -> Path:
    """Twelve generated scenes with labels and proposals."""
    if not (folder / "proposals.npz").exists():
        shutil.rmtree(folder, ignore_errors=True)
        labels = make_scenes(folder, images=12, size=128, seed=3, name="train")
        arguments = ["propose", "--annotations", str(labels), "--images", str(folder / "images"), "--mode", "single"]
        cli.main([*arguments, "--out", str(folder / "proposals.npz"), "--workers", "1", "--min-size", "6"])
    return folder


def config(case: Case, data: Path, run: Path, **optim: Any) -> Path:
    """The experiment file of a case."""
    pretrain = case.task == "pretrain"
    images = {"images": str(data / "images"), "proposals": str(data / "proposals.npz"), "short_side": [96, 128]}
    labels = {"train": str(data / "annotations/instances_train.json"), "short_side": [96, 128]}
    tree = {
        "task": case.task,
        "run": str(run),
        "device": "cpu",
        "threads": 1,
        "timeout": 60.0,
        "log_every": 1,
        "save_every": SAVE_EVERY,
        "model": MODEL,
        "data": (images if pretrain else labels) | {"long_side": 128, "workers": case.workers},
        "optim": {"name": "sgd", "lr": 0.01, "batch": 4, "steps": STEPS, "warmup": 5} | optim,
    } | ({"method": {"candidates": 256, "embedding": 32}} if pretrain else {})
    path = run.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def started(case: Case, path: Path) -> Command:
    """The command of a case, running; what it says is appended beside its config."""
    launcher = [sys.executable]
    if case.ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
        launcher += ["--max-restarts", str(RESTARTS if case.restarts else 0)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(path.with_suffix(".txt"), "ab") as output:
        if case.fork:
            return Forked(path, output.fileno())
        command = [*launcher, str(ROOT / "train.py"), "--cfg", str(path)]
        return subprocess.Popen(command, env=variables, stdout=output, stderr=output, cwd=ROOT)


def processes(case: Case, launched: Command) -> list[int]:
    """The training processes: the command itself, or torchrun's children."""
    return children(launched.pid) if case.ranks else [launched.pid]


def children(process: int) -> list[int]:
    """The children of a process, none if it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def newest_step(run: Path, since: float) -> int:
    """The last step that the log has from after a time; -1 without one."""
    try:
        with open(run / "log.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        record = json.loads(lines[-1])
    except (OSError, IndexError, ValueError):
        return -1
    return record["step"] if "losses" in record and record["time"] >= since else -1


def wait_for(found: Callable[[], bool], launched: Command, pause: float) -> bool:
    """Wait for something to happen; False if the command ended first."""
    deadline = time.monotonic() + PATIENCE
    while not found():
        if launched.poll() is not None:
            return False
        if time.monotonic() > deadline:
            launched.kill()
            raise RuntimeError(f"no progress within {PATIENCE} s: the run hangs")
        time.sleep(pause)
    return True


def kill(case: Case, run: Path, launched: Command, draw: random.Random) -> bool:
    """Kill one training process at a moment as the case says; False if the command ended before it came."""
    since = time.time()
    if not wait_for(lambda: newest_step(run, since) >= 0, launched, 0.005):
        return False
    first = newest_step(run, since)
    if case.inside_save:
        more = draw.randrange(2) * SAVE_EVERY
        found = wait_for(lambda: newest_step(run, since) >= first + more, launched, 0.002)
        found = found and wait_for(lambda: any(run.glob("checkpoint-*.tmp")), launched, 0.0002)
    else:
        more = draw.randrange(3)
        found = wait_for(lambda: newest_step(run, since) >= first + more, launched, 0.002)
        time.sleep(draw.random() * 0.1)  # anywhere in the step that follows
    victims = processes(case, launched)
    if not found or not victims:
        return False
    os.kill(draw.choice(victims), signal.SIGKILL)
    return True


def run_case(case: Case, data: Path, folder: Path) -> dict[str, Any]:
    """Kill, repeat, and compare with the undisturbed run."""
    whole, cut = folder / f"whole-{case.task}-{max(1, case.ranks)}", folder / case.name
    plain = Case(case.task, 2 if case.ranks == 2 else 0, 0, 0, fork=case.ranks < 2)
    if not (whole / EXPORTS[case.task]).exists():
        code = started(plain, config(plain, data, whole)).wait()
        if code:
            raise RuntimeError(f"{whole}: exit code {code}; see {whole.with_suffix('.txt')}")
    shutil.rmtree(cut, ignore_errors=True)
    cut.with_suffix(".txt").unlink(missing_ok=True)
    path, draw, began = config(case, data, cut), random.Random(case.name), time.monotonic()
    kills = inside = commands = 0
    while True:
        launched = started(case, path)
        commands += 1
        while kills < case.kills and kill(case, cut, launched, draw):
            kills += 1
            inside += any(cut.glob("checkpoint*.tmp"))
            if not case.restarts:
                break
        code = launched.wait()
        if code == 0:
            break
        if case.restarts or commands > case.kills + 1:
            raise RuntimeError(f"{case.name}: ended with {code}; see {path.with_suffix('.txt')}")
    return {
        "kills": kills,
        "inside_save": inside,
        "commands": commands,
        "differences": differences(whole, cut, EXPORTS[case.task]),
        "seconds": round(time.monotonic() - began, 1),
    }


def differences(whole: Path, cut: Path, export: str) -> list[str]:
    """What is not the same, bit for bit, at the end of two runs."""
    states = [runfolder.newest(run)[1] for run in (whole, cut)]
    found = [
        key for key in ("step", "model", "optimizer", "scaler", "rng", "skipped") if not same(*(s[key] for s in states))
    ]
    exported = [torch.load(run / export, weights_only=True)["detector"] for run in (whole, cut)]
    logs = [read_log(run / "log.jsonl") for run in (whole, cut)]
    keys = ("step", "losses", "lr", "gradient_norm")
    curves = [[[record[key] for key in keys] for record in log if "losses" in record] for log in logs]
    found += [] if same(*exported) else [export]
    return found + ([] if curves[0] == curves[1] and len(curves[0]) == STEPS else ["loss curve"])


def measured(process: int) -> dict[str, int]:
    """KiB of memory of its own and of shared memory, and open files, of a process and its loader workers."""
    sums = {"private_kib": 0, "shared_kib": 0, "main_private_kib": 0, "files": 0}
    for each in (process, *children(process)):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
        sums["private_kib"] += int(status["RssAnon"].split()[0])
        sums["shared_kib"] += int(status["RssShmem"].split()[0])
        sums["main_private_kib"] += int(status["RssAnon"].split()[0]) if each == process else 0
        sums["files"] += len(os.listdir(f"/proc/{each}/fd"))
    return sums


def long_run(steps: int, data: Path, folder: Path) -> dict[str, Any]:
    """Pre-training with four workers, looked at every 1 % of its steps; the first tenth is warm-up."""
    case, run = Case("pretrain", 0, 4, 0), folder / f"long-{steps}"
    shutil.rmtree(run, ignore_errors=True)
    path = config(case, data, run, steps=steps, batch=2)
    tree = yaml.safe_load(path.read_text())
    tree["data"] |= {"short_side": [64], "long_side": 64}
    tree |= {"save_every": steps // 10, "method": {"candidates": 64, "embedding": 16}}
    path.write_text(yaml.safe_dump(tree))
    launched, samples, began = started(case, path), [], time.time()
    for target in range(steps // 10, steps, steps // 100):
        if not wait_for(lambda: newest_step(run, began) >= target, launched, 0.05):  # noqa: B023  called at once
            break
        samples.append({"step": newest_step(run, began)} | measured(launched.pid))
    if launched.wait():
        raise RuntimeError(f"{run}: see {path.with_suffix('.txt')}")
    third = len(samples) // 3
    drift = {}
    for key in samples[0].keys() - {"step"}:
        first, last = (statistics.median(s[key] for s in part) for part in (samples[:third], samples[-third:]))
        drift[key] = {"first_third": first, "last_third": last, "change": round(last / first - 1, 4) if first else last}
    return {"steps": steps, "samples": len(samples), "drift": drift, "seconds": round(time.time() - began, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also cases that have a result")
    parser.add_argument("--steps", type=int, help="measure a run of so many steps instead")
    parser.add_argument("--folder", default="runs/reliability", help="where the runs are (default runs/reliability)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a process with threads must not fork
    cv2.setNumThreads(1)
    folder = Path(args.folder).absolute()
    data = scenes(folder / "scenes")
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}

    def keep() -> None:
        record["setting"] = {"steps": STEPS, "save_every": SAVE_EVERY, "model": MODEL, "batch": 4, "size": 128}
        record["environment"] = environment()
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")

    if args.steps:
        record["long"] = long_run(args.steps, data, folder)
        print(json.dumps(record["long"], indent=1))
        keep()
        return
    for case in CASES:
        if case.name in args.cases and (args.again or case.name not in record["cases"]):
            found = record["cases"][case.name] = run_case(case, data, folder)
            print(f"{case.name:34} {found}", flush=True)
            keep()
    rows = record["cases"]
    print(f"{'case':34} {'kills':>6} {'in a save':>10} {'commands':>9}  equal to the undisturbed run")
    for name, row in rows.items():
        equal = "yes" if not row["differences"] else f"no: {', '.join(row['differences'])}"
        print(f"{name:34} {row['kills']:6} {row['inside_save']:10} {row['commands']:9}  {equal}")
    total = sum(row["kills"] for row in rows.values())
    print(f"{'all':34} {total:6} {sum(row['inside_save'] for row in rows.values()):10}")


if __name__ == "__main__":
    main()
