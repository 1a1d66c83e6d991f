"""What the three tasks differ in: data, model, and what is measured and exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from aligndet import config as settings
from aligndet.checks import mistakes_of
from aligndet.config import Config, ModelConfig
from aligndet.data.annotations import Annotations
from aligndet.data.augment import Draw, detr_window, jitter_window
from aligndet.data.batch import collate, collate_views
from aligndet.data.crops import CropPairs
from aligndet.data.folder import list_images
from aligndet.data.formats import images_of, load_annotations
from aligndet.data.labelled import LabelledImages
from aligndet.data.proposals import ProposalFile, open_proposals
from aligndet.data.splits import choose_labelled
from aligndet.data.views import ViewPairs
from aligndet.engine.cocoeval import evaluator_note
from aligndet.engine.distributed import World
from aligndet.engine.ema import EMA
from aligndet.engine.log import Log
from aligndet.engine.validate import detections_on, metrics_of, open_validation
from aligndet.finetune import FineTune
from aligndet.image_domain.simsiam import SimSiam
from aligndet.models import build_detector, detector_class, options_of
from aligndet.models.backbones import build_backbone
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.reference import with_mistakes
from aligndet.soco import SoCo
from aligndet.structures import Batch
from aligndet.weights import export_detector, export_pretrained, inherited, load_backbone, load_pretrained

FAR = 1.5  # from the size of images that pseudo-classes come from to that of training (docs/decisions.md)
# Options of the detector's class, where the config sets them.
OPTIONS = (
    *("channels", "convolutions", "levels", "centre_radius", "box_head", "head_width", "regions", "class_agnostic"),
    *("neck_norm", "queries", "encoder_layers", "decoder_layers", "feedforward", "dropout", "conventions"),
    "score_threshold",
)


def detector_arguments(model: ModelConfig, num_classes: int) -> dict[str, Any]:
    """The arguments of ``build_detector`` that a config stands for."""
    chosen = {name: getattr(model, name) for name in OPTIONS if getattr(model, name) is not None}
    return chosen | {
        "name": model.detector,
        "backbone": model.backbone,
        "num_classes": num_classes,
        "width": model.width,
        "norm": model.norm,
        "frozen_stages": model.frozen_stages,
    }


def fine_tuning_arguments(config: Config, num_classes: int) -> dict[str, Any]:
    """The arguments of ``build_detector`` in fine-tuning; what no setting names is as in the file of ``weights``."""
    own = detector_arguments(config.model, num_classes)
    return own if config.weights is None else own | inherited(config.weights, own, config.method.modules)


def training_annotations(config: Config) -> tuple[Annotations, Path, np.ndarray]:
    """The labels of ``data.train``, their image folder, and the rows of the images that are trained on."""
    data = config.data
    if data.train is None:
        raise ValueError("data.train: training needs it, labels in COCO, VOC or YOLO format")
    annotations = load_annotations(
        data.train,
        format=data.format,
        split="train",
        classes=data.classes,
        masks=detector_class(config.model.detector).needs_masks,
        on_error=data.on_error,
    )
    root = images_of(annotations, data.train_images)
    number = len(annotations.file_names)
    if data.labelled is not None and data.labelled > number:
        raise ValueError(
            f"data.labelled: want at most the {number} images of {data.train}, got {data.labelled}; null takes all"
        )
    rows = np.arange(number) if data.labelled is None else choose_labelled(number, data.labelled, data.fold)
    return annotations, root, rows


@dataclass(frozen=True)
class Stage:
    """What differs between the three tasks: data, the function that joins samples to batches, and the model."""

    dataset: ViewPairs | LabelledImages | CropPairs
    join: Callable[[Sequence[Any]], tuple[Batch, ...]]
    model: nn.Module
    backbone: nn.Module
    name_of: Callable[[int], str]
    export: Callable[[nn.Module], dict[str, Any]]
    ema: EMA | None = None
    measure: Callable[[nn.Module], dict[str, Any]] | None = None
    wide: np.ndarray | None = None


def pretraining(config: Config, log: Log, world: World) -> Stage:
    """Two views of images with proposals, and AlignDet or SoCo on them; what was found and loaded goes to the log.

    Raises:
        ValueError, FileNotFoundError: images, proposals or weights do not serve, or pseudo-classes are missing.
    """
    data, method = config.data, config.method
    assert data.images is not None and data.proposals is not None
    proposals = open_proposals(data.proposals)
    mistakes = mistakes_of(config)
    dataset = ViewPairs(
        data.images,
        proposals,
        short_sides=data.short_side,
        long_side=data.long_side,
        flip_probability=data.flip,
        colour=data.colour,
        proposals_per_image=data.proposals_per_image,
        order="first" if "first" in mistakes else data.proposal_order,
        pad_first="padding" in mistakes,
        fast_decode=data.fast_decode,
        on_error=data.on_error,
        seed=config.seed,
    )
    log.note(
        f"{data.proposals}: {len(dataset)} images with proposals, {dataset.without_proposals} without are left out"
    )
    if method.classification and proposals.clusters is None:
        raise ValueError(
            f"method.classification: {data.proposals} has no pseudo-classes; `aligndet cluster` makes some"
        )
    if method.classification and (other := other_sizes(proposals, data.short_side)):
        log.warning(0, other)
    wide = dataset.wide() if data.group_aspect else None
    # On its device at once: the method looks at its losses while it is built, and ranks share values on their GPUs.
    build = pretraining_arguments(config)
    detector = build_detector(**build).to(world.device)
    if config.model.backbone_weights is None:
        log.warning(0, "model.backbone_weights is not set: the backbone has random weights")
    else:
        log.note(str(load_backbone(detector, config.model.backbone_weights)))
    name_of, join = proposals.names.__getitem__, partial(collate_views, multiple=detector.size_divisor)

    def export(model: nn.Module) -> dict[str, Any]:
        return export_pretrained(cast("AlignDet | SoCo", model), build)

    if method.name == "soco":
        competitor = SoCo(detector, embedding=method.embedding)
        ema = EMA(competitor.averaged, competitor.momentum)
        return Stage(dataset, join, competitor, detector.backbone, name_of, export, ema, wide=wide)
    model = _aligndet(config, detector, mistakes)
    return Stage(dataset, join, model, detector.backbone, name_of, export, _momentum_branch(model), wide=wide)


def other_sizes(proposals: ProposalFile, trained: Sequence[int]) -> str:
    """What is to be said where pseudo-classes come from images of another size than training's, or nothing.

    Args:
        trained: px, the short sides of the images in training.
    """
    clustering = proposals.parameters.get("clustering")
    made = clustering.get("short_side") if isinstance(clustering, dict) else None
    if not isinstance(made, int) or min(trained) / FAR <= made <= max(trained) * FAR:
        return ""
    return (
        f"pseudo-classes of {proposals.path} come from images of {made} px (short side), data.short_side has "
        f"{min(trained)} .. {max(trained)}: what they tell apart can hardly be seen there; repeat `aligndet cluster` "
        f"with --short-side {max(trained)}"
    )


def _aligndet(config: Config, detector: Detector, mistakes: tuple[str, ...]) -> AlignDet:
    method = config.method
    start = None
    if "start" in mistakes:
        start = build_detector(**pretraining_arguments(config)).to(next(detector.parameters()).device)
        start.backbone.load_state_dict(detector.backbone.state_dict())
    for branch in (detector, *([] if start is None else [start])):
        with_mistakes(branch, mistakes)
    return AlignDet(
        detector,
        embedding=method.embedding,
        candidates=method.candidates,
        scope=method.scope,
        background=method.background,
        temperature=method.temperature,
        contrast=method.contrast,
        localization=method.localization,
        classification=method.classification,
        positives=method.positives,
        own_keys="fallback" in mistakes,
        reduction=method.reduction,
        symmetric=method.symmetric,
        freeze_backbone=method.freeze_backbone,
        start=start,
    )


def pretraining_arguments(config: Config) -> dict[str, Any]:
    """The arguments of ``build_detector`` in pre-training: pseudo-classes or one class, boxes for any class."""
    assert config.data.proposals is not None
    classes = open_proposals(config.data.proposals).clusters if config.method.classification else None
    any_class = {"class_agnostic": True} if "class_agnostic" in options_of(config.model.detector) else {}
    return detector_arguments(config.model, classes or 1) | any_class


def fine_tuning(config: Config, log: Log, world: World) -> Stage:
    """Labelled images and a detector on them, from pre-trained weights, a backbone's or none; it can be measured.

    Raises:
        ValueError, FileNotFoundError: labels, images or weights do not serve.
    """
    data = config.data
    annotations, root, rows = training_annotations(config)
    dataset = LabelledImages(
        annotations,
        root,
        short_sides=data.short_side,
        long_side=data.long_side,
        flip_probability=data.flip,
        crowds=data.crowds,
        fast_decode=data.fast_decode,
        on_error=data.on_error,
        seed=config.seed,
        rows=rows,
        window=_window(config),
    )
    chosen = "" if data.labelled is None else f", drawn from {len(annotations)} (data.labelled, data.fold)"
    log.note(
        f"{data.train}: {len(dataset)} labelled images{chosen}, {dataset.without_boxes} without boxes are left out"
    )
    for line in annotations.report_lines():
        log.warning(0, line)
    if data.val is not None:
        open_validation(config, annotations.class_names, detector_class(config.model.detector).needs_masks)
        log.note(evaluator_note())
    build = fine_tuning_arguments(config, len(annotations.class_names))
    detector = build_detector(**build)
    if config.model.backbone_weights is not None:
        log.note(str(load_backbone(detector, config.model.backbone_weights)))
    elif config.weights is None:
        log.warning(0, "neither weights nor model.backbone_weights is set: everything starts from random weights")
    elif "backbone" not in config.method.modules:
        log.warning(0, "method.modules is without backbone and model.backbone_weights is not set: random weights there")
    if config.weights is not None:
        kept = config.method.keep_predictors and not config.method.reference_compatible
        log.note(str(load_pretrained(detector, config.weights, config.method.modules, kept)))

    def measure(model: nn.Module) -> dict[str, Any]:
        network = cast(FineTune, model).detector
        detections = detections_on(config, network, annotations.class_names, world)
        return metrics_of(config, network, annotations.class_names, detections)

    def export(model: nn.Module) -> dict[str, Any]:
        content = export_detector(cast(FineTune, model).detector, annotations.class_names, build)
        return content | {"config": settings.to_dict(config)}

    name_of = dict(zip(annotations.image_ids.tolist(), annotations.file_names, strict=True)).__getitem__
    size = (data.jitter_size, data.jitter_size) if data.augment == "jitter" else None
    join = partial(_single, size=size, multiple=detector.size_divisor)
    model, wide = FineTune(detector), dataset.wide() if data.group_aspect else None
    return Stage(dataset, join, model, detector.backbone, name_of, export, None, measure, wide)


def _window(config: Config) -> Draw | None:
    """What ``data.augment`` draws for each labelled image; None: the whole image, resized."""
    data = config.data
    if data.augment == "detr":
        return partial(
            detr_window,
            short_sides=data.short_side,
            long_side=data.long_side,
            first_sides=data.crop_first,
            crop_sides=(data.crop_sides[0], data.crop_sides[1]),
        )
    if data.augment == "jitter":
        return partial(jitter_window, size=data.jitter_size, scale=(data.jitter_scale[0], data.jitter_scale[1]))
    return None


def image_domain(config: Config, log: Log, world: World) -> Stage:
    """Two crops of images without labels, and SimSiam on a backbone.

    Raises:
        ValueError, FileNotFoundError: there are no images, or the weights do not fit.
    """
    data = config.data
    assert data.images is not None
    dataset = CropPairs(
        data.images,
        list_images(data.images),
        size=max(data.short_side),
        scale=(data.crop_scale[0], data.crop_scale[1]),
        flip_probability=data.flip,
        on_error=data.on_error,
        seed=config.seed,
    )
    log.note(f"{data.images}: {len(dataset)} images")
    backbone = build_backbone(config.model.backbone, width=config.model.width, norm=config.model.norm, frozen_stages=0)
    if config.model.backbone_weights is not None:
        log.note(str(load_backbone(nn.ModuleDict({"backbone": backbone}), config.model.backbone_weights)))
    model = SimSiam(backbone, projection=config.method.projection, bottleneck=config.method.bottleneck)

    def export(model: nn.Module) -> dict[str, Any]:
        state = {name: value.cpu() for name, value in cast(SimSiam, model).backbone.state_dict().items()}
        return {"kind": "backbone", "format": 1, "backbone": state}

    return Stage(dataset, collate_views, model, backbone, dataset.names.__getitem__, export)


def _momentum_branch(model: AlignDet) -> EMA | None:
    return None if model.momentum is None else EMA(model.online, model.momentum, apart=("predictors.score.",))


def _single(samples: Sequence[Any], size: tuple[int, int] | None, multiple: int) -> tuple[Batch]:
    return (collate(samples, size=size, multiple=multiple),)
