"""From a config to all that a run needs: data, model, optimizer, and the checkpoint to continue from."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import nn

from aligndet import config as settings
from aligndet.config import Config, OptimConfig
from aligndet.data.stream import StepSampler, loader
from aligndet.engine import distributed, profiling, stages
from aligndet.engine.best import Validation
from aligndet.engine.boards import check_boards, open_boards
from aligndet.engine.distributed import World
from aligndet.engine.ema import ModelAverage
from aligndet.engine.log import Log
from aligndet.engine.loop import Training, resume
from aligndet.engine.open_run import Run, open_run
from aligndet.engine.optim import build_optimizer, parameter_table
from aligndet.engine.precision import slow_precision
from aligndet.engine.schedules import learning_rate_factor, momentum_at, scaled_learning_rate
from aligndet.engine.stages import Stage
from aligndet.ops.batch_norm import SyncBatchNorm
from aligndet.structures import Batch

FEW = 8  # images


def prepare(config: Config, world: World) -> Training:
    """Everything that ``fit`` needs for the run of ``config``, continued where its run folder left off.

    Raises:
        ValueError, FileNotFoundError: data, weights or checkpoint do not serve; nothing has been written then except
            the run folder with its config.
    """
    check_boards(config)
    repeatable(config.deterministic)
    _seed_all(config.seed)
    run = open_run(config, world)
    log = Log(run.folder, world)
    for line in run.warnings:
        log.warning(0, line)
    build = {
        settings.PRETRAIN: stages.pretraining,
        settings.FINETUNE: stages.fine_tuning,
        settings.IMAGE_DOMAIN: stages.image_domain,
    }
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
    if thin := _thin_statistics(stage.model, training.batch // (training.accumulate * world.size), world.size):
        log.warning(training.start, thin)
    if world.rank == 0 and (slow := slow_precision(world.device, config.optim.amp)):
        log.warning(training.start, slow)
    _same_step(training)
    if config.profile:
        every = None if training.validation is None else training.validation.every
        hindrance = profiling.hindrance(training.start, training.steps, every)
        if hindrance and training.start == 0:
            raise ValueError(hindrance)
        if hindrance:  # an interrupted run continues all the same
            log.warning(training.start, f"{hindrance}; goes on without")
            training.profile = False
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
        wide=stage.wide,
    )
    return loader(stage.dataset, sampler, stage.join, config.data.workers, world.device.type == "cuda")


def _seed_all(seed: int) -> None:
    """Seed every generator that a checkpoint keeps: torch's, numpy's and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def repeatable(on: bool) -> None:
    """Only operations that give the same bits each time, in this process; those that have no such form raise.

    The processor's are all of that kind. The workspace of cuBLAS counts from its first use on, which is after this.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = on
    torch.use_deterministic_algorithms(on)


def _same_step(training: Training) -> None:
    starts = distributed.gather_objects(training.start, training.world)
    if len(set(starts)) > 1:
        raise ValueError(f"run {training.folder}: the ranks see checkpoints of steps {starts}; want one shared folder")


def _training(config: Config, world: World, log: Log, run: Run, stage: Stage) -> Training:
    optim = config.optim
    per_epoch = math.ceil(len(stage.dataset) / optim.batch)
    unit = 1 if optim.steps else per_epoch
    steps = optim.steps or per_epoch * (optim.epochs or 0)
    rate = scaled_learning_rate(optim.lr, optim.lr_scaling, optim.batch, optim.base_batch)
    if optim.lr_scaling != "none":
        log.note(
            f"learning rate {rate:.6g} for a batch of {optim.batch}: {optim.lr:g} is for {optim.base_batch} "
            f"(optim.lr_scaling {optim.lr_scaling})"
        )
    optimizer = build_optimizer(
        stage.model,
        name=optim.name,
        lr=rate,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        backbone=stage.backbone,
        backbone_lr=optim.backbone_lr,
        norm_weight_decay=optim.norm_weight_decay,
        bias_lr=optim.bias_lr,
        bias_weight_decay=optim.bias_weight_decay,
    )
    factor = _rate_factor(optim, steps, unit)
    every = config.eval_every or per_epoch * (config.eval_every_epochs or 0)
    return Training(
        model=stage.model,
        optimizer=optimizer,
        steps=steps,
        learning_rate=lambda step: rate * factor(step),
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
        validation=_validation(stage, every, config.early_stop, steps),
        save_every=config.save_every,
        export=stage.export,
        keep=config.keep_checkpoints,
        nonfinite=config.nonfinite,
        profile=config.profile,
        name_of=stage.name_of,
    )


def _rate_factor(optim: OptimConfig, steps: int, unit: int) -> Callable[[int], float]:
    """Step -> factor on the learning rate; milestones are in ``unit`` steps."""
    return partial(
        learning_rate_factor,
        steps=steps,
        schedule=optim.schedule,
        milestones=tuple(unit * milestone for milestone in optim.milestones),
        warmup=optim.warmup,
        warmup_ratio=optim.warmup_ratio,
        warmup_schedule=optim.warmup_schedule,
    )


def _thin_statistics(model: nn.Module, images: int, ranks: int) -> str:
    """What is to be said where batch norms in training see few images; empty where they do not.

    ``images`` of a rank in one pass: passes that are accumulated have statistics of their own.
    """
    # Not those that only become fixed when training begins.
    norms = [norm for norm in model.modules() if type(norm) in (nn.BatchNorm2d, SyncBatchNorm) and norm.training]
    number = images * ranks if all(isinstance(norm, SyncBatchNorm) for norm in norms) else images
    if not norms or number >= FEW:
        return ""
    return (
        f"batch norms have the statistics of {number} images of a pass; below {FEW} these are noisy: take a smaller "
        "optim.accumulate, norms that keep the statistics of the backbone's weights (model.norm=affine or frozen), or "
        "none in the neck (model.neck_norm=null)"
    )


def _validation(stage: Stage, every: int, patience: int | None, steps: int) -> Validation | None:
    if not every or stage.measure is None:
        return None
    if every * (1 + (patience or 0)) >= steps:  # known only here, where steps and epochs can be compared
        stop = "" if patience is None else f" and early_stop {patience}"
        raise ValueError(f"eval_every: every {every} steps{stop} has no effect in a run of {steps} steps")
    return Validation(stage.measure, stage.export, every, patience)
