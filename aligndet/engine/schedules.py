"""Learning rate and momentum as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate_factor(
    step: int,
    *,
    steps: int,
    schedule: str,
    milestones: tuple[int, ...] = (),
    gamma: float = 0.1,
    warmup: int = 0,
    warmup_ratio: float = 0.001,
    warmup_schedule: str = "linear",
) -> float:
    """What the base learning rate is multiplied with at a step.

    Args:
        step: 0-based.
        steps: length of the run.
        schedule: "step" (times ``gamma`` from each milestone on) or "cosine" (to 0 at ``steps``).
        milestones: steps, ascending.
        warmup: steps over which a factor rises linearly from ``warmup_ratio`` to 1 on top of the schedule, or with
            ``warmup_schedule`` "constant" is ``warmup_ratio``.

    Source:
        Method section 1.0: lr = base (1 - (1 - it / W) (1 - r)); constant: section 7, row 26.
    """
    if schedule == "step":
        factor = gamma ** sum(step >= milestone for milestone in milestones)
    elif schedule == "cosine":
        factor = (1 + math.cos(math.pi * step / steps)) / 2
    else:
        raise ValueError(f"schedule: want step or cosine, got {schedule!r}")
    if warmup_schedule not in ("linear", "constant"):
        raise ValueError(f"warmup_schedule: want linear or constant, got {warmup_schedule!r}")
    if step < warmup:
        factor *= warmup_ratio if warmup_schedule == "constant" else 1 - (1 - step / warmup) * (1 - warmup_ratio)
    return factor


def scaled_learning_rate(lr: float, scaling: str, batch: int, base_batch: int | None) -> float:
    """A learning rate that was chosen for steps of ``base_batch`` images, for steps of ``batch``.

    Args:
        scaling: "linear" (arXiv:1706.02677), "sqrt" (customary for Adam), or "none", which reads no ``base_batch``.
    """
    if scaling == "none":
        return lr
    if base_batch is None or scaling not in ("linear", "sqrt"):
        raise ValueError(f"scaling: want none, or linear or sqrt with base_batch, got {scaling!r}, {base_batch}")
    share = batch / base_batch
    return lr * (share if scaling == "linear" else math.sqrt(share))


def momentum_at(step: int, steps: int, start: float = 0.996, end: float = 1.0, *, schedule: str = "cosine") -> float:
    """The EMA momentum at a 0-based step: from ``start`` to ``end`` along half a cosine (method section 2.1).

    ``schedule="constant"`` is ``start`` throughout.
    """
    if schedule == "constant":
        return start
    return end - (end - start) * (math.cos(math.pi * step / steps) + 1) / 2
