"""The contract of the protocol, for every detector; counts of the paper; losses against naive versions."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.finetune import FineTune
from aligndet.models import DETECTORS, build_detector
from aligndet.models.dense_head import flat, per_anchor
from aligndet.models.mask_rcnn import MaskRCNN
from aligndet.models.priors import AnchorShapes, octaves, on_image
from aligndet.models.retinanet import RetinaNet, RetinaNetCandidates
from aligndet.models.two_stage import RegionCandidates, TwoStage
from aligndet.ops.coders import DeltaCoder
from aligndet.ops.masks import crop, paste
from aligndet.ops.roi_align import level_of, multilevel_roi_align
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.structures import BACKGROUND, Batch, Targets
from tests import reference
from tests.scenes import views_of

everyone = pytest.mark.parametrize("name", list(DETECTORS))


def small(name: str, classes: int = 3, score_threshold: float = 0.05, conventions: str = "aligndet") -> Detector:
    own: dict[str, Any] = {"score_threshold": score_threshold}
    if conventions != "aligndet":
        own["conventions"] = conventions
    return build_detector(name, "resnet18", classes, width=0.25, channels=64, **own)


def counted(module: nn.Module) -> tuple[int, int]:
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(n for n, trained in numbers if trained), sum(n for n, _ in numbers)


def with_masks(batch: Batch) -> Batch:
    """The same batch with the inner halves of boxes as masks."""
    height, width = batch.images.shape[2:]
    masks = torch.zeros(len(batch.targets), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, batch.targets.boxes.long().tolist(), strict=True):
        mask[y0 : (y0 + y1) // 2, x0:x1] = True
    targets = batch.targets
    return Batch(
        batch.images,
        batch.sizes,
        batch.original_sizes,
        batch.image_ids,
        Targets(targets.boxes, targets.labels, targets.ids, targets.image, masks),
    )


def test_parameter_counts_of_the_paper() -> None:
    retinanet = build_detector("retinanet", norm="affine")
    assert counted(retinanet) == (37_743_348, 37_968_692)
    assert counted(cast(nn.Module, retinanet.neck))[0] == 7_997_440
    mask_rcnn = build_detector("mask_rcnn", norm="affine")
    assert isinstance(mask_rcnn, MaskRCNN)
    assert counted(mask_rcnn) == (45_481_712, 45_707_056)
    assert counted(mask_rcnn.neck)[0] == 3_344_384
    assert counted(mask_rcnn.rpn)[0] == 593_935
    layers = mask_rcnn.predictors
    assert mask_rcnn.mask_head is not None
    assert sum(counted(part)[0] for part in (mask_rcnn.head, layers["score"], layers["box"])) == 15_617_425
    assert counted(mask_rcnn.mask_head)[0] + counted(layers["mask"])[0] == 2_643_280
    assert counted(build_detector("faster_rcnn", norm="affine", neck_norm="sync")) == (42_840_480, 43_065_824)


@everyone
@pytest.mark.parametrize("counts", [(4, 3), (5, 0), (0, 0)])
def test_every_parameter_gets_a_gradient(name: str, counts: tuple[int, int]) -> None:
    model = FineTune(small(name)).train()
    losses = model(with_masks(views_of(counts)[0]))
    assert all(loss.shape == () and bool(loss.isfinite()) for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if sum(counts):
        assert all(loss.item() > 0 for loss in losses.values())


@everyone
@pytest.mark.parametrize("counts", [(4, 3), (0, 0)])
def test_pre_training_gives_every_trained_parameter_a_gradient(name: str, counts: tuple[int, int]) -> None:
    model = AlignDet(small(name, classes=1), embedding=16).train()
    losses = model(*views_of(counts))
    assert "contrast" in losses
    assert "classification" not in losses
    torch.stack(list(losses.values())).sum().backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert model.momentum is not None
    tied = {id(p) for part in model.online.tied_parts() for p in part.parameters()}
    assert all(p.grad is None for p in model.momentum.parameters() if id(p) not in tied)


@everyone
def test_detections_are_ordered_clipped_and_do_not_depend_on_the_batch(name: str) -> None:
    torch.manual_seed(2)
    detector = small(name, score_threshold=0.0).eval()
    batch, _ = views_of((3, 2))
    with torch.no_grad():
        features = detector.features(batch.images, batch.sizes)
        found = detector.detect(detector.candidates(features, batch.sizes), batch.sizes)
        single = [level[1:] for level in features]
        alone = detector.detect(detector.candidates(single, batch.sizes[1:]), batch.sizes[1:])
    assert len(found) == 2
    for item, (height, width) in zip(found, batch.sizes.tolist(), strict=True):
        assert 0 < len(item) <= 100
        assert bool((item.scores[:-1] >= item.scores[1:]).all())
        assert item.boxes.min() >= 0
        assert item.boxes[:, 2].max() <= width and item.boxes[:, 3].max() <= height
        assert int(item.labels.min()) >= 0 and int(item.labels.max()) < 3
    assert len(alone[0]) == len(found[1])
    assert (alone[0].scores - found[1].scores).abs().max() < 1e-5
    pasted = found[0].resized((96, 89), (200, 180))
    assert (pasted.masks is not None) == (name == "mask_rcnn")
    assert pasted.masks is None or pasted.masks.shape == (len(found[0]), 200, 180)


@everyone
def test_unknown_options_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"chanels: no option of {name}.*the nearest is 'channels'"):
        build_detector(name, "resnet18", chanels=32)


def test_the_coder_equals_the_formula_and_returns() -> None:
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(200, 4, generator=generator) * 50
    boxes = torch.cat([corner[:, :2], corner[:, :2] + corner[:, 2:] + 1], dim=1)
    priors = boxes.flip(0)
    coder = DeltaCoder((0.1, 0.1, 0.2, 0.2))
    found = coder.encode(priors, boxes)
    naive = [reference.encode(p, b, coder.stds) for p, b in zip(priors.tolist(), boxes.tolist(), strict=True)]
    assert (found - torch.tensor(naive)).abs().max() < 1e-3
    assert (coder.decode(priors, found) - boxes).abs().max() < 1e-3
    huge = coder.decode(priors[:1], torch.full((1, 4), 1e4))
    assert (huge[:, 2:] - huge[:, :2] - 62.5 * (priors[:1, 2:] - priors[:1, :2])).abs().max() < 1e-2


def test_anchors_by_hand() -> None:
    shapes = AnchorShapes(octaves((8, 16)))
    anchors = shapes.on([(2, 3), (1, 2)], (8, 16), torch.device("cpu"))
    assert anchors.counts == (54, 18)
    # Cell (1, 2) of stride 8: centre (16, 8); ratio 1 has the numbers 3 .. 5, of which 3 has 32 px sides.
    assert anchors.boxes[9 * 5 + 3].tolist() == [0.0, -8.0, 32.0, 24.0]
    ratio_half = anchors.boxes[9 * 5]
    assert ((ratio_half[2] - ratio_half[0]) / (ratio_half[3] - ratio_half[1])).item() == pytest.approx(2)
    sides = anchors.boxes[:, 2:] - anchors.boxes[:, :2]
    assert sides.prod(1)[54:63].sqrt().tolist() == pytest.approx([64 * 2 ** (i % 3 / 3) for i in range(9)], rel=1e-5)
    # An image of 8 x 9 px in a batch padded to 16 x 24, alone padded to multiples of 8: one row, two columns.
    inside = on_image(anchors, torch.tensor([[8, 9]]), 8)[0]
    assert inside[:54].view(2, 3, 9)[:, :, 0].tolist() == [[True, True, False], [False, False, False]]
    assert inside[54:].view(2, 9)[:, 0].tolist() == [True, False]


def test_retinanet_losses_equal_a_naive_loop() -> None:
    torch.manual_seed(0)
    detector = small("retinanet")
    assert isinstance(detector, RetinaNet)
    batch, _ = views_of((4, 0))
    candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes, batch.targets)
    assert candidates.matched is not None and candidates.scores is not None and candidates.deltas is not None
    matched = candidates.matched.tolist()
    labels = [int(batch.targets.labels[row]) if row >= 0 else row for row in matched]
    positives = max(1, sum(row >= 0 for row in matched)) + 1  # the second image counts as one
    cost = 0.0
    for row, anchor, delta in zip(matched, candidates.anchors.tolist(), candidates.deltas.tolist(), strict=True):
        if row >= 0:
            truth = reference.encode(anchor, batch.targets.boxes[row].tolist(), (1, 1, 1, 1))
            cost += sum(abs(a - b) for a, b in zip(delta, truth, strict=True))
    assert detector.localization_loss(candidates, batch.targets)["box"].item() == pytest.approx(
        cost / positives, rel=1e-4
    )
    focal = reference.focal_loss(candidates.scores.tolist(), labels, 0.25, 2.0)
    found = detector.classification_loss(candidates, batch.targets)["classification"].item()
    assert found == pytest.approx(focal / positives, rel=1e-4)


def test_retinanet_projects_chosen_anchors_as_the_dense_convolution_does() -> None:
    torch.manual_seed(0)
    detector = small("retinanet")
    assert isinstance(detector, RetinaNet)
    projection = detector.score_layer(16, hidden=True)
    detector.predictors["embedding"] = projection
    batch, _ = views_of((4, 2))
    features = detector.features(batch.images, batch.sizes)
    rows = torch.tensor([0, 5, 17, 700, 701, 1400])
    detector.sample = lambda matched, image: rows
    chosen = detector.candidates(features, batch.sizes, batch.targets)
    levels = detector.neck(features[1:])
    dense = per_anchor(flat([projection(detector.head.classification(level)) for level in levels]), 9)
    assert chosen.embeddings is not None
    assert (chosen.embeddings - dense[rows]).abs().max() < 1e-5
    detector.sample = None
    assert (detector.candidates(features, batch.sizes, batch.targets).embeddings - dense).abs().max() < 1e-5  # type: ignore[operator]


def test_two_stage_losses_equal_naive_ones() -> None:
    torch.manual_seed(0)
    detector = small("mask_rcnn")
    assert isinstance(detector, TwoStage)
    batch = with_masks(views_of((4, 0))[0])
    candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes, batch.targets)
    assert candidates.matched is not None and candidates.scores is not None and candidates.deltas is not None
    matched = candidates.matched.tolist()
    assert {0, 1, 2, 3} <= set(matched), "every box is a region of its own"
    number = len(matched)
    entropy, cost = 0.0, 0.0
    for row, score, delta, box in zip(
        matched, candidates.scores, candidates.deltas, candidates.boxes.tolist(), strict=True
    ):
        label = int(batch.targets.labels[row]) if row >= 0 else 3
        entropy -= score.softmax(0)[label].log().item()
        if row >= 0:
            truth = reference.encode(box, batch.targets.boxes[row].tolist(), (0.1, 0.1, 0.2, 0.2))
            cost += sum(abs(a - b) for a, b in zip(delta[label].tolist(), truth, strict=True))
    losses = detector.localization_loss(candidates, batch.targets)
    assert losses["box"].item() == pytest.approx(cost / number, rel=1e-4)
    found = detector.classification_loss(candidates, batch.targets)["classification"].item()
    assert found == pytest.approx(entropy / number, rel=1e-4)
    objectness = candidates.objectness
    assert objectness is not None
    assert len(objectness.scores) <= 512
    truth = (objectness.matched >= 0).float()
    expected = F.binary_cross_entropy(objectness.scores.sigmoid(), truth).item()
    assert losses["rpn_score"].item() == pytest.approx(expected, rel=1e-4)


def test_sampled_regions_keep_their_share_and_image() -> None:
    torch.manual_seed(0)
    detector = small("faster_rcnn")
    batch, _ = views_of((6, 2))
    candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes, batch.targets)
    assert isinstance(candidates, RegionCandidates) and candidates.matched is not None
    for image in range(2):
        mine = candidates.matched[candidates.image == image]
        assert len(mine) == candidates.counts[image] <= 512
        assert int((mine >= 0).sum()) <= 128
        assert int((mine == BACKGROUND).sum()) + int((mine >= 0).sum()) == len(mine)
    positive = candidates.matched >= 0
    assert bool((batch.targets.image[candidates.matched[positive]] == candidates.image[positive]).all())


@pytest.mark.parametrize(("conventions", "expected"), [("aligndet", [0, 1, 0, 1]), ("mmdet", [0, 1, 1, 1])])
def test_each_box_takes_its_nearest_proposal_where_the_rules_say_so(
    conventions: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first proposal overlaps box 0 by 86/114 and box 1 by 94/106, and box 0 has no nearer one."""
    detector = small("faster_rcnn", conventions=conventions)
    assert isinstance(detector, TwoStage)
    boxes = torch.tensor([[0.0, 0, 100, 100], [20, 0, 120, 100]])
    proposals = torch.tensor([[14.0, 0, 114, 100], [20, 0, 120, 101]])
    monkeypatch.setattr(detector.rpn, "proposals", lambda *_: [proposals])
    rows = torch.arange(2)
    targets = Targets(boxes, rows, rows, torch.zeros_like(rows))
    sizes = torch.tensor([[128, 128]])
    candidates = detector.candidates(detector.features(torch.zeros(1, 3, 128, 128), sizes), sizes, targets)
    assert isinstance(candidates, RegionCandidates) and candidates.matched is not None
    assert candidates.boxes.tolist() == torch.cat([boxes, proposals]).tolist()
    assert candidates.matched.tolist() == expected


def test_two_objects_with_one_box_have_a_region_each_and_one_without_area_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector = small("faster_rcnn")
    assert isinstance(detector, TwoStage)
    boxes = torch.tensor([[10.0, 10, 60, 60], [10, 10, 60, 60], [30, 30, 30, 40]])
    monkeypatch.setattr(detector.rpn, "proposals", lambda *_: [boxes[:0]])
    rows = torch.arange(3)
    targets = Targets(boxes, rows, rows, torch.zeros_like(rows))
    sizes = torch.tensor([[64, 64]])
    candidates = detector.candidates(detector.features(torch.zeros(1, 3, 64, 64), sizes), sizes, targets)
    assert candidates.matched is not None
    assert candidates.matched.tolist() == [0, 1, BACKGROUND]


def test_regions_are_pooled_from_the_level_of_their_size() -> None:
    boxes = torch.tensor([[0.0, 0, 111, 111], [0, 0, 112, 112], [0, 0, 500, 500], [5, 5, 6, 6], [9, 9, 9, 9]])
    assert level_of(boxes, 4).tolist() == [0, 1, 3, 0, 0]
    levels = [torch.full((2, 3, 64 // 2**i, 64 // 2**i), float(i + 1)) for i in range(4)]
    levels = [level * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) for level in levels]
    image = torch.tensor([0, 1, 1, 0, 0])
    pooled = multilevel_roi_align(levels, boxes[:, :], image, 7, strides=(4, 8, 16, 32))
    # The large box reaches beyond the maps, where features are 0.
    assert pooled[[0, 1, 3]].flatten(1).mean(1).tolist() == pytest.approx([1, -2, 1])
    assert pooled.shape == (5, 3, 7, 7)
    inputs = [level.requires_grad_() for level in levels]
    empty = multilevel_roi_align(inputs, boxes[:0], image[:0], 7, strides=(4, 8, 16, 32))
    assert empty.shape == (0, 3, 7, 7)
    empty.sum().backward()
    assert all(level.grad is not None and float(level.grad.abs().sum()) == 0 for level in inputs)


def test_masks_are_pasted_on_their_pixels_and_cropped_back() -> None:
    patches = torch.zeros(2, 28, 28)
    patches[0, :14] = 1  # the upper half
    patches[1] = 1
    boxes = torch.tensor([[10.0, 20, 38, 48], [-5, -5, 6, 6]])
    masks = paste(patches, boxes, (60, 50))
    expected = torch.zeros(60, 50, dtype=torch.bool)
    expected[20:34, 10:38] = True
    assert torch.equal(masks[0], expected)
    assert int(masks[1].sum()) == 36
    cells = crop(masks, torch.tensor([0]), boxes[:1], 28)
    assert torch.equal(cells[0], patches[0])
    assert paste(patches[:0], boxes[:0], (60, 50)).shape == (0, 60, 50)
    inverted: Tensor = paste(patches[1:], torch.tensor([[5.0, 5, 5, 9]]), (60, 50))
    assert not bool(inverted.any())


def test_candidates_of_retinanet_count_the_images() -> None:
    detector = small("retinanet")
    batch, _ = views_of((1, 0))
    candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes, batch.targets)
    assert isinstance(candidates, RetinaNetCandidates)
    assert candidates.images == 2
    assert len(candidates.image) == 2 * sum(candidates.counts)


@pytest.mark.parametrize("classes", [1, 3, 80])
def test_untrained_masks_say_nothing_however_few_the_classes(classes: int) -> None:
    """A loss of ln 2 each; by fan-out a single class would cost 5 to 14, and its gradient drown all others."""
    torch.manual_seed(0)
    detector = build_detector("mask_rcnn", "resnet18", classes, width=0.25, channels=64)
    batch = with_masks(views_of((3, 2))[0])
    loss = FineTune(detector)(batch)["mask"]
    assert abs(loss.item() - 0.6931) < 0.05
