"""Claims about what a run is told before it starts."""

from __future__ import annotations

import pytest

from aligndet.engine.prepare import _thin_statistics
from aligndet.finetune import FineTune
from aligndet.models import build_detector
from aligndet.pretrain import AlignDet


@pytest.mark.parametrize(
    ("norm", "images", "ranks", "number"),
    [
        ("frozen", 1, 1, None),
        ("affine", 1, 1, None),
        ("batch", 2, 8, 2),  # each rank has its own
        ("sync", 2, 8, None),
        ("sync", 2, 1, 2),
        ("sync", 1, 3, 3),
        ("batch", 8, 1, None),
    ],
)
def test_statistics_of_few_images_are_warned_of(norm: str, images: int, ranks: int, number: int | None) -> None:
    detector = build_detector("fcos", "resnet18", 1, width=0.25, channels=32, norm=norm)
    said = _thin_statistics(FineTune(detector), images, ranks)
    assert said == "" if number is None else f"statistics of {number} images of a pass" in said
    assert _thin_statistics(AlignDet(detector), images, ranks) == "", "the frozen backbone has them from its weights"
