"""Batches on their way to the device, one ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields

import torch
from torch import Tensor

from aligndet.structures import Batch

Batches = tuple[Batch, ...]


def on_device(loader: Iterable[Batches], device: torch.device) -> Iterator[tuple[Batches, Batches]]:
    """Each item of ``loader`` as it is and on ``device``: what is asked of it on the host makes no device wait.

    On a GPU a stream of its own copies the next item, images as uint8 from page-locked memory, while the step on the
    one before runs. Order and values are those of ``loader``; on the processor nothing is copied or read ahead.
    """
    if device.type != "cuda":
        yield from ((batches, batches) for batches in loader)
        return
    stream = torch.cuda.Stream(device)

    arrived: deque[torch.cuda.Event] = deque()  # of the batches that are under way, in their order

    def send(batches: Batches) -> Batches:
        with torch.cuda.stream(stream):
            sent = tuple(batch.to(device, non_blocking=True) for batch in batches)
            arrived.append(stream.record_event())
        return sent

    def receive(batches: Batches) -> None:
        current = torch.cuda.current_stream(device)
        current.wait_event(arrived.popleft())  # not for the whole stream, where the next batch is on its way already
        for tensor in tensors_of(batches):
            tensor.record_stream(current)  # its memory is not given to the next copy before this step is done

    yield from one_ahead(loader, send, receive)


def one_ahead(
    items: Iterable[Batches], send: Callable[[Batches], Batches], receive: Callable[[Batches], None]
) -> Iterator[tuple[Batches, Batches]]:
    """Each item with what ``send`` made of it before the item in front was given out; ``receive`` sees that last."""
    before: tuple[Batches, Batches] | None = None
    for item in items:
        sent = send(item)
        if before is not None:
            receive(before[1])
            yield before
        before = (item, sent)
    if before is not None:
        receive(before[1])
        yield before


def tensors_of(batches: Batches) -> Iterator[Tensor]:
    """All tensors of some batches."""
    for batch in batches:
        yield from (batch.images, batch.sizes, batch.original_sizes)
        parts = (getattr(batch.targets, item.name) for item in fields(batch.targets))
        yield from (part for part in parts if part is not None)
