"""The command line: ``aligndet <command>``, ``python -m aligndet <command>``, ``train.py`` and ``eval.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import cv2
import torch

from aligndet import convert, demo
from aligndet.config import Config, ModelConfig, load_config
from aligndet.data import check, convert_proposals, propose, shards, split
from aligndet.engine import cluster, curves, distributed, predictions, replay
from aligndet.engine.cocoeval import evaluator_note
from aligndet.engine.failure import MISTAKE, one_line_errors
from aligndet.engine.finish import evaluate, finish, summary
from aligndet.engine.loop import fit
from aligndet.engine.precision import slow_precision
from aligndet.engine.prepare import prepare, repeatable
from aligndet.models import detector_class
from aligndet.protocol import Detector
from aligndet.version import __version__
from aligndet.weights import load_detector

# Modules with ``add_arguments(parser)`` and ``run(arguments) -> exit code``.
TOOLS = {
    "check": (check, "Report on a data set before training: exit code 0 where it is usable, 1 where it is not."),
    "split": (split, "Write the low-data folds of a labelled data set."),
    "propose": (propose, "Find boxes of likely objects in images."),
    "merge-proposals": (shards, "Join the proposal files of all shards."),
    "convert-proposals": (convert_proposals, "Proposals of other programs in, and out for the reference code."),
    "cluster": (cluster, "Pseudo-classes for the boxes of a proposal file."),
    "predict": (predictions, "Detect objects in images."),
    "plot": (curves, "Draw losses and average precision of runs over their steps."),
    "replay": (replay, "Repeat a training step that was not finite."),
    "convert": (convert, "Weights from and to other libraries."),
    "demo": (demo, "The whole method on generated scenes."),
}
# What eval.py reads of an experiment file besides the labels.
EVALUATED = (
    *("data.val", "data.format", "data.classes", "data.eval_short_side", "data.long_side", "data.voc_metrics"),
    *("data.on_error", "data.workers", "optim.amp", "device", "threads", "timeout", "deterministic"),
)


class _Parser(argparse.ArgumentParser):
    """Says in one line, as every mistake, what is wrong with the arguments; ``--help`` says the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"aligndet: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="aligndet",
        description="Pre-train whole object detectors without labels, fine-tune them with few.",
        epilog="aligndet <command> --help shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"aligndet {__version__}")
    parser.add_argument("command", choices=["train", "eval", *TOOLS])
    command = parser.parse_args(arguments[:1]).command
    if command in TOOLS:
        return _tool(command, arguments[1:])
    return (train if command == "train" else evaluate_weights)(arguments[1:])


def train(argv: Sequence[str] | None = None) -> int:
    """Pre-train or fine-tune as the YAML file says; the same command again continues an interrupted run."""
    parser = _Parser(prog="train.py", description=train.__doc__)
    _add_config(parser)
    args = _parsed(parser, argv)
    with one_line_errors():
        config = load_config(args.cfg, args.overrides)
        world = _start(config)
        training = prepare(config, world)
        fit(training)
        finish(config, training)
        distributed.stop(world)
    return 0


def evaluate_weights(argv: Sequence[str] | None = None) -> int:
    """COCO metrics (and VOC's) of a trained detector on data.val; writes metrics.json and predictions.json."""
    parser = _Parser(prog="eval.py", description=evaluate_weights.__doc__)
    _add_config(parser)
    parser.add_argument("--weights", required=True, help="model.pt of a fine-tuning run")
    parser.add_argument("--per-class", action="store_true", help="print a line for each class")
    parser.add_argument("--out", help="folder for the results; default: beside the weights, in eval/")
    args = _parsed(parser, argv)
    with one_line_errors():
        config = load_config(args.cfg, args.overrides, evaluation=True)
        world = _start(config)
        repeatable(config.deterministic)
        detector, classes = load_detector(args.weights)
        if config.data.classes and list(config.data.classes) != list(classes):
            got = ", ".join(config.data.classes)
            raise ValueError(f"data.classes: {args.weights} detects {', '.join(classes)}, got {got}; see --per-class")
        if world.rank == 0 and (other := _other_detector(config, detector, args.weights)):
            print(f"warning: {other}", file=sys.stderr)
        unread = [text.partition("=")[0] for text in args.overrides if not text.startswith(EVALUATED)]
        if unread and world.rank == 0:
            print(f"warning: not read by eval, the weights say it: {', '.join(unread)}", file=sys.stderr)
        if world.rank == 0 and (slow := slow_precision(world.device, config.optim.amp)):
            print(f"warning: {slow}", file=sys.stderr)
        folder = Path(args.out) if args.out else Path(args.weights).parent / "eval"
        metrics = evaluate(config, detector, classes, world, folder)
        if world.rank == 0:
            print(summary(metrics, args.per_class))
            print(evaluator_note())
            print(f"{folder}: metrics.json, predictions.json")
        distributed.stop(world)
    return 0


def _other_detector(config: Config, detector: Detector, weights: str) -> str:
    """That the experiment file describes another detector than the weights are of; "" where it does not, or none."""
    said = config.model.detector
    if config.model == ModelConfig() or type(detector) is detector_class(said):
        return ""
    return f"{weights} holds a {type(detector).__name__}, which is evaluated; model.detector {said} is not read"


def _tool(name: str, argv: Sequence[str]) -> int:
    """One of the commands that need no experiment file."""
    tool, description = TOOLS[name]
    parser = _Parser(prog=f"aligndet {name}", description=description)
    tool.add_arguments(parser)
    args = parser.parse_args(argv)
    with one_line_errors():
        code: int = tool.run(args)
    return code


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg", required=True, metavar="FILE.yaml", help="experiment file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the file")


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of train and eval, overrides before and after options; what is neither ends with exit code 2."""
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; keys are written run=r/x, without dashes")
    return args


def _start(config: Config) -> distributed.World:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    cv2.setNumThreads(1)
    return distributed.start(config.device, config.timeout)
