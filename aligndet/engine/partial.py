"""Results of a command image by image, in a file beside the result: interrupted, the same command continues."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any


class Partial:
    """One JSON line per finished item, after a first one with what the results depend on.

    A line that was being written when the process died is dropped; a file made with other settings begins anew.

    Attributes:
        done: the finished items by name.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.done = path, dict[str, Any]()
        first = json.dumps(settings)
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for line in lines[1:] if lines[:1] == [first.encode()] else []:
            try:
                name, result = json.loads(line)
            except ValueError:
                break
            self.done[name] = result
        # Whole lines only: what is appended must begin one.
        path.write_text("".join(f"{line}\n" for line in (first, *map(json.dumps, self.done.items()))))
        self._file = open(path, "a")  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, result: Any) -> None:
        """Keep the result of an item; it is in the file when this returns."""
        self.done[name] = result
        print(json.dumps([name, result]), file=self._file, flush=True)

    def remove(self) -> None:
        """The result is written: nothing is to be continued."""
        self._file.close()
        self.path.unlink(missing_ok=True)
