"""The momentum branch: an exponential moving average of the online branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """Moves the parameters of ``target`` towards those of ``source``, matched by name.

    Parameters are averaged; buffers are copied, since statistics and counters have no meaningful average. Frozen
    parameters of the source that the target lacks are left alone: they are shared (the backbone). A tensor that both
    modules hold in common is left alone too. The average lives in ``target`` itself, so a checkpoint of the two modules
    is complete.

    Args:
        source: the module that is trained.
        target: the average; must hold a counterpart of every trainable parameter of ``source``, and nothing else.

    Raises:
        ValueError: names or shapes of the two do not agree; lists them.

    Source:
        Method section 2.1; departs from the reference in not averaging frozen parameters.
    """

    def __init__(self, source: nn.Module, target: nn.Module) -> None:
        theirs = dict(source.named_parameters())
        mine = dict(target.named_parameters())
        _check_names(source, target)
        pairs = [(theirs[name], mine[name]) for name in mine if theirs[name] is not mine[name]]
        self._sources: list[Tensor] = [source for source, _ in pairs]
        self._targets: list[Tensor] = [target for _, target in pairs]
        # The modules that own the buffers, not the buffers: moving a module to a device replaces its buffers.
        self._buffers = [
            (source.get_submodule(path), module, name)
            for path, module in target.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if source.get_submodule(path).get_buffer(name) is not buffer
        ]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """``target = momentum * target + (1 - momentum) * source``, in place; at momentum 1 no bit changes.

        Args:
            momentum: in 0 .. 1.

        Raises:
            ValueError: ``momentum`` is outside 0 .. 1.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"EMA momentum: want a number in 0 .. 1, got {momentum}")
        if momentum < 1 and self._targets:
            torch._foreach_lerp_(self._targets, self._sources, 1 - momentum)
        for source, target, name in self._buffers:
            target.get_buffer(name).copy_(source.get_buffer(name))


def _check_names(source: nn.Module, target: nn.Module) -> None:
    theirs, mine = dict(source.named_parameters()), dict(target.named_parameters())
    their_buffers, my_buffers = dict(source.named_buffers()), dict(target.named_buffers())
    missing = [name for name, parameter in theirs.items() if parameter.requires_grad and name not in mine]
    extra = [name for name in mine if name not in theirs] + [name for name in my_buffers if name not in their_buffers]
    if missing or extra:
        raise ValueError(
            "EMA: source and target want the same names; "
            f"only in the source: {', '.join(missing) or 'none'}; only in the target: {', '.join(extra) or 'none'}"
        )
    shapes = [
        f"{name} {list(theirs[name].shape)} {theirs[name].dtype} and {list(mine[name].shape)} {mine[name].dtype}"
        for name in mine
        if theirs[name].shape != mine[name].shape or theirs[name].dtype != mine[name].dtype
    ]
    if shapes:
        raise ValueError(f"EMA: source and target want the same shapes and types, got {'; '.join(shapes)}")
