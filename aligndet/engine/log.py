"""One JSON record per logged step, one progress line, and the same for TensorBoard and W&B."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch

from aligndet.engine.boards import Board
from aligndet.engine.distributed import World


class Log:
    """``log.jsonl`` in the run folder, and words for people on stderr; silent on all ranks but the first.

    Records: {"step", "steps", "losses", "eta", "epoch", "lr", "momentum", "gradient_norm", "data_time", "step_time",
    "images_per_second", "memory_gib"} for steps (times in seconds, of that step; "momentum": of whatever average there
    is, else absent; images of all ranks, over the steps since the record before, without validation and saving),
    {"step", "metrics"} (with "raw" beside averaged weights), {"step", "warning"} and {"note"} otherwise; each has
    "time", seconds since 1970.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.path = folder / "log.jsonl"
        self.main = world.rank == 0
        self.began: tuple[int, float] | None = None  # step and time of the first progress since the start
        self.boards: list[Board] = []
        self.last = (0, 0)  # the last step of training and the last validation that ``truncate`` found
        if self.main and self.path.exists():
            # What a kill left unfinished must go before anything is appended to it.
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def note(self, text: str) -> None:
        """A line for people, kept in the file."""
        self._write({"note": text})
        self._say(text)

    def warning(self, step: int, text: str) -> None:
        """Something that went wrong without stopping the run."""
        self._write({"step": step, "warning": text})
        self._say(f"warning: {text}")

    def progress(self, step: int, steps: int, losses: dict[str, float], numbers: dict[str, float]) -> None:
        """The state after ``step`` of ``steps`` steps."""
        now = time.time()
        self.began = self.began or (step, now)
        done = step - self.began[0]
        eta = (now - self.began[1]) / done * (steps - step) if done else None
        self._write({"step": step, "steps": steps, "losses": losses, **numbers, "eta": eta})
        parts = [f"{name} {value:.4g}" for name, value in losses.items()]
        times = f"data {numbers['data_time']:.3f} s  step {numbers['step_time']:.3f} s"
        times += f"  {numbers['images_per_second']:.3g} img/s"
        left = "" if eta is None else f"  ETA {_clock(eta)}"
        total = f"loss {sum(losses.values()):.4g} ({', '.join(parts)})"
        self.figures(step, {"loss": {"total": sum(losses.values()), **losses}, **numbers})
        line = f"step {step}/{steps}  {total}  lr {numbers['lr']:.3g}  {times}{left}"
        if self.main and sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="\n" if step == steps else "", file=sys.stderr, flush=True)
        else:
            self._say(line)

    def metrics(self, step: int, metrics: dict[str, Any], raw: dict[str, Any] | None = None) -> None:
        """Validation after ``step`` steps; ``raw``: of the weights themselves, where ``metrics`` is of an average."""
        self._write({"step": step, "metrics": metrics} | ({} if raw is None else {"raw": raw}))
        beside = "" if raw is None else f"  (of averaged weights; weights themselves: AP {100 * raw['AP']:.1f})"
        self._say(f"step {step}  AP {100 * metrics['AP']:.1f}  AP50 {100 * metrics['AP50']:.1f}{beside}")
        self.figures(step, {"validation": metrics} | ({} if raw is None else {"validation_raw": raw}))

    def figures(self, step: int, values: dict[str, Any]) -> None:
        """Numbers for TensorBoard and W&B alone; the names of nested ones are joined by "/"."""
        flat = _flat(values)
        for board in self.boards:
            board.write(step, flat)

    def close(self) -> None:
        """Let TensorBoard and W&B finish."""
        for board in self.boards:
            board.close()
        self.boards = []

    def truncate(self, step: int) -> None:
        """Drop the records after ``step`` and a torn last line, so that a continued run has each step once."""
        if not self.main or not self.path.exists():
            return
        records = read_log(self.path)
        training, validation = (
            max((r["step"] for r in records if key in r), default=0) for key in ("losses", "metrics")
        )
        self.last = (training, validation)
        kept = [record for record in records if record.get("step", 0) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)

    def _write(self, record: dict[str, Any]) -> None:
        if not self.main:
            return
        file: IO[str]
        with open(self.path, "a") as file:
            file.write(json.dumps(_finite({**record, "time": round(time.time(), 3)})) + "\n")

    def _say(self, text: str) -> None:
        if self.main:
            print(text, file=sys.stderr, flush=True)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl``; a torn last line, the trace of a kill, is left out."""
    lines = Path(path).read_text().splitlines()
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise ValueError(f"log {path}: line {number + 1} is not JSON") from None
    return records


def _finite(value: Any) -> Any:
    """JSON has no infinity (the gradient norm of a step that fp16 skips): null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_gib(device: torch.device) -> float:
    """GiB: the most that tensors took on a GPU so far, or what this process has in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Finite numbers by their joined names."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[prefix + name] = value
    return found


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
