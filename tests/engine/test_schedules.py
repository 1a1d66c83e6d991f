"""Learning rate and EMA momentum by hand."""

import math

import pytest

from aligndet.engine.schedules import learning_rate_factor, momentum_at, scaled_learning_rate


def test_momentum_rises_from_its_start_to_one() -> None:
    assert momentum_at(0, 7) == pytest.approx(0.996, abs=1e-15)
    assert momentum_at(7, 7) == 1.0
    assert momentum_at(5, 20, start=0.9) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2, abs=1e-15)
    assert momentum_at(3, 6, start=0.2, end=0.8) == pytest.approx(0.5)
    values = [momentum_at(step, 13) for step in range(14)]
    assert values == sorted(values)


def test_steps_fall_from_their_milestones_on() -> None:
    factors = [learning_rate_factor(step, steps=12, schedule="step", milestones=(8, 11)) for step in (0, 7, 8, 10, 11)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_warm_up_is_a_line_on_top_of_the_schedule() -> None:
    plain = {"steps": 1000, "schedule": "step", "milestones": (300,)}
    warm = [learning_rate_factor(step, warmup=500, warmup_ratio=0.001, **plain) for step in (0, 250, 499, 500)]
    assert warm[0] == pytest.approx(0.001)
    assert warm[1] == pytest.approx(1 - 0.5 * 0.999)
    assert warm[2] == pytest.approx(0.1 * (1 - (1 / 500) * 0.999))
    assert warm[3] == pytest.approx(0.1)


def test_a_constant_warm_up_jumps_at_its_end() -> None:
    plain = {"steps": 1000, "schedule": "step", "milestones": (300,), "warmup": 500, "warmup_ratio": 1 / 3}
    warm = [learning_rate_factor(step, warmup_schedule="constant", **plain) for step in (0, 299, 300, 499, 500)]
    assert warm == pytest.approx([1 / 3, 1 / 3, 1 / 30, 1 / 30, 0.1])
    with pytest.raises(ValueError, match="warmup_schedule: want linear or constant, got 'step'"):
        learning_rate_factor(0, steps=3, schedule="step", warmup_schedule="step")


def test_cosine_ends_at_zero_and_warms_up_too() -> None:
    assert learning_rate_factor(0, steps=10, schedule="cosine") == 1.0
    assert learning_rate_factor(5, steps=10, schedule="cosine") == pytest.approx(0.5)
    assert learning_rate_factor(10, steps=10, schedule="cosine") == pytest.approx(0, abs=1e-15)
    halfway = learning_rate_factor(5, steps=10, schedule="cosine", warmup=10, warmup_ratio=0.2)
    assert halfway == pytest.approx(0.5 * (1 - 0.5 * 0.8))


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="want step or cosine, got 'poly'"):
        learning_rate_factor(0, steps=3, schedule="poly")


def test_learning_rates_are_scaled_by_the_batch_or_its_root() -> None:
    assert scaled_learning_rate(0.01, "none", 64, None) == 0.01
    assert scaled_learning_rate(0.01, "linear", 64, 16) == pytest.approx(0.04)
    assert scaled_learning_rate(0.01, "linear", 4, 16) == pytest.approx(0.0025)
    assert scaled_learning_rate(0.01, "sqrt", 64, 16) == pytest.approx(0.02)
    assert scaled_learning_rate(0.01, "sqrt", 32, 16) == pytest.approx(0.0141421356)
    for scaling, base in (("linear", None), ("square", 16)):
        with pytest.raises(ValueError, match="scaling: want none, or linear or sqrt with base_batch"):
            scaled_learning_rate(0.01, scaling, 64, base)
