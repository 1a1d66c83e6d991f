"""The training loop of every stage: what happens between ``backward()`` and ``step()`` is written here."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from aligndet.engine import checkpoint, distributed, guard, profiling, runfolder
from aligndet.engine.best import AVERAGE, RAW, Validation
from aligndet.engine.distributed import World
from aligndet.engine.ema import EMA, ModelAverage
from aligndet.engine.guard import Step
from aligndet.engine.log import Log, memory_gib
from aligndet.engine.precision import autocast
from aligndet.engine.prefetch import on_device
from aligndet.structures import Batch


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
        batch: images per optimizer step, on all ranks; ``images``: of the data set, one epoch.
        accumulate: batches per optimizer step.
        clip: largest L2 norm of the gradient, or None.
        amp: "off", "bf16" or "fp16".
        average: averaged weights of a model that is fine-tuned, or None.
        validation: what is measured on the way; None: nothing.
        loader: one tuple of batches per forward pass, from step ``start`` on.
        start: first step to run; more than 0 after a resume.
        skipped: images that could not be read so far, on all ranks.
        name_of: image id of a batch -> its file name.
        keep: how many of the last checkpoints stay.
        nonfinite: what a loss or gradient that is not finite does: "stop" or "skip".
        bad_steps: steps left out for that so far.
        watched: whether losses are looked at in each step, before the update. Always where that makes no device wait:
            on a processor, and with fp16, whose scaler waits anyway; and to skip a step.
        export: the result of the run, of one of ``models``, as it is saved.
        profile: whether a few steps are recorded, see ``profiling``.
        done: steps run so far: less than ``steps`` after an early stop.
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
    batch: int
    images: int
    accumulate: int
    clip: float | None
    amp: str
    log_every: int
    save_every: int
    export: Callable[[nn.Module], dict[str, Any]]
    average: ModelAverage | None = None
    validation: Validation | None = None
    loader: Iterable[tuple[Batch, ...]] = ()
    start: int = 0
    skipped: int = 0
    name_of: Callable[[int], str] = str
    keep: int = 2
    nonfinite: str = "stop"
    bad_steps: int = 0
    profile: bool = False
    done: int = 0
    watched: bool = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.amp == "fp16")
        self.watched = self.world.device.type == "cpu" or self.amp == "fp16" or self.nonfinite == "skip"

    @property
    def models(self) -> dict[str, nn.Module]:
        """What can be validated and exported; the last one is the result of the run."""
        return {RAW: self.model} | ({} if self.average is None else {AVERAGE: self.average.module})

    def figures(self) -> dict[str, float]:
        """What is worth a line of the log after ``done`` steps, besides what the step itself knows."""
        found = {"epoch": self.done * self.batch / self.images, "memory_gib": memory_gib(self.world.device)}
        if self.ema is not None:
            found["momentum"] = self.momentum(self.done - 1)
        elif self.average is not None:
            found["momentum"] = self.average.decay
        return found


def fit(training: Training) -> None:
    """Train from ``training.start`` to ``training.steps``; repeating the command continues from the last checkpoint.

    Raises:
        FloatingPointError: a loss or gradient is not finite, on any rank; all ranks raise. Checked before the update
            where ``watched``, else whenever losses are read (every ``log_every`` steps and before a checkpoint or a
            validation), so that the step itself never waits for the device. ``dump-*.pt`` in the run folder repeats
            the step.
        Stopped: SIGTERM or SIGINT came to any rank; the checkpoint of the step that ran is written.
        MemoryError: names the images that did not fit.
    """
    t, world = training, training.world
    model = _replicated(t.model, world)
    model.train()
    parameters = [p for group in t.optimizer.param_groups for p in group["params"]]
    unread: list[str] = []
    recent: list[Step] = []  # the steps since losses were last read
    spent = 0.0  # seconds in those
    statistics = guard.Statistics(t.model, t.nonfinite == "skip")
    bad_in_a_row, first_bad = 0, torch.tensor(guard.NEVER, device=world.device)
    with guard.stop_signals() as signals, profiling.steps(t.profile, t.folder, t.log, world) as after_step:
        stream = on_device(t.loader, world.device)
        for step in range(t.start, t.steps):
            if t.validation is not None and t.validation.hopeless:
                break
            began, data_time = time.perf_counter(), 0.0
            recent.append(Step(step, checkpoint.rng_state()))
            rate = _set_rate(t, step)
            statistics.keep()

            sums: dict[str, Tensor] = {}
            for part in range(t.accumulate):
                waiting = time.perf_counter()
                with guard.memory_of(recent[-1]), record_function("data"):
                    (first, *_), batches = next(stream)
                data_time += time.perf_counter() - waiting
                unread += first.skipped  # both views of a pair come from one file
                recent[-1].add(first, t.name_of)
                with guard.memory_of(recent[-1]), _synchronised(model, part == t.accumulate - 1):
                    with record_function("forward"), autocast(world.device, t.amp):
                        losses = model(*batches)
                        total = torch.stack(list(losses.values())).sum() / t.accumulate
                    with record_function("backward"):
                        t.scaler.scale(total).backward()
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0) + loss.detach() / t.accumulate

            t.scaler.unscale_(t.optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if t.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, t.clip, norm)
            # An overflow of fp16 shows in the gradient alone; the scaler skips that step itself, and lowers its scale.
            guard.mark(first_bad, step, [*sums.values(), *([] if t.scaler.is_enabled() else [norm])])
            seen = t.watched and (first_bad.item() < guard.NEVER or guard.scale_is_lost(t.scaler))
            bad, signal = distributed.highest([int(seen), max(signals, default=0)], world)
            bad_in_a_row = bad_in_a_row + 1 if bad else 0
            if bad and (t.nonfinite == "stop" or bad_in_a_row > guard.MOST_SKIPPED):
                give_up(t, step, recent, sums)
            if bad:
                _leave_out(t, step, first_bad)
                statistics.restore()
            else:
                with guard.memory_of(recent[-1]), record_function("optimizer"):
                    t.scaler.step(t.optimizer)
                _follow(t, step)
            t.scaler.update()
            t.optimizer.zero_grad(set_to_none=True)

            done = t.done = step + 1
            saves = done % t.save_every == 0 or done == t.steps or signal > 0
            measures = t.validation is not None and t.validation.due(done, t.steps)
            logs = saves or measures or done % t.log_every == 0 or step == t.start
            losses_read = _read(sums, first_bad, recent, t) if logs else {}
            step_time = time.perf_counter() - began
            spent += step_time
            if logs:
                _report(t, done, unread)
                times = {"data_time": data_time, "step_time": step_time}
                times["images_per_second"] = len(recent) * t.batch / spent
                t.log.progress(
                    done, t.steps, losses_read, {"lr": rate, "gradient_norm": norm.item(), **times, **t.figures()}
                )
                recent.clear()
                spent = 0.0
            after_step()
            improved, ends = _validated(t) if measures else (False, False)
            if saves or improved or ends:
                save(t, done, improved)
            if signal:
                raise guard.Stopped(signal)


def save(training: Training, step: int, best: bool = False) -> None:
    """Write the checkpoint from which ``resume`` continues after ``step`` steps; all ranks call it.

    Raises:
        ValueError: it cannot be written, on all ranks; older ones stay as they were.
    """
    t, error = training, None
    states = distributed.gather_objects(checkpoint.rng_state(), t.world)
    if t.world.rank == 0:
        try:
            runfolder.write(t.folder, _state(t, step, states), keep=t.keep, best=best)
        except ValueError as caught:
            error = str(caught)
    distributed.together(error, t.world)


def resume(training: Training, path: Path, state: dict[str, Any]) -> None:
    """Continue from the state in a checkpoint or dump; sets ``training.start``.

    Raises:
        ValueError: it is of another kind, of a newer version, of another model, or incomplete.
    """
    t = training
    if state.get("kind") != "checkpoint":
        raise ValueError(
            f"checkpoint {path}: want a checkpoint of a training run, got {state.get('kind', 'another file')}"
        )
    try:
        t.model.load_state_dict(state["model"])
        t.optimizer.load_state_dict(state["optimizer"])
        t.scaler.load_state_dict(state["scaler"])
        t.start, t.done, t.skipped = state["step"], state["step"], state["skipped"]
        t.bad_steps = state.get("bad_steps", 0)  # format 1 has none
        if t.average is not None:
            t.average.load_state_dict(state["average"])
        if t.validation is not None:
            t.validation.best, t.validation.stale = state.get("best"), state.get("stale", 0)
        if len(state["rng"]) == t.world.size:
            checkpoint.set_rng_state(state["rng"][t.world.rank])
            if t.world.device.type == "cuda" and not state["rng"][t.world.rank]["cuda"]:
                t.log.warning(0, f"{path}: written without a GPU: other random numbers")
        else:
            t.log.warning(0, f"{path}: written by {len(state['rng'])} ranks, not {t.world.size}: other random numbers")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {path}: does not fit this model: {reason}") from None


def give_up(training: Training, step: int, recent: list[Step], sums: dict[str, Tensor] | None = None) -> NoReturn:
    """Write ``dump-*.pt`` for ``aligndet replay`` and raise; all ranks call it.

    Where the weights before ``step`` are at hand they are in the dump, else those of the last checkpoint: continuing
    from there gives the same step again.

    Args:
        step: the first with a loss or gradient that is not finite.
        recent: the steps since losses were last read.
        sums: the losses, where the weights are still those before the step; None where they have moved on.
    """
    t, error = training, ""
    this = next(item for item in recent if item.step == step)
    states = distributed.gather_objects(this.rng, t.world)
    images = distributed.gather_objects(this.images, t.world)
    path = t.folder / f"dump-{step + 1:08d}.pt"
    if t.world.rank == 0:
        try:
            state = runfolder.newest(t.folder)[1] if sums is None else _state(t, step, states)
            dump = {"kind": "dump", "format": 1, "bad_step": step, "ranks": t.world.size, "images": images}
            checkpoint.save(path, {**dump, "state": state or None, "config": t.config})
        except ValueError as caught:
            error = f" (not written: {caught})"
    where = "" if sums is None else f", on this rank { ({name: value.item() for name, value in sums.items()}) }"
    raise FloatingPointError(
        f"step {step + 1}: loss is not finite or its gradient is not{where}; images {this.described()}; "
        f"`python -m aligndet replay {path}` repeats it{error}; lower optim.lr, set optim.clip or nonfinite=skip"
    )


def _state(training: Training, step: int, rng: list[Any]) -> dict[str, Any]:
    t = training
    return {
        "kind": "checkpoint",
        "format": runfolder.FORMAT,
        "step": step,
        "model": t.model.state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "scaler": t.scaler.state_dict(),
        "rng": rng,
        "skipped": t.skipped,
        "bad_steps": t.bad_steps,
        "average": None if t.average is None else t.average.state_dict(),
        "best": None if t.validation is None else t.validation.best,
        "stale": 0 if t.validation is None else t.validation.stale,
        "config": t.config,
        "versions": checkpoint.versions(),
    }


def _replicated(model: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    # Running statistics of batch norm are rank 0's on all ranks; frozen norms have nothing to share.
    moving = any(isinstance(module, _BatchNorm) for module in model.modules())
    # Of 1 x 1 kernels: the same layout has two descriptions there.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():  # torch 2.14 has another name for broadcast_buffers, which 2.6 does not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, devices, broadcast_buffers=moving, gradient_as_bucket_view=True)


def _synchronised(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients travel between ranks only in the last backward pass of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def _set_rate(training: Training, step: int) -> float:
    """Give each group of parameters its learning rate of this step; that of groups with factor 1."""
    rate = training.learning_rate(step)
    for group in training.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    return rate


def _leave_out(training: Training, step: int, first_bad: Tensor) -> None:
    """Count a step that is not finite, and go on as if it had not been."""
    t = training
    t.bad_steps += 1
    t.log.warning(step + 1, f"a loss or gradient is not finite: step left out ({t.bad_steps} so far)")
    first_bad.fill_(guard.NEVER)


def _follow(training: Training, step: int) -> None:
    """The averages after an update: the momentum branch, or those of a model that is fine-tuned."""
    with record_function("average"):
        if training.ema is not None:
            training.ema.update(training.momentum(step))
        if training.average is not None:
            training.average.update()


def _validated(training: Training) -> tuple[bool, bool]:
    """Measure the model: whether it is the best so far, and whether the run ends since it is not."""
    t = training
    assert t.validation is not None
    with guard.memory_of(None):
        found = t.validation.measured(t.models, t.world)
    t.log.metrics(t.done, found[list(t.models)[-1]], found[RAW] if AVERAGE in found else None)
    improved = t.validation.keep(t.folder, t.done, t.models, found, t.world)
    if improved:
        t.log.note(f"best.pt: step {t.done}, AP {100 * (t.validation.best or 0.0):.1f}, the best so far")
    if t.validation.hopeless:
        best = "none" if t.validation.best is None else f"{100 * t.validation.best:.1f}"
        t.log.note(f"stops early after step {t.done}: no AP above {best} in the last {t.validation.stale} validations")
    return improved, t.validation.hopeless


def _read(sums: dict[str, Tensor], first_bad: Tensor, recent: list[Step], training: Training) -> dict[str, float]:
    """The losses as numbers, means over ranks; the run ends here where a step since the last reading was bad."""
    if not training.watched:
        first = min(distributed.gather_objects(int(first_bad.item()), training.world))
        if first < guard.NEVER:
            give_up(training, first, recent)
    means = distributed.mean(torch.stack(list(sums.values())), training.world)
    return dict(zip(sums, means.tolist(), strict=True))


def _report(training: Training, step: int, unread: list[str]) -> None:
    """Count and name the images that any rank could not read since the last report."""
    for lines in distributed.gather_objects(list(unread), training.world):
        for line in lines:
            training.skipped += 1
            training.log.warning(step, f"skipped image ({training.skipped} so far): {line}")
    unread.clear()
