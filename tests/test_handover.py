"""Pre-trained weights for people who fine-tune elsewhere: ``aligndet convert`` into torchvision's own models."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from aligndet import cli
from aligndet.interop import detectron2, detr, mmdet
from aligndet.interop import torchvision as peer
from aligndet.models import DETECTORS, build_detector
from aligndet.models.backbones.norm import FrozenBatchNorm
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.weights import export_pretrained

MODELS = {
    "fcos": ("fcos_resnet50_fpn", {}),
    "retinanet": ("retinanet_resnet50_fpn", {}),
    "faster_rcnn": ("fasterrcnn_resnet50_fpn", {"box_head": "2fc"}),
    "mask_rcnn": ("maskrcnn_resnet50_fpn", {"box_head": "2fc"}),
}
# What the lines for torchvision are made of.
CONSTRUCTORS: dict[str, Any] = {
    "BackboneWithFPN": BackboneWithFPN,
    "BatchNorm2d": nn.BatchNorm2d,
    "LastLevelP6P7": LastLevelP6P7,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "resnet18": torchvision.models.resnet18,
}


def constructed(text: str) -> nn.Module:
    """The module that a line describes, of CONSTRUCTORS and constants alone: calls, ``.features``, names, literals."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            return value(node.func)(*map(value, node.args), **{str(k.arg): value(k.value) for k in node.keywords})
        if isinstance(node, ast.Attribute):
            assert node.attr == "features"
            return value(node.value).features
        return CONSTRUCTORS[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)

    found = value(ast.parse(text, mode="eval").body)
    assert isinstance(found, nn.Module)
    return found


def pretrained_file(path: Path, name: str, **options: object) -> Detector:
    """A pre-training file whose weights are not those of any initialisation."""
    torch.manual_seed(3)
    build: dict[str, object] = {"name": name, "backbone": "resnet50", "num_classes": 1} | options
    model = AlignDet(build_detector(**build), embedding=8)  # type: ignore[arg-type]
    with torch.no_grad():
        for value in model.online.parameters():
            value.add_(0.01 * torch.randn_like(value))
    torch.save(export_pretrained(model, build), path)
    return model.online


def converted(path: Path, target: str, *more: str) -> dict[str, torch.Tensor]:
    out = path.with_suffix(f".{target}.pth")
    assert cli.main(["convert", "--from", "aligndet", "--to", target, *more, str(path), str(out)]) == 0
    content = torch.load(out, weights_only=True)
    return content.get("model", content.get("state_dict", content))


@pytest.mark.parametrize("name", list(MODELS))
def test_torchvision_models_start_from_pre_training(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    builder, options = MODELS[name]
    agnostic = {"class_agnostic": True} if name.endswith("rcnn") else {}
    online = pretrained_file(tmp_path / "p.pt", name, conventions="torchvision", **options, **agnostic)
    state = converted(tmp_path / "p.pt", "torchvision", "--num-classes", "6")
    said = capsys.readouterr().out
    assert "which pre-training does not teach" in said and "predictors.score.weight" in said
    classes = 7 if name.endswith("rcnn") else 6  # there background is counted with the classes
    model = getattr(torchvision.models.detection, builder)(weights=None, weights_backbone=None, num_classes=classes)
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    parts = ("cls_logits", "cls_score", "mask")
    lacking = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    assert all(any(part in key for part in parts) for key in lacking), lacking
    images = torch.rand(1, 3, 128, 96)
    with torch.no_grad():
        theirs = model.eval().backbone(images)
        ours = online.eval().neck(online.backbone(images)[0 if name.endswith("rcnn") else 1 :])  # type: ignore[operator]
    for one, other in zip(theirs.values(), ours, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()))
    if name.endswith("rcnn"):
        box = state["roi_heads.box_predictor.bbox_pred.weight"].view(classes, 4, -1)
        assert all(torch.equal(part, online.predictors["box"].weight) for part in box)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "mmdet") for name in ("fcos", "retinanet", "faster_rcnn", "mask_rcnn", "detr")),
        *((name, "detectron2") for name in ("retinanet", "faster_rcnn", "mask_rcnn")),
        ("detr", "detr"),
    ],
)
def test_other_libraries_get_all_that_was_learned(name: str, target: str, tmp_path: Path) -> None:
    """As many numbers as the file has, box layers of two-stage detectors once per class; no NaN."""
    options: dict[str, object] = {"class_agnostic": True} if name.endswith("rcnn") else {}
    if target == "detectron2":
        options |= {"conventions": "detectron2"} | ({"box_head": "2fc"} if name.endswith("rcnn") else {})
    pretrained_file(tmp_path / "p.pt", name, **options)
    state = converted(tmp_path / "p.pt", target, "--num-classes", "5")
    known = torch.load(tmp_path / "p.pt", weights_only=True)["detector"]
    assert all(bool(value.isfinite().all()) for value in state.values())
    floats = torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])
    expected = [
        value.flatten().repeat(5 if key.startswith("predictors.box.") and name.endswith("rcnn") else 1)
        for key, value in known.items()
        if value.is_floating_point()
    ]
    wanted = torch.cat(expected)
    assert len(floats) == len(wanted)
    for power in (1, 2, 3):  # the very same numbers, in another order; sorting forty millions takes long
        sums = [part.double().pow(power).sum().item() for part in (floats, wanted)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-9)


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn"])
def test_a_mobilenet_goes_into_torchvision_s_pyramid(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into the backbone that the command says to build: nothing left over, and it computes the same."""
    agnostic = {"class_agnostic": True, "box_head": "2fc"} if name.endswith("rcnn") else {}
    small = {"backbone": "mobilenet_v2", "channels": 32, "conventions": "torchvision"}
    online = pretrained_file(tmp_path / "p.pt", name, **(small | agnostic)).eval()
    state = converted(tmp_path / "p.pt", "torchvision", "--num-classes", "3")
    lines = capsys.readouterr().out.splitlines()
    text = next(line for line in lines if line.startswith("torchvision: backbone: "))
    body = constructed(text.removeprefix("torchvision: backbone: "))
    given = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    result = body.load_state_dict(given, strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in result.missing_keys)
    images = torch.rand(1, 3, 128, 96)
    with torch.no_grad():
        theirs = body.eval()(images)
        ours = online.neck(online.backbone(images)[0 if name.endswith("rcnn") else 1 :])  # type: ignore[operator]
    assert len(ours) == 5
    for one, other in zip(theirs.values(), ours, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()))


def mobilenet_of_mmdet() -> dict[str, tuple[int, ...]]:
    """Shapes of its convolutions by name, from the table of the paper: expansion, channels, blocks."""
    shapes, inputs = {"conv1.conv": (32, 3, 3, 3)}, 32
    table = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for layer, (expansion, width, depth) in enumerate(table, 1):
        for block in range(depth):
            here, hidden = f"layer{layer}.{block}", inputs * expansion
            shapes |= {f"{here}.expand_conv.conv": (hidden, inputs, 1, 1)} if expansion > 1 else {}
            shapes |= {f"{here}.depthwise_conv.conv": (hidden, 1, 3, 3)}
            shapes |= {f"{here}.linear_conv.conv": (width, hidden, 1, 1)}
            inputs = width
    return {f"backbone.{key}": shape for key, shape in (shapes | {"conv2.conv": (1280, 320, 1, 1)}).items()}


@pytest.mark.parametrize("name", list(DETECTORS))
def test_a_mobilenet_has_mmdet_s_names_there(name: str, tmp_path: Path) -> None:
    small = {"backbone": "mobilenet_v2", "channels": 32} | ({"class_agnostic": True} if name.endswith("rcnn") else {})
    online = pretrained_file(tmp_path / "p.pt", name, **small)
    state = converted(tmp_path / "p.pt", "mmdet")
    convolutions = mobilenet_of_mmdet()
    found = {key.removesuffix(".weight"): value for key, value in state.items() if value.ndim == 4}
    assert {key: tuple(value.shape) for key, value in found.items() if key.startswith("backbone.")} == convolutions
    learned = [value for key, value in online.backbone.state_dict().items() if value.ndim == 4]
    assert all(torch.equal(state[f"{key}.weight"], value) for key, value in zip(convolutions, learned, strict=True))
    norms = [module for module in online.backbone.modules() if isinstance(module, FrozenBatchNorm)]
    for key, norm in zip(convolutions, norms, strict=True):
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(state[f"{key.removesuffix('conv')}bn.{part}"], getattr(norm, part))
    if name == "detr":
        state = converted(tmp_path / "p.pt", "mmdet", "--mmdet-version", "2")
        assert any(key.startswith("bbox_head.transformer.encoder.") for key in state)


@pytest.mark.parametrize(
    ("name", "backbone", "target"),
    [
        *(("mask_rcnn", "swin_t", target) for target in ("torchvision", "mmdet", "detectron2")),
        ("faster_rcnn", "mobilenet_v2", "detectron2"),
        ("detr", "mobilenet_v2", "detr"),
    ],
)
def test_a_backbone_without_names_there_is_refused(
    name: str, backbone: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loaded with strict=False, as files of pre-training are, other names would be no error."""
    pretrained_file(tmp_path / "p.pt", name, backbone=backbone, channels=32, width=0.25)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", "--from", "aligndet", "--to", target, str(tmp_path / "p.pt"), str(tmp_path / "o")])
    assert stopped.value.code == 2 and not (tmp_path / "o").exists()
    assert f"{target} has no counterpart of the backbone" in capsys.readouterr().err


def test_norms_of_the_pyramid_keep_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"backbone": "resnet18", "channels": 32, "neck_norm": "batch", "class_agnostic": True, "box_head": "2fc"}
    online = pretrained_file(tmp_path / "p.pt", "faster_rcnn", **small).state_dict()
    for target, weight, norm in (
        ("torchvision", "backbone.fpn.inner_blocks.1.0.weight", "backbone.fpn.inner_blocks.1.1.weight"),
        ("mmdet", "neck.lateral_convs.1.conv.weight", "neck.lateral_convs.1.bn.weight"),
        ("detectron2", "backbone.fpn_lateral3.weight", "backbone.fpn_lateral3.norm.weight"),
    ):
        state = converted(tmp_path / "p.pt", target, "--num-classes", "3")
        assert torch.equal(state[weight], online["neck.lateral.1.0.weight"])
        assert torch.equal(state[norm], online["neck.lateral.1.1.weight"])
    text = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("torchvision: backbone: "))
    body = constructed(text.removeprefix("torchvision: backbone: "))
    state = converted(tmp_path / "p.pt", "torchvision", "--num-classes", "3")
    assert {f"backbone.{key}" for key in body.fpn.state_dict() if "fpn" in key} <= set(state)
    assert not [key for key in body.state_dict() if f"backbone.{key}" not in state and "num_batches" not in key]
    pretrained_file(tmp_path / "r.pt", "retinanet", backbone="resnet18", channels=32, neck_norm="batch")
    for target in ("torchvision", "detectron2"):  # no norm after the convolutions of P6 and P7 there
        with pytest.raises(SystemExit):
            cli.main(["convert", "--from", "aligndet", "--to", target, str(tmp_path / "r.pt"), str(tmp_path / "o")])
        assert "no counterpart for neck.extra.0.0.weight [32, 512, 3, 3]" in capsys.readouterr().err
    pretrained_file(tmp_path / "f.pt", "fcos", backbone="resnet18", channels=32, neck_norm="batch")
    with pytest.raises(SystemExit):
        cli.main(["convert", "--from", "aligndet", "--to", "torchvision", str(tmp_path / "f.pt"), str(tmp_path / "o")])
    assert "no counterpart for neck.extra.0.0.weight [32, 32, 3, 3]" in capsys.readouterr().err
    for name in ("r.pt", "f.pt"):
        assert "neck.fpn_convs.3.bn.weight" in converted(tmp_path / name, "mmdet")


def test_the_box_head_of_the_paper_goes_to_detectron2_and_back(tmp_path: Path) -> None:
    """Its FastRCNNConvFCHead."""
    online = pretrained_file(tmp_path / "p.pt", "faster_rcnn", conventions="detectron2", class_agnostic=True)
    state = converted(tmp_path / "p.pt", "detectron2", "--num-classes", "4")
    assert state["roi_heads.box_head.conv4.weight"].shape == (256, 256, 3, 3)
    assert state["roi_heads.box_head.fc1.weight"].shape == (1024, 256 * 49)
    score = {"weight": torch.zeros(5, 1024), "bias": torch.zeros(5)}
    whole = state | {f"roi_heads.box_predictor.cls_score.{key}": value for key, value in score.items()}
    back = detectron2.from_state_dict("faster_rcnn_R_50_FPN", whole).state_dict()
    learned = online.state_dict()
    for key in ("head.convolutions.6.weight", "head.fully_connected.0.bias", "backbone.layer2.0.conv3.weight"):
        assert torch.equal(back[key], learned[key])


CAFFE: dict[str, Any] = {"stride_in_1x1": True, "pixel_std": (1.0, 1.0, 1.0)}
SMALL_DETR: dict[str, Any] = {
    "queries": 10,
    "channels": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "feedforward": 512,
}
IMAGENET = "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]"
FOUR = ["num_classes=4: background is counted there"]
SETTINGS: list[tuple[ModuleType, str, str, dict[str, Any], list[str]]] = [
    (peer, "fcos", "resnet50", {"conventions": "torchvision"}, ["score_thresh=0.05"]),
    (peer, "fcos", "resnet50", {"conventions": "torchvision", "score_threshold": 0.2}, []),
    (peer, "retinanet", "resnet50", {"conventions": "torchvision_v2", "score_threshold": 0.1}, ["score_thresh=0.1"]),
    (peer, "mask_rcnn", "resnet50", {"conventions": "torchvision", "box_head": "2fc"}, FOUR),
    (
        peer,
        "mask_rcnn",
        "resnet50",
        {"conventions": "torchvision", "score_threshold": 0.3, **peer.V2},
        [*FOUR, "box_score_thresh=0.3"],
    ),
    (peer, "retinanet", "resnet50", {"conventions": "torchvision_v2"}, []),
    (
        peer,
        "retinanet",
        "resnet50",
        {},
        [
            "computed otherwise there: P6, P7, sizes of anchors, places of points or anchors, the smallest boxes, "
            "detections of an image; want model.conventions=torchvision before pre-training",
            "backbone: BackboneWithFPN(resnet50(), {'layer2': '0', 'layer3': '1', 'layer4': '2'}, [512, 1024, 2048], "
            "256, extra_blocks=LastLevelP6P7(2048, 256))",
        ],
    ),
    (
        peer,
        "faster_rcnn",
        "mobilenet_v2",
        {"conventions": "torchvision", "channels": 64, "head_width": 256},
        [
            "box head: FastRCNNConvFCHead((64, 7, 7), [64, 64, 64, 64], [256])",
            "box predictor: FastRCNNPredictor(256, 4)",
            *FOUR,
            "backbone: BackboneWithFPN(mobilenet_v2().features, {'3': '0', '6': '1', '13': '2', '18': '3'}, "
            "[24, 32, 96, 1280], 64)",
        ],
    ),
    (
        peer,
        "fcos",
        "resnet50",
        {"conventions": "torchvision", "pixel_std": (51.0, 51.0, 102.0), "convolutions": 2},
        [
            "head: FCOSHead(..., num_convs=2)",
            "score_thresh=0.05",
            "images: image_mean=[0.485, 0.456, 0.406], image_std=[0.2, 0.2, 0.4]",
        ],
    ),
    (
        mmdet,
        "mask_rcnn",
        "resnet50",
        {"neck_norm": "batch"},
        [
            f"data_preprocessor: {IMAGENET}, bgr_to_rgb=True",
            "backbone: type='ResNet', depth=50, out_indices=(0, 1, 2, 3), style='pytorch'",
            "neck: in_channels=[256, 512, 1024, 2048], start_level=0, out_channels=256, num_outs=5, "
            "add_extra_convs=False, norm_cfg=dict(type='BN')",
            "roi_head.bbox_head: type='Shared4Conv1FCBBoxHead', in_channels=256, fc_out_channels=1024, "
            "reg_class_agnostic=False",
            "train_cfg.rcnn.assigner: match_low_quality=True",
        ],
    ),
    (
        mmdet,
        "fcos",
        "mobilenet_v2",
        {"width": 0.5, "levels": 4, "convolutions": 2, "channels": 64},
        [
            f"data_preprocessor: {IMAGENET}, bgr_to_rgb=True",
            "backbone: type='MobileNetV2', out_indices=(2, 4, 7), widen_factor=0.5",
            "neck: in_channels=[16, 48, 1280], start_level=0, out_channels=64, num_outs=4, add_extra_convs='on_output'",
            "bbox_head: stacked_convs=2, in_channels=64, feat_channels=64",
        ],
    ),
    (
        mmdet,
        "detr",
        "mobilenet_v2",
        SMALL_DETR,
        [
            f"data_preprocessor: {IMAGENET}, bgr_to_rgb=True",
            "backbone: type='MobileNetV2', out_indices=(7,)",
            "neck: in_channels=[1280]",
            "transformer: queries=10, channels=128, encoder_layers=2, decoder_layers=3, feedforward=512, heads=8",
        ],
    ),
    (
        mmdet,
        "retinanet",
        "resnet50",
        {**CAFFE, "conventions": "detectron2"},
        [
            "data_preprocessor: mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False",
            "backbone: type='ResNet', depth=50, out_indices=(1, 2, 3), style='caffe'",
            "neck: in_channels=[512, 1024, 2048], start_level=0, out_channels=256, num_outs=5, "
            "add_extra_convs='on_input'",
            "bbox_head: stacked_convs=4, in_channels=256, feat_channels=256",
            "computed otherwise there: P7, the smallest boxes; want model.conventions=aligndet before",
        ],
    ),
    (
        detectron2,
        "faster_rcnn",
        "resnet18",
        {"class_agnostic": True, "channels": 64, "head_width": 256, "conventions": "detectron2", "width": 0.25},
        [
            "INPUT.FORMAT: RGB",
            "MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53]",
            "MODEL.PIXEL_STD: [58.395, 57.12, 57.375]",
            "MODEL.RESNETS: DEPTH 18, STRIDE_IN_1X1 False, "
            "STEM_OUT_CHANNELS 16, RES2_OUT_CHANNELS 16, WIDTH_PER_GROUP 16",
            "MODEL.FPN: OUT_CHANNELS 64, NORM ''",
            "MODEL.ROI_BOX_HEAD: NUM_CONV 4, CONV_DIM 64, NUM_FC 1, FC_DIM 256, CLS_AGNOSTIC_BBOX_REG True",
        ],
    ),
    (
        detectron2,
        "retinanet",
        "resnet50",
        CAFFE,
        [
            "INPUT.FORMAT: BGR",
            "MODEL.PIXEL_MEAN: [103.53, 116.28, 123.675]",
            "MODEL.PIXEL_STD: [1.0, 1.0, 1.0]",
            "MODEL.RESNETS: DEPTH 50, STRIDE_IN_1X1 True, "
            "STEM_OUT_CHANNELS 64, RES2_OUT_CHANNELS 256, WIDTH_PER_GROUP 64",
            "MODEL.FPN: OUT_CHANNELS 256, NORM ''",
            "MODEL.RETINANET.NUM_CONVS: 4",
            "computed otherwise there: P7, the smallest boxes; want model.conventions=detectron2 before pre-training",
        ],
    ),
    (
        detr,
        "detr",
        "resnet18",
        SMALL_DETR,
        [
            "--backbone resnet18",
            "--num_queries 10",
            "--hidden_dim 128",
            "--enc_layers 2",
            "--dec_layers 3",
            "--dim_feedforward 512",
        ],
    ),
    (detr, "detr", "resnet50", {}, []),
]


@pytest.mark.parametrize(("library", "name", "backbone", "options", "lines"), SETTINGS)
def test_what_has_to_be_set_there_is_named(
    library: ModuleType, name: str, backbone: str, options: dict[str, Any], lines: list[str]
) -> None:
    assert library.settings(build_detector(name, backbone, 3, **options)) == lines


@pytest.mark.parametrize(
    ("library", "name", "backbone", "options", "message"),
    [
        (peer, "faster_rcnn", "resnet50", CAFFE, "in the 3 x 3 convolution of a bottleneck, got it in the first"),
        (peer, "faster_rcnn", "resnet18", {"width": 0.25}, r"begins with 64 channels \(model.width\), got 16"),
        (peer, "faster_rcnn", "resnet18", {"class_agnostic": True}, "want a box for each class, got one for all"),
        (peer, "retinanet", "resnet18", {"levels": 4}, r"5 levels \(model.levels\), got 4"),
        (peer, "retinanet", "resnet18", {"convolutions": 2}, r"RetinaNet's towers \(model.convolutions\), got 2"),
        (peer, "retinanet", "resnet18", {"channels": 512}, "both have 512 channels P6 is made of P5"),
        (detectron2, "retinanet", "resnet18", {"levels": 4}, "5 levels in all, got 4"),
        (detr, "detr", "resnet18", {"width": 0.25}, r"begins with 64 channels \(model.width\), got 16"),
    ],
)
def test_what_would_compute_something_else_there_is_refused(
    library: ModuleType, name: str, backbone: str, options: dict[str, Any], message: str
) -> None:
    """Though all of its tensors have names and shapes there."""
    with pytest.raises(ValueError, match=message):
        library.to_state_dict(build_detector(name, backbone, 3, **options))


def test_the_version_of_mmdet_is_for_mmdet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrained_file(tmp_path / "p.pt", "detr", backbone="resnet18", channels=32, feedforward=8)
    state = converted(tmp_path / "p.pt", "mmdet", "--mmdet-version", "2")
    assert any(key.startswith("bbox_head.transformer.") for key in state)
    assert f"mmdet: img_norm_cfg: {IMAGENET}, to_rgb=True" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        converted(tmp_path / "p.pt", "detr", "--mmdet-version", "2")
    assert "--mmdet-version: want it with --to mmdet only, got --to detr" in capsys.readouterr().err


def test_files_that_do_not_say_how_they_were_built_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AlignDet(build_detector("fcos", "resnet18", 1, width=0.25, channels=32))
    torch.save(export_pretrained(model), tmp_path / "p.pt")
    with pytest.raises(SystemExit):
        cli.main(["convert", "--from", "aligndet", "--to", "mmdet", str(tmp_path / "p.pt"), str(tmp_path / "o.pth")])
    assert "which says how it was built" in capsys.readouterr().err


def test_readme_s_own_steps_into_torchvision_say_what_they_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FCOS as in configs/pretrain/fcos_mobilenet_v2.yaml: its boxes have scales, torchvision's none."""
    small = {"backbone": "mobilenet_v2", "channels": 64, "convolutions": 2, "levels": 4}
    pretrained_file(tmp_path / "p.pt", "fcos", **small)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", "--from", "aligndet", "--to", "torchvision", str(tmp_path / "p.pt"), str(tmp_path / "o")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "no counterpart for predictors.box.scales [4]; want a pyramid of 5 levels (model.levels), got 4" in error
    assert "want model.conventions=torchvision, set before pre-training" in error
    pretrained_file(tmp_path / "p.pt", "fcos", **(small | {"conventions": "torchvision", "levels": 5}))
    assert "head.regression_head.bbox_reg.weight" in converted(tmp_path / "p.pt", "torchvision")
