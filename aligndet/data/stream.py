"""Which samples each step sees: seeded, split over ranks without duplicates, resumable at any step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Lists of (index, position), one per forward pass of this rank.

    The run is one long sequence of samples: position p is sample ``permutation(epoch)[p % length]`` of epoch
    ``p // length``. Step s takes positions s * batch .. (s + 1) * batch; accumulation passes and ranks take contiguous
    shares of them, so that all ranks together see what a single process would.

    Args:
        length: images.
        batch: images per optimizer step, over all ranks and passes.
        steps: of the whole run.
        start_step: first step.
        accumulate: passes per step.
        rank, world: this process and the number of processes.
        seed: of the permutations.

    Raises:
        ValueError: ``batch`` is not divisible by ranks times passes.
    """

    def __init__(
        self,
        length: int,
        *,
        batch: int,
        steps: int,
        start_step: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        if batch % (world * accumulate):
            raise ValueError(
                f"optim.batch: want a multiple of {world} ranks x {accumulate} passes per step, got {batch}"
            )
        self.length, self.batch, self.steps, self.start_step = length, batch, steps, start_step
        self.accumulate, self.rank, self.world, self.seed = accumulate, rank, world, seed

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // (self.world * self.accumulate)
        epoch, order = -1, np.zeros(0, dtype=np.int64)
        for step in range(self.start_step, self.steps):
            for part in range(self.accumulate):
                first = step * self.batch + (part * self.world + self.rank) * share
                items = []
                for position in range(first, first + share):
                    if position // self.length != epoch:
                        epoch = position // self.length
                        order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                    items.append((int(order[position % self.length]), position))
                yield items


def loader(
    dataset: Dataset[Any],
    sampler: StepSampler,
    join: Callable[[Sequence[Any]], Any],
    workers: int,
    pin: bool,
) -> DataLoader[Any]:
    """A loader of the sampler's batches; each worker computes on one thread."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=join,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if workers else None,
        # Otherwise each new iterator draws from the global generator, and a resumed run samples differently.
        generator=torch.Generator(),
    )


def _one_thread(worker: int) -> None:
    # The training process decides when to end, after the running step; a worker that dies before would break it off.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cv2.ocl.setUseOpenCL(False)
