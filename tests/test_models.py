"""Claims about models: counts of the paper, weights of torchvision, exactness of the cheap forms, detection by hand."""

import copy
import math

import pytest
import torch
import torchvision
from torch import nn

from aligndet.losses import iou_loss
from aligndet.models import build_detector, folded
from aligndet.models.backbones import build_backbone
from aligndet.models.backbones.norm import FrozenBatchNorm
from aligndet.models.dense_head import GroupNorm, at_points, flat
from aligndet.models.fcos import FCOS, BoxPredictor, FCOSCandidates
from aligndet.models.fpn import FPN
from aligndet.models.pointwise import Pointwise, with_pointwise
from aligndet.models.priors import points_of
from aligndet.models.retinanet import RetinaNetCandidates
from aligndet.predict import predict
from aligndet.structures import BACKGROUND
from tests.scenes import small_detector, views_of


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_parameter_counts_of_table_12() -> None:
    detector = build_detector("fcos", "resnet50", num_classes=80)
    assert trained(detector.backbone) == 23_232_512
    assert isinstance(detector, FCOS)
    assert trained(detector.neck) == 3_868_672
    assert trained(detector.head) + trained(detector.predictors) == 4_918_618
    assert trained(detector) == 32_019_802
    detector.predictors["embedding"] = detector.score_layer(256, hidden=True)
    del detector.predictors["score"]
    assert trained(detector) - trained(detector.backbone) == 9_258_762


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_backbones_compute_what_torchvision_computes(name: str, norm: str) -> None:
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
    ours = build_backbone(name, norm=norm).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith(("fc.", "classifier."))}
    lacking = ours.load_state_dict(state, strict=norm == "batch")
    assert not lacking.missing_keys
    assert all(key.endswith("num_batches_tracked") for key in lacking.unexpected_keys)
    images = torch.randn(2, 3, 61, 97)
    with torch.no_grad():
        features = ours(images)
        expected = _mobilenet_features(theirs, images) if name == "mobilenet_v2" else _resnet_features(theirs, images)
    for feature, value in zip(features, expected, strict=True):
        assert (feature - value).abs().max() < 1e-5 * max(1, value.abs().max())
    assert tuple(f.shape[1] for f in features) == ours.channels
    for feature, stride in zip(features, ours.strides, strict=True):
        assert feature.shape[-2:] == (math.ceil(61 / stride), math.ceil(97 / stride))


def _resnet_features(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    children = dict(model.named_children())
    features = []
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        images = children[name](images)
        features.append(images)
    return features[-4:]


def _mobilenet_features(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """By stride instead of by layer number: the last map of each of four strides, 96 channels at stride 16."""
    last = {}
    for layer in model.features:
        images = layer(images)
        last[images.shape[-1]] = images
    return list(last.values())[-4:]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_frozen_stages_stay_out_of_training(name: str) -> None:
    counts = []
    for stages in range(5):
        backbone = build_backbone(name, width=0.25, norm="batch", frozen_stages=stages).train()
        frozen = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d) and not m.training]
        counts.append(len(frozen))
        assert all(not p.requires_grad for m in frozen for p in m.parameters())
        assert (trained(backbone) == 0) == (stages == 4)
    assert counts[0] == 0
    assert counts == sorted(set(counts)), "each stage freezes more"
    backbone = build_backbone(name, width=0.25, norm="batch", frozen_stages=0)
    backbone.freeze(4)
    assert trained(backbone) == 0
    assert not any(module.training for module in backbone.train().modules() if isinstance(module, nn.BatchNorm2d))


def test_unknown_names_are_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="got 'fcoss'; the nearest is 'fcos'"):
        build_detector("fcoss")
    with pytest.raises(ValueError, match="got 'resnet05'; the nearest is 'resnet50'"):
        build_detector("fcos", "resnet05")
    for options in ({"channels": 48}, {"levels": 2}, {"convolutions": 0}, {"norm": "group"}, {"frozen_stages": 5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build_detector("fcos", "resnet18", **options)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fcos", {"centre_radius": -1}, "centre_radius: want a positive number"),
        ("retinanet", {"convolutions": -1}, "convolutions: want at least 0"),
        ("retinanet", {"neck_norm": "x"}, "norm: want one of frozen, affine, batch, sync, got 'x'"),
        ("faster_rcnn", {"head_norm": "x"}, "norm: want one of"),
        ("mask_rcnn", {"rpn_depth": -1}, "rpn_depth: want at least 0"),
        ("detr", {"heads": 0}, "heads, feedforward: want at least 1, got 0, 2048"),
        ("detr", {"feedforward": 0}, "heads, feedforward: want at least 1, got 8, 0"),
        ("detr", {"dropout": 1.5}, "dropout: want a number in 0 .. 1, got 1.5"),
        ("fcos", {"score_threshold": 2.0}, "score_threshold: want a number in 0 .. 1, got 2.0"),
        ("fcos", {"pixel_mean": (1.0, 2.0)}, "pixel_mean: want three numbers"),
        ("fcos", {"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std: want three numbers above 0"),
        ("fcos", {"norm_eps": -1.0}, "norm_eps: want a number of at least 0, got -1.0"),
    ],
)
def test_impossible_options_are_named(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_detector(name, "resnet18", 3, width=0.25, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, -1, 2.5, "3"])
def test_classes_are_a_whole_number(number: object) -> None:
    with pytest.raises(ValueError, match=f"num_classes: want a whole number of at least 1, got {number}"):
        build_detector("fcos", "resnet18", number)  # type: ignore[arg-type]


def test_groups_of_one_channel_on_a_map_of_one_cell() -> None:
    """The coarsest level of a small picture; torch refuses it, as if it were about to train."""
    detector = build_detector("fcos", "resnet18", 3, width=0.25, channels=32, convolutions=1, score_threshold=0.0)
    found = predict(detector, [torch.zeros(3, 128, 128, dtype=torch.uint8)], short_side=128, long_side=128)
    assert found[0].boxes.isfinite().all()
    norm, x = GroupNorm(32, 32), torch.randn(2, 32, 3, 5)
    assert torch.equal(norm(x), nn.GroupNorm(32, 32)(x))
    assert norm(torch.rand(1, 32, 1, 1)).abs().max() < 1e-4


def test_pyramid_shapes_and_top_down_path() -> None:
    neck = FPN((7, 11, 13), 5, extra=2)
    features = [torch.randn(3, c, h, w) for c, h, w in ((7, 17, 23), (11, 9, 12), (13, 5, 6))]
    outputs = neck(features)
    assert [tuple(o.shape) for o in outputs] == [(3, 5, h, w) for h, w in ((17, 23), (9, 12), (5, 6), (3, 3), (2, 2))]
    # The coarsest map alone reaches the finest output; the finest reaches no coarser one.
    changed = neck([features[0] + 1, *features[1:]])
    assert not torch.equal(changed[0], outputs[0])
    assert all(torch.equal(a, b) for a, b in zip(changed[1:], outputs[1:], strict=True))
    assert not torch.equal(neck([*features[:2], features[2] + 1])[0], outputs[0])


def test_an_exploding_distance_leaves_the_gradient_finite() -> None:
    """exp overflows float32 at 89; one such point must not turn every weight into nan."""
    predictor = BoxPredictor(32, 1)
    nn.init.constant_(predictor.convolution.bias, 200.0)
    (distances,) = predictor([torch.randn(1, 32, 1, 1)])
    boxes = flat([distances]) * torch.tensor([-1.0, -1.0, 1.0, 1.0]) + 50
    iou_loss(boxes, torch.tensor([[40.0, 40.0, 60.0, 60.0]])).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())


def test_boxes_of_fcos_start_32_px_wide() -> None:
    """From 1 px on each side, which exp makes of a bias of zero, a hundred steps are spent on the size of boxes."""
    maps = [torch.zeros(2, 64, size, size) for size in (4, 2, 1)]
    assert all(torch.allclose(d, torch.tensor(16.0)) for d in BoxPredictor(64, 3)(maps))


def test_points_are_cell_centres() -> None:
    points = points_of([(2, 3), (1, 2)], (8, 16), torch.device("cpu"))
    assert points.centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert points.stride.tolist() == [8.0] * 6 + [16.0] * 2
    assert points.level.tolist() == [0] * 6 + [1] * 2


def test_flat_rows_carry_image_level_and_cell() -> None:
    """Maps that encode (image, level, cell) come out image by image, level by level, row by row."""
    shapes = [(3, 5), (2, 3), (1, 2)]
    maps = []
    for level, (height, width) in enumerate(shapes):
        cell = torch.arange(height * width).reshape(height, width).expand(4, height, width)
        image = torch.arange(4)[:, None, None].expand(4, height, width)
        maps.append(torch.stack([image, torch.full_like(image, level), cell], dim=1))
    rows = flat(maps).tolist()
    expected = [[i, lv, c] for i in range(4) for lv, (h, w) in enumerate(shapes) for c in range(h * w)]
    assert rows == expected
    assert flat(maps, torch.tensor([50, 3])).tolist() == [expected[50], expected[3]]


def test_layers_at_points_equal_the_dense_convolution_with_gradients() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        layer = nn.Sequential(nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 11, 1))
        levels = [torch.randn(3, 5, h, w, requires_grad=True) for h, w in ((7, 5), (4, 3), (2, 1), (1, 1))]
        number = 3 * (35 + 12 + 2 + 1)
        for rows in (torch.arange(number), torch.tensor([0, 149, 34, 35, 46, 47, 48, 49, 50]), torch.arange(0)):
            weight = torch.randn(len(rows), 11)
            dense = (flat([layer(level) for level in levels], rows) * weight).sum()
            sparse = (at_points(layer, levels, rows) * weight).sum()
            assert abs(dense - sparse) < 1e-10
            inputs = [*levels, *layer.parameters()]
            for a, b in zip(torch.autograd.grad(dense, inputs), torch.autograd.grad(sparse, inputs), strict=True):
                assert torch.allclose(a, b, atol=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


def test_scores_and_boxes_do_not_depend_on_the_rest_of_the_batch() -> None:
    detector = small_detector().eval()
    view, _ = views_of((3, 2))
    with torch.no_grad():
        both = detector.candidates(detector.features(view.images, view.sizes), view.sizes)
        alone = detector.candidates(detector.features(view.images[1:], view.sizes[1:]), view.sizes[1:])
    assert isinstance(both, FCOSCandidates)
    assert isinstance(alone, FCOSCandidates)
    second = both.image == 1
    assert both.matched is None
    assert both.scores is not None
    assert alone.scores is not None
    assert torch.allclose(both.scores[second], alone.scores, atol=1e-5)
    assert torch.equal(both.points[second], alone.points)


def test_matched_boxes_contain_their_points() -> None:
    detector = small_detector()
    view, _ = views_of((6, 0))
    found = detector.candidates(detector.features(view.images, view.sizes), view.sizes, view.targets)
    assert isinstance(found, FCOSCandidates)
    assert found.matched is not None
    positive = found.matched >= 0
    assert positive.any()
    assert (found.image[positive] == view.targets.image[found.matched[positive]]).all()
    boxes = view.targets.boxes[found.matched[positive]]
    points = found.points[positive]
    assert ((points > boxes[:, :2]) & (points < boxes[:, 2:])).all()
    assert (found.matched[found.image == 1] == BACKGROUND).all()


def test_detection_by_hand() -> None:
    """Two overlapping boxes of one class, one of another class, one below the threshold, one outside the image."""
    detector = small_detector(num_classes=2)
    boxes = [[0, 0, 20, 20], [1, 1, 21, 21], [1, 1, 21, 21], [50, 50, 70, 70], [60, 60, 999, 999]]
    logits = torch.full((5, 2), -20.0)
    for row, (label, probability) in enumerate([(0, 0.9), (0, 0.8), (1, 0.7), (0, 0.04), (1, 0.6)]):
        logits[row, label] = math.log(probability / (1 - probability))
    rows = torch.zeros(5, dtype=torch.int64)
    centerness = torch.tensor([100.0, 100.0, 0.0, 100.0, 100.0])  # the third counts half
    candidates = FCOSCandidates(
        logits, None, rows, None, torch.zeros(5, 2), rows, torch.tensor(boxes, dtype=torch.float32), centerness
    )
    (found,) = detector.detect(candidates, torch.tensor([[90, 80]]))
    assert found.labels.tolist() == [0, 1, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.35], abs=1e-6)
    assert found.boxes.tolist() == [[0, 0, 20, 20], [60, 60, 80, 90], [1, 1, 21, 21]]


def test_nothing_above_the_threshold_is_an_ordinary_result() -> None:
    detector = small_detector().eval()
    view, _ = views_of((1, 0))
    with torch.no_grad():
        found = detector.detect(detector.candidates(detector.features(view.images, view.sizes), view.sizes), view.sizes)
    assert [len(one) for one in found] == [0, 0], "the prior of every class is 1 %"


def test_bf16_autocast_keeps_losses_in_float32_and_close() -> None:
    detector = small_detector(num_classes=1)
    view, _ = views_of((5, 3))
    full = _losses(detector, view)
    with torch.autocast("cpu", torch.bfloat16):
        half = _losses(copy.deepcopy(detector), view)
    for name, value in half.items():
        assert value.dtype == torch.float32, name
        assert torch.allclose(value, full[name], rtol=0.05), name


def _losses(detector: FCOS, view: object) -> dict[str, torch.Tensor]:
    features = detector.features(view.images, view.sizes)  # type: ignore[attr-defined]
    found = detector.candidates(features, view.sizes, view.targets)  # type: ignore[attr-defined]
    targets = view.targets  # type: ignore[attr-defined]
    return detector.localization_loss(found, targets) | detector.classification_loss(found, targets)


@pytest.mark.parametrize("name", ["swin_t", "swin_b"])
def test_swin_computes_what_torchvision_computes(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    ours = build_backbone(name).eval()
    lacking = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all(key.startswith("norms.") for key in lacking.missing_keys)
    assert set(lacking.unexpected_keys) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    images = torch.randn(2, 3, 61, 97)
    with torch.no_grad():
        features = ours(images)
        for number, layer in enumerate(theirs.features):
            images = layer(images)
            if number % 2:
                expected = nn.functional.layer_norm(images, images.shape[-1:]).permute(0, 3, 1, 2)
                assert (features[number // 2] - expected).abs().max() < 1e-5
    assert tuple(f.shape[1] for f in features) == ours.channels


@pytest.mark.parametrize(("name", "count"), [("swin_s", 48_838_602), ("swin_b", 86_745_016), ("swin_l", 194_998_164)])
def test_swin_parameter_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build_backbone(name, frozen_stages=0).parameters()) == count


def test_swin_freezes_stage_by_stage_and_drops_paths_in_training_only() -> None:
    torch.manual_seed(0)
    counts = [trained(build_backbone("swin_t", width=0.25, frozen_stages=stages)) for stages in range(5)]
    assert counts == sorted(set(counts), reverse=True)
    assert counts[4] == 0
    backbone = build_backbone("swin_t", width=0.25, frozen_stages=0)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        dropped = [backbone.train()(images)[3] for _ in range(4)]
        kept = [backbone.eval()(images)[3] for _ in range(2)]
    assert any(not torch.equal(dropped[0], other) for other in dropped[1:])
    assert torch.equal(*kept)
    with pytest.raises(ValueError, match="swin_t has no batch norm"):
        build_backbone("swin_t", norm="batch")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_folding_and_fused_norms_change_rounding_only(name: str, norm: str) -> None:
    torch.manual_seed(0)
    detector = build_detector("retinanet", name, 5, width=0.5, channels=64, norm=norm, neck_norm="batch").eval()
    for module in detector.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm)):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    images, sizes = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [50, 96]])
    quick = folded(detector)
    assert not [m for m in quick.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm))]
    with torch.no_grad():
        expected = detector.candidates(detector.features(images, sizes), sizes)
        found = quick.candidates(quick.features(images, sizes), sizes)
    assert isinstance(expected, RetinaNetCandidates) and isinstance(found, RetinaNetCandidates)
    for one, other in ((expected.scores, found.scores), (expected.deltas, found.deltas)):
        assert one is not None and other is not None
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(one.abs().max()))


def test_one_by_one_convolutions_are_what_they_were() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(6, 10, 1), nn.Sequential(nn.Conv2d(10, 4, 1, stride=2, bias=False)))
    x = torch.randn(2, 6, 7, 5, requires_grad=True)
    expected = plain(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    names = list(plain.state_dict())
    with_pointwise(plain)
    assert isinstance(plain[0], Pointwise) and list(plain.state_dict()) == names
    found = plain(x)
    assert (found - expected).abs().max() < 1e-6
    assert (torch.autograd.grad(found.square().sum(), x)[0] - gradient).abs().max() < 1e-5
