"""What library users can hand over that no loader would: boxes that are none, and detectors without class scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aligndet.finetune import FineTune
from aligndet.predict import predict
from aligndet.pretrain import AlignDet
from aligndet.soco import SoCo
from aligndet.structures import check_boxes, no_targets
from tests.scenes import views_of
from tests.test_detectors import with_masks
from tests.test_mistakes import everyone, small

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "box",
    [[NAN, 0, 5, 5], [0, 0, 0, 5], [0, 5, 5, 5], [9, 0, 5, 5], [0, 9, 5, 5], [0, 0, INF, 5], [-INF, 0, INF, 5]],
)
def test_a_box_that_is_none_is_named(box: list[float]) -> None:
    view, _ = views_of((2, 2))
    boxes = view.targets.boxes.clone()
    boxes[3] = torch.tensor(box)
    with pytest.raises(ValueError, match=r"targets\.boxes: want finite x0 < x1, y0 < y1, got box 3 of image 1 \("):
        check_boxes(replace(view.targets, boxes=boxes))
    check_boxes(view.targets)
    check_boxes(no_targets())


@everyone
def test_every_way_to_train_refuses_it(name: str) -> None:
    """A box of nan would take the matches of all others of its image, without a word."""
    good, other = (with_masks(view) for view in views_of((2, 1)))
    boxes = good.targets.boxes.clone()
    boxes[1, 0] = NAN
    bad = replace(good, targets=replace(good.targets, boxes=boxes))
    with pytest.raises(ValueError, match="got box 1 of image 0"):
        FineTune(small(name))(bad)
    for model in (AlignDet(small(name), embedding=8), SoCo(small(name), embedding=8, hidden=8)):
        for views in ((bad, other), (other, bad)):
            with pytest.raises(ValueError, match="got box 1 of image 0"):
                model(*views)


@everyone
def test_a_detector_whose_scores_pre_training_took_says_so(name: str) -> None:
    detector = AlignDet(small(name), embedding=8).online
    view, _ = views_of((2,))
    with pytest.raises(ValueError, match=r"predictors\.score: the detector has no class scores"):
        predict(detector, [torch.zeros(3, 64, 64, dtype=torch.uint8)], short_side=64, long_side=64)
    with pytest.raises(ValueError, match=r"predictors\.score: the detector has no class scores"):
        FineTune(detector)(view)
