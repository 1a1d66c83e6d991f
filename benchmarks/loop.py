"""What the training loop costs beside the bare step: the same model, batches, optimizer and average in both.

    python benchmarks/loop.py [--detector fcos] [--rounds 12]

A step of AlignDet on MobileNetV2: 8 pairs of views of 256 px with 20 boxes each, one thread, SGD and the average of the
momentum branch. The bare side is forward, backward, step and average in a plain ``for``, the loop is
``engine.loop.fit`` with logging every 10 steps and no checkpoint. Both take turns in one process, 10 steps each time;
the ratio is the median over rounds. The loop's own time is measured besides, on a model of one parameter, where nothing
else takes any.

Writes benchmarks/results/loop.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn

from aligndet.engine import distributed
from aligndet.engine.ema import EMA
from aligndet.engine.log import Log
from aligndet.engine.loop import Training, fit
from aligndet.models import build_detector
from aligndet.pretrain import AlignDet
from aligndet.structures import Batch, Targets

IMAGES, SIZE, BOXES, STEPS = 8, 256, 20, 10
RESULTS = Path(__file__).parent / "results/loop.json"


def views(images: int, size: int) -> tuple[Batch, Batch]:
    """Two views of noise with the same boxes."""
    pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    corner = torch.rand(images * BOXES, 2) * size * 0.6
    boxes = torch.cat([corner, corner + 16 + torch.rand(images * BOXES, 2) * size * 0.3], dim=1)
    rows = torch.arange(images * BOXES)
    sizes = torch.tensor([[size, size]] * images)
    targets = Targets(boxes, torch.zeros_like(rows), rows, rows // BOXES)
    batch = Batch(pixels, sizes, sizes, tuple(range(images)), targets)
    return batch, batch


class Nothing(nn.Module):
    """One parameter and a loss of it: what is left is the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, view1: Batch, view2: Batch) -> dict[str, Tensor]:
        return {"loss": self.weight * 0.5}


class Timed:
    """Batches, and the time at which each was asked for."""

    def __init__(self, batches: tuple[Batch, Batch]) -> None:
        self.batches, self.times = batches, list[float]()

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        while True:
            self.times.append(time.perf_counter())
            yield self.batches

    def steps(self) -> list[float]:
        """Seconds from one step to the next, without the first."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def bare(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, timed: Timed, steps: int) -> None:
    """The plain loop."""
    model.train()
    stream = iter(timed)
    for _ in range(steps):
        losses = model(*next(stream))
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(0.996)


def ours(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, timed: Timed, steps: int) -> None:
    """The library's loop, as a training of ``steps`` steps without its last checkpoint."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        world = distributed.single()
        training = Training(
            model=model,
            optimizer=optimizer,
            steps=10**9,
            learning_rate=lambda step: 1e-4,
            ema=ema,
            momentum=lambda step: 0.996,
            log=Log(Path(folder), world),
            folder=Path(folder),
            world=world,
            config={},
            batch=1,
            images=1,
            accumulate=1,
            clip=None,
            amp="off",
            log_every=10,
            save_every=10**9,
            export=lambda model: {},
        )
        training.loader = limited(timed, steps)
        with contextlib.suppress(RuntimeError):  # of the generator that ends: no step is cut
            fit(training)


def limited(timed: Timed, steps: int) -> Iterator[tuple[Batch, Batch]]:
    """The batches of so many steps, then the end of the run without a checkpoint."""
    stream = iter(timed)
    for _ in range(steps):
        yield next(stream)
    raise RuntimeError("enough")


def optimised(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4, momentum=0.9, fused=True)
    for group in optimizer.param_groups:
        group["factor"] = 1.0
    return optimizer


def ratio(detector: str, rounds: int) -> dict[str, Any]:
    """Seconds per step of both sides in turn, and the median of their ratio."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"class_agnostic": True} if detector.endswith("rcnn") else {}
    model = AlignDet(build_detector(detector, "mobilenet_v2", 1, channels=64, **options), embedding=64)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert model.momentum is not None
    ema = EMA(model.online, model.momentum, apart=("predictors.score.",))
    optimizer, batches = optimised(model), views(IMAGES, SIZE)
    seconds: dict[str, list[float]] = {"bare": [], "loop": []}
    for turn in range(rounds + 1):
        for name, run in (("bare", bare), ("loop", ours)) if turn % 2 else (("loop", ours), ("bare", bare)):
            timed = Timed(batches)
            run(model, optimizer, ema, timed, STEPS)
            if turn:
                seconds[name].append(statistics.median(timed.steps()))
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["loop"], strict=True)]
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "fastest_ratio": min(seconds["loop"]) / min(seconds["bare"]),
    }


def own_microseconds(steps: int = 2000) -> dict[str, float]:
    """Of the loop per step, with one parameter and one image: both sides' medians and their difference."""
    found = {}
    for name, run in (("bare", bare), ("loop", ours)):
        model = Nothing()
        timed = Timed(views(1, 32))
        run(model, optimised(model), None, timed, steps)
        found[name] = 1e6 * statistics.median(timed.steps())
    return found | {"difference": found["loop"] - found["bare"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="fcos")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--own", action="store_true", help="only the loop's own time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    own = own_microseconds()
    print("microseconds per step with one parameter:", {name: round(value) for name, value in own.items()}, flush=True)
    if args.own:
        return
    found = ratio(args.detector, args.rounds)
    print(f"{args.detector}: bare {found['seconds']['bare']:.3f} s, loop {found['seconds']['loop']:.3f} s per step")
    print(f"ratio {found['ratio']:.4f} (median of rounds), {found['fastest_ratio']:.4f} (fastest of each side)")
    setting = {"detector": args.detector, "images": IMAGES, "size": SIZE, "boxes": BOXES, "rounds": args.rounds}
    record = {"setting": setting, "result": found, "own_microseconds": own, "environment": environment()}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
