"""Which images carry labels in low-data protocols."""

from __future__ import annotations

import math

import numpy as np

LAST_FOLD = 2**32 - 1  # the largest seed of numpy's legacy generator


def choose_labelled(number: int, count: int, fold: int) -> np.ndarray:
    """``count`` of ``number`` images, drawn without replacement: ascending rows, int64 [count].

    Drawn as in SoftTeacher's protocol, with numpy's legacy generator seeded by the fold, so that the folds of published
    low-data results come out alike and smaller draws are part of larger ones (method section 5.5).

    Raises:
        ValueError: more images wanted than there are, or no such fold.
    """
    if not 0 <= fold <= LAST_FOLD:
        raise ValueError(f"fold: want 0 .. {LAST_FOLD}, got {fold}")
    if not 0 < count <= number:
        raise ValueError(f"labelled images: want 1 .. {number}, got {count}")
    return np.sort(np.random.RandomState(fold).choice(number, size=count, replace=False))


def share_of(number: int, percent: float) -> int:
    """How many of ``number`` images a percentage is, rounded down as in SoftTeacher's script: 1182 are 1 % of 118287.

    Raises:
        ValueError: the share is not one image, or more than all.
    """
    if not math.isfinite(percent):
        raise ValueError(f"--percent: want a finite number, got {percent:g}")
    count = int(percent / 100.0 * number)
    if not 0 < count <= number:
        raise ValueError(f"--percent {percent:g}: want at least one image and at most all of {number}, got {count}")
    return count
