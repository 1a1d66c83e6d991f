"""Claims about the plain values: ids by matching, boxes back at the original size, exact zeros in the padding."""

import pytest
import torch

from aligndet.protocol import normalise
from aligndet.structures import BACKGROUND, IGNORED, Candidates, Detections, Targets, no_targets


def test_box_ids_follow_matching() -> None:
    rows = torch.tensor([0, 0, 1])
    targets = Targets(torch.rand(3, 4), rows, torch.tensor([70, 5, 11]), rows)
    matched = torch.tensor([2, BACKGROUND, 0, IGNORED, 0])
    candidates = Candidates(None, None, torch.zeros(5, dtype=torch.int64), matched)
    assert candidates.box_ids(targets).tolist() == [11, BACKGROUND, 70, IGNORED, 70]
    with pytest.raises(ValueError, match="without targets"):
        Candidates(None, None, matched, None).box_ids(targets)


def test_box_ids_without_any_box() -> None:
    matched = torch.tensor([BACKGROUND, IGNORED, BACKGROUND])
    candidates = Candidates(None, None, matched, matched)
    assert candidates.box_ids(no_targets()).tolist() == [BACKGROUND, IGNORED, BACKGROUND]
    assert Candidates(None, None, matched[:0], matched[:0]).box_ids(no_targets()).tolist() == []


def test_detections_return_to_the_original_size_and_inside_it() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0], [-5.0, 0.0, 120.0, 50.0]])
    found = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))
    # Width 110 -> 220: factor 2. Height 50 -> 25: factor 1/2.
    back = found.resized((50, 110), (25, 220))
    assert back.boxes.tolist() == [[20.0, 10.0, 60.0, 20.0], [0.0, 0.0, 220.0, 25.0]]
    assert (
        len(Detections(boxes[:0], boxes[:0, 0], rows := torch.zeros(0, dtype=torch.int64)).resized((7, 7), (5, 5))) == 0
    )
    assert rows.numel() == 0


def test_normalise_is_exact_inside_and_zero_outside() -> None:
    images = torch.full((2, 3, 5, 7), 200, dtype=torch.uint8)
    result = normalise(images, torch.tensor([[3, 7], [5, 2]]), (100.0, 150.0, 200.0), (50.0, 25.0, 10.0))
    assert result[0, :, 0, 0].tolist() == [2.0, 2.0, 0.0]
    assert (result[0, 0] != 0).sum() == 3 * 7
    assert (result[1, 0] != 0).sum() == 5 * 2
    assert result.dtype == torch.float32
