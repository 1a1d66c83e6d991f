"""Validation on the way: the figures, the best weights so far, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from aligndet.engine import checkpoint, distributed
from aligndet.engine.distributed import World

Models = Mapping[str, nn.Module]

RAW, AVERAGE = "weights", "average"  # what was measured: the trained weights, or their average


@dataclass
class Validation:
    """What a run measures of itself, and what follows from it.

    Attributes:
        measure: a model -> its metrics, on all ranks.
        export: a model -> the content of its weights file.
        every: steps between two validations, besides the one after the run.
        patience: validations in a row without a better AP that end the run; None: it runs to its end.
        best: the highest AP so far, or None.
        stale: validations since then.
    """

    measure: Callable[[nn.Module], dict[str, Any]]
    export: Callable[[nn.Module], dict[str, Any]]
    every: int
    patience: int | None = None
    best: float | None = None
    stale: int = 0

    def due(self, step: int, steps: int) -> bool:
        """Whether to measure after ``step`` of ``steps`` steps; the end of the run is measured by ``finish``."""
        return step % self.every == 0 and step < steps

    @property
    def hopeless(self) -> bool:
        """Whether the run should end now."""
        return self.patience is not None and self.stale >= self.patience

    def measured(self, models: Models, world: World) -> dict[str, dict[str, Any]]:
        """The metrics of each model; those of rank 0 on all ranks, so that all of them decide alike."""
        for model in models.values():
            same_buffers(model, world)
        found = {name: self.measure(model) for name, model in models.items()}
        return dict(distributed.gather_objects(found, world)[0])

    def keep(self, folder: Path, step: int, models: Models, found: Mapping[str, dict[str, Any]], world: World) -> bool:
        """Write ``best.pt`` if one of the models has the highest AP so far, and count on if not; all ranks call it.

        Raises:
            ValueError: it cannot be written, on all ranks.
        """
        name = max(found, key=lambda key: found[key]["AP"])
        if not found[name]["AP"] > (-1.0 if self.best is None else self.best):
            self.stale += 1
            return False
        self.best, self.stale, error = found[name]["AP"], 0, None
        if world.rank == 0:
            about = {"step": step, "of": name, "metrics": found[name], "versions": checkpoint.versions()}
            try:
                checkpoint.save(folder / "best.pt", self.export(models[name]) | about)
            except ValueError as caught:
                error = str(caught)
        distributed.together(error, world)
        return True


def same_buffers(model: nn.Module, world: World) -> None:
    """Give all ranks rank 0's buffers: moving statistics of batch norms, which each rank has of its own images.

    They are rank 0's that a checkpoint keeps, and that DDP spreads before the next step.
    """
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
