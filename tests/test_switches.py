"""What each switch of the method does, as a number; that every one of them runs is tests/test_configs.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from aligndet import config as settings
from aligndet.assigners import PositivesFirst
from aligndet.config import load_config
from aligndet.data.views import ViewPairs
from aligndet.engine import stages
from aligndet.engine.distributed import World
from aligndet.engine.ema import EMA
from aligndet.engine.log import Log
from aligndet.engine.stages import _aligndet
from aligndet.models import build_detector
from aligndet.models.detr import DETR, DETRCandidates
from aligndet.models.fcos import FCOS
from aligndet.models.retinanet import RetinaNet
from aligndet.pretrain import AlignDet, sampler_of
from aligndet.reference import level_by_level
from aligndet.structures import Batch
from tests.data.test_views import painted
from tests.scenes import views_of
from tests.test_mistakes import EVERYTHING, chosen, everyone, pretraining, small


def ids_of(model: AlignDet, online: Batch, momentum: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which boxes the online branch finds in one view and the momentum branch in another; IGNORED left out."""
    assert model.momentum is not None
    found = []
    for branch, view in ((model.online, online), (model.momentum, momentum)):
        features = model.online.features(view.images, view.sizes)
        ids = branch.candidates(features, view.sizes, view.targets).box_ids(view.targets)
        found.append(ids[ids != -2])
    return found[0], found[1]


@everyone
def test_the_contrast_compares_the_boxes_that_were_matched(name: str) -> None:
    """At an endless temperature all similarities are equal, and a pair costs log(1 + its negatives)."""
    model = pretraining(name, candidates=EVERYTHING).eval()
    model.temperature = 1e9
    view1, view2 = views_of((6, 4))
    lacking = chosen(view2, torch.arange(10) != 2)
    for second in (view2, lacking):
        with torch.no_grad():
            queries, keys = ids_of(model, view1, second)
            loss = model(view1, second)["contrast"].item()
        everything, costs = torch.cat([queries, keys]), []
        for box in set(queries.tolist()) & set(keys.tolist()) - {-1}:
            costs.append(math.log(1 + int((everything != box).sum())))
        assert loss == pytest.approx(sum(costs) / len(costs), rel=1e-4)


@everyone
def test_symmetric_losses_are_the_mean_of_both_directions(name: str) -> None:
    model = pretraining(name, candidates=EVERYTHING).eval()
    view1, view2 = views_of((6, 4))
    with torch.no_grad():
        there, back = model(view1, view2), model(view2, view1)
        model.symmetric = True
        both = model(view1, view2)
    for key, value in both.items():
        assert value.item() == pytest.approx((there[key].item() + back[key].item()) / 2, rel=1e-3, abs=1e-5), key


@everyone
def test_an_unfrozen_backbone_learns_and_its_average_follows(name: str) -> None:
    model = AlignDet(small(name), embedding=16, freeze_backbone=False).train()
    assert model.momentum is not None
    average = EMA(model.online, model.momentum)
    before = {key: value.clone() for key, value in model.momentum.backbone.named_parameters()}
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.01)
    torch.stack(list(model(*views_of((5, 3))).values())).sum().backward()
    optimizer.step()
    average.update(0.75)
    moved = 0
    for key, value in model.online.backbone.named_parameters():
        follower = dict(model.momentum.backbone.named_parameters())[key]
        assert torch.allclose(follower, 0.75 * before[key] + 0.25 * value, atol=1e-6), key
        moved += not torch.equal(value, before[key])
    assert moved > 5


def test_the_reference_starts_its_branches_apart(tmp_path: Path) -> None:
    """Neck and heads differ, the backbone is the same (method 8.5)."""
    path = tmp_path / "x.yaml"
    path.write_text(
        "task: pretrain\nrun: r\nmodel: {detector: fcos, backbone: resnet18, width: 0.25, channels: 32}\n"
        "data: {images: i, proposals: p}\noptim: {steps: 1}\n"
    )
    config = load_config(path, ["method.mistakes=[start]"])
    detector = build_detector("fcos", "resnet18", 1, width=0.25, channels=32)
    model = _aligndet(config, detector, ("start",))
    assert model.momentum is not None
    online = dict(model.online.named_parameters())
    apart = [key for key, value in model.momentum.named_parameters() if not torch.equal(value, online[key])]
    assert {"neck", "head", "predictors"} <= {key.partition(".")[0] for key in apart}
    assert any(key.startswith("predictors.embedding") for key in apart)
    same = _aligndet(config, build_detector("fcos", "resnet18", 1, width=0.25, channels=32), ())
    assert same.momentum is not None
    online = dict(same.online.named_parameters())
    assert all(torch.equal(value, online[key]) for key, value in same.momentum.named_parameters())


def test_the_switches_of_a_file_reach_method_and_data(tmp_path: Path) -> None:
    proposals, _ = painted(tmp_path, [(40, 50)])
    path = tmp_path / "x.yaml"
    path.write_text(
        "task: pretrain\nrun: r\nmodel: {detector: fcos, backbone: resnet18, width: 0.25, channels: 32}\n"
        f"data: {{images: {tmp_path}, proposals: {proposals.path}}}\noptim: {{steps: 1}}\n"
    )
    words = ["temperature=0.2", "candidates=77", "scope=image", "background=0.25", "positives=both", "symmetric=true"]
    words += ["reduction=queries", "freeze_backbone=false", "contrast=0.5", "localization=3", "embedding=24"]
    words += ["mistakes=[padding]"]
    given = [*(f"method.{word}" for word in words), "data.proposal_order=first", "data.proposals_per_image=7"]
    world = World(0, 1, torch.device("cpu"))
    for options in (given, ["method.mistakes=[fallback]"]):
        stage = stages.pretraining(load_config(path, options), Log(tmp_path, world), world)
        model, data = stage.model, stage.dataset
        assert isinstance(model, AlignDet) and isinstance(data, ViewPairs)
        found = (model.temperature, model.online.sample, model.positives, model.symmetric, model.reduction)
        own = (model.frozen, model.contrast, model.localization, model.own_keys)
        width = cast(nn.Sequential, model.online.predictors["embedding"])[-1].out_channels
        views = (data.order, data.pad_first, data.proposals_per_image)
        if options is given:
            assert found == (0.2, PositivesFirst(77, "image", 0.25), "both", True, "queries")
            assert (own, width, views) == ((False, 0.5, 3.0, False), 24, ("first", True, 7))
        else:
            assert found == (0.5, model.online.sampling, "keys", False, "boxes")
            assert (own, width, views) == ((True, 1.0, 1.0, True), 256, ("random", False, None))


@everyone
def test_the_preset_is_all_mistakes_of_the_detector_and_none_of_another(name: str, tmp_path: Path) -> None:
    """Method 2.3, 8: RetinaNet and DETR alone have the first boxes, FCOS strides, RetinaNet labels, DETR background."""
    proposals, _ = painted(tmp_path, [(40, 50)])
    path = tmp_path / "x.yaml"
    path.write_text(
        f"task: pretrain\nrun: r\nmodel: {{detector: {name}, backbone: resnet18, width: 0.25, channels: 32}}\n"
        f"data: {{images: {tmp_path}, proposals: {proposals.path}, proposals_per_image: 50}}\noptim: {{steps: 1}}\n"
    )
    world = World(0, 1, torch.device("cpu"))
    for compatible in (False, True):
        options = [f"method.reference_compatible={'true' if compatible else 'false'}"]
        stage = stages.pretraining(load_config(path, options), Log(tmp_path, world), world)
        model, data = stage.model, stage.dataset
        assert isinstance(model, AlignDet) and isinstance(data, ViewPairs) and model.momentum is not None
        assert (model.own_keys, data.pad_first) == (compatible, compatible)
        assert data.order == ("first" if compatible and name in ("retinanet", "detr") else "random")
        for branch in (model.online, model.momentum):
            if isinstance(branch, FCOS):
                assert branch.strides == ((4, 8, 16, 32, 64) if compatible else (8, 16, 32, 64, 128))
            if isinstance(branch, DETR):
                assert branch.background_weights == ((1.0, 0.0) if compatible else (0.1, 0.1))
            if isinstance(branch, RetinaNet):
                assert branch.misplaced is (level_by_level if compatible else None)
        online = model.online.state_dict()
        apart = [key for key, value in model.momentum.named_parameters() if not torch.equal(value, online[key])]
        assert bool(apart) == compatible


def test_queries_of_detr_are_on_boxes_of_their_own_image() -> None:
    """In every decoder layer each box of an image is given to one query of that image."""
    model = pretraining("detr", classes=2, classification=1.0).eval()
    view, _ = views_of((6, 3, 1))
    with torch.no_grad():
        found = model.online.candidates(model.online.features(view.images, view.sizes), view.sizes, view.targets)
    assert isinstance(found, DETRCandidates) and found.embeddings is not None
    ids = found.box_ids(view.targets)
    assert len(ids) == len(found.embeddings) == len(found.image)
    assert torch.equal(ids[ids >= 0] >> 32, found.image[ids >= 0])
    values, counts = ids[ids >= 0].unique(return_counts=True)
    assert values.tolist() == view.targets.ids.tolist() and len(set(counts.tolist())) == 1 and counts[0] > 1


def test_sampling_of_a_detector_changes_where_it_is_told_to() -> None:
    own = PositivesFirst(4096, "image", negatives=0.0)
    assert sampler_of(own, None, None, None) == own
    assert sampler_of(own, 9, "batch", None) == PositivesFirst(9, "batch", negatives=0.0)
    assert sampler_of(own, None, None, 0.25) == PositivesFirst(4096, "image", 0.25), (
        "room for background lifts its bound"
    )
    assert sampler_of(None, None, None, None) is None
    with pytest.raises(ValueError, match="keeps all candidates"):
        sampler_of(None, None, "image", None)


def test_box_losses_of_detr_do_not_depend_on_the_sampling_of_the_contrast() -> None:
    view1, view2 = views_of((6, 4))
    losses = []
    for candidates in (None, 7):
        model = AlignDet(small("detr"), embedding=16, candidates=candidates).eval()
        with torch.no_grad():
            losses.append(model(view1, view2))
    for key in ("box", "overlap"):
        assert losses[0][key].item() == pytest.approx(losses[1][key].item(), rel=1e-5)
    assert losses[0]["contrast"] != losses[1]["contrast"]


@pytest.mark.parametrize(
    ("detector", "override", "message"),
    [
        ("fcos", ["method.mistakes=[labels]"], "method.mistakes: labels is made with retinanet alone"),
        ("retinanet", ["method.mistakes=[strides]"], "method.mistakes: strides is made with fcos alone"),
        ("fcos", ["method.name=soco", "method.symmetric=true"], "method.symmetric: not read by method.name soco"),
        ("fcos", ["method.mistakes=[fallback]", "method.positives=both"], "method.positives"),
        ("fcos", ["method.contrast=0", "method.positives=both"], "no effect while method.contrast is 0"),
        ("fcos", ["method.contrast=0", "method.reduction=sum"], "no effect while method.contrast is 0"),
        ("fcos", ["method.contrast=0", "method.mistakes=[start]"], "no effect while method.contrast is 0"),
        ("fcos", ["optim.backbone_lr=0.1"], "optim.backbone_lr: has no effect"),
        (
            "fcos",
            ["method.mistakes=[first]"],
            "method.mistakes: first is made with retinanet and detr alone, not with fcos",
        ),
        (
            "fcos",
            ["method.mistakes=[background]"],
            "method.mistakes: background is made with detr alone, not with fcos",
        ),
        ("detr", ["method.mistakes=[background]"], "background has no effect while method.classification is 0"),
        ("fcos", ["optim.warmup=0", "optim.warmup_schedule=constant"], "optim.warmup_schedule: has no effect"),
        ("detr", ["method.mistakes=[first]"], "first has no effect without data.proposals_per_image"),
        (
            "fcos",
            ["model.conventions=torchvision", "method.mistakes=[strides]"],
            "strides has no effect with model.conventions torchvision",
        ),
    ],
)
def test_switches_that_would_do_nothing_are_refused(detector: str, override: list[str], message: str) -> None:
    tree = {
        "task": "pretrain",
        "run": "r",
        "model": {"detector": detector},
        "data": {"images": "i", "proposals": "p"},
        "optim": {"steps": 1},
    }
    settings.from_dict(tree)
    for item in override:
        settings._override(tree, item)
    with pytest.raises(ValueError, match=message):
        settings.from_dict(tree)
