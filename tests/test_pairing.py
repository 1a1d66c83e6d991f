"""Boxes and what is learned from them belong together: places, numbers and values, with all detectors.

Method section 8.1 for DETR (for the others: tests/test_mistakes.py), 8.4 box losses from the 257th box on, 8.9 queries
are matched by places for the contrast, 8.10 a view without boxes, 8.14 running statistics, 8.21 matchings of DETR. And
the contrast of a batch against a loop over its definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import aligndet.assigners.hungarian as hungarian
from aligndet.finetune import FineTune
from aligndet.models.detr import DETR, DETRCandidates
from aligndet.ops.boxes import corners_to_centre
from aligndet.protocol import Candidates
from aligndet.structures import Targets
from tests import reference
from tests.scenes import views_of
from tests.test_detectors import with_masks
from tests.test_mistakes import EVERYTHING, chosen, everyone, pretraining, small

LAYERS, QUERIES = 6, 100


class Prepared(nn.Module):
    """A layer that returns what it was given, whatever it reads."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


@pytest.mark.parametrize("classes", [1, 50])
def test_embeddings_of_queries_are_of_their_layer_image_and_box(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that say where they are from; in each layer and image other queries lie exactly on the boxes."""
    detector = pretraining("detr", classes, classification=float(classes > 1)).eval().online
    assert isinstance(detector, DETR)
    view, _ = views_of((6, 4, 1))
    generator = torch.Generator().manual_seed(1)
    targets = replace(view.targets, labels=torch.randint(0, classes, (11,), generator=generator))
    shares = corners_to_centre(targets.boxes) / view.sizes.flip(1).repeat(1, 2)[targets.image]
    outputs, boxes = torch.zeros(LAYERS, 3, QUERIES, 64), torch.full((LAYERS, 3, QUERIES, 4), 0.999)
    outputs[..., 0] = torch.arange(LAYERS).view(-1, 1, 1)
    outputs[..., 1] = torch.arange(3).view(-1, 1)
    outputs[..., 2] = torch.arange(QUERIES)
    expected: dict[tuple[int, ...], int] = {}
    for layer in range(LAYERS):
        for image in range(3):
            rows = (targets.image == image).nonzero().squeeze(1)
            queries = torch.randperm(QUERIES, generator=generator)[: len(rows)]
            boxes[layer, image, queries] = shares[rows]
            pairs = zip(queries.tolist(), targets.ids[rows].tolist(), strict=True)
            expected |= {(layer, image, query): box for query, box in pairs}
    monkeypatch.setattr(detector, "_outputs", lambda features, sizes: outputs)
    detector.predictors["box"], detector.predictors["embedding"] = Prepared(boxes), nn.Identity()
    found = detector.candidates([], view.sizes, targets)
    assert found.embeddings is not None
    said = found.embeddings[:, :3].long()
    ids = found.box_ids(targets)
    assert {tuple(place): box for place, box in zip(said.tolist(), ids.tolist(), strict=True) if box >= 0} == expected
    assert torch.equal(said[:, 1], found.image)


def test_queries_have_the_instance_that_their_place_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer and image costs as little as it can by coordinates; a class, or a row, taken for the box would not."""
    model = pretraining("detr", 50, classification=1.0).eval()
    detector = cast(DETR, model.online)
    outputs = torch.randn(LAYERS, 2, QUERIES, 64, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(detector, "_outputs", lambda features, sizes: outputs)
    with torch.no_grad():
        nn.init.normal_(detector.predictors["score"].weight, std=0.5)  # type: ignore[arg-type]
    view, _ = views_of((6, 5))
    labels = torch.randint(0, 50, (11,), generator=torch.Generator().manual_seed(6))
    targets = replace(view.targets, labels=labels)
    with torch.no_grad():
        found = detector.candidates([], view.sizes, targets)
    assert isinstance(found, DETRCandidates)
    boxes, ids = found.boxes.view(LAYERS, 2, QUERIES, 4), found.box_ids(targets).view(LAYERS, 2, QUERIES)
    for layer, image in ((0, 0), (0, 1), (5, 0), (5, 1)):
        rows = (targets.image == image).nonzero().squeeze(1)
        size = (int(view.sizes[image, 0]), int(view.sizes[image, 1]))
        truth = targets.boxes[rows].tolist()
        costs = np.array(reference.hungarian_costs(boxes[layer, image].tolist(), None, truth, [0] * len(rows), size))
        query_of = {box: query for query, box in enumerate(ids[layer, image].tolist()) if box >= 0}
        assert sorted(query_of) == targets.ids[rows].tolist()
        taken = sum(costs[k, query_of[box]] for k, box in enumerate(targets.ids[rows].tolist()))
        assert taken == pytest.approx(costs[linear_sum_assignment(costs)].sum(), rel=1e-4)


@everyone
def test_boxes_beyond_the_256th_have_box_losses(name: str) -> None:
    """With 300 boxes in an image each matched candidate's box has a gradient, those of late boxes too."""
    detector = pretraining(name, candidates=EVERYTHING).train().online
    view, _ = views_of((300, 7), size=192)
    with torch.no_grad():
        found = detector.candidates(detector.features(view.images, view.sizes), view.sizes, view.targets)
    field = "boxes" if name in ("fcos", "detr") else "deltas"
    leaf = getattr(found, field).detach().clone().requires_grad_()
    learned: Candidates = replace(found, **{field: leaf})  # type: ignore[type-var]
    torch.stack(list(detector.localization_loss(learned, view.targets).values())).sum().backward()
    assert found.matched is not None and leaf.grad is not None
    late = found.matched >= 256
    assert int(late.sum()) >= 5
    assert (leaf.grad.flatten(1).abs().sum(dim=1)[late] > 0).all()


@everyone
def test_the_contrast_of_a_batch_is_that_of_its_definition(name: str) -> None:
    """Four images, one without boxes; one box is in the first view only."""
    model = pretraining(name, candidates=40 if name == "retinanet" else 12, scope="image").eval()
    assert model.momentum is not None
    view1, view2 = views_of((4, 3, 0, 2))
    view2 = chosen(view2, torch.arange(9) != 1)
    found: list[Candidates] = []
    for branch in (model.online, model.momentum):
        branch.candidates = recorded(branch.candidates, found)  # type: ignore[method-assign]
    with torch.no_grad():
        losses = model(view1, view2)
    online, momentum = found
    ids = [of_boxes(candidates, view.targets) for candidates, view in ((online, view1), (momentum, view2))]
    common = {box for box in ids[0] if box >= 0} & {box for box in ids[1] if box >= 0}
    assert len(common) >= 3 and int(view1.targets.ids[1]) in ids[0]
    assert online.embeddings is not None and momentum.embeddings is not None
    expected = reference.box_contrastive_loss(online.embeddings, ids[0], momentum.embeddings, ids[1], 0.5)
    assert losses["contrast"].item() == pytest.approx(expected.item(), rel=1e-4)


def recorded(call: Callable[..., Candidates], found: list[Candidates]) -> Callable[..., Candidates]:
    def candidates(*args: Any) -> Candidates:
        found.append(call(*args))
        return found[-1]

    return candidates


def of_boxes(candidates: Candidates, targets: Targets) -> list[int]:
    """The id of the box that each row was matched to, or what it is instead, below 0."""
    rows = candidates.nearest if isinstance(candidates, DETRCandidates) else candidates.matched
    assert rows is not None
    return [int(targets.ids[row]) if row >= 0 else row for row in rows.tolist()]


@everyone
@pytest.mark.parametrize("lost", [0, 1])
def test_a_view_that_lost_all_boxes_costs_no_contrast(name: str, lost: int) -> None:
    model = pretraining(name).train()
    views = list(views_of((4, 3)))
    views[lost] = chosen(views[lost], torch.zeros(7, dtype=torch.bool))
    losses = model(*views)
    assert losses["contrast"] == 0 and all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert not [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]


@pytest.mark.parametrize(("classes", "matchings"), [(1, 24), (50, 36)])
def test_detr_matches_no_more_often_than_it_has_to(
    classes: int, matchings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 layers x 2 images x 2 views by places; the online branch once more by classes, the momentum branch never."""
    model = pretraining("detr", classes, classification=float(classes > 1)).eval()
    calls = 0
    solve = hungarian.linear_sum_assignment

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return solve(*args, **options)

    monkeypatch.setattr(hungarian, "linear_sum_assignment", counted)
    model(*views_of((4, 3)))
    assert calls == matchings


@everyone
def test_fine_tuning_moves_the_statistics_of_trained_stages_alone(name: str) -> None:
    model = FineTune(small(name, 3, norm="batch", frozen_stages=1)).train()
    state = model.detector.backbone.state_dict()
    before = {key: value.clone() for key, value in state.items() if key.endswith("running_mean")}
    view, _ = views_of((4, 3))
    targets = replace(view.targets, labels=view.targets.ids % 3)
    batch = replace(view, targets=targets)
    model(with_masks(batch) if name == "mask_rcnn" else batch)
    moved = {key.partition(".")[0] for key, value in before.items() if not torch.equal(value, state[key])}
    assert moved == {"layer2", "layer3", "layer4"}
    assert {key.partition(".")[0] for key in before} == moved | {"bn1", "layer1"}
