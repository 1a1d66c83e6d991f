"""Progress of a long command: one line with rate and time left on stderr, JSON lines in a file beside the result."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

TERMINAL_SECONDS, FILE_SECONDS = 0.2, 10.0  # between two progress lines on a terminal, and elsewhere


class Progress:
    """Counts items done; ``show`` prints at most as often as is readable, on a terminal over the same line.

    Attributes:
        done: items finished since ``begin``.
        total: items to do in this run.
    """

    def __init__(self, log: Path, title: str) -> None:
        """Append to the JSON-lines file ``log``; ``title`` begins the progress line."""
        self.title, self.done, self.total = title, 0, 0
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = self._logged = time.monotonic()
        try:
            self._file = open(log, "a", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise ValueError(f"{log}: cannot write ({error.strerror})") from None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.log("stop", reason=f"{type(error).__name__}: {error}", **self.rate())
            self.end()
        self._file.close()

    def begin(self, total: int) -> None:
        """Start the clock for ``total`` items."""
        self.total, self.done = total, 0
        self._began = self._logged = time.monotonic()
        self._shown = 0.0 if self._terminal else self._began

    def advance(self) -> None:
        """One more item is done."""
        self.done += 1
        self.show()

    def show(self) -> None:
        """Print the progress line and log it, each if the last time is long enough ago."""
        now = time.monotonic()
        if now - self._logged >= FILE_SECONDS:
            self._logged = now
            self.log("progress", done=self.done, total=self.total, eta_seconds=self._left(), **self.rate())
        if now - self._shown >= (TERMINAL_SECONDS if self._terminal else FILE_SECONDS):
            self._shown = now
            start, end = ("\r", "\x1b[K") if self._terminal else ("", "\n")
            print(start + self._line(), end=end, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Print a line of its own above the progress line."""
        print(("\r\x1b[K" if self._terminal else "") + text, file=sys.stderr, flush=True)

    def log(self, event: str, **values: Any) -> None:
        """Append a JSON line with the event, the time (s since 1970) and ``values``."""
        print(json.dumps({"event": event, "time": round(time.time(), 3)} | values), file=self._file, flush=True)

    def rate(self) -> dict[str, float]:
        """Seconds since ``begin`` and items per second."""
        seconds = time.monotonic() - self._began
        return {"seconds": round(seconds, 3), "per_second": round(self.done / max(seconds, 1e-9), 3)}

    def end(self) -> None:
        """Finish the progress line on a terminal."""
        if self._terminal:
            print("\r" + self._line() + "\x1b[K", file=sys.stderr, flush=True)

    def _left(self) -> float | None:
        if self.done == 0:
            return None
        return round((time.monotonic() - self._began) / self.done * (self.total - self.done), 1)

    def _line(self) -> str:
        left = self._left()
        hours, seconds = divmod(int(left or 0), 3600)
        eta = "?" if left is None else f"{hours}:{seconds // 60:02}:{seconds % 60:02}"
        return f"{self.title} {self.done}/{self.total}  {self.rate()['per_second']:.2f}/s  left {eta}"
