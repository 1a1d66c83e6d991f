"""Claims about SoCo: what is compared, what learns, what is handed over."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aligndet.engine import distributed
from aligndet.engine.ema import EMA
from aligndet.models import DETECTORS, build_detector
from aligndet.protocol import Detector
from aligndet.soco import SoCo
from aligndet.structures import Batch, Targets
from aligndet.weights import export_pretrained, load_pretrained
from tests.ranks import forked
from tests.scenes import batch_of, boxes_for, views_of

everyone = pytest.mark.parametrize("name", list(DETECTORS))


def small(name: str, classes: int = 1) -> Detector:
    torch.manual_seed(1)
    return build_detector(name, "resnet18", classes, width=0.25, channels=32, norm="affine")


def picked(batch: Batch, rows: list[int]) -> Batch:
    fields = (getattr(batch.targets, name)[torch.tensor(rows)] for name in ("boxes", "labels", "ids", "image"))
    return replace(batch, targets=Targets(*fields))


@everyone
def test_the_loss_is_the_distance_of_the_same_boxes(name: str) -> None:
    """Box by box: rows of the views are in another order, and each lacks one."""
    model = SoCo(small(name), embedding=8, hidden=16).eval()
    with torch.no_grad():  # the target is the momentum branch, which equals the other one at step 0 only
        for value in model.momentum.parameters():
            value.add_(0.01 * torch.randn_like(value))
    branch, projector = model.momentum["online"], model.momentum["projector"]
    view1, view2 = views_of((4, 3))
    first, second = picked(view1, [0, 1, 2, 4, 5, 6]), picked(view2, [6, 1, 0, 3, 5, 2])
    with torch.no_grad():
        loss = model(first, second)["region"]
        distances = []
        for box in (0, 1, 2, 5, 6):  # the rows of views_of that both have
            vectors, keys = [], []
            for view in (view1, view2):
                for body, top, found in ((model.online, model.projector, vectors), (branch, projector, keys)):
                    targets = view.targets
                    features = body.features(view.images, view.sizes)
                    regions = body.region_features(features, targets.boxes, targets.image, view.images.shape[2])
                    found.append(top(regions)[box])
            for a, b in ((vectors[0], keys[1]), (vectors[1], keys[0])):
                distances.append(2 - 2 * F.cosine_similarity(model.predictor(a[None])[0], b, dim=0))
    assert loss.item() == pytest.approx(torch.stack(distances).mean().item(), abs=1e-4)


@everyone
def test_backbone_and_neck_learn_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    model = SoCo(small(name), embedding=8, hidden=16).train()
    before = {key: value.clone() for key, value in model.online.state_dict().items()}
    average = EMA(model.averaged, model.momentum)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.1)
    for _ in range(2):
        model(*views_of((4, 3)))["region"].backward()
        lacking = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
        assert not lacking
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.5)
    moved = {
        key.split(".")[0] for key, value in model.online.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"backbone", "neck"} | ({"head"} if name.endswith("rcnn") else set())
    torch.save(export_pretrained(model), tmp_path / "soco.pt")
    report = load_pretrained(small(name, 5), tmp_path / "soco.pt")
    assert {key.split(".")[0] for key in report.loaded} == moved
    own = model.online.state_dict()
    copies = model.momentum["online"].state_dict()
    assert any(not torch.equal(own[key], copies[key]) for key in report.loaded)


@everyone
def test_views_without_a_common_box_cost_nothing(name: str) -> None:
    model = SoCo(small(name), embedding=8, hidden=16).train()
    view1, view2 = views_of((2, 1))
    for views in (views_of((0, 0)), (picked(view1, [0]), picked(view2, [1, 2]))):
        loss = model(*views)["region"]
        assert loss == 0
        loss.backward()
        assert not [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    loss = model(picked(view1, [0, 2]), picked(view2, [0, 1]))["region"]  # one box has no statistics of its own
    assert 0 < loss < 4
    loss.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def one_rank_without_boxes(rank: int) -> None:
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    world = distributed.start("cpu")
    model = torch.nn.parallel.DistributedDataParallel(SoCo(small("fcos"), embedding=8, hidden=16).train())
    loss = model(*views_of((0, 0) if rank else (3, 2)))["region"]
    loss.backward()
    assert (loss == 0) == bool(rank)
    gradients = [value.grad for value in model.parameters() if value.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient is not None and gradient.any() for gradient in gradients)
    distributed.stop(world)


def test_a_rank_without_boxes_waits_for_nobody(tmp_path: Path) -> None:
    ranks = forked(one_rank_without_boxes, tmp_path)
    assert [code for code, _ in ranks] == [0, 0], ranks


def test_boxes_do_not_collapse_onto_one_vector() -> None:
    """Forty steps: with layer norm in the place of batch norm all predictions point the same way after twenty."""
    model = SoCo(small("fcos"), embedding=32, hidden=256).train()
    average = EMA(model.averaged, model.momentum)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 1e-3)
    generator = torch.Generator().manual_seed(5)
    for step in range(40):
        boxes = [boxes_for(12, 96, generator) for _ in range(4)]
        model(batch_of(boxes, seed=step), batch_of([b + 3 for b in boxes], seed=step))["region"].backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.99)
    view = batch_of(boxes, seed=99)
    with torch.no_grad():
        features = model.online.features(view.images, view.sizes)
        regions = model.online.region_features(features, view.targets.boxes, view.targets.image, 96)
        predicted = F.normalize(model.predictor(model.projector(regions)), dim=1)
    # One minus the mean cosine of all pairs: 0 for one vector. 0.0002 with layer norm.
    assert 1 - predicted.mean(dim=0).square().sum() > 0.1
