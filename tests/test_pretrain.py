"""Claims about AlignDet: what is frozen, what is equal, what gets a gradient, what happens without boxes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from aligndet.engine.ema import EMA
from aligndet.models import build_detector
from aligndet.pretrain import AlignDet
from aligndet.structures import Batch, Targets
from tests.scenes import batch_of, small_detector, views_of


def train_steps(model: AlignDet, steps: int, momentum: float = 0.9) -> None:
    assert model.momentum is not None
    average = EMA(model.online, model.momentum)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)
    for _ in range(steps):
        torch.stack(list(model(*views_of((5, 3))).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(momentum)


def test_frozen_backbone_is_bit_identical_after_training() -> None:
    model = AlignDet(small_detector(norm="batch")).train()
    before = copy.deepcopy(model.online.backbone.state_dict())
    head = model.online.predictors["box"].state_dict()
    head = {name: value.clone() for name, value in head.items()}
    train_steps(model, 5)
    after = model.online.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "weights or running statistics moved"
    moved = model.online.predictors["box"].state_dict()
    assert any(not torch.equal(head[name], moved[name]) for name in head), "nothing was trained"


def test_branches_are_equal_at_step_0_and_share_one_backbone() -> None:
    model = AlignDet(small_detector())
    assert model.momentum is not None
    online = dict(model.online.named_parameters())
    momentum = dict(model.momentum.named_parameters())
    assert set(momentum) == {name for name in online if not name.startswith("backbone.")}
    for name, value in momentum.items():
        assert torch.equal(value, online[name]), name
        assert value.data_ptr() != online[name].data_ptr(), f"{name} is shared"
        assert not value.requires_grad
    assert "score" not in model.online.predictors


def test_momentum_branch_follows_its_formula() -> None:
    model = AlignDet(small_detector())
    assert model.momentum is not None
    name = "predictors.box.weight" if "predictors.box.weight" in dict(model.momentum.named_parameters()) else None
    name = name or next(n for n, _ in model.momentum.named_parameters() if "box" in n)
    expected = dict(model.momentum.named_parameters())[name].double().clone()
    average = EMA(model.online, model.momentum)
    source = dict(model.online.named_parameters())[name]
    for step in range(7):
        with torch.no_grad():
            source.add_(torch.randn_like(source) * 0.1)
        average.update(0.9 + step / 100)
        expected = (0.9 + step / 100) * expected + (0.1 - step / 100) * source.double()
    assert torch.allclose(dict(model.momentum.named_parameters())[name].double(), expected, atol=1e-6)


def test_only_the_online_branch_gets_gradients() -> None:
    model = AlignDet(small_detector()).train()
    torch.stack(list(model(*views_of((5, 3))).values())).sum().backward()
    assert model.momentum is not None
    assert all(p.grad is None for p in model.momentum.parameters())
    assert all(p.grad is None for p in model.online.backbone.parameters())
    trained = {name: p for name, p in model.online.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert any(p.grad.abs().sum() > 0 for name, p in trained.items() if p.grad is not None and "embedding" in name)


@pytest.mark.parametrize("counts", [(0, 0), (5, 0), (0, 1)])
def test_images_and_batches_without_proposals(counts: tuple[int, int]) -> None:
    model = AlignDet(small_detector()).train()
    losses = model(*views_of(counts))
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    if sum(counts) == 0:
        assert all(loss == 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking


def test_more_than_256_proposals_per_batch() -> None:
    model = AlignDet(small_detector(), candidates=10_000).train()
    views = views_of((300, 7), size=160)
    candidates = model.online.candidates(
        model.online.features(views[0].images, views[0].sizes), views[0].sizes, views[0].targets
    )
    ids = candidates.box_ids(views[0].targets)
    assert (ids >= 256).any(), "boxes beyond the 256th take part"
    assert model(*views)["contrast"] > 0


def test_a_box_filtered_in_one_view_only_shifts_no_other() -> None:
    """Dropping a row of one view must equal dropping that box from both, not re-number the rest."""
    model = AlignDet(small_detector(), candidates=10_000).eval()
    view1, view2 = views_of((6, 4))

    def without(batch: Batch, box_id: int) -> Batch:
        keep = batch.targets.ids != box_id
        kept = Targets(*(getattr(batch.targets, n)[keep] for n in ("boxes", "labels", "ids", "image")))
        return Batch(batch.images, batch.sizes, batch.original_sizes, batch.image_ids, kept)

    box_id = int(view1.targets.ids[2])
    with torch.no_grad():
        one_side = model(without(view1, box_id), view2)
        full = model(view1, view2)
    online = model.online.candidates(
        model.online.features(view1.images, view1.sizes), view1.sizes, without(view1, box_id).targets
    )
    assert box_id not in online.box_ids(without(view1, box_id).targets).tolist()
    assert one_side["contrast"].isfinite()
    assert not torch.equal(one_side["contrast"], full["contrast"])


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_a_detector_built_for_classes_learns_boxes_of_any_class(name: str) -> None:
    """All labels are 0 without classes: of a layer with a box for each class only the first one would learn."""
    detector = build_detector(name, "resnet18", 3, width=0.25, channels=64)
    model = AlignDet(detector, embedding=16)
    box = model.online.predictors["box"]
    assert isinstance(box, nn.Linear) and box.out_features == 4
    sum(model(*views_of((5, 4))).values()).backward()
    assert box.weight.grad is not None and bool((box.weight.grad.abs().sum(dim=1) > 0).all())
    kept = AlignDet(build_detector(name, "resnet18", 3, width=0.25, channels=64), classification=1.0)
    assert kept.online.predictors["box"].out_features == 12


def test_a_detector_without_embeddings_is_named() -> None:
    model = AlignDet(small_detector(), embedding=16)
    online, candidates = model.online, model.online.candidates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online, "candidates", lambda *given: replace(candidates(*given), embeddings=None))
        with pytest.raises(ValueError, match=r"FCOS\.candidates: want embeddings, predictors has a layer"):
            model(*views_of((2,)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0}, "temperature: want a finite number above 0, got 0"),
        ({"temperature": float("nan")}, "temperature: want a finite number above 0, got nan"),
        ({"positives": "x"}, "positives: want one of keys, both, got 'x'"),
        ({"reduction": "x"}, "reduction: want one of boxes, queries, sum, got 'x'"),
        ({"embedding": 0}, "embedding: want a whole number of at least 1, got 0"),
        ({"embedding": 2.5}, "embedding: want a whole number of at least 1, got 2.5"),
        ({"candidates": 0}, "candidates: want a whole number of at least 1, got 0"),
        ({"candidates": 2.5}, "candidates: want a whole number of at least 1, got 2.5"),
        ({"background": 1.5}, "background: want a share in 0 .. 1, got 1.5"),
        ({"scope": "x"}, "scope: want 'batch' or 'image', got 'x'"),
        ({"contrast": -1}, "contrast: want a finite weight of at least 0, got -1"),
        ({"contrast": 0, "localization": 0}, "contrast, localization, classification: want a weight above 0"),
    ],
)
def test_settings_that_cannot_be_are_named_at_once(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignDet(small_detector(), **wrong)  # type: ignore[arg-type]


def test_views_of_another_number_of_images_are_refused() -> None:
    view1, _ = views_of((2, 1))
    _, view2 = views_of((2,))
    with pytest.raises(ValueError, match="view2: want the 2 images of view1, got 1"):
        AlignDet(small_detector())(view1, view2)


def test_views_of_different_padded_size() -> None:
    model = AlignDet(small_detector()).eval()
    view1, _ = views_of((4, 2), size=96)
    _, view2 = views_of((4, 2), size=128)
    assert all(loss.isfinite() for loss in model(view1, view2).values())


def test_one_task_at_a_time() -> None:
    only_boxes = AlignDet(small_detector(), contrast=0.0).train()
    assert only_boxes.momentum is None
    assert "embedding" not in only_boxes.online.predictors
    assert set(only_boxes(*views_of((4, 2)))) == {"box", "centerness"}
    only_contrast = AlignDet(small_detector(), localization=0.0).train()
    losses = only_contrast(*views_of((4, 2)))
    assert losses["box"] == 0
    assert losses["contrast"] > 0


def test_localization_losses_are_those_of_fine_tuning() -> None:
    """The twins: with every positive kept, box and centerness losses equal the detector's own on the same view."""
    view1, view2 = views_of((5, 3))
    detector = small_detector().eval()
    with torch.no_grad():
        features = detector.features(view1.images, view1.sizes)
        expected = detector.localization_loss(detector.candidates(features, view1.sizes, view1.targets), view1.targets)
        losses = AlignDet(detector, candidates=100_000).eval()(view1, view2)
    for name, value in expected.items():
        assert torch.allclose(losses[name], value, rtol=1e-4), name


def test_loss_of_an_image_does_not_depend_on_its_batch() -> None:
    """A batch that repeats one image has the box losses of that image alone."""
    view1, _ = views_of((6,))
    boxes = view1.targets.boxes
    alone, four = batch_of([boxes]), batch_of([boxes] * 4)
    four = Batch(alone.images.repeat(4, 1, 1, 1), four.sizes, four.sizes, four.image_ids, four.targets)
    model = AlignDet(small_detector(), candidates=10_000).eval()
    with torch.no_grad():
        single, repeated = model(alone, alone), model(four, four)
    for name in ("box", "centerness"):
        assert torch.allclose(single[name], repeated[name], rtol=1e-4), name


def test_same_seed_gives_the_same_weights() -> None:
    def run() -> list[torch.Tensor]:
        torch.manual_seed(5)
        model = AlignDet(small_detector(), candidates=53).train()
        train_steps(model, 4)
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_backbone_stays_in_evaluation_mode() -> None:
    model = AlignDet(small_detector(norm="batch"))
    for mode in (True, False, True):
        model.train(mode)
        assert not any(m.training for m in model.online.backbone.modules())
        assert model.online.predictors.training == mode
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.online.predictors.modules())
