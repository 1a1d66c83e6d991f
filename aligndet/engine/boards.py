"""The same figures for TensorBoard and Weights & Biases: optional, off by default, written by the first rank only."""

from __future__ import annotations

import importlib.util
import json
import secrets
from pathlib import Path
from typing import Any

from aligndet.config import Config
from aligndet.engine import checkpoint

PACKAGES = ("tensorboard", "wandb")  # the key of the config, the package and the extra have one name


class TensorBoard:
    """Event files in ``<run>/tensorboard``.

    Args:
        after: the last step that stands; what an earlier process wrote beyond is hidden by TensorBoard, so that a
            continued run has each step once.
    """

    def __init__(self, folder: Path, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, of one step; on the disk at once, since a killed run writes no more."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a project, the same one each time that the run folder is continued (its id is in ``wandb.json``).

    Args:
        project: its name.
        config: plain values of the run's config.
        sent: the last step of training and the last one with a validation that an earlier process wrote. W&B deletes
            nothing: repeated ones, which are the same numbers again, are left out.

    Raises:
        ValueError: W&B does not take the run, for example without a login; or ``wandb.json`` has no id.
    """

    def __init__(self, folder: Path, project: str, config: dict[str, Any], sent: tuple[int, int]) -> None:
        import wandb

        note = folder / "wandb.json"
        if note.exists():
            try:
                number = str(json.loads(note.read_text())["id"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"wandb: {note} has no id of a run; delete it to begin another one") from None
        else:
            number = secrets.token_hex(4)
            checkpoint.replace(note, json.dumps({"id": number, "project": project}).encode())
        self.sent = sent
        try:
            self.run = wandb.init(
                project=project, id=number, name=folder.name, dir=str(folder), config=config, resume="allow"
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"wandb: {reason} (`wandb login`, or WANDB_MODE=offline)") from None
        # The axis is ours: a validation comes after the figures of its step, perhaps from another process.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name, of one step; they are sent by a process of W&B's."""
        if step > self.sent[any(name.startswith("validation") for name in values)]:
            self.run.log(values | {"step": step})

    def close(self) -> None:
        """Wait until everything is sent."""
        self.run.finish()


Board = TensorBoard | WeightsAndBiases


def check_boards(config: Config) -> None:
    """Raises ValueError where the config asks for a package that is not installed."""
    for key, wanted in zip(PACKAGES, (config.tensorboard, config.wandb is not None), strict=True):
        if wanted and importlib.util.find_spec(key) is None:
            raise ValueError(f"{key}: the package {key} is not installed; `pip install {key}`, or leave {key} out")


def open_boards(config: Config, folder: Path, plain: dict[str, Any], after: int, sent: tuple[int, int]) -> list[Board]:
    """Those that the config asks for.

    Args:
        plain: the config as plain values.
        after: steps of the checkpoint that the run continues from; 0 at its start.
        sent: the last step of training and the last with a validation in the log of the process before.
    """
    boards: list[Board] = []
    if config.tensorboard:
        boards.append(TensorBoard(folder, after))
    if config.wandb is not None:
        boards.append(WeightsAndBiases(folder, config.wandb, plain, sent))
    return boards
