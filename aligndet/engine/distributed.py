"""One process or many: torchrun's environment, agreement and gathering."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist


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


def start(device: str = "auto") -> World:
    """Join the processes of torchrun, or stand alone without it; gloo on CPU, nccl on CUDA.

    Args:
        device: "auto" (CUDA where there is a GPU), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a GPU, or more local ranks than GPUs.
    """
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise ValueError("device: want cuda, but torch finds no GPU; take device=cpu or device=auto")
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_gpu and local_rank >= gpus:
        raise ValueError(f"local rank {local_rank} has no GPU: {gpus} found; take --nproc-per-node {gpus}")
    target = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(target)
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return World(0, 1, target)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=target if on_gpu else None)
    host = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if on_gpu else None
    return World(dist.get_rank(), dist.get_world_size(), target, host)


def stop(world: World) -> None:
    """Leave the processes; safe without any."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait until every process is here."""
    if world.size > 1:
        dist.barrier()


def agree(flag: bool, world: World) -> bool:
    """True on every rank if it is on any."""
    if world.size == 1:
        return flag
    value = torch.tensor(float(flag), device=world.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def highest(numbers: Sequence[int], world: World) -> list[int]:
    """Of each number the highest of all ranks; between processors, so that no rank waits for its device."""
    if world.size == 1:
        return list(numbers)
    values = torch.tensor(numbers)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=world.host)
    return [int(value) for value in values.tolist()]


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
    dist.all_gather_object(values, value)
    return values
