"""Pre-trained weights for people who fine-tune elsewhere: ``aligndet convert`` into torchvision's own models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from aligndet import cli
from aligndet.models import build_detector
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
