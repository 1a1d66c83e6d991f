"""torchvision's detection models with a feature pyramid: ResNet-50 to and fro, other ResNets and MobileNetV2 to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aligndet.interop.renaming import Change, Pair, fill, names_there, rolled
from aligndet.interop.wanted import (
    Pyramidal,
    any_class,
    depth_of,
    no_backbone,
    normed_neck,
    other_resnet,
    otherwise,
    shares_line,
    towers_of,
)
from aligndet.models import FCOS, RetinaNet, build_detector
from aligndet.models.backbones import MobileNetV2, ResNet
from aligndet.models.backbones.mobilenet import OUTPUTS
from aligndet.models.conventions import ANCHORS, DENSE, REGIONS
from aligndet.models.roi_head import BOX_HEADS
from aligndet.models.two_stage import TwoStage
from aligndet.protocol import Detector

# Arguments of build_detector for each builder of torchvision.
V2 = {"box_head": "4conv1fc", "neck_norm": "batch", "head_norm": "batch", "rpn_depth": 2}
MODELS: dict[str, dict[str, Any]] = {
    "fcos_resnet50_fpn": {"name": "fcos", "score_threshold": 0.2},
    "retinanet_resnet50_fpn": {"name": "retinanet"},
    "retinanet_resnet50_fpn_v2": {"name": "retinanet", "conventions": "torchvision_v2"},
    "fasterrcnn_resnet50_fpn": {"name": "faster_rcnn", "box_head": "2fc"},
    "fasterrcnn_resnet50_fpn_v2": {"name": "faster_rcnn", **V2},
    "maskrcnn_resnet50_fpn": {"name": "mask_rcnn", "box_head": "2fc"},
    "maskrcnn_resnet50_fpn_v2": {"name": "mask_rcnn", **V2},
}
# Names of the first published files, which torchvision still reads, and what they became.
FORMER = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2"),
)
FORMER_TOWER = r"^(head\.(?:classification|regression)_head\.conv)\.(\d+)\.(weight|bias)$"
FORMER_MASK = r"^(roi_heads\.mask_head)\.mask_fcn(\d+)\.(weight|bias)$"


def from_state_dict(name: str, state_dict: Mapping[str, Tensor], norm_eps: float | None = None) -> Detector:
    """The detector that computes what torchvision's computes with these weights, in evaluation mode.

    Labels of FCOS and RetinaNet are torchvision's; those of Faster and Mask R-CNN are one less, since background, their
    class 0, is none here. Batch norms of the backbone are trained ones where the weights count batches, else frozen.

    Args:
        name: one of MODELS, the name of torchvision's builder.
        state_dict: of such a model with any number of classes, or of a file published under the names of the time.
        norm_eps: of the backbone's batch norms; None: 0 for files with the former names, as torchvision does for its
            published weights, else 1e-5.

    Raises:
        ValueError: an unknown name, or tensors without a counterpart, listed with their shapes.
    """
    build = build_arguments(name, state_dict, norm_eps)
    state, _ = _current(name, state_dict)
    detector = build_detector(**build)
    pairs, changes = _names(detector)
    return fill(detector, state, pairs, changes, f"torchvision {name}")


def build_arguments(
    name: str, state_dict: Mapping[str, Tensor], norm_eps: float | None = None, num_classes: int | None = None
) -> dict[str, Any]:
    """The arguments of ``build_detector`` for weights of torchvision; ``num_classes`` is read from them."""
    if name not in MODELS:
        raise ValueError(f"torchvision: want one of {', '.join(MODELS)}, got {name!r}")
    state, former = _current(name, state_dict)
    dense = MODELS[name]["name"] in ("fcos", "retinanet")
    key = "head.classification_head.cls_logits.bias" if dense else "roi_heads.box_predictor.cls_score.bias"
    if key not in state:
        raise ValueError(f"torchvision {name}: want {key} among the names, got {', '.join(list(state)[:5])}")
    outputs = len(state[key])
    classes = outputs // 9 if MODELS[name]["name"] == "retinanet" else outputs if dense else outputs - 1
    trained = any(item.startswith("backbone.body.") and item.endswith("num_batches_tracked") for item in state)
    eps = 0.0 if norm_eps is None and former else norm_eps
    return {
        "backbone": "resnet50",
        "num_classes": classes,
        "norm": "batch" if trained else "frozen",
        "conventions": "torchvision",
        **({} if eps is None else {"norm_eps": eps}),
        **MODELS[name],
    }


def to_state_dict(detector: Detector) -> dict[str, Tensor]:
    """The detector's tensors under torchvision's names, ready for ``load_state_dict`` of its model.

    Exact in the values; ``settings`` says what the model has to be built with to compute the same.

    Raises:
        ValueError: torchvision has no place for some tensors, listed with their shapes; or it has one, and computes
            something else with them whatever it is told.
    """
    pairs, changes = _names(detector)
    wrong, state = _computed_otherwise(detector), {}
    try:
        state = names_there(detector, pairs, changes)
    except ValueError as error:
        wrong.insert(0, str(error))
    if wrong:
        linear = not isinstance(detector, FCOS) or detector.rules.linear
        advice = "" if linear else "; want model.conventions=torchvision, set before pre-training"
        raise ValueError(f"torchvision: {'; '.join(wrong)}{advice}")
    return state


def _computed_otherwise(detector: Detector) -> list[str]:
    """What no model of torchvision computes, although tensors of the same names and shapes may be there."""
    wrong = other_resnet(detector.backbone)
    if isinstance(detector, TwoStage) and any_class(detector):
        wrong += ["want a box for each class, got one for all"]
    if isinstance(detector, (FCOS, RetinaNet)) and len(detector.strides) != 5:
        wrong += [f"want a pyramid of 5 levels (model.levels), got {len(detector.strides)}"]
    if isinstance(detector, RetinaNet) and towers_of(detector) != 4:
        wrong += [f"want 4 convolutions in RetinaNet's towers (model.convolutions), got {towers_of(detector)}"]
    if isinstance(detector, RetinaNet) and (detector.rules.extra, detector.neck.inputs[-1]) == (
        "input",
        detector.channels,
    ):
        wrong += [f"where C5 and P5 both have {detector.channels} channels P6 is made of P5, got P6 of C5"]
    return wrong


def settings(detector: Detector) -> list[str]:
    """What the model there has to be built with, a line each, to compute with these weights what ``detector`` does.

    Raises:
        ValueError: torchvision has no such detector or backbone.
    """
    _names(detector)
    advice = "want model.conventions=torchvision before pre-training"
    if isinstance(detector, FCOS):
        lines = otherwise(detector.rules, DENSE["torchvision"], advice)
        lines += [f"head: FCOSHead(..., num_convs={towers_of(detector)})"] if towers_of(detector) != 4 else []
    elif isinstance(detector, RetinaNet):
        row = "torchvision_v2" if detector.rules.norm else "torchvision"
        lines = otherwise(detector.rules, ANCHORS[row], advice)
    else:
        assert isinstance(detector, TwoStage)
        lines = otherwise(detector.rules, REGIONS["torchvision"], advice) + _box_head(detector)
    return [*lines, *_numbers(detector), *shares_line(detector), *_backbone(detector)]


def _numbers(detector: Pyramidal) -> list[str]:
    """Arguments of the builders whose defaults are others: classes, the least score, sizes of images."""
    lines, two_stage = [], isinstance(detector, TwoStage)
    if two_stage:
        lines += [f"num_classes={_outputs(detector)}: background is counted there"]
    name, usual = (
        ("box_score_thresh", 0.05) if two_stage else ("score_thresh", 0.2 if isinstance(detector, FCOS) else 0.05)
    )
    if detector.score_threshold != usual:
        lines += [f"{name}={detector.score_threshold:g}"]
    if (detector.short_side, detector.long_side) != (Detector.short_side, Detector.long_side):
        lines += [f"min_size={detector.short_side}, max_size={detector.long_side}"]
    return lines


def _outputs(detector: Pyramidal) -> int:
    """Rows of the class scores of a two-stage detector: its classes and background."""
    return len(detector.predictors["score"].bias)  # type: ignore[arg-type]


def _backbone(detector: Pyramidal) -> list[str]:
    """The constructor of a backbone that the builders do not make by themselves; it can be evaluated."""
    inputs, channels = detector.neck.inputs, detector.channels
    usual = normed_neck(detector) == (isinstance(detector, TwoStage) and detector.head_norm is not None)
    from_c5 = isinstance(detector, RetinaNet) and detector.rules.extra == "input"
    if isinstance(detector, RetinaNet):
        usual = usual and from_c5 == detector.rules.norm
    if isinstance(detector.backbone, ResNet):
        if usual and channels == 256 and depth_of(detector.backbone) == 50:
            return []
        body, layers = f"resnet{depth_of(detector.backbone)}()", [f"layer{i}" for i in range(1, 5)]
    else:
        assert isinstance(detector.backbone, MobileNetV2)
        width = detector.backbone.width
        body = f"mobilenet_v2({'' if width == 1 else f'width_mult={width}'}).features"
        layers = [str(layer) for layer in OUTPUTS]
    levels = {name: str(number) for number, name in enumerate(layers[-len(inputs) :])}
    words = [body, str(levels), str(list(inputs)), str(channels)]
    if not isinstance(detector, TwoStage):
        words += [f"extra_blocks=LastLevelP6P7({inputs[-1] if from_c5 else channels}, {channels})"]
    words += ["norm_layer=BatchNorm2d"] if normed_neck(detector) else []
    return [f"backbone: BackboneWithFPN({', '.join(words)})"]


def _box_head(detector: TwoStage) -> list[str]:
    """Box heads that the builders do not make by themselves."""
    width, normed, channels = detector.head.width, detector.head_norm is not None, detector.channels
    if detector.box_head == "2fc":
        line = f"box head: TwoMLPHead({49 * channels}, {width})"
        usual = not normed
    else:
        norm = ", norm_layer=BatchNorm2d" if normed else ""
        line = f"box head: FastRCNNConvFCHead(({channels}, 7, 7), {[channels] * 4}, [{width}]{norm})"
        usual = normed
    if usual and width == 1024:
        return []
    return [line] if width == 1024 else [line, f"box predictor: FastRCNNPredictor({width}, {_outputs(detector)})"]


def _names(detector: Detector) -> tuple[list[Pair], list[Change]]:
    if isinstance(detector, FCOS):
        return [_body(detector), *_pyramid(normed_neck(detector)), *_fcos()], []
    if isinstance(detector, RetinaNet):
        step = 3 if detector.rules.norm else 2
        return [_body(detector), *_pyramid(normed_neck(detector)), *_retinanet(step)], []
    if isinstance(detector, TwoStage):
        changes = [rolled("predictors.score.", 1)]
        if detector.rules.spare:
            changes += [rolled("predictors.box.", 4), rolled("predictors.mask.", 1)]
        return [_body(detector), *_pyramid(normed_neck(detector)), *_two_stage(detector)], changes
    raise ValueError(f"torchvision has no counterpart of {type(detector).__name__}")


def _body(detector: Detector) -> Pair:
    if isinstance(detector.backbone, ResNet):
        return ("backbone.", "backbone.body.")
    if isinstance(detector.backbone, MobileNetV2):
        return ("backbone.features.", "backbone.body.")
    raise no_backbone("torchvision", detector, "a ResNet or MobileNetV2")


def _pyramid(normed: bool) -> list[Pair]:
    """Without a norm a layer here is the first of a block there."""
    pairs = []
    for ours, theirs in (("neck.lateral", "backbone.fpn.inner_blocks"), ("neck.output", "backbone.fpn.layer_blocks")):
        pairs += [(f"{ours}.{i}.", f"{theirs}.{i}." if normed else f"{theirs}.{i}.0.") for i in range(4)]
    if normed:  # coarser levels have no norm there
        return pairs
    return [*pairs, *((f"neck.extra.{i}.", f"backbone.fpn.extra_blocks.p{i + 6}.") for i in range(2))]


def _fcos() -> list[Pair]:
    return [
        ("head.classification.", "head.classification_head.conv."),
        ("head.box.", "head.regression_head.conv."),
        ("predictors.score.", "head.classification_head.cls_logits."),
        ("predictors.box.convolution.", "head.regression_head.bbox_reg."),
        ("predictors.centerness.", "head.regression_head.bbox_ctrness."),
    ]


def _retinanet(step: int) -> list[Pair]:
    pairs = [
        ("predictors.score.", "head.classification_head.cls_logits."),
        ("predictors.box.", "head.regression_head.bbox_reg."),
    ]
    for ours, theirs in (("classification", "classification"), ("box", "regression")):
        pairs += _blocks(f"head.{ours}", f"head.{theirs}_head.conv", step)
    return pairs


def _two_stage(detector: TwoStage) -> list[Pair]:
    step = 2 if detector.head_norm is None else 3
    convolutions, layers = BOX_HEADS[detector.box_head]
    box = "roi_heads.box_head"
    full = [f"{box}.fc6.", f"{box}.fc7."] if layers == 2 else [f"{box}.{convolutions + 1}."]
    return [
        ("rpn.score.", "rpn.head.cls_logits."),
        ("rpn.box.", "rpn.head.bbox_pred."),
        *_blocks("rpn.tower", "rpn.head.conv", 2),
        *_blocks("head.convolutions", box, step),
        *((f"head.fully_connected.{i}.", there) for i, there in enumerate(full)),
        ("predictors.score.", "roi_heads.box_predictor.cls_score."),
        ("predictors.box.", "roi_heads.box_predictor.bbox_pred."),
        *_blocks("mask_head.convolutions", "roi_heads.mask_head", step),
        ("mask_head.upsample.", "roi_heads.mask_predictor.conv5_mask."),
        ("predictors.mask.", "roi_heads.mask_predictor.mask_fcn_logits."),
    ]


def _blocks(ours: str, theirs: str, step: int) -> list[Pair]:
    """Four blocks of convolution, norm (where ``step`` is 3) and ReLU, in one row here, each by itself there."""
    return [(f"{ours}.{step * i + part}.", f"{theirs}.{i}.{part}.") for i in range(4) for part in range(step - 1)]


def _current(name: str, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The tensors under today's names, and whether they had others."""
    state = {}
    for key, value in state_dict.items():
        renamed = key
        for pattern, replacement in FORMER:
            renamed = re.sub(pattern, replacement, renamed)
        tower = re.match(FORMER_TOWER, key)
        if tower and name.startswith("retinanet"):
            renamed = f"{tower[1]}.{int(tower[2]) // 2}.0.{tower[3]}"
        mask = re.match(FORMER_MASK, key)
        if mask:
            renamed = f"{mask[1]}.{int(mask[2]) - 1}.0.{mask[3]}"
        state[renamed] = value
    return state, list(state) != list(state_dict)
