"""``aligndet convert``: files of weights from and to other libraries, and what has to be set there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aligndet.interop import detectron2, detr, mmdet, torchvision
from aligndet.protocol import Detector
from aligndet.weights import export_detector, load_detector, read_weights, unfinished_detector

OURS = "aligndet"
PEERS = {"torchvision": torchvision, "detr": detr, "mmdet": mmdet, "detectron2": detectron2}
# Under which key the file of a peer holds its tensors; None: at the top.
WRAPPERS = {"torchvision": None, "detr": "model", "mmdet": "state_dict", "detectron2": "model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet convert``."""
    choices = [OURS, *PEERS]
    parser.add_argument("--from", dest="source", required=True, choices=choices, help="library that wrote IN")
    parser.add_argument("--to", dest="target", required=True, choices=choices, help="library that shall read OUT")
    parser.add_argument("--name", help="what the model is called there, e.g. fcos_resnet50_fpn; needed unless ours")
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="K",
        help="objects, without background, that box layers made from a pre-trained file are for (default 80)",
    )
    parser.add_argument(
        "--mmdet-version",
        type=int,
        choices=(2, 3),
        help="of --to mmdet; names of DETR's layers differ (default 3)",
    )
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line; default: class_0, class_1, ...")
    parser.add_argument("input", metavar="IN", help="file of weights")
    parser.add_argument("output", metavar="OUT", help="file to write")


def run(args: argparse.Namespace) -> int:
    """Convert one file; what has no counterpart is an error that lists it."""
    if args.mmdet_version is not None and args.target != "mmdet":
        raise ValueError(f"--mmdet-version: want it with --to mmdet only, got --to {args.target}")
    output = Path(args.output)
    if output.is_dir():
        raise ValueError(f"{output}: want a file to write, got a folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.source == OURS:
        unfinished = read_weights(args.input).get("kind") == "pretrained"
        if unfinished:
            detector = unfinished_detector(args.input, 80 if args.num_classes is None else args.num_classes)
        elif args.num_classes is not None:
            raise ValueError(f"--num-classes: {args.input} is a trained detector and has its classes already")
        else:
            detector, _ = load_detector(args.input)
        content = _content(args, detector)
    elif args.name is None:
        raise ValueError(f"--name: want what {args.source} calls the model, its builder or config")
    else:
        state = _state(args.source, args.input)
        peer = PEERS[args.source]
        try:
            detector = peer.from_state_dict(args.name, state)
        except ValueError as error:
            raise ValueError(f"weights {args.input}: {error}") from None
        if args.target == OURS:
            build = peer.build_arguments(args.name, state)
            content = export_detector(detector, _class_names(args.classes, build["num_classes"]), build)
        else:
            content = _content(args, detector)
    try:
        torch.save(content, output)
    except RuntimeError as error:  # so torch's writer reports a folder or a disk that cannot be written
        raise ValueError(f"{output}: cannot be written: {error}") from None
    state = detector.state_dict()
    number = sum(value.numel() for value in state.values())
    print(f"{output}: {number:,} numbers, for {args.target}")
    lacking = [name for name, value in state.items() if bool(value.isnan().any())]
    if lacking:
        print(f"without {', '.join(lacking)}, which pre-training does not teach; load it with strict=False")
    for line in _settings(args, detector):
        print(f"{args.target}: {line}")
    return 0


def _content(args: argparse.Namespace, detector: Detector) -> dict[str, Any]:
    if args.target == OURS:
        raise ValueError(f"{args.input}: is aligndet's already; want another library for --to")
    try:
        if args.target == "mmdet":
            state = mmdet.to_state_dict(detector, args.mmdet_version or 3)
        else:
            state = PEERS[args.target].to_state_dict(detector)
    except ValueError as error:
        raise ValueError(f"{args.input}: {error}") from None
    # What a pre-training file says nothing about is NaN: scores, and masks. The model there keeps its own.
    state = {name: value for name, value in state.items() if not bool(value.isnan().any())}
    wrapper = WRAPPERS[args.target]
    return dict(state) if wrapper is None else {wrapper: state}


def _settings(args: argparse.Namespace, detector: Detector) -> list[str]:
    """What the library that reads the file has to be told."""
    if args.target == OURS:
        return []
    if args.target == "mmdet":
        return mmdet.settings(detector, args.mmdet_version or 3)
    return PEERS[args.target].settings(detector)


def _state(source: str, path: str) -> dict[str, Tensor]:
    """The tensors of a peer's file, with or without the wrapper it usually has."""
    content = read_weights(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"weights {path}: want names with tensors of {source}, got {', '.join(list(content)[:5])}")
    return state


def _class_names(path: str | None, number: int) -> Sequence[str]:
    if path is None:
        return [f"class_{label}" for label in range(number)]
    names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if len(names) != number:
        raise ValueError(f"classes {path}: want {number} names, one per line, got {len(names)}")
    return names
