"""Claims about assignment and sampling, against a naive loop."""

from dataclasses import replace

import pytest
import torch

from aligndet.assigners import IoUAssigner, PositivesFirst, assign_center
from aligndet.assigners import center as center_module
from aligndet.assigners import iou as iou_module
from aligndet.structures import BACKGROUND, IGNORED, Targets, no_targets
from tests import reference
from tests.counting import Counting


def targets_of(boxes: list[torch.Tensor]) -> Targets:
    image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
    rows = torch.arange(len(image))
    return Targets(torch.cat(boxes), torch.zeros_like(rows), rows, image)


def random_boxes(number: int, generator: torch.Generator) -> torch.Tensor:
    # Whole numbers, so that ties of area and points exactly on sides occur.
    corner = torch.randint(0, 24, (number, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(1, 17, (number, 2), generator=generator)], dim=1).float()


def test_center_equals_the_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(center_module, "PAIRS", 97)  # several chunks per image
    points = torch.stack(torch.meshgrid(torch.arange(2.0, 40, 4), torch.arange(2.0, 40, 4), indexing="xy"), 2)
    points = points.reshape(-1, 2)
    cases = positives = 0
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        low = torch.randint(-1, 8, (len(points), 1), generator=generator).float()
        ranges = torch.cat([low, low + torch.randint(1, 13, low.shape, generator=generator)], dim=1)
        counts = torch.randint(0, 8, (3,), generator=generator).tolist()
        boxes = [random_boxes(count, generator) for count in counts]
        radius = torch.rand(len(points), generator=generator) * 8 if seed % 3 == 0 else None
        found = assign_center(points, ranges, targets_of(boxes), 3, radius=radius)
        start = 0
        for image, count in enumerate(counts):
            arguments = (points.tolist(), ranges.tolist(), boxes[image].tolist())
            naive = reference.assign_center(*arguments, None if radius is None else radius.tolist())
            expected = [row + start if row >= 0 else BACKGROUND for row in naive]
            assert found[image].tolist() == expected
            start += count
            cases += len(points)
            positives += sum(row >= 0 for row in naive)
    assert cases >= 40_000
    assert positives > 2_000


def test_center_by_hand() -> None:
    """Two nested boxes: the smaller wins where both hold; a point on a side belongs to neither."""
    points = torch.tensor([[8.0, 8.0], [3.0, 3.0], [6.0, 8.0], [40.0, 8.0]])
    ranges = torch.tensor([[-1.0, 64.0]]).repeat(4, 1)
    targets = targets_of([torch.tensor([[0.0, 0.0, 20.0, 20.0], [6.0, 6.0, 10.0, 10.0]])])
    assert assign_center(points, ranges, targets, 1).tolist() == [[1, 0, 0, BACKGROUND]]
    # Both ends of a range count: the farthest side of box 0 from (3, 3) is 17 px away.
    for bounds, expected in (((17, 30), 0), ((5, 17), 0), ((17.5, 30), BACKGROUND), ((5, 16.5), BACKGROUND)):
        assert assign_center(points[1:2], torch.tensor([bounds], dtype=torch.float32), targets, 1).item() == expected


def test_a_point_at_the_radius_is_outside() -> None:
    """As in torchvision and mmdet. The centre is (10, 10); the points are 4, 3.5 and (on y) 4 px from it."""
    points = torch.tensor([[14.0, 10.0], [13.5, 10.0], [10.0, 6.0]])
    targets = targets_of([torch.tensor([[0.0, 0.0, 20.0, 20.0]])])
    ranges, radius = torch.tensor([[-1.0, 64.0]]).repeat(3, 1), torch.full((3,), 4.0)
    assert assign_center(points, ranges, targets, 1, radius=radius).tolist() == [[BACKGROUND, 0, BACKGROUND]]


def test_center_without_boxes_with_one_and_with_500() -> None:
    points, ranges = torch.rand(31, 2) * 50, torch.tensor([[-1.0, torch.inf]]).repeat(31, 1)
    assert (assign_center(points, ranges, no_targets(), 2) == BACKGROUND).all()
    box = torch.tensor([[-1.0, -1.0, 51.0, 51.0]])
    assert assign_center(points, ranges, targets_of([box[:0], box]), 2).tolist() == [[BACKGROUND] * 31, [0] * 31]
    many = random_boxes(500, torch.Generator().manual_seed(1))
    expected = reference.assign_center(points.tolist(), ranges.tolist(), many.tolist())
    assert assign_center(points, ranges, targets_of([many]), 1)[0].tolist() == expected


def test_equal_areas_go_to_the_first_box() -> None:
    same = torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 3)
    found = assign_center(torch.tensor([[4.0, 4.0]]), torch.tensor([[-1.0, 64.0]]), targets_of([same]), 1)
    assert found.item() == 0


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize("background", [0.0, 0.5])
def test_sampler_counts(scope: str, background: float) -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        matched = torch.randint(-2, 4, (53,), generator=generator)
        image = torch.sort(torch.randint(0, 3, (53,), generator=generator)).values
        rows = PositivesFirst(limit=11, scope=scope, background=background)(matched, image)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert (matched[rows] != IGNORED).all()
        groups = [torch.ones(53, dtype=torch.bool)] if scope == "batch" else [image == i for i in range(3)]
        for group in groups:
            positives = int((matched[group] >= 0).sum())
            kept = int((group[rows] & (matched[rows] >= 0)).sum())
            assert kept == min(positives, {0.0: 11, 0.5: 5}[background])
            filled = int((group[rows] & (matched[rows] == BACKGROUND)).sum())
            assert filled == min(int((matched[group] == BACKGROUND).sum()), 11 - kept)


@pytest.mark.parametrize(
    ("limit", "background", "positives"),
    [(512, 0.75, 128), (511, 0.75, 127), (6, 0.75, 1), (10, 0.9, 1), (10, 0.3, 7), (5, 1.0, 0), (5, 0.0, 5)],
)
def test_positives_take_at_most_their_share_rounded_down(limit: int, background: float, positives: int) -> None:
    """As mmdet, detectron2 and torchvision count them: ``int(limit * (1 - background))``, in exact arithmetic."""
    matched = torch.tensor([0] * 600 + [BACKGROUND] * 600)
    rows = PositivesFirst(limit, "image", background)(matched, torch.zeros(1200, dtype=torch.int64))
    assert len(rows) == limit
    assert int((matched[rows] >= 0).sum()) == positives


def test_sampler_is_uniform_and_takes_empty_input() -> None:
    matched = torch.cat([torch.zeros(20, dtype=torch.int64), torch.full((7,), BACKGROUND)])
    hits = torch.zeros(27)
    for _ in range(2000):
        hits[PositivesFirst(limit=5)(matched, torch.zeros_like(matched))] += 1
    assert hits[20:].sum() == 0
    chi_square = ((hits[:20] - 500) ** 2 / 500).sum().item()
    assert chi_square < 43.8, "19 degrees of freedom, p = 0.001"
    nothing = torch.zeros(0, dtype=torch.int64)
    assert PositivesFirst(limit=5)(nothing, nothing).tolist() == []
    assert PositivesFirst(limit=5, scope="image")(nothing, nothing).tolist() == []


def test_sampler_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match="scope: want 'batch' or 'image', got 'level'"):
        PositivesFirst(limit=5, scope="level")
    with pytest.raises(ValueError, match="limit"):
        PositivesFirst(limit=0)


@pytest.mark.parametrize("chunk", [61, 2**23])
def test_iou_equals_the_naive_loop(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(iou_module, "PAIRS", chunk)
    found_low_quality = found_ignored = 0
    for seed in range(600):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 6, (2,), generator=generator).tolist()
        numbers = torch.randint(0, 30, (2,), generator=generator).tolist()
        boxes = [random_boxes(count, generator) for count in counts]
        candidates = [random_boxes(number, generator) for number in numbers]
        if counts[0] and numbers[0] > 3:
            candidates[0][2:4] = boxes[0][0]  # ties at an overlap of 1
        thresholds = [(0.5, 0.4, 0.0), (0.7, 0.3, 0.3), (0.5, 0.5, 0.5)][seed % 3]
        low_quality, ties = bool(seed % 2), bool(seed % 5)
        allowed = torch.rand(sum(numbers), generator=generator) < 0.8
        assigner = IoUAssigner(*thresholds, low_quality, ties)
        found = assigner(candidates, targets_of(boxes), allowed=allowed).split(numbers)
        plain = IoUAssigner(*thresholds, False)(candidates, targets_of(boxes), allowed=allowed).split(numbers)
        masks = allowed.split(numbers)
        for image in range(2):
            naive = reference.assign_iou(
                candidates[image].tolist(), boxes[image].tolist(), thresholds, low_quality, ties, masks[image].tolist()
            )
            start = counts[0] if image else 0
            assert found[image].tolist() == [row + start if row >= 0 else row for row in naive]
            found_low_quality += int((found[image] != plain[image]).sum())
            found_ignored += naive.count(IGNORED)
    assert found_low_quality > 100
    assert found_ignored > 100


def test_iou_with_many_boxes_and_none() -> None:
    generator = torch.Generator().manual_seed(5)
    boxes, candidates = random_boxes(500, generator) * 4, random_boxes(300, generator) * 4
    found = IoUAssigner(0.5, 0.4)([candidates], targets_of([boxes]))
    naive = reference.assign_iou(candidates.tolist(), boxes.tolist(), (0.5, 0.4, 0.0), True, True, [True] * 300)
    assert found.tolist() == naive
    assert IoUAssigner(0.5, 0.4)([candidates], no_targets()).tolist() == [BACKGROUND] * 300
    assert IoUAssigner(0.5, 0.4)([candidates[:0]], targets_of([boxes])).tolist() == []


def test_background_inside_a_crowd_is_ignored() -> None:
    candidates = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [26, 0, 36, 10], [60, 0, 70, 10]])
    targets = replace(
        targets_of([torch.zeros(0, 4), torch.tensor([[0.0, 0, 10, 10]])]),
        crowds=torch.tensor([[15.0, 0, 31, 20], [0.0, 0, 10, 10]]),
        crowd_image=torch.tensor([1, 1]),
    )
    found = IoUAssigner(0.5, 0.5)([candidates, candidates], targets)
    assert found[:4].tolist() == [BACKGROUND] * 4, "the other image has no crowd"
    # The first is an object, though a crowd covers it; the third lies in a crowd by exactly one half.
    assert found[4:].tolist() == [0, IGNORED, IGNORED, BACKGROUND]
    assert IoUAssigner(0.5, 0.5, crowd=0.6)([candidates, candidates], targets)[6] == BACKGROUND
    with pytest.raises(ValueError, match="crowd: want a share"):
        IoUAssigner(0.5, 0.5, crowd=0.0)


def test_negatives_per_positive_are_bounded() -> None:
    matched = torch.tensor([3, 4] + [BACKGROUND] * 50)
    image = torch.zeros(52, dtype=torch.int64)
    assert len(PositivesFirst(40, "image", negatives=0.0)(matched, image)) == 2
    assert len(PositivesFirst(40, "image", negatives=3.0)(matched, image)) == 8
    assert len(PositivesFirst(40, "image")(matched, image)) == 40


@pytest.mark.parametrize("kind", ["center", "iou"])
def test_assignment_runs_as_many_operators_for_150_boxes_as_for_2(kind: str) -> None:
    """Method section 8.22: the reference loops over boxes in Python."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(500, 2, generator=generator) * 40
    found = []
    for number in (2, 150):
        targets = targets_of([random_boxes(number, generator)])
        with Counting() as counting:
            if kind == "center":
                assign_center(points, torch.tensor([[-1.0, 64.0]]).repeat(500, 1), targets, 1)
            else:
                IoUAssigner(0.5, 0.4)([torch.cat([points, points + 9], dim=1)], targets)
        found.append(counting.operators)
    assert found[0] == found[1] < 150
