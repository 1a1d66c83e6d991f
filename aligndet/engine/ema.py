"""Exponential moving averages: of one module in another, and of a whole model beside it."""

from __future__ import annotations

import copy
from typing import Any

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


class ModelAverage:
    """A copy of a model that follows it slowly, for validation and export; what is trained does not notice it.

    Update n = 1, 2, ... makes every floating value v of the copy, parameter or buffer, ``d v + (1 - d) w`` with w the
    model's and ``d = min(decay, (1 + n) / (10 + n))``; whole numbers (batch norm's counters) are the model's. The
    second term keeps the first weights out of the average of short runs: after 300 updates d is at most 0.97.

    Args:
        model: on its device, with the weights of the start.
        decay: in 0 .. 1, exclusive.

    Attributes:
        module: the copy, in evaluation mode.
        updates: n.

    Source:
        The bound by n is that of TensorFlow's ExponentialMovingAverage (``num_updates``), from which YOLO's and DETR's
        successors differ by ``1 - exp(-n / tau)``, a second number to be chosen. Averaged statistics of batch norms fit
        averaged weights better than those of the last steps; timm and YOLOv5 average them, too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay: want a number between 0 and 1, got {decay}")
        self.limit, self.updates = decay, 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = [
            pair
            for of in (nn.Module.parameters, nn.Module.buffers)
            for pair in zip(of(self.module), of(model), strict=True)
        ]
        floating = [(mine, theirs.detach()) for mine, theirs in pairs if mine.is_floating_point()]
        self._mine, self._theirs = [mine for mine, _ in floating], [theirs for _, theirs in floating]
        self._counters = [(mine, theirs) for mine, theirs in pairs if not mine.is_floating_point()]

    @property
    def decay(self) -> float:
        """d of the last update."""
        return min(self.limit, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's values after an optimizer step into the average."""
        self.updates += 1
        torch._foreach_lerp_(self._mine, self._theirs, 1 - self.decay)
        for mine, theirs in self._counters:
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on, bit for bit."""
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``.

        Raises:
            KeyError, RuntimeError: it is not one, or of another model.
        """
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
