"""The detector of docs/protocol.md, run exactly as printed there, goes through both stages to COCO metrics."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aligndet.data import load_coco, make_scenes, write_proposals
from aligndet.engine.ema import EMA
from aligndet.finetune import FineTune
from aligndet.predict import predict
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.structures import BACKGROUND
from tests.protocol_page import blocks, executed
from tests.scenes import batch_of, views_of


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    return executed(0)


def test_the_page_is_about_a_hundred_lines_of_detector() -> None:
    first, *others = blocks()
    assert len(others) == 2
    assert 80 < len([line for line in first.splitlines() if line.strip()]) < 130
    assert max(len(line) for block in blocks() for line in block.splitlines()) <= 120


def test_every_block_of_the_page_runs_from_photographs_to_metrics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    train = make_scenes(tmp_path, images=8, size=128, seed=7, objects=(1, 4))
    labels = load_coco(train)
    rows = [labels.boxes[labels.rows_of(image)] for image in range(len(labels))]
    write_proposals(tmp_path / "boxes.npz", labels.file_names, labels.sizes, rows, {})
    paths = {"photos": tmp_path / "images", "boxes": tmp_path / "boxes.npz", "run": tmp_path}
    result = executed(0, 1, 2, **paths, train=train, val=train)
    history = result["history"]
    assert len(history) == 60
    assert set(history[0]) == {"box", "contrast"}
    # The contrast falls slowly above a frozen backbone of random weights.
    for name, share in (("box", 0.7), ("contrast", 1.0)):
        first, last = (np.mean([losses[name] for losses in part]) for part in (history[:5], history[-5:]))
        assert last < share * first, name
    assert set(result["report"].kept) == {"predictors.score.weight", "predictors.score.bias"}
    assert result["metrics"]["AP"] > 0.9, result["metrics"]
    (alone,) = predict(result["detector"], [tmp_path / "images" / labels.file_names[0]], short_side=128, long_side=128)
    assert torch.equal(alone.boxes, result["found"][int(labels.image_ids[0])].boxes)


def test_pre_training_leaves_the_backbone_as_it_was(page: dict[str, Any]) -> None:
    model = AlignDet(page["CentreDetector"](1), embedding=13).train()
    assert model.momentum is not None
    before = copy.deepcopy(model.state_dict())
    average = EMA(model.online, model.momentum)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(3):
        torch.stack(list(model(*views_of((5, 3))).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.9)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith("online.backbone.")}
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize("counts", [(4, 3), (5, 0), (0, 0)])
def test_every_parameter_gets_a_gradient_with_boxes_and_without(page: dict[str, Any], counts: tuple[int, int]) -> None:
    detector: Detector = page["CentreDetector"](3)
    batch, other = views_of(counts)
    for model, views in ((FineTune(detector), (batch,)), (AlignDet(copy.deepcopy(detector)), (batch, other))):
        losses = model.train()(*views)
        assert all(loss.shape == () and bool(loss.isfinite()) for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_cells_belong_to_the_smallest_box_around_them(page: dict[str, Any]) -> None:
    """Stride 16: cells have centres at 8, 24, 40 ...; a box reaches a quarter of its sides from its middle."""
    large, small, tiny = [0.0, 0, 96, 96], [32.0, 32, 64, 64], [70.0, 5, 73, 8]
    batch = batch_of([torch.tensor([large, small]), torch.zeros(0, 4), torch.tensor([tiny])])
    detector: Detector = page["CentreDetector"](3)
    found = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes, batch.targets)
    assert found.matched is not None
    first, second, third = found.matched.view(3, 6, 6)
    # The large box is around its middle 48, 48 +- 24: cells 1 .. 4; the small one +- 8: cells 2 and 3.
    expected = torch.full((6, 6), BACKGROUND)
    expected[1:5, 1:5] = 0
    expected[2:4, 2:4] = 1
    assert torch.equal(first, expected)
    assert bool((second == BACKGROUND).all())
    assert (third >= 0).nonzero().tolist() == [[0, 4]]
    assert third[0, 4].item() == 2


def test_nothing_found_is_an_empty_result_for_each_image(page: dict[str, Any]) -> None:
    detector: Detector = page["CentreDetector"](3)
    detector.score_threshold = 1.0
    batch, _ = views_of((1, 2))
    candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes)
    assert [item.boxes.shape for item in detector.detect(candidates, batch.sizes)] == [(0, 4), (0, 4)]
