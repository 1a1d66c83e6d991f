"""Mistakes of the reference (method section 8) that a test would catch, here or in the file named.

Here: 8.1 labels and features (DETR: tests/test_pairing.py), 8.2 strides, 8.3 pad before flip (and
tests/data/test_views.py), 8.4 class 256 as background (box losses: tests/test_pairing.py), 8.5 momentum apart, 8.6 a
regressor per proposal, 8.7 keys with gradient, 8.8 drop-path in a frozen backbone, 8.9 DETR's matching (and
tests/test_pairing.py; its losses: tests/test_detr.py), 8.10 nothing to match, and boxes in one view only (and
tests/test_contract.py, tests/test_pairing.py), 8.11 counts over ranks and crowded images (FCOS samples per batch all
the same, as the reference: docs/decisions.md), 8.13 hand-over (and tests/test_weights.py), 8.19 dense projection, 8.20
two backbones, 8.21 losses of the momentum branch, 8.23 tensors stored twice. 8.12 ignored arguments, 8.17 memory and
8.18 loop over boxes of the contrast: tests/test_losses.py. 8.14: tests/test_pairing.py, tests/test_ranks.py. 8.15:
tests/data/test_split.py. 8.16: tests/data/test_grouping.py, tests/data/test_selective_search.py. 8.20 memory of the
average: tests/engine/test_ema.py. 8.22 loop over boxes of the assigners: tests/test_assigners.py. What costs time alone
has benchmarks: 8.18 benchmarks/contrastive.py, 8.22 benchmarks/step.py, 8.24 benchmarks/proposals.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from aligndet.assigners import PositivesFirst
from aligndet.data.views import ViewPairs
from aligndet.engine.ema import EMA
from aligndet.models import DETECTORS, build_detector
from aligndet.models.detr import DETR, DETRCandidates
from aligndet.models.fcos import FCOS, FCOSCandidates
from aligndet.models.retinanet import RetinaNet, RetinaNetCandidates
from aligndet.models.two_stage import RegionCandidates, TwoStage
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.reference import level_by_level, with_mistakes
from aligndet.structures import BACKGROUND, Batch, Targets
from aligndet.weights import export_pretrained, load_pretrained
from tests.data.test_views import measured, painted
from tests.ranks import on_two_ranks
from tests.scenes import boxes_for, views_of

everyone = pytest.mark.parametrize("name", list(DETECTORS))
EVERYTHING = 10**6


def small(name: str, classes: int = 1, backbone: str = "resnet18", **options: object) -> Detector:
    torch.manual_seed(1)
    own: dict[str, object] = {"dropout": 0.0} if name == "detr" else {}
    if name.endswith("rcnn"):
        own = {"class_agnostic": True, "box_head": "2fc", "head_width": 64}
    return build_detector(name, backbone, classes, width=0.25, channels=64, **(own | options))  # type: ignore[arg-type]


def pretraining(name: str, classes: int = 1, **options: object) -> AlignDet:
    model = AlignDet(small(name, classes), embedding=16, **options)  # type: ignore[arg-type]
    if isinstance(model.online, TwoStage):  # scores of an untrained RPN are so close that rounding decides their order
        for branch in filter(None, (model.online, model.momentum)):
            generator = torch.Generator().manual_seed(3)
            nn.init.normal_(cast(TwoStage, branch).rpn.score.weight, std=0.5, generator=generator)
    return model


def chosen(batch: Batch, keep: Tensor) -> Batch:
    """The batch with only the boxes ``keep`` (rows or bool)."""
    fields = (getattr(batch.targets, name)[keep] for name in ("boxes", "labels", "ids", "image"))
    return replace(batch, targets=Targets(*fields))


# 8.1, 8.2: features that say where they are from


def located(shapes: list[tuple[int, int]], images: int) -> list[Tensor]:
    """Maps whose channels hold 1 + image, 1 + level, row and column."""
    levels = []
    for level, (height, width) in enumerate(shapes):
        features = torch.zeros(images, 64, height, width)
        features[:, 0] = 1 + torch.arange(images).view(-1, 1, 1)
        features[:, 1] = 1 + level
        features[:, 2] = torch.arange(height).view(-1, 1)
        features[:, 3] = torch.arange(width)
        levels.append(features)
    return levels


class Given(nn.Module):
    """A neck that returns prepared maps."""

    def __init__(self, levels: list[Tensor]) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return self.levels


SHAPES = [(12, 13), (6, 7), (3, 4), (2, 2), (1, 1)]  # of strides 8 .. 128 for 96 x 104 px


def located_candidates(name: str, images: int) -> tuple[FCOSCandidates | RetinaNetCandidates, Targets]:
    """All matched candidates of a detector whose embeddings are the features it reads, unchanged; and the boxes."""
    detector = small(name)
    assert isinstance(detector, (FCOS, RetinaNet))
    detector.neck = Given(located(SHAPES, images))  # type: ignore[assignment]
    detector.head.classification = nn.Sequential()
    projection = cast(nn.Sequential, detector.score_layer(8, hidden=True))
    first, last = cast(nn.Conv2d, projection[0]), cast(nn.Conv2d, projection[2])
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:, :, first.weight.shape[2] // 2, first.weight.shape[3] // 2] = torch.eye(64)
        last.weight.zero_()
        anchors = last.out_channels // 8
        for anchor in range(anchors):  # anchor a adds its number in channel 4
            last.weight[8 * anchor : 8 * anchor + 4, :4, 0, 0] = torch.eye(4)
            last.bias[8 * anchor + 4] = anchor  # type: ignore[index]
    detector.predictors["embedding"] = projection
    detector.sample = PositivesFirst(EVERYTHING)
    generator = torch.Generator().manual_seed(4)
    boxes = torch.cat([boxes_for(5, 96, generator) for _ in range(images)])
    image = torch.arange(images).repeat_interleave(5)
    targets = Targets(boxes, torch.zeros_like(image), torch.arange(len(boxes)), image)
    features = [torch.zeros(images, 8, 24, 26)] * 4
    found = detector.candidates(features, torch.tensor([[96, 104]] * images), targets)
    assert isinstance(found, (FCOSCandidates, RetinaNetCandidates))
    return found, targets


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
@pytest.mark.parametrize("images", [1, 2, 4])
def test_embeddings_and_labels_are_of_the_same_place(name: str, images: int) -> None:
    found, targets = located_candidates(name, images)
    assert found.embeddings is not None and found.matched is not None
    said = found.embeddings.round().long()
    assert torch.equal(said[:, 0] - 1, found.image)
    strides = torch.tensor([8, 16, 32, 64, 128])[said[:, 1] - 1]
    if isinstance(found, FCOSCandidates):
        x, y = (said[:, 3] + 0.5) * strides, (said[:, 2] + 0.5) * strides
        assert torch.equal(found.points, torch.stack([x, y], dim=1).float())
    else:
        centres = (found.anchors[:, :2] + found.anchors[:, 2:]) / 2
        assert torch.allclose(centres, torch.stack([said[:, 3] * strides, said[:, 2] * strides], dim=1).float())
        ratio = (found.anchors[:, 3] - found.anchors[:, 1]) / (found.anchors[:, 2] - found.anchors[:, 0])
        assert torch.allclose(ratio, torch.tensor([0.5, 1.0, 2.0])[said[:, 4] // 3], rtol=1e-3)
        area = (found.anchors[:, 2:] - found.anchors[:, :2]).prod(dim=1)
        octave = 4 * strides * 2 ** (said[:, 4] % 3 / 3)
        assert torch.allclose(area.sqrt(), octave, rtol=1e-2)
    positive = found.matched >= 0
    assert int(positive.sum()) > 3 * images
    rows = found.matched[positive]
    assert torch.equal(targets.image[rows], found.image[positive])
    if isinstance(found, FCOSCandidates):
        inside = torch.cat(
            [found.points[positive] - targets.boxes[rows, :2], targets.boxes[rows, 2:] - found.points[positive]], 1
        )
        assert (inside > 0).all()
    else:
        overlaps = box_iou(found.anchors[positive], targets.boxes[rows]).diagonal()
        every = box_iou(found.anchors, targets.boxes[rows]).where(found.image[:, None] == found.image[positive], -1)
        assert ((overlaps >= 0.5) | torch.isclose(overlaps, every.amax(dim=0))).all()


class Mean(nn.Module):
    """A box head that returns the mean of each pooled channel."""

    width = 64

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled.mean(dim=(2, 3))


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_embeddings_and_labels_of_regions_are_of_the_same_place(name: str) -> None:
    """Boxes of three sizes in each of two images, so that regions come from three levels, not in their order."""
    detector = small(name)
    assert isinstance(detector, TwoStage)
    detector.needs_masks = False
    detector.neck = Given(located([(80, 80), (40, 40), (20, 20), (10, 10), (5, 5)], 2))  # type: ignore[assignment]
    detector.head = Mean()  # type: ignore[assignment]
    detector.predictors["embedding"] = nn.Identity()
    detector.sample = PositivesFirst(EVERYTHING)
    sides = torch.tensor([250.0, 30, 130, 40, 240, 120])
    corner = torch.tensor([[30.0, 40], [200, 60], [100, 150], [60, 70], [50, 20], [150, 160]])
    image = torch.tensor([0, 0, 0, 1, 1, 1])
    targets = Targets(torch.cat([corner, corner + sides[:, None]], dim=1), image * 0, torch.arange(6), image)
    found = detector.candidates([torch.zeros(2, 8, 80, 80)] * 4, torch.tensor([[320, 320]] * 2), targets)
    assert isinstance(found, RegionCandidates) and found.embeddings is not None and found.matched is not None
    assert torch.allclose(found.embeddings[:, 0] - 1, found.image.float(), atol=1e-4)
    width, height = (found.boxes[:, 2:] - found.boxes[:, :2]).T
    level = (4 + (width * height).sqrt().div(224).log2()).floor().clamp(2, 5) - 2  # of P2 .. P5
    assert torch.allclose(found.embeddings[:, 1] - 1, level, atol=1e-4)
    inside = ((found.boxes > 40) & (found.boxes < 280)).all(dim=1) & (width > 20) & (height > 20)
    centre = (found.boxes[:, 0] + found.boxes[:, 2]) / 2
    read = (found.embeddings[:, 3] + 0.5) * 4 * 2**level  # px, of the mean over the region
    assert int(inside.sum()) >= 3 and (read - centre)[inside].abs().max() < 1
    positive = found.matched >= 0
    match = found.matched[positive]
    assert torch.equal(targets.image[match], found.image[positive])
    assert set(match.tolist()) == set(range(6)) and len(set(level[positive].tolist())) == 3
    overlaps = box_iou(found.boxes[positive], targets.boxes)
    assert overlaps.gather(1, match[:, None]).min() >= 0.5


def test_the_reference_pairs_labels_with_the_wrong_anchors() -> None:
    """At one image nothing is wrong; at two only the finest level of the first image is in its place (method 8.1)."""
    counts = (100 * 152 * 9, 50 * 76 * 9, 25 * 38 * 9, 13 * 19 * 9, 7 * 10 * 9)
    rows = torch.arange(sum(counts))
    assert torch.equal(level_by_level(rows, counts, 1), rows)
    rows = torch.arange(2 * sum(counts))
    moved = level_by_level(rows, counts, 2)
    assert torch.equal(moved.sort().values, rows)
    # The finest level of the first image and the coarsest of the last stand where they should.
    assert torch.equal((moved == rows).nonzero().squeeze(1), torch.cat([rows[: counts[0]], rows[-counts[-1] :]]))
    naive = [(image, level, i) for level, number in enumerate(counts[2:]) for image in range(2) for i in range(number)]
    starts = [sum(counts[2 : 2 + level]) for level in range(3)]
    expected = [image * sum(counts[2:]) + starts[level] + i for image, level, i in naive]
    assert level_by_level(torch.arange(2 * sum(counts[2:])), counts[2:], 2).tolist() == expected

    detector = small("retinanet")
    with_mistakes(detector, ("labels",))
    assert cast(RetinaNet, detector).misplaced is level_by_level
    with_mistakes(other := small("retinanet"), ("strides", "padding"))
    assert cast(RetinaNet, other).misplaced is None


def test_a_retinanet_with_the_mistake_embeds_other_anchors_than_it_matched() -> None:
    """Each row has the embedding that stands at its place of a list by levels; the labels stay."""
    detector = cast(RetinaNet, pretraining("retinanet", candidates=EVERYTHING).eval().online)
    view, _ = views_of((5, 3))

    def found() -> RetinaNetCandidates:
        with torch.no_grad():
            candidates = detector.candidates(detector.features(view.images, view.sizes), view.sizes, view.targets)
        assert isinstance(candidates, RetinaNetCandidates) and candidates.embeddings is not None
        return candidates

    detector.sample = every = Everything()
    right = found()
    with_mistakes(detector, ("labels",))
    wrong = found()
    assert torch.equal(right.matched, wrong.matched) and torch.equal(right.anchors, wrong.anchors)  # type: ignore[arg-type]
    places = level_by_level(torch.arange(every.number), right.counts, 2)
    assert right.embeddings is not None and wrong.embeddings is not None
    assert torch.allclose(wrong.embeddings, right.embeddings[places], atol=1e-5)
    same = (places == torch.arange(every.number)).float().mean()
    assert same < 0.5, "most anchors of two images are misplaced"


class Everything:
    """A sampler that keeps all candidates, in their order."""

    number = 0

    def __call__(self, matched: Tensor, image: Tensor) -> Tensor:
        self.number = len(matched)
        return torch.arange(len(matched))


def test_points_cover_the_whole_image_unless_the_mistake_is_asked_for() -> None:
    detector = small("fcos")
    generator = torch.Generator().manual_seed(5)
    boxes = boxes_for(40, 256, generator)
    rows = torch.arange(40)
    targets = Targets(boxes, 0 * rows, rows, 0 * rows)
    features = [
        torch.randn(1, channels, 256 // s, 256 // s)
        for channels, s in zip((16, 32, 64, 128), (4, 8, 16, 32), strict=True)
    ]

    def boxes_with_a_point() -> set[int]:
        with torch.no_grad():
            matched = detector.candidates(features, torch.tensor([[256, 256]]), targets).matched
        assert matched is not None
        return set(matched[matched >= 0].tolist())

    assert len(boxes_with_a_point()) >= 39
    with_mistakes(detector, ("strides",))
    found = boxes_with_a_point()
    assert 0 < len(found) < 20
    assert (boxes[list(found)][:, :2] < 128).all(), "only boxes of the upper left quarter have points"


# 8.3


def test_padding_before_the_flip_moves_boxes_by_the_padding(tmp_path: Path) -> None:
    proposals, _ = painted(tmp_path, [(480, 640)])
    pairs = ViewPairs(tmp_path, proposals, short_sides=(672,), long_side=1333, colour=False, pad_first=True)
    errors = []
    for position in range(20):
        for view in pairs[(0, position)]:
            assert view.image.shape[1:] == (672, 896)  # 672 x 896: no padding here
            errors.append(float((measured(view.image) - view.boxes[0]).abs().max()))
    assert max(errors) < 1
    pairs = ViewPairs(tmp_path, proposals, short_sides=(640,), long_side=1333, colour=False, pad_first=True)
    shifts = [float(measured(view.image)[0] - view.boxes[0][0]) for p in range(20) for view in pairs[(0, p)]]
    assert {round(shift) for shift in shifts} == {0, 11}, "640 x 853 px, padded to 864"


# 8.4


@everyone
def test_boxes_beyond_the_256th_are_boxes(name: str) -> None:
    model = pretraining(name, candidates=EVERYTHING).train()
    views = views_of((300, 7), size=192)
    view = views[0]
    with torch.no_grad():
        found = model.online.candidates(model.online.features(view.images, view.sizes), view.sizes, view.targets)
    ids = found.box_ids(view.targets)
    matched = set(ids[ids >= 0].tolist())
    if name == "detr":  # 100 queries: no more than 100 of the 300 boxes, in any of six layers
        assert len({box for box in matched if box < 300}) >= 100
        assert len({box for box in matched if 256 <= box < 300}) >= 5
    else:
        assert len({box for box in matched if 256 <= box < 300}) >= 15
    assert all(box in matched for box in view.targets.ids[300:].tolist()) or name == "fcos"
    losses = model(*views)
    assert losses["contrast"].isfinite() and losses["contrast"] > 0


# 8.5, 8.20


@everyone
def test_branches_agree_at_step_0_and_share_one_backbone(name: str) -> None:
    model = pretraining(name).eval()
    assert model.momentum is not None
    assert list(model.momentum.backbone.parameters()) == []
    state = [value.data_ptr() for value in model.state_dict().values() if value.numel()]
    tied_twice = sum(len(part.state_dict()) for part in model.online.tied_parts())
    assert len(state) - len(set(state)) == tied_twice, "a checkpoint has every tensor once, but for shared queries"
    online = dict(model.online.named_parameters())
    tied = {id(value) for part in model.online.tied_parts() for value in part.parameters()}
    for key, value in model.momentum.named_parameters():
        assert torch.equal(value, online[key]), key
        assert (value is online[key]) == (id(value) in tied), key
    assert (name == "detr") == bool(tied)
    view, _ = views_of((4, 3))
    sampler = PositivesFirst(EVERYTHING)
    outputs = []
    for branch in (model.online, model.momentum):
        branch.sample = sampler
        with torch.no_grad():
            features = model.online.features(view.images, view.sizes)
            outputs.append(branch.candidates(features, view.sizes, view.targets))
    assert outputs[0].embeddings is not None and outputs[1].embeddings is not None
    assert torch.allclose(outputs[0].embeddings, outputs[1].embeddings, atol=1e-5)
    assert torch.equal(outputs[0].box_ids(view.targets), outputs[1].box_ids(view.targets))


@everyone
def test_each_step_passes_the_backbone_once(name: str) -> None:
    model = pretraining(name)
    sizes = []
    model.online.backbone.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    model(*views_of((3, 2)))
    assert sizes == [4], "two views of two images, as one batch"


@everyone
def test_averages_follow_what_is_trained_and_nothing_else(name: str) -> None:
    model = pretraining(name).train()
    assert model.momentum is not None
    before = {key: value.clone() for key, value in model.momentum.named_parameters()}
    frozen = copy.deepcopy(model.online.backbone.state_dict())
    average = EMA(model.online, model.momentum, apart=("predictors.score.",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    torch.stack(list(model(*views_of((5, 3))).values())).sum().backward()
    optimizer.step()
    average.update(0.75)
    online, moved = dict(model.online.named_parameters()), 0
    tied = {id(value) for part in model.online.tied_parts() for value in part.parameters()}
    for key, value in model.momentum.named_parameters():
        expected = online[key] if id(value) in tied else 0.75 * before[key] + 0.25 * online[key]
        assert torch.allclose(value, expected, atol=1e-6), key
        moved += not torch.equal(value, before[key])
    assert moved > 5
    assert all(torch.equal(value, frozen[key]) for key, value in model.online.backbone.state_dict().items())


# Section 7, row 9


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"])
def test_norms_of_the_neck_keep_the_statistics_of_their_own_branch(name: str) -> None:
    """Section 7, row 9: weights of the norms follow, statistics are of the view that a branch sees."""
    torch.manual_seed(0)
    model = AlignDet(small(name, neck_norm="batch"), embedding=16).train()
    assert model.momentum is not None
    neck, follower = (dict(branch.neck.named_buffers()) for branch in (model.online, model.momentum))
    before = {key: value.clone() for key, value in neck.items()}
    assert any(key.endswith("running_mean") for key in before), "there are norms"
    view1, view2 = views_of((6, 4))
    losses = model(view1, view2)
    torch.stack(list(losses.values())).sum().backward()
    weight, average = (
        dict(branch.neck.named_parameters())["lateral.0.1.weight"] for branch in (model.online, model.momentum)
    )
    with torch.no_grad():
        weight += 1
    EMA(model.online, model.momentum, apart=("predictors.score.",)).update(0.75)
    assert torch.allclose(average, torch.full_like(average, 1.25)), "it began at 1"
    for key, value in before.items():
        if key.endswith("running_mean"):
            assert not torch.equal(neck[key], value) and not torch.equal(follower[key], value), key
            assert not torch.equal(neck[key], follower[key]), key
    finest = {
        key: value.grad
        for key, value in model.online.neck.named_parameters()
        if key.startswith(("lateral.0.", "output.0."))
    }
    assert len(finest) == 6 and all(grad is not None and bool(grad.abs().sum() > 0) for grad in finest.values())
    assert all(value.grad is None for value in model.momentum.neck.parameters())


# 8.6, 8.13: nothing depends on the number of a box; what is learned is handed over


@everyone
def test_losses_do_not_depend_on_the_order_of_boxes(name: str) -> None:
    model = pretraining(name, candidates=EVERYTHING).eval()
    view1, view2 = views_of((6, 4))
    order = torch.tensor([4, 2, 0, 5, 1, 3, 9, 7, 6, 8])
    with torch.no_grad():
        plain, mixed = model(view1, view2), model(chosen(view1, order), chosen(view2, order))
    assert set(plain) == set(mixed)
    for key, loss in plain.items():
        # An anchor that two boxes claim goes to the later one; queries of an untrained DETR are so alike that rounding
        # decides which of two gets a box.
        close = 1e-2 if name in ("retinanet", "detr") and key == "contrast" else 1e-4
        assert mixed[key].item() == pytest.approx(loss.item(), rel=close), key
    outputs = {"fcos": 4, "retinanet": 36, "faster_rcnn": 4, "mask_rcnn": 4, "detr": 4}[name]
    last = [m for m in model.online.predictors["box"].modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
    assert last.weight.shape[0] == outputs, "one box for any class"


@everyone
@pytest.mark.parametrize("classes", [1, 7])
def test_everything_learned_reaches_a_detector_with_classes(name: str, classes: int, tmp_path: Path) -> None:
    model = pretraining(name, classes, classification=float(classes > 1))
    with torch.no_grad():
        for value in model.online.parameters():
            value.add_(torch.randn_like(value) * 0.01)
    content = export_pretrained(model)
    assert not [
        key for key in content["detector"] if key.startswith(("predictors.embedding", "predictors.score", "mask"))
    ]
    torch.save(content, tmp_path / "p.pt")
    options = {"class_agnostic": False} if name.endswith("rcnn") else {}
    detector = small(name, 3, **options)
    report = load_pretrained(detector, tmp_path / "p.pt")
    assert not report.mismatched and not report.unused
    own, online = detector.state_dict(), model.online.state_dict()
    kept = {key.split(".")[0] + "." + key.split(".")[1] for key in report.kept}
    masks = {"mask_head.convolutions", "mask_head.upsample", "predictors.mask"} if name == "mask_rcnn" else set()
    assert kept == {"predictors.score"} | masks
    for key in report.loaded:
        if key in report.tiled:
            assert torch.equal(own[key], torch.cat([online[key]] * 3))
        else:
            assert torch.equal(own[key], online[key]), key
    assert bool(report.tiled) == name.endswith("rcnn")


@everyone
def test_parts_that_are_handed_over_can_be_chosen(name: str, tmp_path: Path) -> None:
    """Table 9 of the paper."""
    torch.save(export_pretrained(pretraining(name)), tmp_path / "p.pt")
    for modules in (("backbone",), ("backbone", "neck"), ("backbone", "neck", "head")):
        report = load_pretrained(small(name, 3), tmp_path / "p.pt", modules)
        tops = {key.split(".")[0] for key in report.loaded}
        assert tops - {"predictors"} == set(modules)
        assert ("predictors" in tops) == ("head" in modules)
    detector = small(name, 3)
    report = load_pretrained(detector, tmp_path / "p.pt", ("rpn",)) if name.endswith("rcnn") else None
    if report is not None:
        assert {key.split(".")[0] for key in report.loaded} == {"rpn"}
    else:
        with pytest.raises(ValueError, match=r"p\.pt: holds nothing of rpn"):
            load_pretrained(detector, tmp_path / "p.pt", ("rpn",))


# 8.7, 8.8, 8.21


@everyone
def test_no_gradient_reaches_keys_negatives_or_the_frozen_backbone(name: str) -> None:
    model = pretraining(name).train()
    assert model.momentum is not None
    tied = {id(value) for part in model.online.tied_parts() for value in part.parameters()}
    torch.stack(list(model(*views_of((5, 3))).values())).sum().backward()
    assert all(value.grad is None for value in model.momentum.parameters() if id(value) not in tied)
    assert all(value.grad is None for value in model.online.backbone.parameters())


def test_a_frozen_swin_drops_no_path_and_moves_no_statistic() -> None:
    model = AlignDet(build_detector("fcos", "swin_t", 1, width=0.25, channels=32), embedding=8).train()
    view, other = views_of((2, 1))
    with torch.no_grad():
        first, again = (model.online.features(view.images, view.sizes) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "drop-path is off"
    before = copy.deepcopy(model.online.backbone.state_dict())
    model(view, other)
    assert all(torch.equal(value, before[key]) for key, value in model.online.backbone.state_dict().items())


@everyone
def test_the_momentum_branch_computes_no_box_losses(name: str) -> None:
    model = pretraining(name).eval()
    assert model.momentum is not None and model.momentum.localizes is False
    view, _ = views_of((4, 2))
    with torch.no_grad():
        features = model.online.features(view.images, view.sizes)
        found = model.momentum.candidates(features, view.sizes, view.targets)
    assert found.scores is None
    if isinstance(found, RegionCandidates):
        assert found.objectness is None and found.deltas is None
    elif isinstance(found, RetinaNetCandidates):
        assert found.deltas is None
    elif isinstance(found, FCOSCandidates):
        assert found.boxes is None and found.centerness is None


# 8.9


@pytest.mark.parametrize("counts", [(5, 3), (4, 0), (0, 0)])
def test_detr_weighs_queries_without_boxes_as_the_reference_only_if_asked(counts: tuple[int, int]) -> None:
    """8.9: full weight, and divided by the queries with a box of a layer, at least 1; else 0.1 in both places."""
    model = pretraining("detr", classes=4, classification=1.0).eval()
    detector = cast(DETR, model.online)
    view, _ = views_of(counts)
    with torch.no_grad():
        found = detector.candidates(detector.features(view.images, view.sizes), view.sizes, view.targets)
    assert found.scores is not None and found.matched is not None
    layers = 6
    each = len(found.matched) // layers
    expected = {"ours": 0.0, "theirs": 0.0}
    for layer in range(layers):
        empty, full = 0.0, 0.0
        rows = range(layer * each, (layer + 1) * each)
        for row in rows:
            match = int(found.matched[row])
            label = 4 if match < 0 else int(view.targets.labels[match])
            cost = -found.scores[row].double().log_softmax(0)[label].item()
            empty, full = (empty + cost, full) if match < 0 else (empty, full + cost)
        number = sum(int(found.matched[row]) >= 0 for row in rows)
        assert number == sum(counts)
        expected["ours"] += (0.1 * empty + full) / (0.1 * (each - number) + number)
        expected["theirs"] += (empty + full) / max(number, 1)
    with torch.no_grad():
        assert detector.classification_loss(found, view.targets)["classification"].item() == pytest.approx(
            expected["ours"], rel=1e-5
        )
        with_mistakes(detector, ("background",))
        assert detector.classification_loss(found, view.targets)["classification"].item() == pytest.approx(
            expected["theirs"], rel=1e-5
        )
    assert expected["theirs"] > 3 * expected["ours"]


def test_detr_knows_a_box_by_its_place_whatever_the_pseudo_classes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pretraining("detr", 50, classification=1.0).eval()
    detector = model.online
    assert isinstance(detector, DETR)
    # Queries of an untrained DETR are all alike; these are not.
    outputs = torch.randn(6, 2, 100, 64, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(detector, "_outputs", lambda features, sizes: outputs)
    with torch.no_grad():
        nn.init.normal_(detector.predictors["score"].weight, std=0.5)
    view, _ = views_of((6, 5))
    labels = torch.randint(0, 50, (11,), generator=torch.Generator().manual_seed(6))
    targets = replace(view.targets, labels=labels)
    with torch.no_grad():
        features = detector.features(view.images, view.sizes)
        found = detector.candidates(features, view.sizes, targets)
        plain = detector.candidates(features, view.sizes, replace(targets, labels=0 * labels))
    assert isinstance(found, DETRCandidates) and isinstance(plain, DETRCandidates)
    assert torch.equal(found.box_ids(targets), plain.box_ids(targets)), "instances: coordinates alone"
    assert not torch.equal(found.matched, plain.matched), "classes and boxes: by the pseudo-classes too"  # type: ignore[arg-type]
    assert (found.box_ids(targets) != targets.ids[found.matched.clamp(min=0)]).any()  # type: ignore[union-attr]
    losses = model(replace(view, targets=targets), replace(view, targets=targets))
    assert set(losses) == {"box", "overlap", "classification", "contrast"}
    assert 0 < losses["classification"].item() < 6 * 3 * 50


# 8.10, 8.11


@everyone
def test_a_box_that_one_view_lost_shifts_no_other(name: str) -> None:
    model = pretraining(name, candidates=EVERYTHING).eval()
    view1, view2 = views_of((6, 4))
    keep = torch.arange(10) != 2
    with torch.no_grad():
        one_sided, neither = model(view1, chosen(view2, keep)), model(view1, view2)
        ids = model.online.candidates(
            model.online.features(view1.images, view1.sizes), view1.sizes, chosen(view1, keep).targets
        ).box_ids(chosen(view1, keep).targets)
    assert int(view1.targets.ids[2]) not in ids.tolist()
    assert one_sided["contrast"].isfinite() and one_sided["contrast"] > 0
    for key in set(neither) - {"contrast"}:
        assert torch.equal(one_sided[key], neither[key]), "losses of the first view do not know the second"


@everyone
@pytest.mark.parametrize("counts", [(0, 0), (4, 0), (0, 1)])
@pytest.mark.parametrize(
    "kind",
    [{}, {"symmetric": True}, {"own_keys": True}, {"positives": "both"}, {"contrast": 0.0}, {"classification": 1.0}],
)
def test_images_and_batches_without_proposals(name: str, counts: tuple[int, int], kind: dict[str, object]) -> None:
    model = pretraining(name, **kind).train() if kind != {"contrast": 0.0} else AlignDet(small(name), contrast=0.0)
    losses = model(*views_of(counts))
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    if sum(counts) == 0 and "contrast" in losses:
        assert losses["contrast"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert not [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]


@everyone
def test_a_batch_that_repeats_an_image_has_the_box_losses_of_that_image(name: str) -> None:
    model = pretraining(name, candidates=EVERYTHING).eval()
    view1, view2 = views_of((6,))

    def times(view: Batch, number: int) -> Batch:
        rows = torch.arange(len(view.targets)).repeat(number)
        image = torch.arange(number).repeat_interleave(len(view.targets))
        targets = Targets(view.targets.boxes[rows], view.targets.labels[rows], rows + (image << 32), image)
        sizes = view.sizes.repeat(number, 1)
        return Batch(view.images.repeat(number, 1, 1, 1), sizes, sizes, tuple(range(number)), targets)

    with torch.no_grad():
        one, four = model(view1, view2), model(times(view1, 4), times(view2, 4))
    for key in set(one) - {"contrast"}:
        assert four[key].item() == pytest.approx(one[key].item(), rel=5e-4), key


def test_a_crowded_image_does_not_starve_the_other() -> None:
    matched = torch.cat([torch.zeros(5000, dtype=torch.int64), torch.tensor([1] * 30 + [BACKGROUND] * 4970)])
    image = torch.arange(2).repeat_interleave(5000)
    kept = image[PositivesFirst(100, "image")(matched, image)]
    assert torch.bincount(kept).tolist() == [100, 100]
    per_batch = matched[PositivesFirst(100, "batch")(matched, image)]
    assert int((per_batch == 1).sum()) < 10


RANKS = """
import torch, torch.distributed as dist
from dataclasses import replace
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
from aligndet.models import DETECTORS
from aligndet.structures import Batch, Targets
from tests.test_mistakes import EVERYTHING, pretraining
from tests.scenes import views_of

def part(view, number):
    keep = view.targets.image == number
    t = view.targets
    targets = Targets(t.boxes[keep], t.labels[keep], t.ids[keep], t.image[keep] * 0)
    one = slice(number, number + 1)
    return Batch(view.images[one], view.sizes[one], view.sizes[one], (number,), targets)

def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

for name, classes in [(name, classes) for name in DETECTORS for classes in (1, 3)]:
    views = views_of((6, 2))
    views = [replace(view, targets=replace(view.targets, labels=view.targets.ids % classes)) for view in views]
    method = {"candidates": EVERYTHING, "contrast": 0.0, "classification": float(classes > 1)}
    together, replica = (pretraining(name, classes, **method).eval() for _ in range(2))
    model = DistributedDataParallel(replica)
    losses = model(*(part(view, rank) for view in views))
    assert ("classification" in losses) == (classes > 1), list(losses)
    torch.stack(list(losses.values())).sum().backward()
    if rank == 0:
        import aligndet.ops.reduce as reduce
        group, size = dist.is_initialized, dist.get_world_size
        dist.is_initialized = lambda: False  # the same batch without ranks
        whole = together(*views)
        torch.stack(list(whole.values())).sum().backward()
        dist.is_initialized = group
        ours, theirs = gradients(replica), gradients(together)
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error < 2e-4, (name, classes, error)
    dist.barrier()
dist.destroy_process_group()
print("rank", rank, "done")
"""


def test_two_ranks_have_the_gradients_of_one_with_both_batches() -> None:
    """Of all box losses, and those on pseudo-classes.

    The contrast takes its negatives from the rank's own images (docs/decisions.md).
    """
    assert "rank 0 done" in on_two_ranks(RANKS)[0]


# 8.19


@everyone
def test_the_projection_is_computed_for_sampled_candidates_only(name: str) -> None:
    model = pretraining(name, candidates=13, scope="batch").train()
    view, _ = views_of((5, 3))
    seen: list[int] = []  # places that any layer of the projection was computed at
    for part in model.online.predictors["embedding"].modules():
        part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numel() // inputs[0].shape[1]))
    features = model.online.features(view.images, view.sizes)
    found = model.online.candidates(features, view.sizes, view.targets)
    assert found.embeddings is not None and found.embeddings.shape == (13, 16)
    assert all(places <= 13 * 9 for places in seen), "13 candidates, of 3 x 3 cells at most"


def test_numbers_of_the_paper_in_pre_training() -> None:
    """Method 1.8; our two-stage detectors have 4 box outputs for any class instead of 4 for each of 256 proposals."""

    def trained(name: str, classes: int, classification: float, **options: object) -> int:
        detector = build_detector(name, "resnet50", classes, **options)  # type: ignore[arg-type]
        model = AlignDet(detector, classification=classification)
        return sum(value.numel() for value in model.parameters() if value.requires_grad)

    assert trained("fcos", 1, 0.0) == 9_258_762
    assert trained("retinanet", 1, 0.0) == 13_458_980
    assert trained("mask_rcnn", 1, 0.0, class_agnostic=True) == 21_506_319 - 1020 * 1025
    assert trained("detr", 256, 1.0) == 18_243_845


def test_a_few_candidates_do_not_take_the_background_from_an_rpn() -> None:
    """Positives come first: of 64 anchors with 40 boxes in an image most were positive, and everything an object."""
    model = pretraining("faster_rcnn", candidates=64, contrast=0.0).train()
    batch, _ = views_of((40, 40))
    detector = cast(TwoStage, model.online)
    found = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes, batch.targets)
    assert isinstance(found, RegionCandidates) and found.objectness is not None and found.matched is not None
    positive = (found.objectness.matched >= 0).sum().item()
    assert len(found.objectness.matched) > 4 * positive and positive > 80, "background outnumbers boxes by far"
    assert max(torch.bincount(found.image)) <= 64, "regions are what the number is for"


def test_the_same_boxes_in_each_epoch_are_an_option(tmp_path: Path) -> None:
    proposals, _ = painted(tmp_path, [(97, 61)])
    many = np.tile(np.array([[5, 5, 50, 60]], np.float32), (40, 1)) + np.arange(40, dtype=np.float32)[:, None] / 10
    object.__setattr__(proposals, "boxes", many)
    object.__setattr__(proposals, "offsets", np.array([0, 40]))
    first = ViewPairs(tmp_path, proposals, short_sides=(61,), long_side=97, proposals_per_image=7, order="first")
    ids = first[(0, 0)][0].ids.tolist()
    assert [first[(e, p)][0].ids.tolist() for e in range(2) for p in range(3)] == [ids] * 6
    assert len(set(ids)) == 7 and max(ids) > 13, "not the largest of a file that is sorted by area"
    drawn = ViewPairs(tmp_path, proposals, short_sides=(61,), long_side=97, proposals_per_image=7)
    assert len({tuple(drawn[(0, p)][0].ids.tolist()) for p in range(5)}) == 5
