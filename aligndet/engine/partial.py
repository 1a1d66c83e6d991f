"""Results of a command image by image, in a file beside the result: interrupted, the same command continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class Partial:
    """One JSON line per finished item, after a first one with what the results depend on.

    A line that was being written when the process died is dropped; a file made with other settings begins anew. What is
    there is never written again.

    Attributes:
        done: the finished items by name.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.done = path, dict[str, Any]()
        first = json.dumps(settings).encode()
        try:
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
            whole = len(first) + 1
            for line in lines[1:] if lines[:1] == [first] else []:
                try:
                    name, result = json.loads(line)
                except ValueError:
                    break
                self.done[name] = result
                whole += len(line) + 1
            if lines[:1] == [first]:
                os.truncate(path, whole)  # whole lines only: what is appended must begin one
            else:
                path.write_bytes(first + b"\n")
            self._file = open(path, "a")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from None

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
