"""In which precision a model computes, and where that costs time instead of saving it."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDE, ROUNDS = 256, 3  # of the products that are timed: about a millisecond each in float32
FAR_SLOWER = (
    3.0  # times; where a processor has instructions for it, a product takes about as long as in float32, or less
)


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass on ``device`` runs in; ``amp``: "off", "bf16" or "fp16"."""
    return torch.autocast(device.type, dtype=PRECISIONS[amp], enabled=amp != "off")


def slow_precision(device: torch.device, amp: str) -> str:
    """What is to be said where ``device`` is a processor that computes ``amp`` by programs; empty elsewhere.

    Measured, which takes some milliseconds, instead of read off the processor's features, which go by other names on
    each kind. Where AVX2 is all there is, a matrix product in bf16 takes 50 times as long as in float32 (torch 2.14), a
    training step ten times.
    """
    if device.type != "cpu" or amp == "off":
        return ""
    ratio = _seconds(PRECISIONS[amp]) / _seconds(torch.float32)
    if ratio < FAR_SLOWER:
        return ""
    return (
        f"optim.amp={amp}: this processor has no instructions for it, a matrix product takes {ratio:.0f} times as long "
        "as in float32; take optim.amp=off"
    )


def _seconds(dtype: torch.dtype) -> float:
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    taken = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        matrix @ matrix
        taken.append(time.perf_counter() - began)
    return min(taken[1:])  # the first one may compile, and other work on the machine only ever adds
