"""What may end a run early: signals, numbers that are not finite, memory; each says what is needed to go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from aligndet.structures import Batch

NEVER = 2**62  # no step
MOST_SKIPPED = 10  # steps in a row; more are no outliers
# Of fp16's losses: torch starts at 65536 and halves it after each overflow. Gradients above 6e8 are no overflow.
LEAST_SCALE = 1e-4
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Stopped(Exception):  # noqa: N818  not an error
    """A signal asked the run to end; its checkpoint is written.

    Attributes:
        signal: its number; the exit code is 128 more, as a shell's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: checkpoint written; the same command continues")
        self.signal = number


@dataclass
class Step:
    """What is needed to repeat a step: its number, the random states before it, and its images.

    Attributes:
        images: [image id, name, height px, width px] of each image of this rank.
    """

    step: int
    rng: dict[str, Any]
    images: list[list[Any]] = field(default_factory=list)

    def add(self, batch: Batch, name_of: Callable[[int], str]) -> None:
        """Note the images of one forward pass."""
        sizes = batch.sizes.tolist()
        self.images += [[i, name_of(i), *size] for i, size in zip(batch.image_ids, sizes, strict=True)]

    def described(self) -> str:
        """The images in words."""
        return ", ".join(f"{name} ({width} x {height} px)" for _, name, height, width in self.images)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying from them; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets only the main thread handle signals
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Statistics:
    """The buffers of a model as they were before a step: a step that is left out has moved running statistics, too."""

    def __init__(self, model: nn.Module, wanted: bool) -> None:
        """Keep nothing where it is not ``wanted``."""
        self._now = list(model.buffers()) if wanted else []
        self._before = [buffer.clone() for buffer in self._now]

    def keep(self) -> None:
        """Note them as they are now."""
        for before, now in zip(self._before, self._now, strict=True):
            before.copy_(now)

    def restore(self) -> None:
        """Put back what was noted."""
        for before, now in zip(self._before, self._now, strict=True):
            now.copy_(before)


def mark(first_bad: Tensor, step: int, values: Sequence[Tensor]) -> None:
    """Lower ``first_bad`` (int64 []) to ``step`` if one of the scalars is not finite; nothing waits for the device."""
    finite = torch.stack([value.detach().float() for value in values]).isfinite().all()
    torch.minimum(first_bad, torch.where(finite, NEVER, step).to(first_bad), out=first_bad)


def scale_is_lost(scaler: torch.amp.GradScaler) -> bool:
    """Whether no scale of the loss keeps fp16's gradients finite: they are not finite by themselves."""
    return scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE


@contextlib.contextmanager
def memory_of(step: Step | None) -> Iterator[None]:
    """An out-of-memory error that names the images of the step, and how to need less; None: of a validation.

    Raises:
        MemoryError: in place of the device's or the allocator's error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        if step is None:
            remedy = "take a smaller data.eval_short_side or data.long_side"
            raise MemoryError(f"validation: out of memory; {remedy} ({reason})") from None
        images = f"with the images {step.described()}" if step.images else "before its images were there"
        raise MemoryError(
            f"step {step.step + 1}: out of memory {images}; take a larger optim.accumulate, "
            f"or a smaller data.short_side or optim.batch ({reason})"
        ) from None
