"""Claims about the box algebra, by hand and against torchvision."""

import torch
import torchvision

from aligndet.ops.boxes import area, clip, matched_iou


def random_boxes(number: int) -> torch.Tensor:
    corner = torch.rand(number, 2, dtype=torch.float64) * 50
    return torch.cat([corner, corner + torch.rand(number, 2, dtype=torch.float64) * 40], dim=1)


def test_area_by_hand() -> None:
    boxes = torch.tensor([[1.0, 2.0, 4.0, 7.0], [3.0, 3.0, 3.0, 9.0], [5.0, 0.0, 3.0, 4.0]])
    assert area(boxes).tolist() == [15, 0, -8]
    assert area(boxes[:0]).shape == (0,)


def test_matched_iou_is_the_diagonal_of_torchvision() -> None:
    a, b = random_boxes(211), random_boxes(211)
    expected = torchvision.ops.box_iou(a, b).diagonal()
    assert (expected > 0).sum() > 20
    assert torch.allclose(matched_iou(a, b), expected, atol=1e-14)
    assert torch.equal(matched_iou(a, b), matched_iou(b, a))


def test_matched_iou_of_degenerate_boxes() -> None:
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert matched_iou(point, point).item() == 0, "an empty union is no agreement"
    side_by_side = torch.tensor([[5.0, 0.0, 9.0, 9.0]])
    assert matched_iou(torch.tensor([[0.0, 0.0, 5.0, 9.0]]), side_by_side).item() == 0
    assert matched_iou(side_by_side, side_by_side).item() == 1
    assert matched_iou(point[:0], point[:0]).shape == (0,)


def test_clip_cuts_at_every_side() -> None:
    boxes = torch.tensor([[-3.0, -5.0, 99.0, 99.0], [2.0, 3.0, 7.0, 11.0], [90.0, 90.0, 99.0, 99.0]])
    expected = [[0, 0, 31, 17], [2, 3, 7, 11], [31, 17, 31, 17]]
    assert clip(boxes, torch.tensor([17, 31])).tolist() == expected
