"""Claims about other libraries' weights: the same detections, the same names and values back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from aligndet.data.transforms import read_image
from aligndet.interop import detr as detr_peer
from aligndet.interop import torchvision as peer
from aligndet.models import build_detector
from aligndet.protocol import Detector
from aligndet.structures import Detections
from aligndet.weights import export_detector, load_detector

SIZES = [(96, 160), (130, 97), (224, 200)]  # px; no multiples of 32 but one


def twin(name: str, classes: int = 7) -> Any:
    """torchvision's model with random weights that are far from their initial values, so that scores spread."""
    torch.manual_seed(3)
    build = getattr(torchvision.models.detection, name)
    model = build(weights=None, weights_backbone=None, num_classes=classes, min_size=1, max_size=10_000).eval()
    model.transform.resize = lambda image, target=None: (image, target)  # the images below are used as they are
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.7, 1.4)
        elif key.endswith("running_mean"):
            value.normal_(std=0.1)
        elif key.endswith(("cls_logits.weight", "cls_score.weight", "mask_fcn_logits.weight")):
            value.normal_(std=0.02 if "cls_logits" in key else 0.05)  # beyond, dense scores would all be 1
        elif key.endswith(("bbox_reg.weight", "bbox_pred.weight", "bbox_ctrness.weight")):
            value.normal_(std=0.01)
        elif key.endswith("num_batches_tracked"):
            value.fill_(17)
        elif "bn" in key or "downsample.1" in key:
            value.uniform_(0.6, 1.1) if key.endswith("weight") else value.normal_(std=0.05)
    with torch.no_grad():
        if name.startswith(("fcos", "retinanet")):
            model.head.classification_head.cls_logits.bias.fill_(-1.5)
            for layer in model.head.modules():
                if isinstance(layer, nn.Conv2d) and layer.out_channels == 256:
                    layer.weight.mul_(3)
    return model


def found_by(detector: Detector, image: Tensor) -> Detections:
    size = torch.tensor([image.shape[1:]])
    padded = torch.zeros(1, 3, *(-(-side // 32) * 32 for side in image.shape[1:]), dtype=torch.uint8)
    padded[0, :, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        found = detector.detect(detector.candidates(detector.features(padded, size), size), size)[0]
    height, width = int(image.shape[1]), int(image.shape[2])
    return found.resized((height, width), (height, width))


def compared(model: Any, detector: Detector, image: Tensor, offset: int) -> int:
    """Holds the detections on one image against torchvision's, whose labels are larger by ``offset``; their number."""
    with torch.no_grad():
        expected = model([image / 255])[0]
    found = found_by(detector, image)
    assert len(found) == len(expected["boxes"])
    assert (found.scores - expected["scores"]).abs().max() < 1e-4
    # Scores that agree in six digits may change places: a partner is looked for, not expected in the same row.
    close = (found.scores[:, None] - expected["scores"]).abs() < 1e-4
    close &= found.labels[:, None] + offset == expected["labels"]
    close &= (found.boxes[:, None] - expected["boxes"]).abs().amax(dim=2) < 1e-2
    assert bool(close.any(0).all()) and bool(close.any(1).all())
    if "masks" in expected:
        assert found.masks is not None
        theirs = expected["masks"][:, 0][close.int().argmax(dim=1)] >= 0.5
        both = (theirs & found.masks).flatten(1).sum(1)
        either = (theirs | found.masks).flatten(1).sum(1)
        assert bool((both >= 0.99 * either).all())
        assert int(either.sum()) > 1000
    return len(found)


@pytest.mark.parametrize("name", list(peer.MODELS))
def test_detections_and_names_equal_torchvisions(name: str, tmp_path: Any) -> None:
    model = twin(name)
    state = model.state_dict()
    detector = peer.from_state_dict(name, state)
    back = peer.to_state_dict(detector)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in state.items())
    # The same after a journey through a file.
    build = peer.build_arguments(name, state)
    torch.save(export_detector(detector, [f"class_{i}" for i in range(build["num_classes"])], build), tmp_path / "m.pt")
    detector, _ = load_detector(tmp_path / "m.pt")
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in SIZES]
    number = sum(compared(model, detector, image, 1 if "rcnn" in name else 0) for image in images)
    assert number > 100


@pytest.mark.parametrize("name", list(peer.MODELS))
def test_detections_on_photographs_equal_torchvisions(name: str, shared: Path) -> None:
    model = twin(name)
    detector = peer.from_state_dict(name, model.state_dict())
    number = 0
    for path in sorted((shared / "data" / "coco_by_masks" / "train").glob("*.jpg"))[:2]:
        image = torch.from_numpy(read_image(path)).permute(2, 0, 1)[:, 40:215, 30:301].contiguous()
        number += compared(model, detector, image, 1 if "rcnn" in name else 0)
    assert number > 50


def test_files_with_former_names_are_read_with_their_norms() -> None:
    state = {k: v for k, v in twin("maskrcnn_resnet50_fpn").state_dict().items() if "num_batches" not in k}
    former = {}
    for key, value in state.items():
        key = key.replace("rpn.head.conv.0.0", "rpn.head.conv")
        if "inner_blocks" in key or "layer_blocks" in key:
            key = key.replace(".0.weight", ".weight", 1) if key.count(".0.weight") else key.replace(".0.bias", ".bias")
        if "mask_head" in key:
            block = int(key.split(".")[2])
            key = f"roi_heads.mask_head.mask_fcn{block + 1}.{key.split('.')[-1]}"
        former[key] = value
    assert set(former) != set(state)
    detector = peer.from_state_dict("maskrcnn_resnet50_fpn", former)
    assert detector.backbone.bn1.eps == 0  # type: ignore[union-attr]
    assert peer.from_state_dict("maskrcnn_resnet50_fpn", state).backbone.bn1.eps == 1e-5  # type: ignore[union-attr]
    back = peer.to_state_dict(detector)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_what_does_not_fit_is_listed() -> None:
    state = dict(twin("retinanet_resnet50_fpn").state_dict())
    state["head.more.weight"] = torch.zeros(3, 5)
    del state["backbone.fpn.extra_blocks.p6.bias"]
    with pytest.raises(ValueError, match=r"head\.more\.weight \[3, 5\].*neck\.extra\.0\.bias \[256\]"):
        peer.from_state_dict("retinanet_resnet50_fpn", state)
    with pytest.raises(ValueError, match="want one of fcos_resnet50_fpn"):
        peer.from_state_dict("ssd300", state)
    with pytest.raises(ValueError, match="no counterpart of DETR"):
        peer.to_state_dict(build_detector("detr", "resnet18", channels=32, feedforward=8))
    with pytest.raises(ValueError, match=r"predictors\.box\.scales \[5\]"):
        peer.to_state_dict(build_detector("fcos", "resnet50"))


@pytest.mark.parametrize("conventions", ["torchvision", "detectron2", "mmdet"])
def test_unknown_conventions_are_named(conventions: str) -> None:
    with pytest.raises(ValueError, match=r"conventions: want one of aligndet, .*got 'tochvision'"):
        build_detector("faster_rcnn", "resnet18", conventions="tochvision")
    assert build_detector("faster_rcnn", "resnet18", conventions=conventions, channels=32)


def test_detr_comes_and_goes_under_the_references_names() -> None:
    """The reference's names, written down from its modules; nn.Transformer gives the same ones for its layers."""
    torch.manual_seed(0)
    transformer = nn.Transformer(256, 8, 6, 6, 2048, batch_first=True)
    state = {f"transformer.{k}": v for k, v in transformer.state_dict().items() if "encoder.norm" not in k}
    body = build_detector("detr", "resnet50").backbone.state_dict()
    state |= {f"backbone.0.body.{key}": torch.randn_like(value) for key, value in body.items()}
    shapes = {"query_embed.weight": (100, 256), "class_embed.weight": (92, 256), "class_embed.bias": (92,)}
    shapes |= {"input_proj.weight": (256, 2048, 1, 1), "input_proj.bias": (256,)}
    for i, width in enumerate((256, 256, 4)):
        shapes |= {f"bbox_embed.layers.{i}.weight": (width, 256), f"bbox_embed.layers.{i}.bias": (width,)}
    state |= {key: torch.randn(shape) for key, shape in shapes.items()}
    detector = detr_peer.from_state_dict("detr_resnet50", state)
    back = detr_peer.to_state_dict(detector)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    del state["query_embed.weight"]
    with pytest.raises(ValueError, match=r"want query_embed\.weight"):
        detr_peer.from_state_dict("detr_resnet50", state)
