"""Worker processes that may die: a task that crashes, hangs or kills its process costs that task and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import cv2

Result = TypeVar("Result")
START_SECONDS = 120.0  # a worker that is not ready by then never will be
_TICK = 1.0  # s, longest wait between two looks at the clock


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of one item: its result, or the reason why there is none (one line)."""

    item: str
    result: Result | None
    failure: str | None


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    deadline: float  # of the item at hand, or of the start
    ready: bool = False
    item: str | None = None


def run_tasks(
    task: Callable[[str], Result], items: Sequence[str], *, workers: int, timeout: float
) -> Generator[Outcome[Result] | None, None, None]:
    """Apply ``task`` to every item in worker processes; outcomes come in the order in which they finish.

    Workers are started from a clean server process, not forked from this one, whose threads (torch, OpenCV) would not
    survive that. They end when this process ends, however it ends.

    Args:
        task: picklable; runs in a worker, with one OpenCV thread.
        items: handed out one at a time, in this order.
        workers: number of processes.
        timeout: s per item; a worker that takes longer is killed.

    Yields:
        One outcome per item: an exception, a dead worker and a timeout are failures with their reason. None in between,
        at least about once a second, so that the caller can report progress.

    Raises:
        ValueError: a worker cannot even start (usually a script without ``if __name__ == "__main__":``).
    """
    waiting = deque(items)
    pool = [_start(task) for _ in range(min(workers, len(items)))]
    looked = time.monotonic()
    try:
        while pool:
            looked = _forgive_pause(pool, looked)
            nearest = min(worker.deadline for worker in pool) - time.monotonic()
            readable = wait([worker.connection for worker in pool], timeout=max(0.0, min(_TICK, nearest)))
            for worker in list(pool):
                outcome, alive = _look(worker, worker.connection in readable, timeout)
                if outcome is not None:
                    yield outcome
                if not alive:
                    pool.remove(worker)
                    _stop(worker)
                    if waiting:
                        pool.append(_start(task))
                elif worker.ready and worker.item is None:
                    _hand_out(worker, waiting, timeout)
                    if worker.item is None and not waiting:
                        pool.remove(worker)
                        _stop(worker)
            yield None
    finally:
        for worker in pool:
            _stop(worker)


def available_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _forgive_pause(pool: list[_Worker], looked: float) -> float:
    """Move the deadlines by the time that this process itself was stopped (Ctrl-Z); returns the time now."""
    now = time.monotonic()
    if now - looked > 5 * _TICK:
        for worker in pool:
            worker.deadline += now - looked
    return now


def _look(worker: _Worker, readable: bool, timeout: float) -> tuple[Outcome[Any] | None, bool]:
    """What the worker has to tell, if anything, and whether it goes on living."""
    if readable:
        message = _receive(worker.connection)
        if message is None:
            return _died(worker), False
        item, worker.item, worker.deadline = worker.item, None, float("inf")
        if item is None:
            worker.ready = True
            return None, True
        return Outcome(item, *message), True
    if time.monotonic() < worker.deadline:
        return None, True
    if worker.item is None:
        raise ValueError(f"worker processes do not start within {START_SECONDS:g} s")
    return Outcome(worker.item, None, f"took longer than {timeout:g} s"), False


def _receive(connection: Connection) -> tuple[Any, str | None] | None:
    try:
        return connection.recv()
    except (EOFError, OSError):
        return None  # the other end is gone


def _died(worker: _Worker) -> Outcome[Any] | None:
    worker.process.join(5)
    code = worker.process.exitcode
    if not worker.ready:
        raise ValueError(
            f"worker processes end at their start (exit code {code}); in a script of your own, "
            'call this below `if __name__ == "__main__":`'
        )
    if worker.item is None:
        return None
    how = f"signal {-code} ({signal.strsignal(-code)})" if code is not None and code < 0 else f"exit code {code}"
    return Outcome(worker.item, None, f"killed its worker process: {how}")


def _hand_out(worker: _Worker, waiting: deque[str], timeout: float) -> None:
    if not waiting:
        return
    try:
        worker.connection.send(waiting[0])
    except OSError:
        return  # it died while idle, which is no item's fault; the next look replaces it
    worker.item, worker.deadline = waiting.popleft(), time.monotonic() + timeout


def _start(task: Callable[[str], Any]) -> _Worker:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__, _module_of(task)])  # imported once, not by each worker
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, task), daemon=True)  # type: ignore[attr-defined]
    process.start()
    there.close()
    return _Worker(process, here, time.monotonic() + START_SECONDS)


def _module_of(task: Callable[[str], Any]) -> str:
    return getattr(getattr(task, "func", task), "__module__", __name__)


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join()
    worker.process.close()


def _serve(connection: Connection, task: Callable[[str], Any]) -> None:
    """The life of a worker: ``(None, None)`` out when ready, then item in and ``(result, failure)`` out, for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send((None, None))
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, str | None]
        try:
            answer = task(item), None
        except Exception as error:
            answer = None, f"{type(error).__name__}: {' '.join(str(error).split())}"
        connection.send(answer)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and one inside a long search would not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
