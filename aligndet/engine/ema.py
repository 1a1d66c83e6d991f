"""Exponential moving average of one module in another."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Moves the parameters of ``target`` towards those of ``source``.

    Args:
        source: the trained module; it may have more frozen parameters than ``target`` (a backbone that both share).
        target: the averaged module; each of its parameters has a namesake of the same shape in ``source``. Parameters
            that are the very same in both are left alone.
        apart: beginnings of names of trained parameters that ``target`` has no use for.

    Raises:
        ValueError: names or shapes do not match.
    """

    def __init__(self, source: nn.Module, target: nn.Module, apart: tuple[str, ...] = ()) -> None:
        own = dict(source.named_parameters())
        pairs = [(name, value) for name, value in target.named_parameters()]
        strange = [name for name, value in pairs if name not in own or own[name].shape != value.shape]
        if strange:
            raise ValueError(f"EMA: no parameter of that name and shape in the source for {', '.join(strange[:5])}")
        known = {name for name, _ in pairs}
        trained = [name for name, value in own.items() if value.requires_grad and not name.startswith(apart)]
        lost = [name for name in trained if name not in known]
        if lost:
            raise ValueError(f"EMA: trained parameters without a namesake in the target: {', '.join(lost[:5])}")
        pairs = [(name, value) for name, value in pairs if own[name] is not value]
        self.source: list[Tensor] = [own[name] for name, _ in pairs]
        self.target: list[Tensor] = [value for _, value in pairs]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """``target = momentum * target + (1 - momentum) * source``, in place; at 1 nothing changes, bit for bit.

        Buffers are left alone (method section 2.1): norms with running statistics keep those of their own branch, which
        sees the other view.
        """
        if momentum < 1:
            torch._foreach_lerp_(self.target, self.source, 1 - momentum)
