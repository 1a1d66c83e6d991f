"""``profile=true``: where the time of a step goes, from a few steps after the first ones; training stays what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, schedule

from aligndet.engine.distributed import World
from aligndet.engine.log import Log

LEFT_OUT, WARM_UP, RECORDED = 3, 1, 5  # steps: slow first ones, the profiler's own first one, those in the trace
STEPS = LEFT_OUT + WARM_UP + RECORDED
# Ranges that ``record_function`` marks in the code, and those inside of them.
RANGES = {
    "data": (),
    "forward": ("backbone", "assignment", "contrast"),
    "backward": (),
    "optimizer": (),
    "average": (),
}


@contextmanager
def steps(wanted: bool, folder: Path, log: Log, world: World) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each step; writes ``trace.json`` and ``profile.txt`` on the first rank.

    ``trace.json`` is for chrome://tracing or ui.perfetto.dev; the table of ranges also goes to the log.
    """
    if not wanted or world.rank > 0:
        yield lambda: None
        return
    left, on_gpu = STEPS, world.device.type == "cuda"

    def ready(found: Any) -> None:
        """Write what was recorded; called by torch once, at the end of the last recorded step or of the run."""
        if left:  # the run ends before its time
            return
        averages = found.key_averages()
        # With a GPU each range is there twice: its second row, of the GPU's timeline, has no time of the processor.
        table = range_table({i.key: i for i in averages if i.device_type == DeviceType.CPU}, on_gpu)
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        operators = averages.table(sort_by=order, row_limit=25, max_name_column_width=60)
        try:
            (folder / "profile.txt").write_text(f"{table}\n\n{operators}\n")
            found.export_chrome_trace(str(folder / "trace.json"))
        except OSError as error:  # training goes on without
            log.warning(0, f"profile: cannot be written: {error}")
            return
        log.note(f"{folder / 'trace.json'}, profile.txt: {RECORDED} steps\n{table}")

    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
        schedule=schedule(wait=LEFT_OUT, warmup=WARM_UP, active=RECORDED, repeat=1),
        on_trace_ready=ready,
    )

    def after_step() -> None:
        nonlocal left
        if left:
            left -= 1
            profiler.step()

    with profiler:
        yield after_step
        if left:
            log.warning(0, f"profile: want {STEPS} steps from start or continuation on; fewer were run")


def hindrance(start: int, steps: int, validate_every: int | None) -> str:
    """Why nothing can be recorded from step ``start`` on: the run ends before, or a validation comes in between.

    Empty where nothing hinders.
    """
    if start + STEPS > steps:
        return f"profile: want {STEPS} steps to run, got {max(0, steps - start)}"
    if validate_every is not None and start // validate_every != (start + STEPS - 1) // validate_every:
        return (
            f"profile: a validation after every {validate_every} steps would be recorded, too, within the {STEPS} "
            f"steps from {start} on; take a longer eval_every"
        )
    return ""


def range_table(averages: dict[str, Any], on_gpu: bool) -> str:
    """Milliseconds of a step in each range, and the share of the whole step; "other" is what no range covers.

    Args:
        averages: of ``key_averages``, by name.
        on_gpu: adds the time in which the GPU worked for a range; not for the backward pass, which autograd runs in a
            thread of its own, outside of every range.
    """
    whole = sum(item.cpu_time_total for key, item in averages.items() if key.startswith("ProfilerStep"))

    def row(name: str, total: float, device: float | None) -> str:
        text = f"{name:22} {total / RECORDED / 1000:9.2f} ms {total / max(whole, 1e-9):6.1%}"
        return text + (f"  {device / RECORDED / 1000:9.2f} ms on the GPU" if on_gpu and device is not None else "")

    def times(name: str) -> tuple[float, float]:
        item = averages.get(name)
        return (0.0, 0.0) if item is None else (item.cpu_time_total, item.device_time_total)

    lines, covered = [], 0.0
    for name, inner in RANGES.items():
        if name not in averages:
            continue
        inside = [(part, *times(part)) for part in inner if part in averages]
        total, device = times(name)
        lines.append(row(name, total, None if name == "backward" else device))
        lines += [row(f"  {part}", *numbers) for part, *numbers in inside]
        if inside:
            rest = [times(name)[i] - sum(numbers[i] for _, *numbers in inside) for i in range(2)]
            lines.append(row("  other parts of it", rest[0], rest[1]))
        covered += total
    return "\n".join([*lines, row("other", whole - covered, None), row("step", whole, None)])
