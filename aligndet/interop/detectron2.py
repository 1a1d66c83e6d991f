"""detectron2's model zoo: RetinaNet, Faster and Mask R-CNN with a feature pyramid on its ResNet-50 and -101."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aligndet.interop.renaming import Change, Pair, fill, names_there, reordered
from aligndet.interop.wanted import (
    CAFFE_STD,
    any_class,
    depth_of,
    no_backbone,
    normed_neck,
    otherwise,
    pixels_of,
    towers_of,
)
from aligndet.models import RetinaNet, build_detector
from aligndet.models.backbones import ResNet
from aligndet.models.conventions import ANCHORS, REGIONS
from aligndet.models.roi_head import BOX_HEADS
from aligndet.models.two_stage import TwoStage
from aligndet.protocol import Detector

NAME = re.compile(r"^(retinanet|faster_rcnn|mask_rcnn)_R_(50|101)_FPN(?:_|$)")
# Constants that older files hold beside the weights.
CONSTANTS = re.compile(r"(^pixel_(mean|std)$|anchor_generator\.cell_anchors\.)")
PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB here, BGR there


def from_state_dict(name: str, state_dict: Mapping[str, Tensor]) -> Detector:
    """The detector that computes what detectron2's computes with these weights, in evaluation mode.

    The models of its zoo: images BGR with mean 103.53, 116.28, 123.675 and without scaling, the stride of a bottleneck
    in its first convolution, frozen batch norm.

    Args:
        name: e.g. "mask_rcnn_R_50_FPN_3x".
        state_dict: of the model; files hold it under "model". Anchors and pixel statistics in it are left out.

    Raises:
        ValueError: an unknown name, or tensors without a counterpart, listed with their shapes.
    """
    detector = build_detector(**build_arguments(name, state_dict))
    state = {key: value for key, value in state_dict.items() if not CONSTANTS.search(key)}
    pairs, changes = _names(detector)
    return fill(detector, state, pairs, changes, f"detectron2 {name}")


def build_arguments(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``build_detector`` for weights of detectron2."""
    match = NAME.match(name)
    if match is None:
        raise ValueError(f"detectron2: want a name like retinanet_R_50_FPN of {NAME.pattern}, got {name!r}")
    dense = match[1] == "retinanet"
    box_head = "4conv1fc" if "roi_heads.box_head.conv1.weight" in state_dict else "2fc"
    key = "head.cls_score.bias" if dense else "roi_heads.box_predictor.cls_score.bias"
    if key not in state_dict:
        raise ValueError(f"detectron2 {name}: want {key} among the names, got {', '.join(list(state_dict)[:5])}")
    outputs = len(state_dict[key])
    if dense and outputs % 9:
        raise ValueError(f"detectron2 {name}: {key}: want a multiple of 9 anchors, got {outputs} scores")
    return {
        "name": match[1],
        "backbone": f"resnet{match[2]}",
        "num_classes": outputs // 9 if dense else outputs - 1,
        "stride_in_1x1": True,
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": CAFFE_STD,
        "conventions": "detectron2",
        **({} if dense else {"box_head": box_head}),
    }


def to_state_dict(detector: Detector) -> dict[str, Tensor]:
    """The detector's tensors under detectron2's names; exact.

    Raises:
        ValueError: detectron2 has no place for some tensors, listed with their shapes.
    """
    pairs, changes = _names(detector)
    state = names_there(detector, pairs, changes)
    if isinstance(detector, RetinaNet) and len(detector.strides) != 5:
        raise ValueError(f"detectron2: its pyramid has P6 and P7, 5 levels in all, got {len(detector.strides)}")
    return state


def settings(detector: Detector) -> list[str]:
    """What the config there has to say, a line each, to compute with these weights what ``detector`` does.

    Raises:
        ValueError: detectron2 has no such detector or backbone.
    """
    _names(detector)
    backbone, advice = detector.backbone, "want model.conventions=detectron2 before pre-training"
    assert isinstance(backbone, ResNet) and isinstance(detector, (RetinaNet, TwoStage))
    blue_first, mean, std = pixels_of(detector)
    stem = backbone.conv1.out_channels
    lines = [
        f"INPUT.FORMAT: {'BGR' if blue_first else 'RGB'}",
        f"MODEL.PIXEL_MEAN: {mean}",
        f"MODEL.PIXEL_STD: {std}",
        f"MODEL.RESNETS: DEPTH {depth_of(backbone)}, STRIDE_IN_1X1 {backbone.stride_in_1x1}, STEM_OUT_CHANNELS {stem}, "
        f"RES2_OUT_CHANNELS {backbone.channels[0]}, WIDTH_PER_GROUP {stem}",
        f"MODEL.FPN: OUT_CHANNELS {detector.channels}, NORM {'BN' if normed_neck(detector) else repr('')}",
    ]
    if isinstance(detector, RetinaNet):
        lines += [f"MODEL.RETINANET.NUM_CONVS: {towers_of(detector)}"]
        return lines + otherwise(detector.rules, ANCHORS["detectron2"], advice)
    convolutions, layers = BOX_HEADS[detector.box_head]
    lines += [
        f"MODEL.ROI_BOX_HEAD: NUM_CONV {convolutions}, CONV_DIM {detector.channels}, NUM_FC {layers}, "
        f"FC_DIM {detector.head.width}, CLS_AGNOSTIC_BBOX_REG {any_class(detector)}"
    ]
    return lines + otherwise(detector.rules, REGIONS["detectron2"], advice)


def _names(detector: Detector) -> tuple[list[Pair], list[Change]]:
    changes = [reordered("backbone.conv1.", (2, 1, 0), dim=1)] if detector.pixel_std == CAFFE_STD else []
    if isinstance(detector, RetinaNet):
        pairs = _backbone(detector) + _pyramid(3, normed_neck(detector)) + _retinanet()
        each = detector.shapes.per_cell
        score, box = (len(detector.predictors[name].bias) // each for name in ("score", "box"))  # type: ignore[arg-type]
        sizes = {"predictors.score.": score, "predictors.box.": box}
        return pairs, changes + [reordered(prefix, _anchor_order(size)) for prefix, size in sizes.items()]
    if isinstance(detector, TwoStage):
        pairs = _backbone(detector) + _pyramid(2, normed_neck(detector)) + _two_stage(*BOX_HEADS[detector.box_head])
        return pairs, changes
    wanted = "want RetinaNet, FasterRCNN or MaskRCNN"
    raise ValueError(f"detectron2 has no counterpart of {type(detector).__name__}; {wanted}")


def _anchor_order(outputs: int) -> list[int]:
    """Rows there of the rows here: its nine anchors run over ratios first, ours over sizes first."""
    return [(size * 3 + ratio) * outputs + k for ratio in range(3) for size in range(3) for k in range(outputs)]


def _backbone(detector: Detector) -> list[Pair]:
    backbone = detector.backbone
    if not isinstance(backbone, ResNet):
        raise no_backbone("detectron2", detector, "a ResNet")
    root = "backbone.bottom_up"
    pairs = [("backbone.conv1.", f"{root}.stem.conv1."), ("backbone.bn1.", f"{root}.stem.conv1.norm.")]
    for stage, layer in enumerate((backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4), 1):
        for block in range(len(layer)):
            here, there = f"backbone.layer{stage}.{block}", f"{root}.res{stage + 1}.{block}"
            for i in range(1, 4):
                pairs += [(f"{here}.conv{i}.", f"{there}.conv{i}."), (f"{here}.bn{i}.", f"{there}.conv{i}.norm.")]
            pairs += [
                (f"{here}.downsample.0.", f"{there}.shortcut."),
                (f"{here}.downsample.1.", f"{there}.shortcut.norm."),
            ]
    return pairs


def _pyramid(first: int, normed: bool) -> list[Pair]:
    # Coarser levels have no norm there.
    pairs = [] if normed else [(f"neck.extra.{i}.", f"backbone.top_block.p{i + 6}.") for i in range(2)]
    for part, level in ((part, level) for part in ("lateral", "output") for level in range(first, 6)):
        here, there = f"neck.{part}.{level - first}.", f"backbone.fpn_{part}{level}."
        pairs += [(f"{here}0.", there), (f"{here}1.", f"{there}norm.")] if normed else [(here, there)]
    return pairs


def _retinanet() -> list[Pair]:
    return [
        ("head.classification.", "head.cls_subnet."),
        ("head.box.", "head.bbox_subnet."),
        ("predictors.score.", "head.cls_score."),
        ("predictors.box.", "head.bbox_pred."),
    ]


def _two_stage(convolutions: int, layers: int) -> list[Pair]:
    box = "roi_heads.box_head"
    return [
        ("rpn.tower.0.", "proposal_generator.rpn_head.conv."),
        ("rpn.score.", "proposal_generator.rpn_head.objectness_logits."),
        ("rpn.box.", "proposal_generator.rpn_head.anchor_deltas."),
        *((f"head.convolutions.{2 * i}.", f"{box}.conv{i + 1}.") for i in range(convolutions)),
        *((f"head.fully_connected.{i}.", f"{box}.fc{i + 1}.") for i in range(layers)),
        ("predictors.score.", "roi_heads.box_predictor.cls_score."),
        ("predictors.box.", "roi_heads.box_predictor.bbox_pred."),
        *((f"mask_head.convolutions.{2 * i}.", f"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(4)),
        ("mask_head.upsample.", "roi_heads.mask_head.deconv."),
        ("predictors.mask.", "roi_heads.mask_head.predictor."),
    ]
