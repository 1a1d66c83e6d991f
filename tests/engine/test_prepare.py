"""Claims about what a run is told before it starts."""

from __future__ import annotations

import pytest
import torch

from aligndet.engine import precision
from aligndet.engine.precision import slow_precision
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


@pytest.mark.parametrize(("amp", "seconds", "times"), [("bf16", 0.05, 50), ("fp16", 0.0041, 4), ("bf16", 0.0039, None)])
def test_a_precision_that_is_far_slower_on_a_processor_is_named(
    monkeypatch: pytest.MonkeyPatch, amp: str, seconds: float, times: int | None
) -> None:
    taken = {torch.float32: 0.001, precision.PRECISIONS[amp]: seconds}
    monkeypatch.setattr(precision, "_seconds", lambda *dtypes: [taken[dtype] for dtype in dtypes])
    said = slow_precision(torch.device("cpu"), amp)
    assert said == "" if times is None else f"optim.amp={amp}" in said and f"takes {times} times as long" in said
    assert slow_precision(torch.device("cpu"), "off") == ""
    assert slow_precision(torch.device("cuda"), amp) == "", "a GPU is not asked: it need not be there"


def test_products_are_timed_in_turn_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round is left out, and the shortest of the others counts."""
    seen: list[tuple[torch.dtype, int]] = []
    seconds = iter([9.0, 9.0, *(value for n in range(precision.ROUNDS) for value in (5.0 - n / 10, 7.0 + n))])

    def product(matrix: torch.Tensor) -> float:
        seen.append((matrix.dtype, torch.get_num_threads()))
        return next(seconds)

    monkeypatch.setattr(precision, "_product", product)
    threads = torch.get_num_threads()
    assert precision._seconds(torch.float32, torch.bfloat16) == [5.0 - (precision.ROUNDS - 1) / 10, 7.0]
    assert seen == [(torch.float32, 1), (torch.bfloat16, 1)] * (precision.ROUNDS + 1)
    assert torch.get_num_threads() == threads
