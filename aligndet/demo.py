"""``aligndet demo``: the whole method on generated scenes, with and without pre-training, and a table of both."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch

from aligndet import config as settings
from aligndet.data import propose
from aligndet.data.synthetic import Difficulty, make_scenes
from aligndet.demo_figures import write_figures
from aligndet.engine import distributed
from aligndet.engine.finish import finish
from aligndet.engine.log import read_log
from aligndet.engine.loop import fit
from aligndet.engine.prepare import prepare
from aligndet.plots import figures

METRICS = ("AP", "AP50", "AP75")
BACKBONE, WIDTH = "resnet18", 0.5
CLASSES = ("disc", "triangle", "ring", "cross")
MODEL = {"backbone": BACKBONE, "width": WIDTH, "channels": 64, "convolutions": 2, "levels": 4}


@dataclass(frozen=True)
class Recipe:
    """Sizes of the demo; chosen so that the full one takes at most 12 minutes on 2 cores.

    Attributes:
        size: px, both sides of a scene.
        objects: pictures of single objects, for stage 1.
        unlabelled: scenes of many objects, for stage 2.
        labelled: of them, how many carry labels in stage 3.
        validation: scenes that are evaluated.
        image_domain, pretrain, finetune: optimizer steps of the three stages.
        seeds: each is one fold of labelled scenes and one initialisation of the layers that start from noise.
    """

    size: int = 160
    objects: int = 800
    unlabelled: int = 600
    labelled: int = 60
    validation: int = 80
    image_domain: int = 400
    pretrain: int = 1600
    finetune: int = 120
    seeds: tuple[int, ...] = (1, 2, 3)


FULL = Recipe()
SHORT = Recipe(objects=100, unlabelled=80, validation=16, image_domain=50, pretrain=60, finetune=60, seeds=(1,))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet demo``."""
    parser.add_argument("--out", default="runs/demo", help="folder for results (default runs/demo)")
    parser.add_argument("--short", action="store_true", help="the same in little: fewer scenes, steps and seeds")
    parser.add_argument("--check", action="store_true", help="fail unless the loss of every stage falls")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")


def run(args: argparse.Namespace) -> int:
    """All three stages; a stage that is complete in ``--out`` is not repeated."""
    figures.require()
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
            _stage(f"3 {start}, seed {seed}", out, seconds, partial(_train, config))
    table = _table(out, recipe, seconds)
    (out / "table.json").write_text(json.dumps(table, indent=1))
    write_figures(out, recipe.seeds[0], train, val, proposals)
    print(_text(table))
    print(f"{out}: table.json, figures/*.png, weights (*.pt) and logs (log.jsonl) of each run")
    return _check(out) if args.check else 0


def _scenes(out: Path, recipe: Recipe) -> tuple[str, str]:
    """Pictures of single objects, as the image domain has them, and scenes of many, as detection has them."""
    single = Difficulty(extents=(0.45, 0.8), typical=0.9, lumps=(0, 0))
    many = Difficulty(extents=(0.18, 0.55), typical=0.9, lumps=(0, 1))
    numbers: dict[str, Any] = {"images": recipe.objects, "size": recipe.size * 3 // 5, "seed": 3}
    make_scenes(out / "objects", **numbers, classes=CLASSES, objects=(1, 1), difficulty=single)
    paths = []
    for name, images, seed in (("train", recipe.unlabelled, 1), ("val", recipe.validation, 2)):
        numbers = {"images": images, "size": recipe.size, "seed": seed}
        scenes = make_scenes(out / "scenes", **numbers, name=name, classes=CLASSES, objects=(2, 6), difficulty=many)
        paths.append(str(scenes))
    return paths[0], paths[1]


def _train(config: dict[str, Any]) -> str:
    checked = settings.from_dict(config)
    training = prepare(checked, distributed.single("cpu"))
    fit(training)
    return str(finish(checked, training))


def _image_domain(out: Path, recipe: Recipe) -> dict[str, Any]:
    return _common(out, "1-image-domain", recipe) | {
        "task": settings.IMAGE_DOMAIN,
        "model": {"backbone": BACKBONE, "width": WIDTH, "norm": "batch"},
        "data": {"images": str(out / "objects/images"), "short_side": recipe.size * 2 // 5, "workers": 1},
        "method": {"projection": 256, "bottleneck": 64},
        "optim": {"lr": 0.05, "batch": 64, "steps": recipe.image_domain, "schedule": "cosine", "warmup": 10},
    }


def _pretrain(out: Path, recipe: Recipe, backbone: str, proposals: str) -> dict[str, Any]:
    return _common(out, "2-pretrain", recipe) | {
        "task": settings.PRETRAIN,
        "model": MODEL | {"backbone_weights": backbone},
        "data": {"images": str(out / "scenes/images"), "proposals": proposals} | _sides(recipe),
        "method": {"momentum": 0.99, "candidates": 1024, "scope": "batch", "embedding": 64},
        "optim": {
            "name": "adamw",
            "lr": 1e-3,
            "batch": 8,
            "steps": recipe.pretrain,
            "schedule": "cosine",
            "warmup": 20,
        },
    }


def _finetune(
    out: Path, recipe: Recipe, seed: int, train: str, val: str, backbone: str | None = None
) -> dict[str, Any]:
    """The same run for both starts; only the weights differ."""
    start = "without" if backbone else "with"
    data = {"train": train, "val": val, "labelled": recipe.labelled, "fold": seed, "eval_short_side": recipe.size}
    common = _common(out, f"3-finetune-{start}-seed{seed}", recipe)
    return common | {
        "task": settings.FINETUNE,
        "seed": seed,
        "model": MODEL | {"frozen_stages": 0, "norm": "batch"} | ({"backbone_weights": backbone} if backbone else {}),
        "data": data | _sides(recipe),
        "optim": {
            "name": "adamw",
            "lr": 2e-3,
            "batch": 8,
            "steps": recipe.finetune,
            "schedule": "cosine",
            "warmup": 10,
        },
    }


def _common(out: Path, name: str, recipe: Recipe) -> dict[str, Any]:
    return {"run": str(out / name), "seed": 0, "device": "cpu", "log_every": 5}


def _sides(recipe: Recipe) -> dict[str, Any]:
    short = [recipe.size * part // 8 for part in (6, 7, 8)]
    return {"short_side": short, "long_side": recipe.size, "workers": 1}


def _propose(out: Path, train: str) -> str:
    path = out / "proposals.npz"
    parser = argparse.ArgumentParser()
    propose.add_arguments(parser)
    arguments = ["--annotations", train, "--images", str(out / "scenes/images"), "--out", str(path)]
    propose.run(parser.parse_args([*arguments, "--mode", "fast", "--workers", "2"]))
    return str(path)


def _stage(name: str, out: Path, seconds: dict[str, float], work: Callable[[], Any]) -> Any:
    """Run a stage, or take its result from an earlier run of the demo; seconds are those it really took."""
    path = out / "stages.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if name not in done:
        print(f"\n== {name}", flush=True)
        began = time.perf_counter()
        result = work()
        done[name] = {"result": result, "seconds": time.perf_counter() - began}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(done, indent=1))
    seconds[name] = done[name]["seconds"]
    return done[name]["result"]


def _same_recipe(out: Path, recipe: Recipe) -> None:
    path = out / "recipe.json"
    plain = json.dumps(dataclasses.asdict(recipe))
    if path.exists() and path.read_text() != plain:
        raise ValueError(f"{out}: holds a demo of another size; take another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(plain)


def _table(out: Path, recipe: Recipe, seconds: dict[str, float]) -> dict[str, Any]:
    results: dict[str, dict[str, list[float]]] = {}
    for start in ("without", "with"):
        files = [out / f"3-finetune-{start}-seed{seed}" / "metrics.json" for seed in recipe.seeds]
        metrics = [json.loads(path.read_text()) for path in files]
        results[start] = {name: [100 * row[name] for row in metrics] for name in METRICS}
    means = {
        start: {name: statistics.fmean(values) for name, values in rows.items()} for start, rows in results.items()
    }
    difference = {name: means["with"][name] - means["without"][name] for name in METRICS}
    return {"seeds": recipe.seeds, "each": results, "mean": means, "difference": difference, "seconds": seconds}


def _text(table: dict[str, Any]) -> str:
    lines = [
        f"\nFine-tuning, mean of seeds {list(table['seeds'])}, same labels and steps:",
        f"{'':24}   AP   AP50   AP75",
    ]
    rows = {"stage 1 only": table["mean"]["without"], "stages 1 and 2 (AlignDet)": table["mean"]["with"]}
    for title, row in (rows | {"difference": table["difference"]}).items():
        sign = "+" if title == "difference" else ""
        lines.append(f"{title:25}" + "  ".join(f"{row[name]:{sign}5.1f}" for name in METRICS))
    each = table["each"]
    gains = [b - a for a, b in zip(each["without"]["AP"], each["with"]["AP"], strict=True)]
    lines.append("AP gained per seed: " + ", ".join(f"{gain:+.1f}" for gain in gains))
    if table["difference"]["AP"] <= 0:
        lines.append("AlignDet did not win this time.")
    lines.append("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in table["seconds"].items()))
    return "\n".join(lines)


def _check(out: Path) -> int:
    """1 where the total loss of a run did not fall between its first and last fifth, else 0."""
    failed = 0
    for path in sorted(out.glob("*/log.jsonl")):
        totals = [sum(record["losses"].values()) for record in read_log(path) if "losses" in record]
        part = max(1, len(totals) // 5)
        first, last = statistics.fmean(totals[:part]), statistics.fmean(totals[-part:])
        print(f"{path.parent.name}: loss {first:.3f} -> {last:.3f}{'' if last < first else ', did not fall'}")
        failed |= not last < first
    return int(failed)
