"""What a model of another library has to be told, beside its weights, to compute what a detector here computes."""

from __future__ import annotations

from dataclasses import fields

from torch import nn

from aligndet.models import DETR, FCOS, RetinaNet
from aligndet.models.backbones import ResNet
from aligndet.models.backbones.resnet import RESNETS
from aligndet.models.conventions import AnchorRules, DenseRules, RegionRules
from aligndet.models.transformer import DecoderLayer
from aligndet.models.two_stage import TwoStage
from aligndet.protocol import Detector

Pyramidal = FCOS | RetinaNet | TwoStage
CAFFE_STD = (1.0, 1.0, 1.0)  # of images that are BGR there
STEM = 64  # channels of a ResNet's first convolution at its usual width
# What a rule of ``models.conventions`` decides; the others leave boxes as they are.
DECIDES = {
    "grid": "places of points or anchors",
    "whole": "places of points or anchors",
    "sizes": "sizes of anchors",
    "linear": "box coding",
    "biased": "biases of the towers",
    "beside_box": "centerness",
    "overlap": "suppression",
    "extra": "P6",
    "relu": "P7",
    "norm": "norms of the towers",
    "shrink": "the smallest boxes",
    "least": "the smallest boxes",
    "most": "detections of an image",
    "sampling_ratio": "RoIAlign",
    "aligned": "RoIAlign",
    "low_quality": "low-quality matches",
}


def otherwise(
    rules: DenseRules | AnchorRules | RegionRules, there: DenseRules | AnchorRules | RegionRules, advice: str
) -> list[str]:
    """One line that names what the model there computes by other rules, and ``advice``; none if nothing."""
    names = [item.name for item in fields(rules) if getattr(rules, item.name) != getattr(there, item.name)]
    words = dict.fromkeys(DECIDES[name] for name in names if name in DECIDES)
    return [f"computed otherwise there: {', '.join(words)}; {advice}"] if words else []


def pixels_of(detector: Detector) -> tuple[bool, list[float], list[float]]:
    """Whether images there are BGR, as for weights of Caffe, and their mean and standard deviation in that order."""
    blue_first = detector.pixel_std == CAFFE_STD
    order = -1 if blue_first else 1
    return blue_first, list(detector.pixel_mean)[::order], list(detector.pixel_std)[::order]


def shares_line(detector: Detector) -> list[str]:
    """One line with mean and standard deviation in shares of 255, RGB; none where they are the usual ones."""
    if (detector.pixel_mean, detector.pixel_std) == (Detector.pixel_mean, Detector.pixel_std):
        return []
    mean, std = ([round(value / 255, 6) for value in values] for values in (detector.pixel_mean, detector.pixel_std))
    return [f"images: image_mean={mean}, image_std={std}"]


def depth_of(backbone: ResNet) -> int:
    """50 of a ResNet-50."""
    stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    made = (type(backbone.layer1[0]), tuple(len(stage) for stage in stages))
    return next(int(name.removeprefix("resnet")) for name, build in RESNETS.items() if build == made)


def towers_of(detector: FCOS | RetinaNet) -> int:
    """Convolutions of each tower of the head."""
    return sum(isinstance(layer, nn.Conv2d) for layer in detector.head.classification)


def any_class(detector: TwoStage) -> bool:
    """Whether there is one box for all of several classes."""
    outputs, classes = (len(detector.predictors[name].bias) for name in ("box", "score"))  # type: ignore[arg-type]
    return outputs == 4 and classes > 2


def normed_neck(detector: Pyramidal) -> bool:
    """Whether norms follow the convolutions of its pyramid."""
    return isinstance(detector.neck.lateral[0], nn.Sequential)


def detr_sizes(detector: DETR) -> dict[str, int]:
    """Queries, channels, encoder_layers, decoder_layers, feedforward, heads."""
    decoder = detector.head.decoder[0]
    assert isinstance(decoder, DecoderLayer)
    return {
        "queries": len(detector.head.queries.weight),
        "channels": detector.channels,
        "encoder_layers": len(detector.head.encoder),
        "decoder_layers": len(detector.head.decoder),
        "feedforward": decoder.feed_forward.inner.out_features,
        "heads": decoder.attention.num_heads,
    }


def no_backbone(library: str, detector: Detector, known: str) -> ValueError:
    """The error for a backbone whose layers have no names in another library."""
    return ValueError(f"{library} has no counterpart of the backbone {type(detector.backbone).__name__}; want {known}")


def other_resnet(backbone: nn.Module) -> list[str]:
    """What sets a ResNet apart from all of torchvision's, though its tensors have their names; empty: nothing."""
    if not isinstance(backbone, ResNet):
        return []
    wrong, stem = [], backbone.conv1.out_channels
    if backbone.stride_in_1x1:
        wrong += ["want a ResNet with the stride in the 3 x 3 convolution of a bottleneck, got it in the first"]
    if stem != STEM:
        wrong += [f"want a ResNet that begins with {STEM} channels (model.width), got {stem}"]
    return wrong
