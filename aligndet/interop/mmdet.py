"""mmdet 2.x and 3.x: FCOS, RetinaNet, Faster and Mask R-CNN and DETR on ResNets; AlignDet's published files, too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aligndet.interop.renaming import Change, Pair, fill, names_there, reordered, transformer_pairs
from aligndet.interop.wanted import (
    CAFFE_STD,
    any_class,
    depth_of,
    detr_sizes,
    no_backbone,
    normed_neck,
    otherwise,
    pixels_of,
    towers_of,
)
from aligndet.models import DETR, FCOS, RetinaNet, build_detector
from aligndet.models.backbones import MobileNetV2, ResNet
from aligndet.models.conventions import ANCHORS, DENSE, REGIONS
from aligndet.models.roi_head import BOX_HEADS
from aligndet.models.two_stage import TwoStage
from aligndet.protocol import Detector

# mmdet's names of configs, with underscores or hyphens and anything after the part that matters.
NAME = re.compile(r"^(fcos|retinanet|faster_rcnn|mask_rcnn|detr)_r(18|34|50|101)(_caffe)?(?:_|$)")
CAFFE_MEAN = {"fcos": (122.7717, 115.9465, 102.9801)}  # RGB, of 0 .. 255; the others' is the usual one
LAYER = ("conv", "bn")
MOBILENET = (1, 2, 3, 4, 3, 3, 1)  # blocks of each of MobileNetV2's layers
SCORE = {"fcos": "conv_cls", "retinanet": "retina_cls", "detr": "fc_cls"}
SCALE = re.compile(r"^bbox_head\.scales\.(\d+)\.scale$")
# Layers that AlignDet's published files have for pre-training only: projections and pseudo-classes.
DROPPED = re.compile(r"(projector|embedding_head|cls_branches|obj_branches|reg_branches|retina_cls|conv_cls|fc_cls)")
BRANCH = re.compile(r"^(.+\.)backbone\.conv1\.weight$")


def from_state_dict(name: str, state_dict: Mapping[str, Tensor], num_classes: int | None = None) -> Detector:
    """The detector that computes what mmdet's computes with these weights, in evaluation mode.

    A checkpoint of AlignDet's pre-training holds several branches; the online one is taken, and its projection is
    left out. Such files have no class layer: scores (and layers of another shape) keep their random values.

    Args:
        name: as mmdet's configs are called: detector, "r" with the depth, "caffe" where the backbone is,
            e.g. "retinanet_r50_fpn", "fcos_r50_caffe_fpn_gn-head_1x_coco".
        state_dict: of the model; files hold it under "state_dict".
        num_classes: K of a file without a class layer (80); for others it must be None.

    Raises:
        ValueError: an unknown name, or tensors without a counterpart, listed with their shapes.
    """
    state, pretrained = _online(state_dict, num_classes)
    detector = build_detector(**_arguments(name, state, num_classes))
    pairs, changes = _names(detector, new=_is_new(state))
    if isinstance(detector, DETR) and not detector.head.encoder:
        raise ValueError(f"mmdet {name}: no encoder layer among the names")
    source = f"mmdet {name}"
    return fill(detector, _stacked(state), pairs, changes, source, fresh="predictors." if pretrained else None)


def build_arguments(name: str, state_dict: Mapping[str, Tensor], num_classes: int | None = None) -> dict[str, Any]:
    """The arguments of ``build_detector`` for weights of mmdet."""
    return _arguments(name, _online(state_dict, num_classes)[0], num_classes)


def to_state_dict(detector: Detector, version: int = 3) -> dict[str, Tensor]:
    """The detector's tensors under mmdet's names; exact. The major ``version`` matters for DETR only.

    Raises:
        ValueError: mmdet has no place for some tensors, listed with their shapes; or another version than 2 or 3.
    """
    if version not in (2, 3):
        raise ValueError(f"version: want 2 or 3, got {version}")
    pairs, changes = _names(detector, new=version == 3)
    found = names_there(detector, pairs, changes)
    scales = found.pop("bbox_head.scales", None)
    if scales is not None:
        found |= {f"bbox_head.scales.{i}.scale": scale.clone() for i, scale in enumerate(scales)}
    return found


def settings(detector: Detector, version: int = 3) -> list[str]:
    """What the config there has to say, a line each, to compute with these weights what ``detector`` does.

    Raises:
        ValueError: mmdet has no such detector or backbone.
    """
    _names(detector, new=version == 3)
    blue_first, mean, std = pixels_of(detector)
    loader, order = ("data_preprocessor", "bgr_to_rgb") if version == 3 else ("img_norm_cfg", "to_rgb")
    lines = [f"{loader}: mean={mean}, std={std}, {order}={not blue_first}"]
    if isinstance(detector, DETR):
        sizes = ", ".join(f"{name}={value}" for name, value in detr_sizes(detector).items())
        return [
            *lines,
            _backbone(detector, 1),
            f"neck: in_channels=[{detector.neck.in_channels}]",
            f"transformer: {sizes}",
        ]
    assert isinstance(detector, (FCOS, RetinaNet, TwoStage))
    inputs, channels, advice = detector.neck.inputs, detector.channels, "want model.conventions=aligndet before"
    extra = {"pool": False, "input": "'on_input'", "output": "'on_output'"}[detector.neck.source]
    norm = ", norm_cfg=dict(type='BN')" if normed_neck(detector) else ""
    lines += [
        _backbone(detector, len(inputs)),
        f"neck: in_channels={list(inputs)}, start_level=0, out_channels={channels}, "
        f"num_outs={len(detector.neck.extra) + detector.neck.pools + len(inputs)}, add_extra_convs={extra}{norm}",
    ]
    if isinstance(detector, TwoStage):
        return lines + _two_stage_settings(detector)
    lines += [f"bbox_head: stacked_convs={towers_of(detector)}, in_channels={channels}, feat_channels={channels}"]
    if isinstance(detector, FCOS):
        return lines + otherwise(detector.rules, DENSE["aligndet"], advice)
    return lines + otherwise(detector.rules, ANCHORS["aligndet"], advice)


def _backbone(detector: Detector, levels: int) -> str:
    backbone = detector.backbone
    if isinstance(backbone, MobileNetV2):
        width = f", widen_factor={backbone.width}" if backbone.width != 1 else ""
        return f"backbone: type='MobileNetV2', out_indices={(1, 2, 4, 7)[-levels:]}{width}"
    assert isinstance(backbone, ResNet)
    style, stem = "caffe" if backbone.stride_in_1x1 else "pytorch", backbone.conv1.out_channels
    width = f", base_channels={stem}" if stem != 64 else ""
    return (
        f"backbone: type='ResNet', depth={depth_of(backbone)}, out_indices={(0, 1, 2, 3)[-levels:]}, "
        f"style='{style}'{width}"
    )


def _two_stage_settings(detector: TwoStage) -> list[str]:
    kind = {"2fc": "Shared2FCBBoxHead", "4conv1fc": "Shared4Conv1FCBBoxHead"}[detector.box_head]
    norm = ", norm_cfg=dict(type='BN')" if detector.head_norm is not None else ""
    there = replace(REGIONS["aligndet"], low_quality=detector.rules.low_quality)  # which is a setting there
    return [
        f"roi_head.bbox_head: type='{kind}', in_channels={detector.channels}, fc_out_channels={detector.head.width}, "
        f"reg_class_agnostic={any_class(detector)}{norm}",
        f"train_cfg.rcnn.assigner: match_low_quality={detector.rules.low_quality}",
        *otherwise(detector.rules, there, "want model.conventions=mmdet before"),
    ]


def _arguments(name: str, state: Mapping[str, Tensor], num_classes: int | None) -> dict[str, Any]:
    match = NAME.match(name.replace("-", "_"))
    if match is None:
        raise ValueError(f"mmdet: want a name like retinanet_r50_fpn of {NAME.pattern}, got {name!r}")
    kind, depth, caffe = match[1], match[2], match[3] is not None
    two_stage = kind.endswith("rcnn")
    score = "roi_head.bbox_head.fc_cls.bias" if two_stage else f"bbox_head.{SCORE[kind]}.bias"
    classes = num_classes or 80
    if score in state:
        classes = len(state[score]) // {"retinanet": 9}.get(kind, 1) - int(two_stage or kind == "detr")
    build: dict[str, Any] = {"name": kind, "backbone": f"resnet{depth}", "num_classes": classes}
    build["norm"] = "affine" if "backbone.bn1.num_batches_tracked" in state else "frozen"
    if kind != "detr" and "neck.lateral_convs.0.bn.weight" in state:
        build["neck_norm"] = "batch"
    if two_stage:
        build["box_head"] = "4conv1fc" if "roi_head.bbox_head.shared_convs.0.conv.weight" in state else "2fc"
        if "roi_head.bbox_head.shared_convs.0.bn.weight" in state:
            build["head_norm"] = "batch"
        build |= {"conventions": "mmdet"} if kind == "faster_rcnn" else {}
    if kind == "detr":
        halves = {"encoder_layers": "encoder.layers", "decoder_layers": "decoder.layers"}
        build |= {option: _number(state, part) for option, part in halves.items()}
        queries = next((value for key, value in state.items() if key.endswith("query_embedding.weight")), None)
        build |= {} if queries is None else {"queries": len(queries)}
    if caffe:
        build |= {"stride_in_1x1": True, "pixel_std": CAFFE_STD}
        build |= {"pixel_mean": CAFFE_MEAN[kind]} if kind in CAFFE_MEAN else {}
    return build


def _online(state_dict: Mapping[str, Tensor], num_classes: int | None) -> tuple[dict[str, Tensor], bool]:
    """The tensors of one detector under their plain names, and whether they come from pre-training."""
    found = [match[1] for match in map(BRANCH.match, state_dict) if match]
    state = dict(state_dict)
    if found:
        # "backbone." is the reference's second name of its online branch.
        averaged = re.compile(r"(momentum|target|ema|teacher)")
        branch = min(found, key=lambda text: (text != "backbone.", bool(averaged.search(text)), len(text)))
        state = {key.removeprefix(branch): value for key, value in state_dict.items() if key.startswith(branch)}
    scored = any(re.search(r"\.(conv_cls|retina_cls|fc_cls)\.(weight|bias)$", key) for key in state)
    pretrained = bool(found) or not scored
    if pretrained:
        state = {key: value for key, value in state.items() if not DROPPED.search(key)}
    elif num_classes is not None:
        raise ValueError("num_classes: the weights have a class layer, which says it; want None")
    return state, pretrained


def _stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FCOS's scales of levels, single numbers there, as the one tensor they are here."""
    scales = {int(match[1]): state[match[0]] for match in map(SCALE.match, state) if match}
    rest = {key: value for key, value in state.items() if not SCALE.match(key)}
    return rest | ({"bbox_head.scales": torch.stack([scales[i] for i in sorted(scales)])} if scales else {})


def _names(detector: Detector, new: bool) -> tuple[list[Pair], list[Change]]:
    changes = [reordered("backbone.conv1.", (2, 1, 0), dim=1)] if detector.pixel_std == CAFFE_STD else []
    pairs = _body(detector)
    if isinstance(detector, DETR):
        return pairs + _detr(detector, new), changes
    if isinstance(detector, FCOS):
        return pairs + _pyramid(len(detector.neck.lateral), normed_neck(detector)) + _fcos(), changes
    if isinstance(detector, RetinaNet):
        return pairs + _pyramid(len(detector.neck.lateral), normed_neck(detector)) + _retinanet(), changes
    if isinstance(detector, TwoStage):
        return pairs + _pyramid(len(detector.neck.lateral), normed_neck(detector)) + _two_stage(detector), changes
    raise ValueError(f"mmdet has no counterpart of {type(detector).__name__}")


def _body(detector: Detector) -> list[Pair]:
    if isinstance(detector.backbone, ResNet):
        return [("backbone.", "backbone.")]
    if not isinstance(detector.backbone, MobileNetV2):
        raise no_backbone("mmdet", detector, "a ResNet or MobileNetV2")
    pairs = []
    for ours, theirs in ((0, "conv1"), (18, "conv2")):
        pairs += [(f"backbone.features.{ours}.{i}.", f"backbone.{theirs}.{part}.") for i, part in enumerate(LAYER)]
    blocks = [(layer, i) for layer, depth in enumerate(MOBILENET, 1) for i in range(depth)]
    for number, (layer, i) in enumerate(blocks, 1):
        here, there = f"backbone.features.{number}.conv", f"backbone.layer{layer}.{i}"
        inner = ("expand_conv", "depthwise_conv") if number > 1 else ("depthwise_conv",)
        for k, name in enumerate(inner):
            pairs += [(f"{here}.{k}.{j}.", f"{there}.{name}.{part}.") for j, part in enumerate(LAYER)]
        pairs += [(f"{here}.{len(inner) + j}.", f"{there}.linear_conv.{part}.") for j, part in enumerate(LAYER)]
    return pairs


def _pyramid(levels: int, normed: bool) -> list[Pair]:
    pairs: list[Pair] = []
    for i in range(levels + 2):
        places = (("lateral", "lateral_convs", i), ("output", "fpn_convs", i), ("extra", "fpn_convs", levels + i))
        for ours, theirs, number in places:
            here, there = f"neck.{ours}.{i}.", f"neck.{theirs}.{number}."
            pairs += (
                [(f"{here}0.", f"{there}conv."), (f"{here}1.", f"{there}bn.")] if normed else [(here, f"{there}conv.")]
            )
    return [pair for pair in pairs if not (pair[0].startswith("neck.output") and int(pair[0].split(".")[2]) >= levels)]


def _fcos() -> list[Pair]:
    pairs = [
        ("predictors.score.", "bbox_head.conv_cls."),
        ("predictors.box.convolution.", "bbox_head.conv_reg."),
        ("predictors.box.scales", "bbox_head.scales"),
        ("predictors.centerness.", "bbox_head.conv_centerness."),
    ]
    for ours, theirs in (("classification", "cls_convs"), ("box", "reg_convs")):
        for i in range(4):
            pairs += [(f"head.{ours}.{3 * i}.", f"bbox_head.{theirs}.{i}.conv.")]
            pairs += [(f"head.{ours}.{3 * i + 1}.", f"bbox_head.{theirs}.{i}.gn.")]
    return pairs


def _retinanet() -> list[Pair]:
    pairs = [("predictors.score.", "bbox_head.retina_cls."), ("predictors.box.", "bbox_head.retina_reg.")]
    for ours, theirs in (("classification", "cls_convs"), ("box", "reg_convs")):
        pairs += [(f"head.{ours}.{2 * i}.", f"bbox_head.{theirs}.{i}.conv.") for i in range(4)]
    return pairs


def _two_stage(detector: TwoStage) -> list[Pair]:
    step = 2 if detector.head_norm is None else 3
    layers = BOX_HEADS[detector.box_head][1]
    pairs = [
        ("rpn.tower.0.", "rpn_head.rpn_conv."),
        ("rpn.score.", "rpn_head.rpn_cls."),
        ("rpn.box.", "rpn_head.rpn_reg."),
        ("predictors.score.", "roi_head.bbox_head.fc_cls."),
        ("predictors.box.", "roi_head.bbox_head.fc_reg."),
        ("mask_head.upsample.", "roi_head.mask_head.upsample."),
        ("predictors.mask.", "roi_head.mask_head.conv_logits."),
    ]
    pairs += [(f"head.fully_connected.{i}.", f"roi_head.bbox_head.shared_fcs.{i}.") for i in range(layers)]
    for ours, theirs in (("head", "bbox_head.shared_convs"), ("mask_head", "mask_head.convs")):
        for i in range(4):
            pairs += [(f"{ours}.convolutions.{step * i}.", f"roi_head.{theirs}.{i}.conv.")]
            pairs += [(f"{ours}.convolutions.{step * i + 1}.", f"roi_head.{theirs}.{i}.bn.")] if step == 3 else []
    return pairs


def _detr_heads() -> list[Pair]:
    return [
        ("predictors.score.", "bbox_head.fc_cls."),
        ("predictors.box.layers.0.", "bbox_head.reg_ffn.layers.0.0."),
        ("predictors.box.layers.1.", "bbox_head.reg_ffn.layers.1."),
        ("predictors.box.layers.2.", "bbox_head.fc_reg."),
    ]


def _detr(detector: DETR, new: bool) -> list[Pair]:
    """3.x (``new``) has the transformer beside the head, 2.x inside it."""
    inside, root = ("", "") if new else ("bbox_head.", "bbox_head.transformer.")
    own, cross = ("self_attn", "cross_attn") if new else ("attentions.0", "attentions.1")
    feed = "ffn" if new else "ffns.0"
    pairs = [
        ("neck.", "neck.convs.0.conv." if new else "bbox_head.input_proj."),
        ("head.queries.", f"{inside}query_embedding."),
        ("head.norm.", f"{root}decoder.post_norm."),
    ]
    parts = {
        "attention": f"{own}.attn",
        "cross_attention": f"{cross}.attn",
        "feed_forward.inner": f"{feed}.layers.0.0",
        "feed_forward.outer": f"{feed}.layers.1",
        "norms": "norms",
    }
    return pairs + transformer_pairs(detector.head, root, parts) + _detr_heads()


def _is_new(state: Mapping[str, Tensor]) -> bool:
    return not any(key.startswith("bbox_head.transformer.") for key in state)


def _number(state: Mapping[str, Tensor], part: str) -> int:
    """Layers of one half of DETR's transformer, by the highest index."""
    found = [re.search(rf"(?:^|\.){re.escape(part)}\.(\d+)\.", key) for key in state]
    return max((int(match[1]) + 1 for match in found if match), default=0)
