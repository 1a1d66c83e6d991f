"""The training loop of every stage: what happens between ``backward()`` and ``step()`` is written here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from aligndet.engine import checkpoint, distributed
from aligndet.engine.distributed import World
from aligndet.engine.ema import EMA
from aligndet.engine.log import Log
from aligndet.structures import Batch

PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Training:
    """All that one run needs.

    Attributes:
        model: AlignDet, FineTune or SimSiam: ``model(*batches) -> losses``, on the device of ``world``.
        optimizer: its groups carry a "factor" on the learning rate.
        steps: optimizer steps of the whole run.
        learning_rate: step -> learning rate of groups with factor 1.
        ema: moves the momentum branch; None where there is none.
        momentum: step -> EMA momentum.
        log: JSON lines and the progress line.
        folder: run folder; checkpoints go there.
        config: plain values of the run's config, stored in the checkpoint.
        accumulate: batches per optimizer step.
        clip: largest L2 norm of the gradient, or None.
        amp: "off", "bf16" or "fp16".
        validate: metrics of the model as it is, on all ranks; read where ``eval_every`` is set.
        eval_every: steps between two validations, besides the one after the run.
        loader: one tuple of batches per forward pass, from step ``start`` on.
        start: first step to run; more than 0 after a resume.
        skipped: images that could not be read so far, on all ranks.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    learning_rate: Callable[[int], float]
    ema: EMA | None
    momentum: Callable[[int], float]
    log: Log
    folder: Path
    world: World
    config: dict[str, Any]
    accumulate: int
    clip: float | None
    amp: str
    log_every: int
    save_every: int
    validate: Callable[[], dict[str, Any]] | None = None
    eval_every: int | None = None
    loader: Iterable[tuple[Batch, ...]] = ()
    start: int = 0
    skipped: int = 0
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.amp == "fp16")


def fit(training: Training) -> None:
    """Train from ``training.start`` to ``training.steps``; repeating the command continues from the last checkpoint.

    Raises:
        FloatingPointError: a loss is not finite, on any rank; all ranks raise. Checked whenever losses are read
            (every ``log_every`` steps and before a checkpoint), so that the step itself never waits for the device.
    """
    t, world = training, training.world
    model = _replicated(t.model, world)
    model.train()
    parameters = [p for group in t.optimizer.param_groups for p in group["params"]]
    stream = iter(t.loader)
    unread: list[str] = []
    for step in range(t.start, t.steps):
        began, data_time = time.perf_counter(), 0.0
        rate = t.learning_rate(step)
        for group in t.optimizer.param_groups:
            group["lr"] = rate * group["factor"]

        sums: dict[str, Tensor] = {}
        for part in range(t.accumulate):
            waiting = time.perf_counter()
            batches = next(stream)
            data_time += time.perf_counter() - waiting
            unread += batches[0].skipped  # both views of a pair come from one file
            batches = tuple(batch.to(world.device, non_blocking=True) for batch in batches)
            with _synchronised(model, part == t.accumulate - 1), _autocast(world, t.amp):
                losses = model(*batches)
                total = torch.stack(list(losses.values())).sum() / t.accumulate
            with _synchronised(model, part == t.accumulate - 1):
                t.scaler.scale(total).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / t.accumulate

        t.scaler.unscale_(t.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, t.clip or float("inf"))
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.optimizer.zero_grad(set_to_none=True)
        if t.ema is not None:
            t.ema.update(t.momentum(step))

        done = step + 1
        saves = done % t.save_every == 0 or done == t.steps
        if saves or done % t.log_every == 0 or step == t.start:
            values = _finite(sums, done, world)
            _report(t, done, unread)
            times = {"data_time": data_time, "step_time": time.perf_counter() - began}
            t.log.progress(done, t.steps, values, {"lr": rate, "gradient_norm": norm.item(), **times})
        if t.eval_every and t.validate and done % t.eval_every == 0 and done < t.steps:
            t.log.metrics(done, t.validate())
        if saves:
            save(t, done)


def save(training: Training, step: int) -> None:
    """Write the checkpoint from which ``resume`` continues after ``step`` steps; all ranks call it."""
    t = training
    states = distributed.gather_objects(checkpoint.rng_state(), t.world)
    if t.world.rank == 0:
        state = {
            "kind": "checkpoint",
            "format": 1,
            "step": step,
            "model": t.model.state_dict(),
            "optimizer": t.optimizer.state_dict(),
            "scaler": t.scaler.state_dict(),
            "rng": states,
            "skipped": t.skipped,
            "config": t.config,
            "versions": checkpoint.versions(),
        }
        checkpoint.save(t.folder / "checkpoint.pt", state)
    distributed.barrier(t.world)


def resume(training: Training) -> None:
    """Continue from the run folder's checkpoint, if it has one; sets ``training.start``."""
    t = training
    path = t.folder / "checkpoint.pt"
    if not path.exists():
        return
    state = checkpoint.load(path)
    if state.get("kind") != "checkpoint":
        raise ValueError(
            f"checkpoint {path}: want a checkpoint of a training run, got {state.get('kind', 'another file')}"
        )
    try:
        t.model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path}: does not fit this model: {' '.join(str(error).split())[:300]}") from None
    t.optimizer.load_state_dict(state["optimizer"])
    t.scaler.load_state_dict(state["scaler"])
    t.start, t.skipped = state["step"], state["skipped"]
    if len(state["rng"]) == t.world.size:
        checkpoint.set_rng_state(state["rng"][t.world.rank])


def _replicated(model: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    # Running statistics of batch norm are rank 0's on all ranks; frozen norms have nothing to share.
    moving = any(isinstance(module, _BatchNorm) for module in model.modules())
    return DistributedDataParallel(model, devices, broadcast_buffers=moving, gradient_as_bucket_view=True)


def _synchronised(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients travel between ranks only in the last backward pass of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def _autocast(world: World, amp: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(world.device.type, dtype=PRECISIONS[amp], enabled=amp != "off")


def _finite(sums: dict[str, Tensor], step: int, world: World) -> dict[str, float]:
    values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    bad = [name for name, value in values.items() if not abs(value) < float("inf")]
    if distributed.agree(bool(bad), world):
        where = f"on this rank {values}" if bad else "on another rank"
        raise FloatingPointError(f"step {step}: loss is not finite ({where}); lower optim.lr or set optim.clip")
    return values


def _report(training: Training, step: int, unread: list[str]) -> None:
    """Count and name the images that any rank could not read since the last report."""
    for lines in distributed.gather_objects(list(unread), training.world):
        for line in lines:
            training.skipped += 1
            training.log.warning(step, f"skipped image ({training.skipped} so far): {line}")
    unread.clear()
