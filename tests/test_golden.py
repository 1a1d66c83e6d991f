"""No detector trains otherwise than before: see tests/golden.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import golden

# Relative, of the first step, which no update precedes, of the others up to step 8, and of those after it. With SSE 4
# instead of AVX-512 these are 1e-6, 1e-5 and 3e-4; with two stages, whose suppression and sampling jump where rounding
# decides, 1e-6, 8e-4 and 8e-2.
SMOOTH, JUMPING = (2e-5, 1e-3, 5e-3), (2e-5, 5e-3, 0.25)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.scenes(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("detector", list(golden.MODELS))
@pytest.mark.parametrize("task", golden.TASKS)
def test_the_losses_of_the_first_20_steps_are_the_golden_ones(
    scenes: Path, tmp_path: Path, task: str, detector: str
) -> None:
    expected = json.loads(golden.PATH.read_text())[task][detector]
    steps = golden.deviation(golden.losses(task, detector, scenes, tmp_path / "run"), expected)
    first, early, late = JUMPING if detector.endswith("rcnn") else SMOOTH
    assert len(steps) == golden.STEPS
    assert steps[0] < first, "another loss, matching, sampling, augmentation or initial weights"
    assert max(steps[:8]) < early, f"another update: {[f'{value:.0e}' for value in steps]}"
    assert max(steps) < late, f"another update: {[f'{value:.0e}' for value in steps]}"


def test_a_learning_rate_that_is_a_tenth_higher_shows(scenes: Path, tmp_path: Path) -> None:
    expected = json.loads(golden.PATH.read_text())["pretrain"]["fcos"]
    steps = golden.deviation(golden.losses("pretrain", "fcos", scenes, tmp_path / "run", lr=0.0022), expected)
    assert steps[0] < SMOOTH[0]
    assert max(steps[:8]) > SMOOTH[1]
