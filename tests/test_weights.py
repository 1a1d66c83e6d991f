"""Claims about weights: what transfers, what is refused, what is reported."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import nn

from aligndet.models import build_backbone, build_detector
from aligndet.pretrain import AlignDet
from aligndet.weights import (
    export_detector,
    export_pretrained,
    inherited,
    load_backbone,
    load_detector,
    load_pretrained,
)
from tests.scenes import small_detector, views_of


def pretrained_file(path: Path) -> AlignDet:
    model = AlignDet(small_detector())
    with torch.no_grad():
        for parameter in model.online.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    torch.save(export_pretrained(model), path)
    return model


def test_everything_but_projection_and_scores_transfers(tmp_path: Path) -> None:
    model = pretrained_file(tmp_path / "p.pt")
    detector = small_detector(num_classes=7)
    scores = {k: v.clone() for k, v in detector.predictors["score"].state_dict().items()}
    report = load_pretrained(detector, tmp_path / "p.pt")
    own, online = detector.state_dict(), model.online.state_dict()
    for name in own:
        if name.startswith("predictors.score."):
            assert torch.equal(own[name], scores[name.removeprefix("predictors.score.")])
            assert name in report.kept
        else:
            assert torch.equal(own[name], online[name]), name
            assert name in report.loaded
    assert not report.unused
    assert not report.mismatched
    assert "predictors.box" in str(report)


def test_parts_and_predictors_can_be_left_out(tmp_path: Path) -> None:
    model = pretrained_file(tmp_path / "p.pt")
    fresh = small_detector()
    report = load_pretrained(fresh, tmp_path / "p.pt", modules=("neck",))
    assert report.loaded
    assert all(name.startswith("neck.") for name in report.loaded)
    report = load_pretrained(small_detector(), tmp_path / "p.pt", keep_predictors=False)
    assert not [name for name in report.loaded if name.startswith("predictors.")]
    assert len(report.loaded) > len(model.online.backbone.state_dict())
    with pytest.raises(ValueError, match="modules: want some of backbone, neck, rpn, head, got body"):
        load_pretrained(small_detector(), tmp_path / "p.pt", modules=("body",))


def test_only_a_box_layer_for_any_class_is_repeated(tmp_path: Path) -> None:
    """One that was trained for three classes says nothing of six."""
    options: dict[str, Any] = {"width": 0.25, "channels": 32, "box_head": "2fc", "head_width": 16}
    trained = build_detector("faster_rcnn", "resnet18", 3, **options)
    build = {"name": "faster_rcnn", "backbone": "resnet18", "num_classes": 3} | options
    torch.save(export_detector(trained, ("a", "b", "c"), build), tmp_path / "m.pt")
    report = load_pretrained(build_detector("faster_rcnn", "resnet18", 6, **options), tmp_path / "m.pt")
    assert not report.tiled
    assert any(line.startswith("predictors.box.weight") for line in report.mismatched)
    same = build_detector("faster_rcnn", "resnet18", 3, **options)
    assert "predictors.box.weight" in load_pretrained(same, tmp_path / "m.pt").loaded


def test_weights_of_another_detector_are_refused(tmp_path: Path) -> None:
    pretrained_file(tmp_path / "p.pt")
    other = build_detector("fcos", "resnet18", num_classes=3, width=0.5, channels=32, convolutions=1, levels=3)
    with pytest.raises(ValueError, match=r"p\.pt: .*backbone"):
        load_pretrained(other, tmp_path / "p.pt")


def test_files_of_another_kind_say_where_they_belong(tmp_path: Path) -> None:
    detector = small_detector()
    for content, words in (
        (
            {"kind": "checkpoint", "model": detector.state_dict()},
            "want pretrained.pt or model.pt of a run, got its check",
        ),
        ({"kind": "backbone", "backbone": {}}, "want pretrained.pt or model.pt of a run, got its backbone"),
        ({"features.0.0.weight": torch.zeros(1)}, r"\(the first: features.0.0.weight\).* for model.backbone_weights"),
    ):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=rf"w\.pt: .*{words}"):
            load_pretrained(detector, tmp_path / "w.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"damaged or refused: .*"):
        load_pretrained(detector, tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("name", "there", "here", "modules", "said"),
    [
        ("fcos", {"conventions": "torchvision"}, {}, ("head",), "conventions torchvision, here it is aligndet"),
        ("retinanet", {}, {"conventions": "detectron2"}, ("head",), "set model.conventions=aligndet"),
        ("faster_rcnn", {"conventions": "mmdet"}, {}, ("rpn",), "leave rpn and head out of method.modules"),
        ("mask_rcnn", {"box_head": "2fc"}, {}, ("head",), "box_head 2fc, here it is 4conv1fc"),
        ("fcos", {"neck_norm": "batch"}, {}, ("neck",), "neck_norm batch, here it is None.* model.neck_norm=batch"),
        ("fcos", {}, {"neck_norm": "sync"}, ("neck",), "neck_norm None, here it is sync.* model.neck_norm=null"),
    ],
)
def test_tensors_that_would_compute_something_else_are_refused(
    name: str, there: dict[str, Any], here: dict[str, Any], modules: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    torch.save({"kind": "pretrained", "detector": {}, "build": {"name": name} | there}, tmp_path / "p.pt")
    with pytest.raises(ValueError, match=said):
        inherited(tmp_path / "p.pt", {"name": name} | here, modules)
    untouched = ("backbone",) if "neck" in modules else ("backbone", "neck")
    assert inherited(tmp_path / "p.pt", {"name": name} | here, untouched) == {}
    assert inherited(tmp_path / "p.pt", {"name": name} | there, modules) == {}


def test_what_no_setting_names_comes_with_the_parts_it_belongs_to(tmp_path: Path) -> None:
    """Pixel statistics and strides of Caffe's backbones, and norms of torchvision's second version."""
    caffe = {"pixel_std": (1.0, 1.0, 1.0), "stride_in_1x1": True, "norm_eps": 0.0}
    build = {"name": "faster_rcnn", "head_norm": "batch", "rpn_depth": 2, "width": 0.25, **caffe}
    torch.save({"kind": "detector", "detector": {}, "build": build}, tmp_path / "d.pt")
    assert inherited(tmp_path / "d.pt", {"name": "mask_rcnn"}) == caffe | {"head_norm": "batch", "rpn_depth": 2}
    assert inherited(tmp_path / "d.pt", {"name": "mask_rcnn"}, ("rpn",)) == {"rpn_depth": 2}
    assert inherited(tmp_path / "d.pt", {"name": "fcos"}) == caffe, "FCOS has no such head"
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.pt")
    assert inherited(tmp_path / "other.pt", {"name": "fcos"}) == {}


def test_backbone_file_must_fit_whole(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    detector = build_detector("fcos", "resnet18", num_classes=3, channels=32, convolutions=1, levels=3)
    report = load_backbone(detector, tmp_path / "r18.pth")
    assert not [name for name in report.kept if not name.endswith("num_batches_tracked")]
    with pytest.raises(ValueError, match=r"r18\.pth: do not fit this backbone"):
        load_backbone(build_detector("fcos", "resnet50", num_classes=3), tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"r18\.pth: do not fit this backbone: .*shapes differ"):
        load_backbone(small_detector(), tmp_path / "r18.pth")


def test_half_precision_and_wrapped_files_load(tmp_path: Path) -> None:
    source = torchvision.models.resnet18(weights=None)
    state = {f"module.backbone.{k}": v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "r18.pth")
    detector = build_detector("fcos", "resnet18", num_classes=3, channels=32, convolutions=1, levels=3)
    load_backbone(detector, tmp_path / "r18.pth")
    loaded = detector.backbone.state_dict()["conv1.weight"]
    assert loaded.dtype == torch.float32
    assert torch.allclose(loaded, source.conv1.weight, atol=1e-3)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('executed', 'w').close()",)


def test_files_that_are_no_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    detector = small_detector()
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        load_backbone(detector, "none.pt")
    torch.save({"a": Evil()}, "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt: want a file of tensors, damaged or refused"):
        load_backbone(detector, "evil.pt")
    assert not Path("executed").exists()
    pretrained_file(Path("p.pt"))
    Path("cut.pt").write_bytes(Path("p.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        load_pretrained(detector, "cut.pt")
    torch.save([torch.zeros(3)], "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt: want a mapping"):
        load_pretrained(detector, "list.pt")
    torch.save({"epoch": 3}, "empty.pt")
    with pytest.raises(ValueError, match=r"empty\.pt: want names with tensors"):
        load_pretrained(detector, "empty.pt")
    with pytest.raises(ValueError, match=r"p\.pt: want a trained detector .*, got pretrained"):
        load_detector("p.pt")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"detector": None}, "want build, detector and classes of a trained detector, got kind, format"),
        (
            {"build": {"name": "fcos", "lvels": 3}},
            "want arguments of build_detector in build; problem: lvels: no option",
        ),
        ({"build": {"backbone": "resnet18"}}, "want arguments of build_detector in build; problem: .*'name'"),
        ({"classes": ["a"]}, "want names of its 3 classes, got 1"),
    ],
)
def test_a_file_that_lacks_a_part_is_named(changed: dict[str, object], words: str, tmp_path: Path) -> None:
    build = {"name": "fcos", "backbone": "resnet18", "num_classes": 3, "width": 0.25}
    build |= {"channels": 32, "convolutions": 1, "levels": 3}
    torch.save(export_detector(small_detector(), ("a", "b", "c"), build) | changed, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"weights .*m\.pt: {words}"):
        load_detector(tmp_path / "m.pt")


def test_trained_detector_round_trip(tmp_path: Path) -> None:
    build = {"name": "fcos", "backbone": "resnet18", "num_classes": 3, "width": 0.25}
    build |= {"channels": 32, "convolutions": 1, "levels": 3}
    detector = small_detector().eval()
    torch.save(export_detector(detector, ("a", "b", "c"), build), tmp_path / "m.pt")
    loaded, classes = load_detector(tmp_path / "m.pt")
    assert classes == ("a", "b", "c")
    view, _ = views_of((2, 1))
    with torch.no_grad():
        first = detector.candidates(detector.features(view.images, view.sizes), view.sizes)
        second = loaded.candidates(loaded.features(view.images, view.sizes), view.sizes)
    assert first.scores is not None
    assert second.scores is not None
    assert torch.equal(first.scores, second.scores)


def test_published_style_imagenet_weights_load(shared: Path) -> None:
    path = shared / "weights" / "mobilenet_v2_imagenet_fp16.pth"
    detector = build_detector("fcos", "mobilenet_v2", num_classes=3, channels=32, convolutions=1, levels=3)
    report = load_backbone(detector, path)
    assert not report.mismatched
    theirs = torchvision.models.mobilenet_v2(weights=None)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.allclose(detector.backbone.eval()(images)[-1], theirs.eval().features(images), atol=1e-4)


@pytest.mark.parametrize(
    ("around", "wrapper", "others"),
    [
        ("module.encoder_q.", "state_dict", ("module.encoder_k.",)),  # MoCo v1, v2
        ("module.base_encoder.", "state_dict", ("module.momentum_encoder.",)),  # MoCo v3
        ("module.", "", ()),  # SwAV
        ("encoder_q.0.", "state_dict", ("encoder_k.0.",)),  # DenseCL
        ("module.encoder.", "model", ("module.encoder_k.",)),  # PixPro, SoCo
        ("module.backbone.", "teacher", ()),  # DINO
        ("backbone.", "state_dict", ()),
    ],
)
def test_self_supervised_layouts_are_recognised(
    tmp_path: Path, around: str, wrapper: str, others: tuple[str, ...]
) -> None:
    source = build_backbone("resnet18", width=0.25)
    state = {around + name: value for name, value in source.state_dict().items()}
    for other in others:
        state |= {other + name: torch.zeros_like(value) for name, value in source.state_dict().items()}
    state |= {"module.projection_head.0.weight": torch.zeros(3)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "weights.pth")
    detector = build_detector("fcos", "resnet18", width=0.25, channels=32)
    load_backbone(detector, tmp_path / "weights.pth")
    loaded = cast(nn.Module, detector.backbone).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("encoder", ["", "encoder."])
def test_official_swin_weights_of_another_window_load(tmp_path: Path, encoder: str) -> None:
    detector = build_detector("mask_rcnn", "swin_t", width=0.25, channels=32)
    own = cast(nn.Module, detector.backbone).state_dict()
    official = {}
    for name, value in own.items():
        if name.startswith("norms.") or name.endswith("relative_position_index"):
            continue
        parts = name.split(".")
        stage, rest = int(parts[1]), ".".join(parts[2:])
        if stage == 0:
            key = f"patch_embed.{'proj' if parts[2] == '0' else 'norm'}.{parts[3]}"
        elif stage % 2:
            key = f"layers.{stage // 2}.blocks.{rest}".replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        else:
            key = f"layers.{stage // 2 - 1}.downsample.{rest}"
        value = torch.randn(value.shape)
        if key.endswith("relative_position_bias_table"):
            value = torch.full((11 * 11, value.shape[1]), 0.5)  # window 6, as in SimMIM
        official[encoder + key] = value
    torch.save({"model": official | {f"{encoder}norm.weight": torch.ones(3)}}, tmp_path / "swin.pth")
    load_backbone(detector, tmp_path / "swin.pth")
    loaded = cast(nn.Module, detector.backbone).state_dict()
    assert torch.equal(
        loaded["features.2.reduction.weight"], official[f"{encoder}layers.0.downsample.reduction.weight"]
    )
    assert torch.equal(loaded["features.3.1.mlp.3.bias"], official[f"{encoder}layers.1.blocks.1.mlp.fc2.bias"])
    table = loaded["features.5.0.attn.relative_position_bias_table"]
    assert table.shape[0] == 169
    assert (table - 0.5).abs().max() < 1e-5
