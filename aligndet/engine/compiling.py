"""``compile=true``: torch.compile of what turns maps into maps; assignment and losses stay as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def check_device(device: torch.device) -> None:
    """Raises ValueError on a processor, where compiling has been measured and does not pay."""
    if device.type == "cpu":
        raise ValueError(
            "compile: not on processors, where steps take longer with it (docs/decisions.md); leave compile out"
        )


def compile_parts(parts: Iterable[nn.Module], backend: str = "inductor") -> int:
    """Compile each part in place, at its first use; names of weights and checkpoints stay as they are.

    Pictures of every size pass the same code (``dynamic``), since training draws sizes anew in each step. A part that
    cannot be compiled as a whole is an error at its first use, not a silent return to what it was.

    Args:
        backend: of torch.compile; others than inductor are for tests.

    Returns:
        How many parts; those without parameters, which stand for a backbone that is shared, are left out.
    """
    found = {id(part): part for part in parts if any(True for _ in part.parameters())}
    for part in found.values():
        part.compile(dynamic=True, fullgraph=True, backend=backend)
    return len(found)
