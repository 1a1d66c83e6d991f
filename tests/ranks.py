"""Two ranks on one machine, as forks of the test, which start at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_two_ranks(script: str, timeout: float = 180) -> list[str]:
    """What each rank printed; fails where one does, or does not end within ``timeout`` seconds."""

    def act(rank: int) -> None:
        warnings.simplefilter("default")  # as in a process of its own
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})

    with tempfile.TemporaryDirectory() as folder:
        ranks = forked(act, Path(folder), timeout)
        outputs = [(Path(folder) / f"stdout-{rank}").read_text() for rank in (0, 1)]
    assert [code for code, _ in ranks] == [0, 0], "\n".join(error for _, error in ranks)
    return outputs


def forked(act: Callable[[int], None], folder: Path, timeout: float = 60) -> list[tuple[int, str]]:
    """The exit code (negative: killed by that signal) and stderr of ``act(rank)`` in two forks of this process.

    One that is stopped (SIGSTOP) is killed once the other has ended. Fails where they do not end within ``timeout`` s.
    """
    meeting = _meeting()
    ranks = [os.fork() or _rank(act, rank, folder, meeting) for rank in (0, 1)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < 2 and time.monotonic() < deadline:
        for rank, process in enumerate(ranks):
            ended, status = os.waitpid(process, os.WNOHANG | os.WUNTRACED) if rank not in codes else (0, 0)
            if ended and not os.WIFSTOPPED(status):
                codes[rank] = os.waitstatus_to_exitcode(status)
        if len(codes) == 1:
            left = ranks[1 - next(iter(codes))]
            if Path(f"/proc/{left}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                os.kill(left, signal.SIGKILL)
        time.sleep(0.02)
    outputs = [(folder / f"stderr-{rank}").read_text() for rank in (0, 1)]
    for rank, process in enumerate(ranks):
        if rank not in codes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    assert len(codes) == 2, f"ranks {sorted({0, 1} - set(codes))} did not end:\n" + "\n".join(outputs)
    return [(codes[rank], outputs[rank]) for rank in (0, 1)]


def _rank(act: Callable[[int], None], rank: int, folder: Path, meeting: dict[str, str]) -> int:
    code: object = 1
    try:
        # Closed with the process.
        sys.stderr = open(folder / f"stderr-{rank}", "w", buffering=1)  # noqa: SIM115
        sys.stdout = open(folder / f"stdout-{rank}", "w", buffering=1)  # noqa: SIM115
        os.environ.update(meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        act(rank)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def _meeting() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
