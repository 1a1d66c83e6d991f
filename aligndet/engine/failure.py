"""How a command ends that cannot go on: one line on stderr, of the rank that failed, and an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator

from aligndet.engine import distributed
from aligndet.engine.guard import Stopped

MISTAKE, INTERRUPTED, LOST = 2, 130, 75  # 75 is EX_TEMPFAIL of sysexits.h: not this rank's fault, try again


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A caller's mistake, or a file that cannot be read or written, becomes one line on stderr and exit code 2.

    ALIGNDET_TRACEBACK=1 shows where it arose.

    Of several ranks the one that failed first says why. One that only waited for it ends with code 75, and names it
    where it is the first of its machine. Any other error keeps its traceback; the other ranks hear of it, too.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        _say(_message(error))
        if os.environ.get("ALIGNDET_TRACEBACK"):
            raise
        raise SystemExit(MISTAKE) from None
    except Stopped as stopped:
        _say(str(stopped))
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        _say("interrupted; the same command continues")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        reason = distributed.lost(error) if isinstance(error, RuntimeError) else ""
        if not reason or os.environ.get("ALIGNDET_TRACEBACK"):
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            distributed.first_failure(reason)
            _record(f"rank {os.environ.get('RANK', 0)}: {reason}")
            raise
        _say_lost(reason)
        raise SystemExit(LOST) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: cannot be read or written ({error.strerror})"
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # An error in a loader worker arrives wrapped in that worker's traceback; its last line is the message.
    wrapped = any("Original Traceback" in line for line in lines)
    return lines[-1].partition(": ")[2] if wrapped else " ".join(lines)


def _say(message: str) -> None:
    """Print a message, unless another rank has printed the same."""
    own = int(os.environ.get("RANK", 0))
    rank, first = distributed.first_failure(message)
    if rank == own or first != message:
        _print(f"rank {own}: {message}" if distributed.launched() else message)


def _say_lost(reason: str) -> None:
    own = int(os.environ.get("RANK", 0))
    rank, first = distributed.first_failure(reason)
    if rank == own:
        _print(f"rank {own}: {reason}; the same command continues from the last checkpoint")
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        _print(f"rank {own} ends: rank {rank} failed: {first}")


def _print(line: str) -> None:
    print(f"aligndet: {line}", file=sys.stderr, flush=True)
    _record(line)


def _record(line: str) -> None:
    """Leave what torchrun is to show at its end as the cause."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and distributed.launched():
        content = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, "w") as errors:
            json.dump({"message": content}, errors)
