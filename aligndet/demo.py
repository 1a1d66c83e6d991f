"""``aligndet demo``: the whole method on generated scenes, with and without pre-training, and a table of both."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch

from aligndet import config as settings
from aligndet.data import propose
from aligndet.data.synthetic import make_scenes
from aligndet.demo_figures import write_figures
from aligndet.engine import distributed
from aligndet.engine.finish import finish
from aligndet.engine.log import read_log
from aligndet.engine.loop import fit
from aligndet.engine.prepare import prepare

METRICS = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Recipe:
    """Sizes of the demo; chosen so that the full one takes at most 12 minutes on 2 cores.

    Attributes:
        size: px, both sides of a scene.
        unlabelled: scenes for stages 1 and 2.
        labelled: of them, how many carry labels in stage 3.
        validation: scenes that are evaluated.
        image_domain, pretrain, finetune: optimizer steps of the three stages.
        seeds: each is one fold of labelled scenes and one initialisation of the layers that start from noise.
    """

    size: int = 160
    unlabelled: int = 400
    labelled: int = 30
    validation: int = 60
    image_domain: int = 200
    pretrain: int = 250
    finetune: int = 100
    seeds: tuple[int, ...] = (1, 2, 3)


FULL = Recipe()
SHORT = Recipe(unlabelled=60, validation=16, image_domain=30, pretrain=40, finetune=40, seeds=(1,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet demo``."""
    parser.add_argument("--out", default="runs/demo", help="folder for results (default runs/demo)")
    parser.add_argument("--short", action="store_true", help="the same in little: fewer scenes, steps and seeds")
    parser.add_argument("--check", action="store_true", help="fail unless the loss of every stage falls")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")


def run(args: argparse.Namespace) -> int:
    """All three stages; a stage that is complete in ``--out`` is not repeated."""
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    out = Path(args.out)
    recipe = SHORT if args.short else FULL
    _same_recipe(out, recipe)
    seconds: dict[str, float] = {}
    train, val = _stage("scenes", out, seconds, lambda: _scenes(out, recipe))
    backbone = _stage("1 image domain", out, seconds, lambda: _train(_image_domain(out, recipe)))
    proposals = _stage("2a proposals", out, seconds, lambda: _propose(out, train))
    pretrained = _stage("2b box domain", out, seconds, lambda: _train(_pretrain(out, recipe, backbone, proposals)))
    for seed in recipe.seeds:
        for start in ("with", "without"):
            config = _finetune(out, recipe, seed, train, val, backbone=backbone if start == "without" else None)
            if start == "with":
                config |= {"weights": pretrained}
            _stage(f"3 {start}, seed {seed}", out, seconds, lambda config=config: _train(config))
    table = _table(out, recipe, seconds)
    (out / "table.json").write_text(json.dumps(table, indent=1))
    write_figures(out, recipe.seeds[0], train, val, proposals)
    print(_text(table))
    print(f"{out}: table.json, figures/*.png, weights (*.pt) and logs (log.jsonl) of each run")
    return _check(out) if args.check else 0


def _scenes(out: Path, recipe: Recipe) -> tuple[str, str]:
    size = recipe.size
    train = make_scenes(out / "scenes", images=recipe.unlabelled, size=size, seed=1, name="train")
    val = make_scenes(out / "scenes", images=recipe.validation, size=size, seed=2, name="val")
    return str(train), str(val)


def _train(config: dict[str, Any]) -> str:
    checked = settings.from_dict(config)
    training = prepare(checked, distributed.single("cpu"))
    fit(training)
    return str(finish(checked, training))
