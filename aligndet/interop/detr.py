"""facebookresearch/detr: DETR with ResNet-50 or ResNet-101, without dilation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aligndet.interop.renaming import Pair, fill, names_there, transformer_pairs
from aligndet.interop.wanted import depth_of, detr_sizes, no_backbone, other_resnet, shares_line
from aligndet.models import DETR, build_detector
from aligndet.models.backbones import ResNet
from aligndet.protocol import Detector

# Here, there, and its default.
OPTIONS = {
    "queries": ("num_queries", 100),
    "channels": ("hidden_dim", 256),
    "encoder_layers": ("enc_layers", 6),
    "decoder_layers": ("dec_layers", 6),
    "feedforward": ("dim_feedforward", 2048),
    "heads": ("nheads", 8),
}
MODELS = {"detr_resnet50": "resnet50", "detr_resnet101": "resnet101"}


def from_state_dict(name: str, state_dict: Mapping[str, Tensor]) -> Detector:
    """The detector that computes what the reference computes with these weights, in evaluation mode.

    Labels are the reference's (COCO's category ids for its published files).

    Args:
        name: one of MODELS.
        state_dict: of the model; its files hold it under "model".

    Raises:
        ValueError: an unknown name, or tensors without a counterpart, listed with their shapes.
    """
    detector = build_detector(**build_arguments(name, state_dict))
    assert isinstance(detector, DETR)
    return fill(detector, state_dict, _pairs(detector), [], f"detr {name}")


def build_arguments(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``build_detector`` for weights of the reference; sizes are read from them."""
    if name not in MODELS:
        raise ValueError(f"detr: want one of {', '.join(MODELS)}, got {name!r}")
    wanted = ("class_embed.bias", "query_embed.weight", "transformer.encoder.layers.0.linear1.bias")
    lacking = [key for key in wanted if key not in state_dict]
    if lacking:
        raise ValueError(
            f"detr {name}: want {', '.join(lacking)} among the names, got {', '.join(list(state_dict)[:5])}"
        )
    return {
        "name": "detr",
        "backbone": MODELS[name],
        "num_classes": len(state_dict["class_embed.bias"]) - 1,
        "queries": len(state_dict["query_embed.weight"]),
        "channels": state_dict["query_embed.weight"].shape[1],
        "feedforward": len(state_dict["transformer.encoder.layers.0.linear1.bias"]),
        "encoder_layers": _layers(state_dict, "encoder"),
        "decoder_layers": _layers(state_dict, "decoder"),
    }


def to_state_dict(detector: Detector) -> dict[str, Tensor]:
    """The detector's tensors under the reference's names; exact.

    Raises:
        ValueError: it is no DETR, or the reference has no place for some tensors, listed with their shapes.
    """
    return names_there(detector, _pairs(_checked(detector)), [])


def settings(detector: Detector) -> list[str]:
    """Options of its main.py, other than the defaults, to compute with these weights what ``detector`` does.

    Raises:
        ValueError: it is no DETR on a ResNet.
    """
    known = _checked(detector)
    assert isinstance(known.backbone, ResNet)
    sizes, lines = detr_sizes(known), []
    if depth_of(known.backbone) != 50:
        lines += [f"--backbone resnet{depth_of(known.backbone)}"]
    lines += [f"--{there} {sizes[here]}" for here, (there, usual) in OPTIONS.items() if sizes[here] != usual]
    return lines + shares_line(known)


def _checked(detector: Detector) -> DETR:
    if not isinstance(detector, DETR):
        raise ValueError(f"detr has no counterpart of {type(detector).__name__}")
    if not isinstance(detector.backbone, ResNet):
        raise no_backbone("detr", detector, "a ResNet")
    wrong = other_resnet(detector.backbone)
    if wrong:
        raise ValueError(f"detr: {'; '.join(wrong)}")
    return detector


def _pairs(detector: DETR) -> list[Pair]:
    pairs = [
        ("backbone.", "backbone.0.body."),
        ("neck.", "input_proj."),
        ("head.norm.", "transformer.decoder.norm."),
        ("head.queries.", "query_embed."),
        ("predictors.score.", "class_embed."),
        ("predictors.box.layers.", "bbox_embed.layers."),
    ]
    parts = {
        "attention": "self_attn",
        "cross_attention": "multihead_attn",
        "feed_forward.inner": "linear1",
        "feed_forward.outer": "linear2",
        **{f"norms.{i}": f"norm{i + 1}" for i in range(3)},
    }
    return pairs + transformer_pairs(detector.head, "transformer.", parts)


def _layers(state_dict: Mapping[str, Tensor], half: str) -> int:
    prefix = f"transformer.{half}.layers."
    return 1 + max(int(key[len(prefix) :].partition(".")[0]) for key in state_dict if key.startswith(prefix))
