"""Learning rate and EMA momentum as pure functions of the step: no state, so resuming needs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence


def momentum_at(step: int, steps: int, start: float = 0.996, end: float = 1.0) -> float:
    """EMA momentum of a step: from ``start`` to ``end`` along half a cosine, ``end - (end - start) (cos(pi k/K) + 1)/2``.

    Args:
        step: k, 0-based; steps past the end stay at ``end``.
        steps: K of the whole run.
        start, end: in 0 .. 1.

    Raises:
        ValueError: ``step`` is negative, ``steps`` not positive, or a momentum outside 0 .. 1.

    Source:
        Method section 2.1 (the reference's schedule; the paper states none), there with end = 1.
    """
    _check_steps(step, steps)
    if not 0 <= start <= 1 or not 0 <= end <= 1:
        raise ValueError(f"EMA momentum: want start and end in 0 .. 1, got {start} and {end}")
    return end - (end - start) * _half_cosine(step, steps)


def learning_rate_factor(
    step: int,
    *,
    steps: int,
    schedule: str = "step",
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    warmup: int = 0,
    warmup_ratio: float = 0.001,
) -> float:
    """What the base learning rate is multiplied with in a step: the schedule times a linear warm-up.

    The warm-up multiplies with ``1 - (1 - step/warmup) (1 - warmup_ratio)``: ``warmup_ratio`` at step 0, 1 from step
    ``warmup`` on.

    Args:
        step: 0-based.
        steps: of the whole run; where "cosine" reaches 0.
        schedule: "step" (times ``gamma`` from each milestone on) or "cosine" (half a period over the whole run).
        milestones: steps, of the schedule "step".
        gamma: factor per milestone.
        warmup: steps; 0 for none.
        warmup_ratio: factor at step 0.

    Raises:
        ValueError: unknown schedule, negative ``step`` or ``warmup``, or ``steps`` not positive.

    Source:
        Method section 1.0.
    """
    _check_steps(step, steps)
    if warmup < 0:
        raise ValueError(f"warmup: want at least 0 steps, got {warmup}")
    if schedule == "step":
        factor = gamma ** sum(milestone <= step for milestone in milestones)
    elif schedule == "cosine":
        factor = _half_cosine(step, steps)
    else:
        raise ValueError(f"schedule: want step or cosine, got {schedule!r}")
    if step < warmup:
        factor *= 1 - (1 - step / warmup) * (1 - warmup_ratio)
    return factor


def _half_cosine(step: int, steps: int) -> float:
    """From 1 at step 0 to 0 at ``steps``, and 0 after it."""
    return (math.cos(math.pi * min(step / steps, 1.0)) + 1) / 2


def _check_steps(step: int, steps: int) -> None:
    if step < 0 or steps < 1:
        raise ValueError(f"want a step >= 0 of a run of at least 1 step, got step {step} of {steps}")
