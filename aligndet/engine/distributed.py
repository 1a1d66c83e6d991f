"""One process or many: torchrun's environment, agreement and gathering."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

TIMEOUT = 600.0  # s that a rank waits for the others, by default
LAST_WORDS = 3.0  # s that the rank with the store stays for the others when all end
# What gloo, the store and nccl say when another rank is gone, and when it does not answer.
GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Application timeout", "connectFullMesh"),
    *("Socket closed", "Failed to recv", "Connection was likely closed", "remote process exit", "ncclRemoteError"),
    "NCCL communicator was aborted",
)
SILENT = ("Timed out waiting", "wait timeout", "Wait timeout", "timed out after")


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: 0 .. size-1.
        size: number of processes.
        device: where this process computes.
        host: the group that agrees without waiting for devices; None is the group of all.
    """

    rank: int
    size: int
    device: torch.device
    host: dist.ProcessGroup | None = None


def single(device: str = "cpu") -> World:
    """A world of one process."""
    return World(0, 1, torch.device(device))


def device_for(device: str, option: str = "device") -> torch.device:
    """Where a process computes that is told "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a GPU; names ``option``.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option}: want cuda, but torch finds no GPU; take cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def start(device: str = "auto", timeout: float = TIMEOUT) -> World:
    """Join the processes of torchrun, or stand alone without it; gloo on CPU, nccl on CUDA.

    Args:
        device: "auto" (CUDA where there is a GPU), "cpu" or "cuda".
        timeout: s; a rank that waits longer for another one fails.

    Raises:
        ValueError: "cuda" without a GPU, or more local ranks than GPUs.
    """
    on_gpu = device_for(device).type == "cuda"
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if on_gpu and local_rank >= gpus:
        raise ValueError(f"local rank {local_rank} has no GPU: {gpus} found; take --nproc-per-node {gpus}")
    target = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(target)
    if not launched():
        return World(0, 1, target)
    wait = timedelta(seconds=timeout)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", _board()),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=wait,
        device_id=target if on_gpu else None,
    )
    host = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=wait)) if on_gpu else None
    _board().set(f"process {dist.get_rank()}", f"{socket.gethostname()} {os.getpid()}")
    return World(dist.get_rank(), dist.get_world_size(), target, host)


def stop(world: World) -> None:
    """Leave the processes; safe without any."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def launched() -> bool:
    """Whether this is one process of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def first_failure(message: str) -> tuple[int, str]:
    """Tell the other ranks why this one fails; what the first to do so said, and its rank.

    That is this rank itself where no other failed before, and where the launcher's store cannot be reached.
    """
    rank = int(os.environ.get("RANK", 0))
    first = rank, message
    launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # Before start, only torchrun's own store is sure to be there.
    if launched() and (dist.is_initialized() or launcher):
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            board = _board()
            told = board.compare_set("failure", "", f"{rank} {message}").decode().partition(" ")
            first = int(told[0]), told[2]
            board.set(f"told {rank}", "")
            if rank == 0 and not launcher:  # the store lives in this process
                _await_told(board)
    return first


def _await_told(board: dist.Store) -> None:
    """Until every rank that lives has told why it ends: those that fail alike do so a moment apart."""
    deadline, size = time.monotonic() + LAST_WORDS, int(os.environ["WORLD_SIZE"])
    while time.monotonic() < deadline:
        gone = {rank for rank, _ in _killed()}
        if all(other in gone or board.check([f"told {other}"]) for other in range(size)):
            return
        time.sleep(0.02)


def lost(error: RuntimeError) -> str:
    """What an error says of the other ranks, where it comes from waiting for one; empty for any other error."""
    text, known = str(error), ""
    if not launched():
        return ""
    if any(words in text for words in GONE):
        for _ in range(20):  # the connection ends a moment before the process does
            with contextlib.suppress(RuntimeError, ValueError, OSError):
                known = ", ".join(f"rank {rank} (process {process})" for rank, process in _killed())
            if known:
                break
            time.sleep(0.05)
        return f"{known or 'another rank'} is gone: killed, crashed or cut off"
    return "another rank does not answer in time (timeout)" if any(words in text for words in SILENT) else ""


def _killed() -> Iterator[tuple[int, str]]:
    """The ranks on this machine whose process is no more, and that process."""
    board = _board()
    for rank in range(int(os.environ["WORLD_SIZE"])):
        if not board.check([f"process {rank}"]):
            continue
        host, process = board.get(f"process {rank}").decode().split()
        status = Path("/proc", process, "stat")
        # A process that nobody has waited for yet is a zombie, Z.
        dead = not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"
        if host == socket.gethostname() and Path("/proc/self").exists() and dead:
            yield rank, process


@functools.cache
def _board() -> dist.Store:
    """The launcher's store, where ranks find each other and leave words, under a name that only this start has.

    torchrun keeps its store over restarts, and in it the addresses of the processes before. Rank 0 makes the name up;
    the others take it once rank 0 has answered a word of their own: that of an earlier start is dead and answers none.

    Raises:
        RuntimeError: the store cannot be reached, or a rank does not come.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=TIMEOUT))))
    own, deadline = uuid.uuid4().hex, time.monotonic() + TIMEOUT
    if rank == 0:
        store.set("aligndet start", own)
        for other in range(1, size):
            store.set(f"{own} {_word(store, f'{own} {other}', deadline)}", "")
        return dist.PrefixStore(own, store)
    while time.monotonic() < deadline:
        name = _word(store, "aligndet start", deadline)
        store.set(f"{name} {rank}", own)
        for _ in range(20):
            if store.check([f"{name} {own}"]):
                return dist.PrefixStore(name, store)
            time.sleep(0.02)
    raise RuntimeError("Timed out waiting for rank 0 to start")


def _word(store: dist.Store, key: str, deadline: float) -> str:
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"Timed out waiting for the other ranks to start ({key})")
        time.sleep(0.02)
    return str(store.get(key).decode())


def barrier(world: World) -> None:
    """Wait until every process is here."""
    if world.size > 1:
        dist.barrier()


def highest(numbers: Sequence[int], world: World) -> list[int]:
    """Of each number the highest of all ranks; between processors, so that no rank waits for its device."""
    if world.size == 1:
        return list(numbers)
    values = torch.tensor(numbers)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=world.host)
    return [int(value) for value in values.tolist()]


def mean(values: torch.Tensor, world: World) -> torch.Tensor:
    """The mean over all ranks of numbers [n] on any device, as float64 on the processor."""
    found = values.detach().to("cpu", torch.float64)
    if world.size > 1:
        dist.all_reduce(found, group=world.host)
    return found / world.size


def together(error: str | None, world: World) -> None:
    """Go on if no rank has an error; otherwise all ranks raise the first one.

    Raises:
        ValueError: some rank has an error.
    """
    found = [message for message in gather_objects(error, world) if message is not None]
    if found:
        raise ValueError(found[0])


def gather_objects(value: Any, world: World) -> list[Any]:
    """The values of all ranks, in their order, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.host)  # through no GPU's memory
    return values
