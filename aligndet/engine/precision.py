"""In which precision a model computes, and where that costs time instead of saving it."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor

PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDE, ROUNDS = 128, 7  # of the products that are timed: a tenth of a millisecond each in float32
# Times as long as in float32. With instructions for it a product takes about as long, or less.
FAR_SLOWER = 4.0


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass on ``device`` runs in; ``amp``: "off", "bf16" or "fp16"."""
    return torch.autocast(device.type, dtype=PRECISIONS[amp], enabled=amp != "off")


def slow_precision(device: torch.device, amp: str) -> str:
    """What is to be said where ``device`` is a processor that is far slower with ``amp``; empty elsewhere.

    Measured, with one thread, instead of read off the processor's features, which go by other names on each kind. Where
    AVX2 is all there is, a matrix product in bf16 takes some 30 times as long as in float32 (torch 2.14), a training
    step of FCOS ten times.
    """
    if device.type != "cpu" or amp == "off":
        return ""
    plain, half = _seconds(torch.float32, PRECISIONS[amp])
    if half < FAR_SLOWER * plain:
        return ""
    return (
        f"optim.amp={amp} is far slower on this processor: a matrix product takes {half / plain:.0f} times as long as "
        "in float32; take optim.amp=off"
    )


def _seconds(*dtypes: torch.dtype) -> list[float]:
    """The shortest time of a matrix product in each precision, in turn: other work on the machine hits all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one that another process has thrown off its core
    try:
        matrices = [torch.ones(SIDE, SIDE, dtype=dtype) for dtype in dtypes]
        rounds = [[_product(matrix) for matrix in matrices] for _ in range(ROUNDS + 1)]
    finally:
        torch.set_num_threads(threads)
    return [min(taken) for taken in zip(*rounds[1:], strict=True)]  # the first round may compile


def _product(matrix: Tensor) -> float:
    began = time.perf_counter()
    matrix @ matrix
    return time.perf_counter() - began
