"""Several processes as one run: torchrun's environment, and the few things that ranks tell each other.

Without torchrun there is one rank and no process group; every function then answers at once.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

# One rank may evaluate or write for this long while the others wait; after it a hang becomes an error.
TIMEOUT = datetime.timedelta(minutes=30)
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """Which process this is.

    Attributes:
        rank: 0 .. size - 1 over all machines; rank 0 writes files.
        size: number of processes.
        local_rank: 0 .. on this machine; also the index of its GPU.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes logs and files."""
        return self.rank == 0


def single(device: torch.device | str = "cpu") -> World:
    """The world of one process without a process group."""
    return World(0, 1, 0, torch.device(device))


def start(device: str = "auto") -> World:
    """Join the process group that torchrun describes (gloo on CPU, nccl on CUDA), or stay alone without torchrun.

    Args:
        device: "cpu", "cuda" (the GPU of the local rank), or "auto": "cuda" where there is a GPU.

    Raises:
        ValueError: another device, no GPU for it, or an environment that is only half torchrun's.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: want auto, cpu or cuda, got {device!r}")
    launched = _launched()
    local_rank = int(os.environ["LOCAL_RANK"]) if launched else 0
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        chosen = torch.device("cpu")
    else:
        chosen = _gpu(local_rank)
        torch.cuda.set_device(chosen)
    if not launched:
        return World(0, 1, 0, chosen)
    if chosen.type == "cuda":
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=chosen)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, chosen)


def stop(world: World) -> None:
    """Leave the process group, if there is one; safe to call twice and after an error."""
    del world  # the group belongs to the process
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait until all ranks are here."""
    if world.size > 1:
        dist.barrier()


def agree(flag: bool, world: World) -> bool:
    """True on every rank as soon as it is true on any; all ranks call it."""
    if world.size == 1:
        return flag
    votes = torch.tensor(int(flag), device=world.device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def gather_objects(value: Value, world: World) -> list[Value]:
    """The value of each rank, in the order of ranks, on every rank; all ranks call it.

    Values travel as pickles between the processes of this run; nothing from outside is unpickled. On CUDA they pass
    through GPU memory.
    """
    if world.size == 1:
        return [value]
    values = [value] * world.size
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Value, world: World) -> Value:
    """The value of rank 0 on every rank; all ranks call it."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _launched() -> bool:
    """Whether torchrun started this process."""
    missing = [name for name in NAMES if name not in os.environ]
    if not missing:
        return True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"environment: WORLD_SIZE is above 1 but {', '.join(missing)} not set; start with torchrun")
    return False


def _gpu(local_rank: int) -> torch.device:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= available:
        raise ValueError(f"device cuda: want a GPU for local rank {local_rank}, this machine has {available}; take device=cpu")
    return torch.device("cuda", local_rank)
