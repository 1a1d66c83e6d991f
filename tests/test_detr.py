"""Claims about DETR: its transformer, its assigner, its losses."""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss

from aligndet.assigners import HungarianAssigner
from aligndet.losses import giou_loss
from aligndet.models import build_detector
from aligndet.models.detr import DETR, DETRCandidates
from aligndet.models.transformer import Transformer, inside_cells, sine_positions
from aligndet.ops.boxes import centre_to_corners, corners_to_centre, generalized_iou
from aligndet.pretrain import AlignDet
from aligndet.structures import BACKGROUND, Targets, no_targets
from tests import reference
from tests.scenes import boxes_for, views_of


def small(**options: int) -> DETR:
    detector = build_detector("detr", "resnet18", 3, width=0.25, channels=32, queries=11, feedforward=64, **options)
    assert isinstance(detector, DETR)
    return detector


def random_case(layers: int, counts: list[int], queries: int, seed: int) -> tuple[Tensor, Tensor, Targets, Tensor]:
    """Predicted boxes [L, B, Q, 4], probabilities of 5 outputs, targets of 4 classes, sizes."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(layers, len(counts), queries, 4, generator=generator)
    probabilities = torch.rand(layers, len(counts), queries, 5, generator=generator).softmax(dim=3)
    sizes = torch.randint(64, 200, (len(counts), 2), generator=generator)
    truth = torch.cat([boxes_for(count, 64, generator) for count in counts])
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = torch.randint(0, 4, (len(truth),), generator=generator)
    return boxes, probabilities, Targets(truth, labels, torch.arange(len(truth)), image), sizes


def test_parameter_counts_of_the_paper() -> None:
    frozen = build_detector("detr")
    trained = sum(p.numel() for p in frozen.parameters() if p.requires_grad)
    assert trained == 41_299_541
    assert trained - sum(p.numel() for p in frozen.backbone.parameters() if p.requires_grad) == 18_067_029
    affine = build_detector("detr", norm="affine")
    assert sum(p.numel() for p in affine.parameters()) == 41_575_061


def test_all_decoder_layers_equal_a_naive_transformer_also_with_padding() -> None:
    torch.manual_seed(0)
    head = Transformer(16, 5, layers=(3, 6), heads=4, width=24).eval()
    for parameter in head.parameters():  # biases and norms that start as constants take part, too
        nn.init.normal_(parameter, std=0.3)
    cells = torch.randn(3, 16, 4, 7)
    extents = [(4, 7), (3, 5), (1, 1)]
    rows = torch.tensor([[y < h for y in range(4)] for h, _ in extents])
    columns = torch.tensor([[x < w for x in range(7)] for _, w in extents])
    with torch.no_grad():
        found = head(cells, (rows, columns))
        for image, (height, width) in enumerate(extents):
            expected = reference.detr(head, cells[image], height, width)
            assert found.shape == (6, 3, 5, 16)
            assert (found[:, image] - expected).abs().max() < 1e-4
        cells[1, :, 3:] = 1e3  # what stands in the padding reaches nothing
        cells[1, :, :, 5:] = -1e3
        assert (head(cells, (rows, columns))[:, 1] - found[:, 1]).abs().max() < 1e-5


def test_positions_by_hand() -> None:
    rows, columns = torch.tensor([[True, True, False]]), torch.tensor([[True] * 5])
    places = sine_positions(rows, columns, 8)
    assert places.shape == (1, 15, 8)
    one, fifth = 2 * torch.pi / 2, 2 * torch.pi / 5 * 3  # of cell (0, 2)
    angles = torch.tensor([one, one, one / 100, one / 100, fifth, fifth, fifth / 100, fifth / 100])
    expected = torch.where(torch.arange(8) % 2 == 0, angles.sin(), angles.cos())
    assert (places[0, 2] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("padded", [(96, 89), (100, 131), (64, 64), (1333, 800)])
def test_cells_inside_an_image_are_those_of_the_reduced_mask(padded: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    shares = 0.05 + 0.95 * torch.rand(50, 2, generator=generator)
    sizes = (shares * torch.tensor(padded)).long().clamp(min=1)
    cells = (-(-padded[0] // 32), -(-padded[1] // 32))
    rows, columns = inside_cells(sizes, torch.tensor(padded), cells)
    masks = torch.zeros(50, *padded)
    for mask, (height, width) in zip(masks, sizes.tolist(), strict=True):
        mask[:height, :width] = 1
    reduced = F.interpolate(masks[:, None], size=cells, mode="nearest")[:, 0] > 0
    assert torch.equal(rows[:, :, None] & columns[:, None, :], reduced)


def test_the_padded_size_is_recognised() -> None:
    """An image of 90 x 75 px in a tensor of 93 x 121 px (not multiples of 4): the mask as from the tensor itself."""
    detector = small().eval()
    seen: list[tuple[Tensor, Tensor]] = []
    detector.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    images, sizes = torch.zeros(2, 3, 93, 121, dtype=torch.uint8), torch.tensor([[90, 75], [93, 121]])
    with torch.no_grad():
        detector.candidates(detector.features(images, sizes), sizes)
    rows, columns = inside_cells(sizes, torch.tensor([93, 121]), (3, 4))
    assert torch.equal(seen[0][0], rows) and torch.equal(seen[0][1], columns)


def test_generalized_iou_equals_torchvision_and_the_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (boxes_for(40, 100, generator).double() for _ in range(2))
    found = generalized_iou(a[:, None], b)
    assert (found - generalized_box_iou(a, b)).abs().max() < 1e-9
    assert found[3, 5].item() == pytest.approx(reference.generalized_iou(a[3].tolist(), b[5].tolist()))
    assert (giou_loss(a, b) - generalized_box_iou_loss(a, b)).abs().max() < 1e-6
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert generalized_iou(point, point).item() == 0
    assert (centre_to_corners(corners_to_centre(a)) - a).abs().max() < 1e-9


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [3, 5], [4], [0, 7, 2, 0]])
@pytest.mark.parametrize("scored", [True, False])
def test_pairs_cost_least_in_total_as_by_trying_all(counts: list[int], scored: bool) -> None:
    assigner = HungarianAssigner()
    for seed in range(40 if sum(counts) < 9 else 6):
        boxes, probabilities, targets, sizes = random_case(3, counts, 5, seed)
        matched = assigner(boxes, probabilities if scored else None, targets, sizes)
        assert matched.shape == (3, len(counts), 5)
        for layer in range(3):
            for image, count in enumerate(counts):
                mine = (targets.image == image).nonzero().squeeze(1)
                got = matched[layer, image]
                assert sorted(got[got >= 0].tolist()) == sorted(set(got[got >= 0].tolist()) & set(mine.tolist()))
                assert int((got >= 0).sum()) == min(count, 5)
                if not count:
                    continue
                table = reference.hungarian_costs(
                    boxes[layer, image].tolist(),
                    probabilities[layer, image].tolist() if scored else None,
                    targets.boxes[mine].tolist(),
                    targets.labels[mine].tolist(),
                    (int(sizes[image, 0]), int(sizes[image, 1])),
                )
                total = sum(table[int(row - mine[0])][query] for query, row in enumerate(got.tolist()) if row >= 0)
                assert total == pytest.approx(reference.cheapest(table), abs=1e-4)


def test_a_thousand_random_images_equal_the_solver_on_naive_costs() -> None:
    assigner = HungarianAssigner()
    for seed in range(125):
        counts = [int(number) for number in torch.randint(0, 9, (8,), generator=torch.Generator().manual_seed(seed))]
        boxes, probabilities, targets, sizes = random_case(1, counts, 6, 1000 + seed)
        matched = assigner(boxes, probabilities, targets, sizes)[0]
        for image, count in enumerate(counts):
            mine = (targets.image == image).nonzero().squeeze(1)
            expected = [BACKGROUND] * 6
            if count:
                table = reference.hungarian_costs(
                    boxes[0, image].tolist(),
                    probabilities[0, image].tolist(),
                    targets.boxes[mine].tolist(),
                    targets.labels[mine].tolist(),
                    (int(sizes[image, 0]), int(sizes[image, 1])),
                )
                for row, query in zip(*linear_sum_assignment(table), strict=True):
                    expected[query] = int(mine[row])
            assert matched[image].tolist() == expected


def test_more_boxes_than_queries_ties_and_numbers_that_are_none() -> None:
    assigner = HungarianAssigner()
    boxes, probabilities, targets, sizes = random_case(2, [500, 3], 100, 5)
    matched = assigner(boxes, probabilities, targets, sizes)
    assert bool((matched[:, 0] >= 0).all())
    assert len(matched[0, 0].unique()) == 100
    assert (matched[:, 1] >= 0).sum(dim=1).tolist() == [3, 3]
    same = Targets(targets.boxes[:1].repeat(4, 1), targets.labels[:1].repeat(4), torch.arange(4), torch.zeros(4).long())
    tied = assigner(boxes[:, :1, :1].expand(2, 1, 6, 4), None, same, sizes[:1])
    assert all(sorted(row[row >= 0].tolist()) == [0, 1, 2, 3] for row in tied[:, 0])
    broken = assigner(boxes * torch.nan, probabilities, targets, sizes)
    assert len(broken[0, 0].unique()) == 100
    assert bool((assigner(boxes, None, no_targets(), sizes) == BACKGROUND).all())


@pytest.mark.parametrize("counts", [(4, 0), (5, 13), (0, 0)])
def test_losses_and_gradients_equal_naive_ones(counts: tuple[int, int]) -> None:
    torch.manual_seed(0)
    detector = small()
    batch, _ = views_of(counts)
    found = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes, batch.targets)
    assert found.scores is not None and found.matched is not None
    assert len(found.matched) == 6 * 2 * 11
    scores = found.scores.detach().clone().requires_grad_()
    boxes = found.boxes.detach().clone().requires_grad_()
    candidates = DETRCandidates(scores, None, found.image, found.matched, boxes, batch.sizes)
    losses = detector.localization_loss(candidates, batch.targets)
    losses |= detector.classification_loss(candidates, batch.targets)

    other_scores, other_boxes = (part.detach().clone().requires_grad_() for part in (scores, boxes))
    classes, distance, overlap = [torch.zeros(())], [torch.zeros(())], [torch.zeros(())]
    for layer in range(6):
        cost, weights = torch.zeros(()), 0.0
        for row in range(22 * layer, 22 * layer + 22):
            match = int(found.matched[row])
            label, weight = (3, 0.1) if match < 0 else (int(batch.targets.labels[match]), 1.0)
            cost, weights = cost - weight * other_scores[row].softmax(0)[label].log(), weights + weight
            if match >= 0:
                height, width = batch.sizes[int(found.image[row])].tolist()
                x0, y0, x1, y1 = batch.targets.boxes[match].tolist()
                truth = torch.tensor(
                    [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
                )
                distance.append((other_boxes[row] - truth).abs().sum())
                x, y, w, h = other_boxes[row]
                corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                edges = torch.tensor([x0 / width, y0 / height, x1 / width, y1 / height])
                overlap.append(1 - generalized_box_iou(corners[None], edges[None])[0, 0])
        classes.append(cost / weights)
    number = max(1, sum(counts))
    expected = {
        "classification": torch.stack(classes).sum(),
        "box": 5 * torch.stack(distance).sum() / number,
        "overlap": 2 * torch.stack(overlap).sum() / number,
    }
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4)
    torch.stack(list(losses.values())).sum().backward()
    total = torch.stack(list(expected.values())).sum()
    total.backward()
    assert scores.grad is not None and boxes.grad is not None and other_scores.grad is not None
    assert (scores.grad - other_scores.grad).abs().max() < 1e-5
    expected_grad = torch.zeros_like(boxes) if other_boxes.grad is None else other_boxes.grad
    assert (boxes.grad - expected_grad).abs().max() < 1e-4


def test_pre_training_matches_by_coordinates_in_all_layers() -> None:
    torch.manual_seed(0)
    model = AlignDet(small(), embedding=16).train()
    first, second = views_of((4, 5))
    losses = model(first, second)
    assert set(losses) == {"box", "overlap", "contrast"}
    with torch.no_grad():
        features = model.online.features(first.images, first.sizes)
        candidates = model.online.candidates(features, first.sizes, first.targets)
    assert candidates.scores is None and candidates.matched is not None and candidates.embeddings is not None
    assert len(candidates.matched) == 6 * 2 * 11
    assert int((candidates.matched >= 0).sum()) == 6 * 9


def test_detections_are_the_best_class_of_each_query() -> None:
    detector = small().eval()
    scores = torch.tensor([[0.0, 2, 1, 0], [0, 0, 0, 9], [3, 0, 0, 1]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1], [0.9, 0.5, 0.4, 0.2]])
    sizes = torch.tensor([[50, 100]])
    candidates = DETRCandidates(scores, None, torch.zeros(3, dtype=torch.int64), None, boxes, sizes)
    found = detector.detect(candidates, sizes)[0]
    assert found.labels.tolist()[:2] == [0, 1]
    assert found.boxes[0].tolist() == pytest.approx([70, 20, 100, 30])
    assert found.boxes[1].tolist() == pytest.approx([40, 15, 60, 35])
    assert found.scores.tolist() == pytest.approx(
        [scores[2].softmax(0)[0].item(), scores[0].softmax(0)[1].item(), scores[1].softmax(0)[0].item()]
    )
    detector.score_threshold = 0.5
    assert len(detector.detect(candidates, sizes)[0]) == 2


def test_impossible_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="channels: want a multiple of 4 and of the 8 heads, got 100"):
        build_detector("detr", "resnet18", channels=100)
    with pytest.raises(ValueError, match="queries=0"):
        build_detector("detr", "resnet18", queries=0)


def test_matrices_start_xavier_uniform() -> None:
    head = cast(DETR, build_detector("detr", "resnet18")).head
    bound = (6 / (256 + 2048)) ** 0.5
    weight = head.encoder[0].feed_forward.inner.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert head.queries.weight.std().item() == pytest.approx(1, rel=0.05)
