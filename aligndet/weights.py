"""Weights in and out: backbones, pre-trained detectors, trained detectors; strict, with a report."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aligndet.config import MODULES
from aligndet.models import build_detector, option_of, options_of
from aligndet.models.backbones.swin import Swin, from_official, resized_tables
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.soco import SoCo

# Layers of an image classifier that no detector has; leaving them out of a backbone file is not a loss.
CLASSIFIERS = ("fc.", "classifier.", "head.")

# Tensors that follow from others, and those that no classifier has (Swin's norms of the outputs, identities at first).
DERIVED, FRESH = ("num_batches_tracked", "relative_position_index"), ("norms.",)
# One tensor by which each family of backbones is recognised, wherever in a file it stands.
LANDMARKS = ("layer1.0.conv1.weight", "features.0.0.weight", "patch_embed.proj.weight")

# Arguments of ``build_detector`` with which the same tensors compute something else, and the parts whose tensors do:
# those that a config sets, and those that only files bring along.
ANOTHER_MEANING = {"conventions": ("rpn", "head"), "box_head": ("head",)}
OF_BACKBONES = ("pixel_mean", "pixel_std", "stride_in_1x1", "norm_eps")
WITHOUT_SETTING = dict.fromkeys(OF_BACKBONES, "backbone") | {"head_norm": "head", "rpn_depth": "rpn"}

BOX = "predictors.box."  # the only layer of which there may be one for any class or one for each


@dataclass(frozen=True)
class Report:
    """What came from a file and what did not.

    Attributes:
        source: the file, or a word for weights from memory.
        loaded: names of the model's tensors that were taken from it.
        kept: names of the model's tensors that keep the values they had.
        unused: names in the file that the model has no place for.
        mismatched: "name: file [shape], model [shape]" of tensors that exist in both but differ in shape.
        tiled: names, among ``loaded``, of box layers for any class that were repeated for each class of the model.
    """

    source: str
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[str, ...]
    tiled: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded ({_summary(self.loaded)})"]
        rest = (("repeated for each class", self.tiled), ("keep their values", self.kept))
        for title, names in (*rest, ("unused in the file", self.unused)):
            if names:
                lines.append(f"  {len(names)} {title}: {_summary(names)}")
        lines += [f"  shape differs, {line}" for line in self.mismatched]
        return "\n".join(lines)


def why_refused(error: Exception) -> str:
    """What ``torch.load`` says of a file in a line, without its advice to read the file by executing it."""
    text = " ".join(str(error).split())
    text = re.sub(r"In PyTorch 2\.6, .*? trusted source\. (Please file an issue .*? use case: )?", "", text)
    text = re.sub(r" Check the documentation of torch\.load .*", "", text)
    return textwrap.shorten(text, 200, placeholder=" …")


def read_weights(path: str | Path) -> dict[str, Any]:
    """The contents of a weights file, loaded without executing anything in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no mapping, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old zip layouts; the content is checked below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load raises a dozen kinds of errors for damaged and for refused files; each means the same here.
        message = f"weights {path}: want a file of tensors, damaged or refused: {why_refused(error)}"
        raise ValueError(message) from None
    if not isinstance(content, dict):
        raise ValueError(f"weights {path}: want a mapping of names to tensors, got {type(content).__name__}")
    return content


def load_backbone(detector: Detector | nn.Module, path: str | Path) -> Report:
    """Load weights of image classification or of self-supervised pre-training into the backbone.

    Recognised are torchvision's names, our image-domain runs, Microsoft's Swin and SimMIM, and what stands around them
    in the files of MoCo v1 to v3, DenseCL, PixPro, SoCo, SwAV and DINO: of several encoders the one that was trained.

    Args:
        detector: its ``backbone`` is filled; half-precision tensors are cast.
        path: file with a state dict, plain or under "state_dict", "model" or "backbone".

    Raises:
        ValueError: not every tensor of the backbone is in the file with the right shape; a partly loaded backbone
            would be frozen with random layers in it.
    """
    backbone = detector.backbone
    assert isinstance(backbone, nn.Module)
    state = _unwrapped(_tensors(read_weights(path), ("backbone", "state_dict", "model", "teacher"), path))
    if isinstance(backbone, Swin):
        state = resized_tables(from_official(state), backbone.state_dict())
    state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIERS)}
    report = _fill(backbone, state, str(path))
    lacking = [name for name in report.kept if not name.endswith(DERIVED) and not name.startswith(FRESH)]
    if lacking or report.mismatched:
        missing = f"{len(lacking)} of its tensors are not in the file (first: {lacking[0]})" if lacking else ""
        shapes = f"shapes differ: {report.mismatched[0]}" if report.mismatched else ""
        raise ValueError(f"weights {path}: do not fit this backbone: {'; '.join(filter(None, [missing, shapes]))}")
    return report


def export_pretrained(module: AlignDet | SoCo, build: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What pre-training has taught the online branch, ready for ``torch.save`` and ``load_pretrained``.

    The paper hands over everything but the projection; the online branch, not its average, is what the reference hands
    over (method section 5.1). Pseudo-class scores and mask layers stay behind too: no later task has those classes, and
    the masks have learned nothing. Of SoCo it is the backbone, the neck and the box head.

    Args:
        build: the arguments of ``build_detector`` that the detector was built with; ``aligndet convert`` needs them.
    """
    state = module.online.state_dict()
    dropped = tuple(f"{name}." for name in module.left_behind())
    kept = {name: value.cpu() for name, value in state.items() if not name.startswith(dropped)}
    return {"kind": "pretrained", "format": 1, "detector": kept, "build": dict(build or {})}


def load_pretrained(
    detector: Detector, path: str | Path, modules: Sequence[str] = MODULES, keep_predictors: bool = True
) -> Report:
    """Start a detector from the file of a pre-training run, where shapes fit.

    A box layer for any class is repeated for each class of a detector with one for each (two-stage detectors).

    Args:
        path: file written from ``export_pretrained`` (or ``export_detector``: the class scores then fit or are left).
        modules: which parts to take, of "backbone", "neck", "rpn", "head" (Table 9 of the paper).
        keep_predictors: False leaves out box and centerness layers, as the reference does (method section 7, row 4);
            of DETR all three linear layers of its boxes, of which the reference drops the last.

    Raises:
        ValueError: unknown module names, a file of another kind, or nothing in the file fits the detector.
    """
    unknown = [name for name in modules if name not in MODULES]
    if unknown or not modules:
        raise ValueError(f"modules: want some of {', '.join(MODULES)}, got {', '.join(unknown) or 'none'}")
    content = read_weights(path)
    if content.get("kind") not in (None, "pretrained", "detector"):
        raise ValueError(f"weights {path}: want pretrained.pt or model.pt of a run, got its {content['kind']}")
    state = _tensors(content, ("detector", "state_dict", "model"), path)
    if not state.keys() & detector.state_dict().keys():
        raise ValueError(
            f"weights {path}: holds no tensor of a detector of ours (the first: {next(iter(state))}); weights of a "
            "backbone alone are for model.backbone_weights, those of other libraries for `aligndet convert`"
        )
    wanted = {name: value for name, value in state.items() if _module_of(name) in modules}
    if not keep_predictors:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("predictors.")}
    own = detector.state_dict()
    tiled = tuple(name for name, value in wanted.items() if name.startswith(BOX) and _repeats(value, own.get(name)) > 1)
    for name in tiled:
        wanted[name] = torch.cat([wanted[name]] * _repeats(wanted[name], own[name]))
    report = replace(_fill(detector, wanted, str(path)), tiled=tiled)
    for part in modules:
        fits = [name for name in report.loaded if _module_of(name) == part]
        there = [name for name in wanted if _module_of(name) == part]
        if there and not fits and any(_module_of(name) == part for name in own):
            raise ValueError(
                f"weights {path}: no tensor fits the {part} of this detector; was it made with another backbone, "
                f"width, channels or convolutions?{' For example ' + report.mismatched[0] if report.mismatched else ''}"
            )
    if not report.loaded:
        raise ValueError(f"weights {path}: holds nothing of {', '.join(modules)} for this detector")
    return report


def inherited(path: str | Path, build: Mapping[str, Any], modules: Sequence[str] = MODULES) -> dict[str, Any]:
    """What a detector is to be built with beside ``build``, so that tensors of a file compute there what they did here.

    By name and shape alone they would also fit where pixels are normalised otherwise or boxes mean something else. A
    file that does not say how its detector was built says nothing.

    Args:
        build: arguments of ``build_detector``.
        modules: the parts that are taken from the file.

    Raises:
        ValueError: ``build`` has another of ANOTHER_MEANING for a part that is taken, or norms in the neck on one side.
    """
    there = read_weights(path).get("build") or {}
    if not there:
        return {}
    for option, parts in ANOTHER_MEANING.items():
        was, now = option_of(there, option), option_of(build, option)
        if None not in (was, now) and was != now and any(part in modules for part in parts):
            raise ValueError(
                f"weights {path}: made with {option} {was}, here it is {now}, and the same tensors would compute "
                f"something else; set model.{option}={was}, or leave {' and '.join(parts)} out of method.modules"
            )
    was, now = option_of(there, "neck_norm"), option_of(build, "neck_norm")
    if (was is None) != (now is None) and "neck" in modules:
        raise ValueError(
            f"weights {path}: made with neck_norm {was}, here it is {now}, and layers have other names; set "
            f"model.neck_norm={'null' if was is None else was}, or leave neck out of method.modules"
        )
    known = {*OF_BACKBONES, *options_of(build["name"])}
    return {
        name: there[name]
        for name, part in WITHOUT_SETTING.items()
        if name in there and name in known and name not in build and part in modules
    }


def unfinished_detector(path: str | Path, num_classes: int) -> Detector:
    """The detector of a pre-training file, with NaN wherever that file says nothing; for conversion.

    Raises:
        ValueError: the file does not say how its detector was built, or is of another kind.
    """
    content = read_weights(path)
    if content.get("kind") != "pretrained" or not content.get("build"):
        found = content.get("kind", "a file of another program")
        raise ValueError(f"weights {path}: want pretrained.pt of a run, which says how it was built, got {found}")
    changed = {"num_classes": num_classes} | ({"class_agnostic": False} if "class_agnostic" in content["build"] else {})
    detector = build_detector(**content["build"] | changed)
    with torch.no_grad():
        for value in detector.state_dict().values():
            if value.is_floating_point():
                value.fill_(torch.nan)
    load_pretrained(detector, path)
    return detector


def export_detector(detector: Detector, classes: Sequence[str], build: Mapping[str, Any]) -> dict[str, Any]:
    """A trained detector with its class names and the arguments of ``build_detector`` that it was built with."""
    state = {name: value.cpu() for name, value in detector.state_dict().items()}
    return {"kind": "detector", "format": 1, "detector": state, "classes": list(classes), "build": dict(build)}


def load_detector(path: str | Path) -> tuple[Detector, tuple[str, ...]]:
    """A trained detector from a file of ``export_detector``, in evaluation mode, with its class names.

    ``short_side`` and ``long_side`` of the detector are those at which its run measured it, where the file says so.

    Raises:
        ValueError: the file holds no trained detector, or tensors or names that do not fit the one it describes.
    """
    content = read_weights(path)
    if content.get("kind") != "detector":
        found = content.get("kind", "a file of another program")
        raise ValueError(f"weights {path}: want a trained detector (model.pt of a fine-tuning run), got {found}")
    build, state, classes = (content.get(key) for key in ("build", "detector", "classes"))
    if not isinstance(build, dict) or not isinstance(state, dict) or not isinstance(classes, list | tuple):
        got = ", ".join(content)
        raise ValueError(f"weights {path}: want build, detector and classes of a trained detector, got {got}")
    try:
        detector = build_detector(**build)
    except (TypeError, ValueError) as error:
        raise ValueError(f"weights {path}: want arguments of build_detector in build; problem: {error}") from None
    if len(classes) != (number := build.get("num_classes", 80)):
        raise ValueError(f"weights {path}: want names of its {number} classes, got {len(classes)}")
    report = _fill(detector, state, str(path))
    if report.kept or report.mismatched or report.unused:
        raise ValueError(f"weights {path}: do not fit the detector they describe:\n{report}")
    detector.short_side = _side_of(content, "eval_short_side", path) or detector.short_side
    detector.long_side = _side_of(content, "long_side", path) or detector.long_side
    return detector.eval(), tuple(classes)


def _side_of(content: Mapping[str, Any], key: str, path: str | Path) -> int | None:
    """A size px of images in the config of the run that a file is from; None where it says none."""
    config = content.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    side = data.get(key) if isinstance(data, dict) else None
    if side is not None and (not isinstance(side, int) or side < 1):
        raise ValueError(f"weights {path}: config.data.{key}: want px, at least 1, got {side!r}")
    return side


def _tensors(content: dict[str, Any], wrappers: tuple[str, ...], path: str | Path) -> dict[str, Tensor]:
    for wrapper in wrappers:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"weights {path}: want names with tensors, got none; keys are {list(content)[:5]}")
    return state


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one backbone without the names around it; of several, averages (momentum, _k, ema) come last."""
    prefixes = {
        name[: -len(landmark)]
        for name in state
        for landmark in LANDMARKS
        if name == landmark or name.endswith("." + landmark)
    }
    if not prefixes:
        return state
    averaged = re.compile(r"(_k\.|_k$|momentum|ema|target)")
    prefix = min(prefixes, key=lambda text: (bool(averaged.search(text)), len(text), text))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _repeats(value: Tensor, own: Tensor | None) -> int:
    """How many copies of ``value``, a layer of one box for any class, have the shape of ``own``; 0: no number."""
    if own is None or value.ndim == 0 or own.shape[1:] != value.shape[1:]:
        return 0
    if value.shape[0] != 4 or own.shape[0] % 4:
        return 0
    return int(own.shape[0] // 4)


def _module_of(name: str) -> str:
    top = name.partition(".")[0]
    return top if top in MODULES else "head"


@torch.no_grad()
def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> Report:
    own = module.state_dict()
    loaded, mismatched = [], []
    for name, value in state.items():
        if name not in own:
            continue
        if own[name].shape == value.shape:
            own[name].copy_(value)
            loaded.append(name)
        else:
            mismatched.append(f"{name}: file {list(value.shape)}, model {list(own[name].shape)}")
    kept = tuple(name for name in own if name not in set(loaded))
    # Batch norm's step counter is bookkeeping: frozen norms have none.
    unused = tuple(name for name in state if name not in own and not name.endswith("num_batches_tracked"))
    return Report(source, tuple(loaded), kept, unused, tuple(mismatched))


def _summary(names: Sequence[str]) -> str:
    """Top-level parts with counts: ``backbone 267, neck 16``; predictors by name."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        top = ".".join(parts[:2]) if parts[0] == "predictors" else parts[0]
        counts[top] = counts.get(top, 0) + 1
    return ", ".join(f"{top} {count}" for top, count in counts.items())
