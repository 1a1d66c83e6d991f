"""Claims about what a run is told before it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize(("amp", "seconds", "times"), [("bf16", 0.05, 50), ("fp16", 0.004, 4), ("bf16", 0.0029, None)])
def test_a_precision_that_the_processor_computes_by_programs_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, amp: str, seconds: float, times: int | None
) -> None:
    monkeypatch.setattr(precision, "_seconds", {torch.float32: 0.001, precision.PRECISIONS[amp]: seconds}.__getitem__)
    said = slow_precision(torch.device("cpu"), amp)
    assert said == "" if times is None else f"optim.amp={amp}" in said and f"takes {times} times as long" in said
    assert slow_precision(torch.device("cpu"), "off") == ""
    assert slow_precision(torch.device("cuda"), amp) == "", "a GPU is not asked: it need not be there"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_that_are_timed_are_of_the_precision_asked_for(dtype: torch.dtype) -> None:
    with Products() as products:
        assert precision._seconds(dtype) > 0
    assert products.of == [dtype] * (precision.ROUNDS + 1)


class Products(TorchDispatchMode):
    """The types of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.mm.default:
            self.of.append(args[0].dtype)
        return func(*args, **(kwargs or {}))
