"""Settings that do nothing together, or contradict each other; ``config`` asks here."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aligndet.config import Config, DataConfig

LARGEST = 16384  # px
# Of the authors' code, and the detectors that it makes them with (method sections 2.3, 8); None: with all.
MISTAKES: dict[str, tuple[str, ...] | None] = {
    "strides": ("fcos",),
    "labels": ("retinanet",),
    "background": ("detr",),
    "padding": None,
    "start": None,
    "first": ("retinanet", "detr"),
    "fallback": None,
}
# As whose model each detector can compute (models/conventions.py; a test holds the two together).
CONVENTIONS: dict[str, tuple[str, ...]] = {
    "fcos": ("aligndet", "torchvision"),
    "retinanet": ("aligndet", "torchvision", "detectron2"),
    "faster_rcnn": ("aligndet", "torchvision", "detectron2", "mmdet"),
    "mask_rcnn": ("aligndet", "torchvision", "detectron2", "mmdet"),
}
READ_BY_SOCO = ("name", "embedding", "momentum", "momentum_schedule")
READ_BY = {"crop_first": "detr", "crop_sides": "detr", "jitter_size": "jitter", "jitter_scale": "jitter"}


def check_augmentation(data: DataConfig, plain: DataConfig, batch: int) -> None:
    """Refuse settings of one way of augmentation with another, and ranges that are none.

    Args:
        plain: the defaults.
        batch: images per step.
    """
    for name, way in READ_BY.items():
        if data.augment != way and getattr(data, name) != getattr(plain, name):
            raise ValueError(f"data.{name}: only read by data.augment {way}, which is {data.augment} here; remove it")
    if data.augment == "jitter" and data.short_side != plain.short_side:
        raise ValueError("data.short_side: not read by data.augment jitter, which has jitter_size; remove it")
    if not data.crop_first:
        raise ValueError("data.crop_first: want at least one size")
    for name in ("crop_sides", "jitter_scale"):
        values = getattr(data, name)
        if len(values) != 2 or values[0] > values[1]:
            raise ValueError(f"data.{name}: want two ascending numbers, least and most, got {list(values)}")
    for name, value in (("jitter_size", data.jitter_size), ("crop_first", max(data.crop_first))):
        if value > LARGEST:
            raise ValueError(f"data.{name}: want at most {LARGEST} px, got {value}")
    if data.group_aspect and data.augment == "jitter":
        raise ValueError("data.group_aspect: has no effect with data.augment jitter, whose images are all squares")
    if data.group_aspect and batch == 1:
        raise ValueError("data.group_aspect: has no effect with optim.batch 1")


def check_sides(data: DataConfig) -> None:
    """Refuse short sides of training that the bound of the long one never lets through."""
    if data.short_side and data.augment != "jitter" and max(data.short_side) > data.long_side:
        raise ValueError(
            f"data.long_side: want at least the largest short side {max(data.short_side)}, got {data.long_side}"
        )


def check_conventions(detector: str, conventions: str | None) -> None:
    """Refuse conventions that a detector does not know."""
    known = CONVENTIONS.get(detector, ())
    if conventions is not None and conventions not in known:
        raise ValueError(f"model.conventions: want one of {', '.join(known)} for {detector}, got {conventions}")


def check_project(wandb: str | None) -> None:
    """Refuse a W&B project without a name."""
    if wandb == "":
        raise ValueError("wandb: want the name of a project, got none")


def check_validation(config: Config) -> None:
    """Refuse settings of validation in fine-tuning that never come into effect."""
    for key in ("eval_every", "eval_every_epochs"):
        every = getattr(config, key)
        if every is not None and config.data.val is None:
            raise ValueError(f"{key}: has no effect without data.val")
        length = config.optim.steps if key == "eval_every" else config.optim.epochs
        if every is not None and length is not None and every * (1 + (config.early_stop or 0)) >= length:
            # The first validation has nothing to be compared with; the end of the run is measured anyway.
            stop = "" if config.early_stop is None else f" and early_stop {config.early_stop}"
            raise ValueError(f"{key}: {every}{stop} has no effect in a run of {length}")
    if config.eval_every is not None and config.eval_every_epochs is not None:
        raise ValueError("eval_every, eval_every_epochs: want one of the two")
    if config.early_stop is not None and config.eval_every is None and config.eval_every_epochs is None:
        raise ValueError("early_stop: has no effect without eval_every or eval_every_epochs")
    if config.ema is not None and config.ema >= 1:
        raise ValueError(f"ema: want a decay below 1, got {config.ema}")


def mistakes_of(config: Config) -> tuple[str, ...]:
    """The mistakes of the authors' code that a pre-training makes: those that are named, or all of its detector."""
    if not config.method.reference_compatible:
        return config.method.mistakes
    return tuple(name for name, whose in MISTAKES.items() if whose is None or config.model.detector in whose)


def check_pretraining(config: Config) -> None:
    """Refuse settings that would do nothing: an ablation that changes nothing measures nothing."""
    method, detector = config.method, config.model.detector
    for mistake in method.mistakes:
        whose = MISTAKES[mistake]
        if whose is not None and detector not in whose:
            raise ValueError(
                f"method.mistakes: {mistake} is made with {' and '.join(whose)} alone, not with {detector}"
            )
    if ("first" in method.mistakes or config.data.proposal_order == "first") and not config.data.proposals_per_image:
        raise ValueError("data.proposal_order, method.mistakes: first has no effect without data.proposals_per_image")
    fitted = config.model.conventions == "torchvision" and config.model.centre_radius is None
    if "strides" in method.mistakes and fitted:  # points follow from the sizes of the maps alone
        raise ValueError("method.mistakes: strides has no effect with model.conventions torchvision")
    if "background" in method.mistakes and not method.classification:
        raise ValueError("method.mistakes: background has no effect while method.classification is 0")
    idle = {"start", "fallback"} & {*method.mistakes} or method.positives != "keys" or method.reduction != "boxes"
    if idle and not method.contrast:
        raise ValueError("method.positives, .reduction, mistakes start, fallback: no effect while method.contrast is 0")
    if method.positives == "both" and "fallback" in mistakes_of(config):
        raise ValueError("method.positives: the reference's fallback keys go with positives keys only")
    if method.name == "soco":
        plain = type(method)()
        names = [item.name for item in dataclasses.fields(method) if item.name not in READ_BY_SOCO]
        if unread := [name for name in names if getattr(method, name) != getattr(plain, name)]:
            keys = ", ".join(f"method.{name}" for name in unread)
            usual = " ".join(f"method.{name}={json.dumps(getattr(plain, name))}" for name in unread)
            raise ValueError(f"{keys}: not read by method.name soco; remove, or set {usual}")
    elif method.freeze_backbone and config.optim.backbone_lr != 1:
        raise ValueError("optim.backbone_lr: has no effect while method.freeze_backbone is true")
