"""From a config to all that a run needs: data, model, optimizer, and the checkpoint to continue from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from aligndet import config as settings
from aligndet.config import Config, ModelConfig
from aligndet.data.annotations import Annotations
from aligndet.data.batch import collate, collate_views
from aligndet.data.crops import CropPairs
from aligndet.data.folder import list_images
from aligndet.data.formats import images_of, load_annotations
from aligndet.data.labelled import LabelledImages
from aligndet.data.proposals import open_proposals
from aligndet.data.splits import choose_labelled
from aligndet.data.stream import StepSampler, loader
from aligndet.data.views import ViewPairs
from aligndet.engine import distributed
from aligndet.engine.best import Validation
from aligndet.engine.boards import check_boards, open_boards
from aligndet.engine.cocoeval import evaluator_note
from aligndet.engine.distributed import World
from aligndet.engine.ema import EMA, ModelAverage
from aligndet.engine.log import Log
from aligndet.engine.loop import Training, resume
from aligndet.engine.open_run import Run, open_run
from aligndet.engine.optim import build_optimizer, parameter_table
from aligndet.engine.schedules import learning_rate_factor, momentum_at
from aligndet.engine.validate import detections_on, metrics_of
from aligndet.finetune import FineTune
from aligndet.image_domain.simsiam import SimSiam
from aligndet.models import build_detector, detector_class, options_of
from aligndet.models.backbones import build_backbone
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.reference import with_mistakes
from aligndet.soco import SoCo
from aligndet.structures import Batch
from aligndet.weights import export_detector, load_backbone, load_pretrained

# Options of the detector's class, where the config sets them.
OPTIONS = (
    *("channels", "convolutions", "levels", "centre_radius", "box_head", "head_width", "regions", "class_agnostic"),
    *("neck_norm", "queries", "encoder_layers", "decoder_layers", "feedforward", "dropout", "conventions"),
    "score_threshold",
)


def prepare(config: Config, world: World) -> Training:
    """Everything that ``fit`` needs for the run of ``config``, continued where its run folder left off.

    Raises:
        ValueError, FileNotFoundError: data, weights or checkpoint do not serve; nothing has been written then except
            the run folder with its config.
    """
    check_boards(config)
    _seed_all(config.seed)
    run = open_run(config, world)
    log = Log(run.folder, world)
    for line in run.warnings:
        log.warning(0, line)
    build = {settings.PRETRAIN: _pretraining, settings.FINETUNE: _fine_tuning, settings.IMAGE_DOMAIN: _image_domain}
    stage = build[config.task](config, log, world)
    stage.model.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    log.note(parameter_table(stage.model))
    training = _training(config, world, log, run, stage)
    # Each rank samples its own candidates; the weights above were drawn alike.
    _seed_all(config.seed + world.rank)
    if run.path is not None:
        resume(training, run.path, run.state)
        log.truncate(training.start)
        changed = f"; changed since: {', '.join(run.changed)}" if run.changed else ""
        log.note(f"{run.folder}: continues at step {training.start} of {training.steps}{changed}")
    else:
        log.truncate(0)
    _same_step(training)
    if world.rank == 0:
        log.boards = open_boards(config, run.folder, training.config, training.start, log.last)
    training.loader = batches(config, training, stage)
    return training


def batches(config: Config, training: Training, stage: Stage) -> Iterable[tuple[Batch, ...]]:
    """The batches of this rank from step ``training.start`` on."""
    world = training.world
    sampler = StepSampler(
        len(stage.dataset),
        batch=config.optim.batch,
        accumulate=config.optim.accumulate,
        rank=world.rank,
        world=world.size,
        seed=config.seed,
        start_step=training.start,
        steps=training.steps,
    )
    return loader(stage.dataset, sampler, stage.join, config.data.workers, world.device.type == "cuda")


def _seed_all(seed: int) -> None:
    """Seed every generator that a checkpoint keeps: torch's, numpy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _same_step(training: Training) -> None:
    starts = distributed.gather_objects(training.start, training.world)
    if len(set(starts)) > 1:
        raise ValueError(f"run {training.folder}: the ranks see checkpoints of steps {starts}; want one shared folder")


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
        raise ValueError(f"data.labelled: want at most the {number} images of {data.train}, got {data.labelled}")
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
    ema: EMA | None = None
    measure: Callable[[nn.Module], dict[str, Any]] | None = None
    export: Callable[[nn.Module], dict[str, Any]] | None = None


def _pretraining(config: Config, log: Log, world: World) -> Stage:
    data, method = config.data, config.method
    assert data.images is not None and data.proposals is not None
    proposals = open_proposals(data.proposals)
    mistakes = settings.MISTAKES if method.reference_compatible else method.mistakes
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
    # On its device at once: the method looks at its losses while it is built, and ranks share values on their GPUs.
    detector = build_detector(**pretraining_arguments(config)).to(world.device)
    if config.model.backbone_weights is None:
        log.warning(0, "model.backbone_weights is not set: the backbone has random weights")
    else:
        log.note(str(load_backbone(detector, config.model.backbone_weights)))
    if method.name == "soco":
        competitor = SoCo(detector, embedding=method.embedding)
        ema = EMA(competitor.averaged, competitor.momentum)
        name_of = proposals.names.__getitem__
        return Stage(dataset, collate_views, competitor, detector.backbone, name_of, ema)
    model = _aligndet(config, detector, mistakes)
    name_of = proposals.names.__getitem__
    return Stage(dataset, collate_views, model, detector.backbone, name_of, _momentum_branch(model))


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


def _fine_tuning(config: Config, log: Log, world: World) -> Stage:
    data = config.data
    annotations, root, rows = training_annotations(config)
    dataset = LabelledImages(
        annotations,
        root,
        short_sides=data.short_side,
        long_side=data.long_side,
        flip_probability=data.flip,
        crowds=data.crowds,
        on_error=data.on_error,
        seed=config.seed,
        rows=rows,
    )
    log.note(f"{data.train}: {len(dataset)} labelled images, {dataset.without_boxes} without boxes are left out")
    for line in annotations.report_lines():
        log.warning(0, line)
    if data.val is not None:
        log.note(evaluator_note())
    detector = build_detector(**detector_arguments(config.model, len(annotations.class_names)))
    if config.weights is not None:
        kept = config.method.keep_predictors and not config.method.reference_compatible
        log.note(str(load_pretrained(detector, config.weights, config.method.modules, kept)))
    elif config.model.backbone_weights is not None:
        log.note(str(load_backbone(detector, config.model.backbone_weights)))
    else:
        log.warning(0, "neither weights nor model.backbone_weights is set: everything starts from random weights")

    def measure(model: nn.Module) -> dict[str, Any]:
        network = cast(FineTune, model).detector
        detections = detections_on(config, network, annotations.class_names, world)
        return metrics_of(config, network, annotations.class_names, detections)

    def export(model: nn.Module) -> dict[str, Any]:
        build = detector_arguments(config.model, len(annotations.class_names))
        content = export_detector(cast(FineTune, model).detector, annotations.class_names, build)
        return content | {"config": settings.to_dict(config)}

    name_of = dict(zip(annotations.image_ids.tolist(), annotations.file_names, strict=True)).__getitem__
    return Stage(dataset, _single, FineTune(detector), detector.backbone, name_of, None, measure, export)


def _image_domain(config: Config, log: Log, world: World) -> Stage:
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
    return Stage(dataset, collate_views, model, backbone, dataset.names.__getitem__)


def _training(config: Config, world: World, log: Log, run: Run, stage: Stage) -> Training:
    optim = config.optim
    per_epoch = math.ceil(len(stage.dataset) / optim.batch)
    unit = 1 if optim.steps else per_epoch
    steps = optim.steps or per_epoch * (optim.epochs or 0)
    optimizer = build_optimizer(
        stage.model,
        name=optim.name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        backbone=stage.backbone,
        backbone_lr=optim.backbone_lr,
        norm_weight_decay=optim.norm_weight_decay,
        bias_lr=optim.bias_lr,
        bias_weight_decay=optim.bias_weight_decay,
    )
    factor = partial(
        learning_rate_factor,
        steps=steps,
        schedule=optim.schedule,
        milestones=tuple(unit * milestone for milestone in optim.milestones),
        warmup=optim.warmup,
        warmup_ratio=optim.warmup_ratio,
    )
    every = config.eval_every or per_epoch * (config.eval_every_epochs or 0)
    return Training(
        model=stage.model,
        optimizer=optimizer,
        steps=steps,
        learning_rate=lambda step: optim.lr * factor(step),
        ema=stage.ema,
        momentum=partial(
            momentum_at, steps=steps, start=config.method.momentum, schedule=config.method.momentum_schedule
        ),
        log=log,
        folder=run.folder,
        world=world,
        config=settings.to_dict(config),
        batch=optim.batch,
        images=len(stage.dataset),
        accumulate=optim.accumulate,
        clip=optim.clip,
        amp=optim.amp,
        log_every=config.log_every,
        average=None if config.ema is None else ModelAverage(stage.model, config.ema),
        validation=_validation(stage, every, config.early_stop),
        save_every=config.save_every,
        keep=config.keep_checkpoints,
        nonfinite=config.nonfinite,
        profile=config.profile,
        name_of=stage.name_of,
    )


def _validation(stage: Stage, every: int, patience: int | None) -> Validation | None:
    if not every or stage.measure is None or stage.export is None:
        return None
    return Validation(stage.measure, stage.export, every, patience)


def _momentum_branch(model: AlignDet) -> EMA | None:
    return None if model.momentum is None else EMA(model.online, model.momentum, apart=("predictors.score.",))


def _single(samples: Sequence[Any]) -> tuple[Batch]:
    return (collate(samples),)
