"""A run folder at the start of a run: locked, clean, of this config, and the checkpoint to continue from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aligndet import config as settings
from aligndet.config import Config
from aligndet.engine import checkpoint, distributed, runfolder
from aligndet.engine.distributed import World

# Keys that may change between a run and its continuation: they say where and how often, not what is computed.
FREE_KEYS = (
    *("run:", "device:", "threads:", "log_every:", "save_every:", "eval_every:", "data.workers:"),
    *("keep_checkpoints:", "nonfinite:", "eval_every_epochs:", "early_stop:", "tensorboard:", "wandb:"),
    *("timeout:", "deterministic:", "profile:"),
)


@dataclass(frozen=True)
class Run:
    """An open run folder.

    Attributes:
        path, state: the newest whole checkpoint; None and {} at the start of a run.
        warnings: a line for each damaged thing that was passed over.
        changed: ``key: old -> new`` for the keys that differ from the run so far.
    """

    folder: Path
    path: Path | None
    state: dict[str, Any]
    warnings: list[str]
    changed: list[str]


def open_run(config: Config, world: World) -> Run:
    """Lock the run folder, find its newest checkpoint, and write the resolved config there; all ranks call it.

    Raises:
        ValueError: another process trains there; the folder cannot be written; no checkpoint can be read; they are of a
            config that cannot be continued with this one; or there is none beside a result.
    """
    folder, error = Path(config.run), None
    if world.rank == 0:
        try:
            runfolder.lock(folder)
        except ValueError as caught:
            error = str(caught)
    distributed.together(error, world)
    path, state, warnings = runfolder.newest(folder)
    result = folder / runfolder.RESULTS[config.task]
    if path is None and result.exists():
        raise ValueError(
            f"run {folder}: holds {result.name} and no checkpoint to continue from; take another run folder, or move "
            "that file away to start afresh"
        )
    plain = settings.to_dict(config)
    changed = [] if path is None else _changes(folder, path, state, plain)
    refused = [line for line in changed if not line.startswith(FREE_KEYS)]
    if refused:
        raise ValueError(
            f"run {folder}: holds a run with another config ({'; '.join(refused)}); "
            "take another run folder, or delete this one to start afresh"
        )
    if world.rank == 0:
        try:
            checkpoint.replace(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False).encode())
        except OSError as caught:
            error = f"run {folder}: cannot write there: {caught.strerror or caught}"
    distributed.together(error, world)
    return Run(folder, path, state, warnings, changed)


def _changes(folder: Path, path: Path, state: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """The keys that differ; those that the checkpoint's version did not have yet count with their defaults."""
    version = state.get("format", 1)
    if not isinstance(version, int) or version > runfolder.FORMAT:
        raise ValueError(f"checkpoint {path}: of format {version!r}, newer than {runfolder.FORMAT}; update aligndet")
    old = state.get("config")
    if not isinstance(old, dict):
        raise ValueError(f"checkpoint {path}: want a checkpoint of a training run, got one without a config")
    try:
        old = settings.to_dict(settings.from_dict(old))
    except ValueError as error:
        raise ValueError(f"run {folder}: {path.name} is of another version of aligndet: {error}") from None
    return settings.differences(old, plain)
