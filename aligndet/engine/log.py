"""The record of a run: JSON lines in ``log.jsonl``, and one progress line on stderr."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aligndet.engine.checkpoint import write_atomically
from aligndet.engine.distributed import World

NAME = "log.jsonl"


class Log:
    """Writes what happens in a run; only the main rank writes files and progress.

    Records are appended to ``log.jsonl`` and flushed line by line; each has the time (s since 1970) and

    * of ``progress``: step, steps, losses {name: value} and further numbers;
    * of ``warning``: step and warning;
    * of ``note``: note.

    Args:
        folder: run folder; made by the main rank if absent.
        world: which rank this is.

    A line that a killed process left unfinished is removed.
    """

    def __init__(self, folder: str | Path, world: World) -> None:
        self.path = Path(folder) / NAME
        self._world = world
        self._first: tuple[int, float] | None = None
        self._line_open = False
        if world.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self.path)

    def truncate(self, step: int) -> None:
        """Drop the records of later steps, which a run that continues after ``step`` steps will write again.

        Raises:
            ValueError: the file is no log.
        """
        if not self._world.is_main or not self.path.exists():
            return
        records = read_log(self.path)
        kept = [record for record in records if record.get("step", 0) <= step]
        if len(kept) < len(records):
            text = "".join(json.dumps(record) + "\n" for record in kept).encode()
            write_atomically(self.path, lambda file: [file.write(text), None][1])

    def progress(self, step: int, steps: int, losses: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        """Record the state after ``step`` of ``steps`` steps and show it.

        Args:
            step: steps done, 1-based.
            steps: of the whole run.
            losses: weighted losses; the line shows their sum and each.
            numbers: others of interest. "lr", "data_time" and "step_time" (s of the last step) appear in the line.
        """
        if not self._world.is_main:
            return
        now = time.time()
        self._write({"step": step, "steps": steps, "losses": dict(losses), **numbers}, now)
        self._first = self._first or (step, now)
        line = _progress_line(step, steps, losses, numbers)
        left = _remaining(self._first, step, steps, now, numbers.get("step_time"))
        line += f"  ETA {_duration(left)}" if step < steps else f"  took {_duration(now - self._first[1])}"
        self._show(line, last=step >= steps)

    def warning(self, step: int, text: str) -> None:
        """Record and show something that should not have happened.

        What happens in preparation (step 0) happens on every rank, so only the main rank tells of it. Later warnings of
        other ranks, about images of their own, appear on stderr only.
        """
        if self._world.is_main:
            self._write({"step": step, "warning": text}, time.time())
            self._print(f"warning: step {step}: {text}" if step else f"warning: {text}")
        elif step:
            self._print(f"warning: rank {self._world.rank}, step {step}: {text}")

    def note(self, text: str) -> None:
        """Record and show a fact; ``text`` may have several lines."""
        if self._world.is_main:
            self._write({"note": text}, time.time())
            self._print(text)

    def _write(self, record: dict[str, Any], now: float) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite({"time": round(now, 3), **record})) + "\n")

    def _show(self, line: str, last: bool) -> None:
        if not sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{line[:width]}", end="\n" if last else "", file=sys.stderr, flush=True)
        self._line_open = not last

    def _print(self, text: str) -> None:
        clear = "\r\033[K" if self._line_open else ""
        self._line_open = False
        print(f"{clear}{text}", file=sys.stderr, flush=True)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log, in order; an unfinished last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is not a JSON object; names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"log {path}: no such file")
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"log {path}, line {number}: want a JSON object, got {line[:60]!r}")
        records.append(record)
    return records


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _progress_line(step: int, steps: int, losses: Mapping[str, float], numbers: Mapping[str, float]) -> str:
    parts = [f"step {step}/{steps}", f"loss {sum(losses.values()):.4f}"]
    if len(losses) > 1:
        parts[1] += f" ({', '.join(f'{name} {value:.4f}' for name, value in losses.items())})"
    if "lr" in numbers:
        parts.append(f"lr {numbers['lr']:.2e}")
    for key, title in (("data_time", "data"), ("step_time", "step")):
        if key in numbers:
            parts.append(f"{title} {numbers[key]:.3f} s")
    return "  ".join(parts)


def _remaining(first: tuple[int, float], step: int, steps: int, now: float, step_time: float | None) -> float:
    """Seconds left, from the mean rate since the first line; from the last step alone while there is only one line."""
    if step > first[0]:
        return (now - first[1]) / (step - first[0]) * (steps - step)
    return math.nan if step_time is None else step_time * (steps - step)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _finite(value: Any) -> Any:
    """JSON has no infinity (the gradient norm of a skipped fp16 step): null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
