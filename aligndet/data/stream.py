"""Which samples each step sees: seeded, split over ranks without duplicates, resumable at any step."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def drawn(key: object) -> tuple[int, int]:
    """The image and the position in the stream that a sample is asked for by.

    Raises:
        ValueError: a number alone; it would draw the same augmentation in every epoch.
    """
    if not isinstance(key, tuple) or len(key) != 2:
        raise ValueError(f"sample: want (image, position in the stream), as StepSampler gives them, got {key!r}")
    return key


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
        wide: bool [length], a kind of each image; None: all are alike. With it the images of a step are of one kind.
            Each kind keeps the order of the permutations and waits until it fills a step, over the end of an epoch if
            need be: each image still comes once per epoch, but for less than ``batch`` of each kind that come in the
            first steps of the next. A kind of fewer images than ``batch`` waits for more than an epoch, and its steps
            then hold images twice.

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
        wide: np.ndarray | None = None,
    ) -> None:
        if batch % (world * accumulate):
            raise ValueError(
                f"optim.batch: want a multiple of {world} ranks x {accumulate} passes per step, got {batch}"
            )
        self.length, self.batch, self.steps, self.start_step = length, batch, steps, start_step
        self.accumulate, self.rank, self.world, self.seed, self.wide = accumulate, rank, world, seed, wide

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // (self.world * self.accumulate)
        whole = self._steps() if self.wide is None else self._grouped_steps(self.wide)
        for step, images in zip(range(self.start_step, self.steps), whole, strict=False):
            for part in range(self.accumulate):
                first = (part * self.world + self.rank) * share
                places = range(first, first + share)
                yield [(int(images[place]), step * self.batch + place) for place in places]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)

    def _steps(self) -> Iterator[np.ndarray]:
        """The images of each step from ``start_step`` on: int64 [batch]."""
        epoch, order = -1, np.zeros(0, dtype=np.int64)
        for step in range(self.start_step, self.steps):
            images = np.empty(self.batch, dtype=np.int64)
            for place in range(self.batch):
                position = step * self.batch + place
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = self._permutation(epoch)
                images[place] = order[position % self.length]
            yield images

    def _grouped_steps(self, wide: np.ndarray) -> Iterator[np.ndarray]:
        """The same, each step of one kind; found again from the first epoch on, some milliseconds each."""
        waiting = [np.zeros(0, dtype=np.int64)] * 2
        passed, epoch = 0, 0
        while True:
            order, epoch = self._permutation(epoch), epoch + 1
            full: list[tuple[int, np.ndarray]] = []  # where in the order the last image of a step comes; its images
            for kind, earlier in enumerate(waiting):
                where = np.flatnonzero(wide[order] == bool(kind))
                queue = np.concatenate([earlier, order[where]])
                whole = len(queue) // self.batch * self.batch
                for first in range(0, whole, self.batch):
                    last = first + self.batch - 1 - len(earlier)
                    full.append((int(where[last]), queue[first : first + self.batch]))
                waiting[kind] = queue[whole:]
            for _, images in sorted(full, key=itemgetter(0)):
                if passed >= self.start_step:
                    yield images
                passed += 1


def loader(
    dataset: Dataset[Any],
    sampler: StepSampler,
    join: Callable[[Sequence[Any]], Any],
    workers: int,
    pin: bool,
) -> DataLoader[Any]:
    """A loader of the sampler's batches; each worker computes on one thread."""
    if workers:
        _leave_no_workers()
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


@functools.cache
def _leave_no_workers() -> None:
    """At the end of this process kill loader workers that are left.

    Python would ask them with SIGTERM, which they ignore, and wait without end. They are left where the traceback of an
    error keeps their loader alive.
    """

    def kill(owner: int) -> None:
        if os.getpid() != owner:
            return
        if sys.platform != "win32":
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take it for an accident
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(kill, os.getpid())


def _one_thread(worker: int) -> None:
    # The training process decides when to end, after the running step; a worker that dies before would break it off.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cv2.ocl.setUseOpenCL(False)
