"""Pre-trained weights for people who fine-tune elsewhere: ``aligndet convert`` into torchvision's own models."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from aligndet import cli
from aligndet.interop import detectron2
from aligndet.models import DETECTORS, build_detector
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.weights import export_pretrained

MODELS = {
    "fcos": ("fcos_resnet50_fpn", {}),
    "retinanet": ("retinanet_resnet50_fpn", {}),
    "faster_rcnn": ("fasterrcnn_resnet50_fpn", {"box_head": "2fc"}),
    "mask_rcnn": ("maskrcnn_resnet50_fpn", {"box_head": "2fc"}),
}


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
    out = capsys.readouterr().out
    assert "torchvision: sizes: channels 32 (usual 256)\n" in out and "want model.conventions" not in out
    said = re.search(r"return_layers=(\{.*\}), \.\.\.", out)
    assert said is not None
    layers, channels = ast.literal_eval(said[1]), {"3": 24, "6": 32, "13": 96, "18": 1280}
    extra = None if name.endswith("rcnn") else LastLevelP6P7(32, 32)
    features = torchvision.models.mobilenet_v2(weights=None).features
    body = BackboneWithFPN(features, layers, [channels[layer] for layer in layers], 32, extra)
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
def test_a_mobilenet_has_mmdet_s_names_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"backbone": "mobilenet_v2", "channels": 32} | ({"class_agnostic": True} if name.endswith("rcnn") else {})
    pretrained_file(tmp_path / "p.pt", name, **small)
    state = converted(tmp_path / "p.pt", "mmdet")
    convolutions = mobilenet_of_mmdet()
    found = {key.removesuffix(".weight"): value for key, value in state.items() if value.ndim == 4}
    assert {key: tuple(value.shape) for key, value in found.items() if key.startswith("backbone.")} == convolutions
    for key, shape in convolutions.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert state[f"{key.removesuffix('conv')}bn.{part}"].shape == shape[:1]
    assert "bgr_to_rgb=True" in capsys.readouterr().out
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
    assert "detectron2: MODEL.FPN.NORM: BN" in capsys.readouterr().out
    pretrained_file(tmp_path / "r.pt", "retinanet", backbone="resnet18", channels=32, neck_norm="batch")
    for target in ("torchvision", "detectron2"):  # no norm after the convolutions of P6 and P7 there
        with pytest.raises(SystemExit):
            cli.main(["convert", "--from", "aligndet", "--to", target, str(tmp_path / "r.pt"), str(tmp_path / "o")])
        assert "no counterpart for neck.extra.0.0.weight [32, 512, 3, 3]" in capsys.readouterr().err
    assert "neck.fpn_convs.3.bn.weight" in converted(tmp_path / "r.pt", "mmdet")


def test_the_box_head_of_the_paper_goes_to_detectron2_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its FastRCNNConvFCHead; what its config has to say is printed."""
    online = pretrained_file(tmp_path / "p.pt", "faster_rcnn", conventions="detectron2", class_agnostic=True)
    state = converted(tmp_path / "p.pt", "detectron2", "--num-classes", "4")
    assert state["roi_heads.box_head.conv4.weight"].shape == (256, 256, 3, 3)
    assert state["roi_heads.box_head.fc1.weight"].shape == (1024, 256 * 49)
    said = capsys.readouterr().out.splitlines()
    assert {"detectron2: INPUT.FORMAT: RGB", "detectron2: MODEL.RESNETS.STRIDE_IN_1X1: False"} <= set(said)
    assert {
        "detectron2: MODEL.PIXEL_STD: [58.395, 57.12, 57.375]",
        "detectron2: MODEL.ROI_BOX_HEAD: NUM_CONV 4, NUM_FC 1",
    } <= set(said)
    score = {"weight": torch.zeros(5, 1024), "bias": torch.zeros(5)}
    whole = state | {f"roi_heads.box_predictor.cls_score.{key}": value for key, value in score.items()}
    back = detectron2.from_state_dict("faster_rcnn_R_50_FPN", whole).state_dict()
    learned = online.state_dict()
    for key in ("head.convolutions.6.weight", "head.fully_connected.0.bias", "backbone.layer2.0.conv3.weight"):
        assert torch.equal(back[key], learned[key])


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
    assert "no counterpart for predictors.box.scales [4]; want model.conventions=torchvision" in error
    assert "before pre-training" in error
    pretrained_file(tmp_path / "p.pt", "fcos", **small, conventions="torchvision")
    assert "head.regression_head.bbox_reg.weight" in converted(tmp_path / "p.pt", "torchvision")
