"""``aligndet replay``: repeats the step of a ``dump-*.pt`` whose loss or gradient was not finite."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from aligndet import config as settings
from aligndet.engine import checkpoint, distributed, runfolder
from aligndet.engine.distributed import World
from aligndet.engine.loop import fit
from aligndet.engine.prepare import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet replay``."""
    parser.add_argument("dump", metavar="DUMP", help="dump-*.pt of a run folder")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(args: argparse.Namespace) -> int:
    """Train from the dump's state to its bad step; 0 if that is not finite again, 1 if it is finite now."""
    dump = _load(Path(args.dump))
    world = distributed.start(args.device)
    if world.size != dump["ranks"]:
        raise ValueError(f"{args.dump}: of {dump['ranks']} ranks; want torchrun --nproc-per-node {dump['ranks']}")
    with tempfile.TemporaryDirectory() as own:
        folder = Path(distributed.gather_objects(own, world)[0])
        message = _repeated(dump, folder, args.device, world)
        distributed.barrier(world)
    if world.rank == 0:
        print(f"reproduced: {message}" if message else f"not reproduced: step {dump['bad_step'] + 1} is finite here")
    distributed.stop(world)
    return 0 if message else 1


def _repeated(dump: dict[str, Any], folder: Path, device: str, world: World) -> str:
    """What the step says when it is not finite again; empty if it is finite."""
    tree = dump["config"] | {"run": str(folder), "device": device, "log_every": 1, "nonfinite": "stop"}
    tree |= {key: None for key in ("eval_every", "eval_every_epochs", "early_stop") if key in tree}
    tree |= {"tensorboard": False, "wandb": None, "profile": False}
    if world.rank == 0 and dump["state"] is not None:
        runfolder.write(folder, dump["state"], keep=1)
    distributed.barrier(world)
    training = prepare(settings.from_dict(tree), world)
    training.steps, training.save_every, training.watched = dump["bad_step"] + 1, dump["bad_step"] + 2, True
    try:
        fit(training)
    except FloatingPointError as error:
        return str(error).partition("; `python")[0]
    return ""


def _load(path: Path) -> dict[str, Any]:
    dump = checkpoint.load(path)
    if dump.get("kind") != "dump" or not {"bad_step", "ranks", "state", "config"} <= dump.keys():
        raise ValueError(f"{path}: want a dump-*.pt of a run, got {dump.get('kind', 'another file')}")
    if dump.get("format") != 1:
        raise ValueError(f"{path}: want dump format 1, got {dump.get('format')!r}; it needs another aligndet")
    return dump
