"""What runs inside a block: how many operators, and how large their results are."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Counts the operators that run, and notes the most elements of a tensor that one of them returned."""

    operators, largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out
