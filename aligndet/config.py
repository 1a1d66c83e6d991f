"""Every knob on one page: strict YAML into frozen dataclasses, ``key.sub=value`` overrides, no inheritance.

A key that does not exist, has the wrong type, or is not read by the task at hand is an error that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aligndet import checks
from aligndet.typed import checked, read_yaml, shown

TASKS = ("pretrain", "finetune", "image_domain")
PRETRAIN, FINETUNE, IMAGE_DOMAIN = TASKS
BOXES = (PRETRAIN, FINETUNE)
MODULES = ("backbone", "neck", "rpn", "head")  # parts of a detector that weights are handed over for
# Of aligndet.models: which detectors and backbones train.py builds; a test holds both lists, and ``of`` below, to it.
DENSE, TWO_STAGE, DETR = ("fcos", "retinanet"), ("faster_rcnn", "mask_rcnn"), ("detr",)
DETECTORS = (*DENSE, *TWO_STAGE, *DETR)
BACKBONES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2"),
    *("swin_t", "swin_s", "swin_b", "swin_l"),
)


def knob(
    default: Any,
    *,
    tasks: tuple[str, ...] = TASKS,
    of: tuple[str, ...] = DETECTORS,
    choices: tuple[str, ...] = (),
    above: float = -math.inf,
    least: float = -math.inf,
) -> Any:
    """A config field: tasks and detectors that read it, allowed words, exclusive and inclusive lower bounds."""
    metadata = {"tasks": tasks, "of": of, "choices": choices, "above": above, "least": least}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    detector: str = knob("fcos", choices=DETECTORS, tasks=BOXES)
    backbone: str = knob("resnet50", choices=BACKBONES)
    backbone_weights: str | None = knob(None)  # file in torchvision's layout, or one of our image-domain runs
    width: float = knob(1.0, above=0)  # channel multiplier of the backbone; 1 is the published network
    norm: str = knob("frozen", choices=("frozen", "affine", "batch", "sync"))  # batch norm of the backbone
    frozen_stages: int = knob(1, least=0, tasks=BOXES)  # 1 = stem and first stage; read where the backbone is trained
    # Options of the detector, where it has them; null is the default of its class.
    channels: int | None = knob(None, above=0, tasks=BOXES)  # of neck and head (256)
    convolutions: int | None = knob(None, of=DENSE, least=0, tasks=BOXES)  # of each tower of the head (4)
    levels: int | None = knob(None, of=DENSE, least=3, tasks=BOXES)  # of the pyramid, from stride 8 on (5: P3 .. P7)
    centre_radius: float | None = knob(None, of=("fcos",), above=0, tasks=BOXES)  # centre sampling, in strides (off)
    box_head: str | None = knob(None, of=TWO_STAGE, choices=("4conv1fc", "2fc"), tasks=BOXES)  # (4conv1fc)
    head_width: int | None = knob(None, of=TWO_STAGE, above=0, tasks=BOXES)  # of the box head's linear layers (1024)
    regions: int | None = knob(None, of=TWO_STAGE, above=0, tasks=(FINETUNE,))  # most per image in a step (512)
    class_agnostic: bool | None = knob(None, of=TWO_STAGE, tasks=(FINETUNE,))  # one finer box for all classes (false)
    # After convolutions of the neck (none).
    neck_norm: str | None = knob(None, of=(*DENSE, *TWO_STAGE), choices=("batch", "sync"), tasks=BOXES)
    queries: int | None = knob(None, of=DETR, above=0, tasks=BOXES)  # most objects found in an image (100)
    encoder_layers: int | None = knob(None, of=DETR, least=0, tasks=BOXES)  # (6)
    decoder_layers: int | None = knob(None, of=DETR, above=0, tasks=BOXES)  # (6)
    feedforward: int | None = knob(None, of=DETR, above=0, tasks=BOXES)  # hidden width of the transformer (2048)
    dropout: float | None = knob(None, of=DETR, least=0, tasks=BOXES)  # (0.1)
    # As whose model it computes (ours, which is mmdet's but for details): pre-train with it to go on elsewhere.
    conventions: str | None = knob(None, of=(*DENSE, *TWO_STAGE), tasks=BOXES)  # which: checks.CONVENTIONS
    score_threshold: float | None = knob(None, least=0, tasks=(FINETUNE,))  # less is dropped (0.05; detr 0)


@dataclass(frozen=True)
class DataConfig:
    images: str | None = knob(None, tasks=(PRETRAIN, IMAGE_DOMAIN))  # folder of unlabelled images
    proposals: str | None = knob(None, tasks=(PRETRAIN,))  # file written by `aligndet propose`
    proposals_per_image: int | None = knob(None, above=0, tasks=(PRETRAIN,))  # subset per step; None: all
    proposal_order: str = knob("random", choices=("random", "first"), tasks=(PRETRAIN,))  # which subset
    colour: bool = knob(True, tasks=(PRETRAIN,))  # one colour operation of nine per view
    crop_scale: tuple[float, ...] = knob((0.2, 1.0), above=0, tasks=(IMAGE_DOMAIN,))  # area of the random crops
    train: str | None = knob(None, tasks=(FINETUNE,))  # labels: a file or folder of a format
    train_images: str | None = knob(None, tasks=(FINETUNE,))  # folder; None: as the format says, or looked for
    val: str | None = knob(None, tasks=(FINETUNE,))  # may be the same as train where that has parts train and val
    val_images: str | None = knob(None, tasks=(FINETUNE,))
    format: str | None = knob(None, choices=("coco", "voc", "yolo"), tasks=(FINETUNE,))  # None: found out by the path
    classes: tuple[str, ...] = knob((), tasks=(FINETUNE,))  # only these, in this order; empty: all of the file
    labelled: int | None = knob(None, above=0, tasks=(FINETUNE,))  # train on so many images only; None: all
    fold: int = knob(1, least=0, tasks=(FINETUNE,))  # which random subset: the seed of its draw
    short_side: tuple[int, ...] = knob((640, 672, 704, 736, 768, 800), above=0)  # px, one drawn per image and view
    long_side: int = knob(1333, above=0, tasks=BOXES)  # px, upper bound
    voc_metrics: str | None = knob(None, choices=("11-point", "area"), tasks=(FINETUNE,))  # beside COCO's: method 5.4
    eval_short_side: int = knob(800, above=0, tasks=(FINETUNE,))  # px
    # detr: half of the images are cropped, then resized. jitter: all at a random scale, cropped or padded to a square.
    augment: str = knob("plain", choices=("plain", "detr", "jitter"), tasks=(FINETUNE,))
    crop_first: tuple[int, ...] = knob((400, 500, 600), above=0, tasks=(FINETUNE,))  # px; detr: short side before
    crop_sides: tuple[int, ...] = knob((384, 600), above=0, tasks=(FINETUNE,))  # px; detr: least and most of a crop
    jitter_size: int = knob(1024, above=0, tasks=(FINETUNE,))  # px; jitter: side of the square; long side at scale 1
    jitter_scale: tuple[float, ...] = knob((0.1, 2.0), above=0, tasks=(FINETUNE,))  # jitter: least and most
    group_aspect: bool = knob(False, tasks=BOXES)  # images of a step are all wider than high, or none: less padding
    fast_decode: bool = knob(True, tasks=BOXES)  # large JPEGs at 1/2, 1/4, 1/8 of their size, where that is enough
    flip: float = knob(0.5, least=0)  # probability of the horizontal flip
    crowds: bool = knob(True, tasks=(FINETUNE,))  # anchors and regions inside crowds are not background
    on_error: str = knob("skip", choices=("skip", "fail"))  # image or label that does not serve: count it, or stop
    workers: int = knob(2, least=0)  # loader processes per rank


@dataclass(frozen=True)
class MethodConfig:
    name: str = knob("aligndet", choices=("aligndet", "soco"), tasks=(PRETRAIN,))  # soco: the paper's competitor
    temperature: float = knob(0.5, above=0, tasks=(PRETRAIN,))  # method 2.6
    embedding: int = knob(256, above=0, tasks=(PRETRAIN,))  # D, outputs of the projection
    # Sampling of candidates, positives first; null is the detector's own (method 2.5): fcos 1024 per image, retinanet
    # 2048, two-stage 4096 without background, detr all. Anchors of an RPN: always 4096 with.
    candidates: int | None = knob(None, above=0, tasks=(PRETRAIN,))  # most candidates per view
    scope: str | None = knob(None, choices=("batch", "image"), tasks=(PRETRAIN,))  # what `candidates` counts over
    background: float | None = knob(None, least=0, tasks=(PRETRAIN,))  # share of them kept free for background
    momentum: float = knob(0.996, least=0, tasks=(PRETRAIN,))  # EMA at step 0, to 1 by a cosine (method 2.1)
    contrast: float = knob(1.0, least=0, tasks=(PRETRAIN,))  # weight of the box-contrastive loss; 0: not computed
    localization: float = knob(1.0, least=0, tasks=(PRETRAIN,))  # weight of the detector's own box losses
    classification: float = knob(0.0, least=0, tasks=(PRETRAIN,))  # weight of its class loss on pseudo-classes
    symmetric: bool = knob(False, tasks=(PRETRAIN,))  # both views pass both branches (method 7, row 6)
    positives: str = knob("keys", choices=("keys", "both"), tasks=(PRETRAIN,))  # of the momentum view, or both (row 1)
    reduction: str = knob("boxes", choices=("boxes", "queries", "sum"), tasks=(PRETRAIN,))  # of the contrast (row 2)
    momentum_schedule: str = knob("cosine", choices=("cosine", "constant"), tasks=(PRETRAIN,))  # row 11
    freeze_backbone: bool = knob(True, tasks=(PRETRAIN,))  # Table 11; soco always trains it
    mistakes: tuple[str, ...] = knob((), choices=tuple(checks.MISTAKES), tasks=(PRETRAIN,))  # see aligndet/reference.py
    reference_compatible: bool = knob(False, tasks=BOXES)  # all of the detector's; keep_predictors false
    projection: int = knob(2048, above=0, tasks=(IMAGE_DOMAIN,))  # SimSiam: outputs of the projector
    bottleneck: int = knob(512, above=0, tasks=(IMAGE_DOMAIN,))  # SimSiam: hidden width of the predictor
    modules: tuple[str, ...] = knob(MODULES, choices=MODULES, tasks=(FINETUNE,))  # handed over from weights (Table 9)
    keep_predictors: bool = knob(True, tasks=(FINETUNE,))  # hand over box and centerness layers (method 7, row 4)


@dataclass(frozen=True)
class OptimConfig:
    name: str = knob("sgd", choices=("sgd", "adamw"))
    lr: float = knob(0.01, above=0)  # for the whole `batch`
    backbone_lr: float = knob(1.0, least=0, tasks=BOXES)  # factor on lr for the backbone, where it learns
    weight_decay: float = knob(1e-4, least=0)
    norm_weight_decay: bool = knob(True)  # decay the affine parameters of norm layers too
    bias_lr: float = knob(1.0, least=0)  # factor on lr for biases of other layers (FCOS fine-tuning: 2)
    bias_weight_decay: float = knob(1.0, least=0)  # factor on weight_decay for them (FCOS fine-tuning: 0)
    momentum: float = knob(0.9, least=0)  # SGD only
    batch: int = knob(16, above=0)  # images per optimizer step, over all ranks and accumulation steps
    lr_scaling: str = knob("none", choices=("none", "linear", "sqrt"))  # lr grows with batch / base_batch, or its root
    base_batch: int | None = knob(None, above=0)  # the batch that lr was chosen for
    accumulate: int = knob(1, above=0)  # passes per optimizer step; each divides its losses by its own positives
    epochs: int | None = knob(None, above=0)  # length of the run: either this ...
    steps: int | None = knob(None, above=0)  # ... or this
    schedule: str = knob("step", choices=("step", "cosine"))
    milestones: tuple[int, ...] = knob((), above=0)  # in epochs or steps, as the length; lr x 0.1 at each
    warmup: int = knob(500, least=0)  # steps
    warmup_ratio: float = knob(0.001, least=0)  # of lr at step 0
    warmup_schedule: str = knob("linear", choices=("linear", "constant"))  # to lr, or a jump at the end (method 7, 26)
    clip: float | None = knob(None, above=0)  # largest L2 norm of the gradient
    amp: str = knob("off", choices=("off", "bf16", "fp16"))


@dataclass(frozen=True)
class Config:
    task: str = knob("pretrain", choices=TASKS)
    run: str = knob("")  # folder of logs, checkpoints and results; repeating the command resumes it
    seed: int = knob(0, least=0)
    weights: str | None = knob(None, tasks=(FINETUNE,))  # our pre-trained detector to start from
    device: str = knob("auto", choices=("auto", "cpu", "cuda"))
    threads: int | None = knob(None, above=0)  # CPU threads per rank; None: torch's default
    timeout: float = knob(600.0, least=1)  # s that a rank waits for another one before it fails; all have 600 to start
    deterministic: bool = knob(False)  # only operations that repeat bit for bit; on GPUs some are slower
    log_every: int = knob(10, above=0)  # steps
    save_every: int = knob(500, above=0)  # steps
    keep_checkpoints: int = knob(2, above=0)  # the last ones, besides the best where eval_every is set
    nonfinite: str = knob(
        "stop", choices=("stop", "skip")
    )  # a loss or gradient: end with a dump, or leave the step out
    eval_every: int | None = knob(
        None, above=0, tasks=(FINETUNE,)
    )  # steps; None: only at the end, where data.val is set
    eval_every_epochs: int | None = knob(None, above=0, tasks=(FINETUNE,))  # the same in epochs
    early_stop: int | None = knob(None, above=0, tasks=(FINETUNE,))  # end after so many validations with no better AP
    ema: float | None = knob(None, above=0, tasks=(FINETUNE,))  # decay of averaged weights, as 0.999; see engine/ema.py
    tensorboard: bool = knob(False)  # figures for TensorBoard too, in <run>/tensorboard; needs the package
    wandb: str | None = knob(None)  # the W&B project to send figures to; needs the package
    profile: bool = knob(False)  # write trace.json and profile.txt of a few steps into the run folder
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


def load_config(path: str | Path, overrides: Sequence[str] = (), evaluation: bool = False) -> Config:
    """The config of a YAML file with ``key.sub=value`` overrides on top.

    Values of overrides are read as YAML (``data.short_side=[256, 320]``, ``optim.clip=null``). A key that knows no null
    has its default with it. For an ``evaluation``, ``data.val`` has to be there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a YAML mapping, or a key is unknown, has the wrong type or an impossible value.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config {path}: no such file")
    try:
        tree = read_yaml(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"config {path}: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"config {path}: want a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    data = tree.get("data")
    try:
        if evaluation and (data is None or (isinstance(data, dict) and data.get("val") is None)):
            raise ValueError("data.val: eval needs it, labels in COCO, VOC or YOLO format")
        return from_dict(tree, evaluation)
    except ValueError as error:
        raise ValueError(f"config {path}: {error}") from None


def from_dict(tree: Mapping[str, Any], evaluation: bool = False) -> Config:
    """A checked Config from nested plain values, as ``to_dict`` or YAML gives them; others take their defaults."""
    config = _build(Config, tree, "")
    _check_read(config, tree)
    if not evaluation and config.task != IMAGE_DOMAIN:  # which does not read them
        checks.check_sides(config.data)
    _check_combinations(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain values that YAML, JSON and ``from_dict`` understand: keys of its task only."""
    return _plain(config, config.task)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for every key in which two ``to_dict`` results differ."""
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += [f"{key}.{line}" for line in differences(before, after)]
        elif before != after:
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: want key=value or key.sub=value")
    try:
        value = read_yaml(text)
    except ValueError:
        raise ValueError(f"override {override!r}: {text!r} is not a YAML value") from None
    section, dot, name = key.strip().partition(".")
    if not dot:
        tree[section] = value
        return
    branch = tree.setdefault(section, {})
    if not isinstance(branch, dict):
        raise ValueError(f"override {override!r}: {section} is not a section with keys of its own")
    branch[name] = value


def _build(kind: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ValueError(f"{prefix.rstrip('.') or 'file'}: want keys and values, got {shown(tree)}")
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            raise ValueError(_unknown(f"{prefix}{key if isinstance(key, str) else shown(key)}"[:200]))
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(typing.cast(type, hints[key]), value, f"{key}.")
        elif value is not None or type(None) in typing.get_args(hints[key]):  # else null: the default again
            values[key] = checked(value, hints[key], known[key].metadata, f"{prefix}{key}")
    return kind(**values)


def _unknown(key: str) -> str:
    names = list(_leaves())
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    # A key that is right but stands in the wrong section is nearest by its last part.
    same_name = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f"unknown key {key!r}; the nearest valid key is {(same_name or near)[0]!r}"


def _leaves() -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for name, hint in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{item.name}": item.metadata for item in dataclasses.fields(hint)}
        else:
            found[name] = next(item.metadata for item in dataclasses.fields(Config) if item.name == name)
    return found


def _check_read(config: Config, tree: Mapping[str, Any]) -> None:
    """Refuse keys that task or detector never read: an option that does nothing is a mistake."""
    for key, metadata in _leaves().items():
        section, _, name = key.rpartition(".")
        branch = tree.get(section, {}) if section else tree
        if name in branch and config.task not in metadata["tasks"]:
            raise ValueError(
                f"{key}: not read by task {config.task}, only by {', '.join(metadata['tasks'])}; remove it"
            )
        whose = metadata["of"]
        if name in branch and branch[name] is not None and config.model.detector not in whose:
            raise ValueError(f"{key}: no option of {config.model.detector}, only of {', '.join(whose)}; remove it")


def _check_combinations(config: Config) -> None:
    optim, data = config.optim, config.data
    if not config.run:
        raise ValueError("run: want the folder for logs and checkpoints, for example run=runs/first")
    if (optim.epochs is None) == (optim.steps is None):
        raise ValueError("optim.epochs, optim.steps: want exactly one of the two")
    length = optim.epochs or optim.steps or 0
    if any(b <= a for a, b in zip(optim.milestones, optim.milestones[1:], strict=False)):
        raise ValueError(f"optim.milestones: want an ascending list, got {list(optim.milestones)}")
    if optim.milestones and optim.milestones[-1] >= length:
        raise ValueError(f"optim.milestones: want all below the length of {length}, got {list(optim.milestones)}")
    if optim.milestones and optim.schedule == "cosine":
        raise ValueError("optim.milestones: not read by schedule cosine; remove them or take schedule step")
    if optim.warmup_schedule == "constant" and not optim.warmup:
        raise ValueError("optim.warmup_schedule: has no effect while optim.warmup is 0")
    if data.fold >= 2**32:  # seeds of numpy's legacy generator
        raise ValueError(f"data.fold: want a number below 2**32, got {data.fold}")
    if config.timeout > 1e6:
        raise ValueError(f"timeout: want at most 1000000 s, got {config.timeout:g}")
    if (optim.base_batch is None) != (optim.lr_scaling == "none"):
        raise ValueError(
            f"optim.base_batch, optim.lr_scaling: want both or neither, got {optim.base_batch} and {optim.lr_scaling}"
        )
    if optim.batch % optim.accumulate:
        raise ValueError(f"optim.accumulate: want a divisor of optim.batch {optim.batch}, got {optim.accumulate}")
    if not data.short_side:
        raise ValueError("data.short_side: want at least one size")
    checks.check_conventions(config.model.detector, config.model.conventions)
    checks.check_augmentation(data, DataConfig(), optim.batch)
    checks.check_project(config.wandb)
    shares = {"data.flip": data.flip, "optim.warmup_ratio": optim.warmup_ratio}
    shares |= {f"model.{name}": getattr(config.model, name) for name in ("dropout", "score_threshold")}
    for key, share in shares.items():
        if share is not None and share > 1:
            raise ValueError(f"{key}: want a number in 0 .. 1, got {share}")
    if config.model.frozen_stages > 4:
        raise ValueError(f"model.frozen_stages: want 0 .. 4, got {config.model.frozen_stages}")
    _check_task_combinations(config)


def _check_task_combinations(config: Config) -> None:
    data, method = config.data, config.method
    needed = {PRETRAIN: ("images", "proposals"), IMAGE_DOMAIN: ("images",), FINETUNE: ()}[config.task]
    for name in needed:
        if getattr(data, name) is None:
            raise ValueError(f"data.{name}: task {config.task} needs it")
    if config.task == FINETUNE and data.train is None and data.val is None:
        raise ValueError("data.train: task finetune needs it (evaluation alone needs only data.val)")
    if config.task == IMAGE_DOMAIN and config.model.norm == "frozen" and not config.model.backbone.startswith("swin"):
        raise ValueError("model.norm: a backbone trained from random weights needs norms that learn: batch or sync")
    if config.task == PRETRAIN:
        checks.check_pretraining(config)
        if method.contrast + method.localization + method.classification == 0:
            raise ValueError("method.contrast, .localization, .classification: want one of them above 0")
        if not 0 <= method.momentum <= 1 or not 0 <= (method.background or 0.0) <= 1:
            raise ValueError("method.momentum, method.background: want numbers in 0 .. 1")
    if config.task == IMAGE_DOMAIN and (len(data.crop_scale) != 2 or not data.crop_scale[0] <= data.crop_scale[1] <= 1):
        raise ValueError(f"data.crop_scale: want two ascending shares in 0 .. 1, got {list(data.crop_scale)}")
    if config.task == FINETUNE and config.weights and config.model.backbone_weights and "backbone" in method.modules:
        raise ValueError("weights, model.backbone_weights: want one of the two; weights contain a backbone already")
    if config.task == FINETUNE:
        checks.check_validation(config)
    if config.task == FINETUNE and not method.keep_predictors and not config.weights:
        raise ValueError("method.keep_predictors: has no effect without weights")
    if config.task == FINETUNE and not config.weights and (method.modules != MODULES or method.reference_compatible):
        raise ValueError("method.modules, method.reference_compatible: have no effect without weights")
    if config.task == FINETUNE and not method.keep_predictors and "head" not in method.modules:
        raise ValueError("method.keep_predictors: has no effect without head in method.modules")
    if config.task == FINETUNE and not method.modules:
        raise ValueError(f"method.modules: want some of {', '.join(MODULES)}, got none")


def _plain(value: Any, task: str) -> Any:
    if dataclasses.is_dataclass(value):
        items = dataclasses.fields(value)
        read = [item for item in items if task in item.metadata.get("tasks", TASKS)]
        return {item.name: _plain(getattr(value, item.name), task) for item in read}
    return list(value) if isinstance(value, tuple) else value
