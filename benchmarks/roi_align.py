"""Time of our RoIAlign kernel beside torchvision's, forward and backward, on a GPU.

Four FPN levels of 2 images of 800 x 1344, 256 channels, 1000 RoIs per image, 7 x 7 cells, adaptive samples; fp32, fp16
and bf16, channels-last and contiguous. torchvision's op is called once per level with the maps as they are; where it
does not take their type, its own words stand in place of its times. Both sides assign boxes to levels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from environment import environment
from torch import Tensor
from torchvision.ops import roi_align

from aligndet.ops.cuda_module import module_for
from aligndet.ops.roi_align import level_of, multilevel_roi_align

STRIDES, CHANNELS, IMAGES, BOXES, SIZE = (4, 8, 16, 32), 256, 2, 1000, 7
HEIGHT, WIDTH = 800, 1344  # px
Pooling = Callable[[list[Tensor], Tensor, Tensor], Tensor]


def ours(levels: list[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
    return multilevel_roi_align(levels, boxes, image, SIZE, strides=STRIDES)


def torchvision(levels: list[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
    level = level_of(boxes, len(levels))
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1).to(levels[0].dtype)
    pooled = levels[0].new_zeros(len(boxes), CHANNELS, SIZE, SIZE)
    for number, (features, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        rows = (level == number).nonzero().squeeze(1)
        pooled = pooled.index_put((rows,), roi_align(features, rois[rows], SIZE, 1 / stride, -1, True))
    return pooled


def random_boxes() -> tuple[Tensor, Tensor]:
    """Sides from 16 to 512 px, evenly on a logarithmic scale."""
    sides = torch.exp2(4 + 5 * torch.rand(IMAGES * BOXES, 2))
    corner = torch.rand(IMAGES * BOXES, 2) * (torch.tensor([WIDTH, HEIGHT]) - sides)
    boxes = torch.cat([corner, corner + sides], dim=1)
    return boxes.cuda(), (torch.arange(IMAGES * BOXES) // BOXES).cuda()


def milliseconds(action: Callable[[], object], rounds: int) -> float:
    """Median over rounds, after three that warm up."""
    times = []
    for turn in range(rounds + 3):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        action()
        ended.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(began.elapsed_time(ended))
    return statistics.median(times)


def measure(pooling: Pooling, dtype: torch.dtype, last: bool, rounds: int) -> dict[str, float] | str:
    """Milliseconds of both directions and peak memory above the inputs; the reason where the side does not run."""
    layout = torch.channels_last if last else torch.contiguous_format
    shapes = [(IMAGES, CHANNELS, HEIGHT // stride, WIDTH // stride) for stride in STRIDES]
    maps = [torch.randn(shape, device="cuda").to(dtype, memory_format=layout).requires_grad_() for shape in shapes]
    boxes, image = random_boxes()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        pooled = pooling(maps, boxes, image)
        gradient = torch.randn_like(pooled)
        forward = milliseconds(lambda: pooling(maps, boxes, image), rounds)
        backward = milliseconds(lambda: torch.autograd.grad(pooled, maps, gradient, retain_graph=True), rounds)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    return {"forward_ms": forward, "backward_ms": backward, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("roi_align: this benchmark needs a GPU; none found, nothing measured")
        return
    if module_for("roi_align", torch.cuda.current_device()) is None:
        print("roi_align: our kernel cannot be compiled or loaded here; nothing measured")
        return
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for last in (True, False):
            row: dict[str, object] = {"dtype": str(dtype), "layout": "channels-last" if last else "contiguous"}
            row |= {side.__name__: measure(side, dtype, last, args.rounds) for side in (ours, torchvision)}
            rows.append(row)
            print(row)
    setting = {"images": IMAGES, "boxes": BOXES, "channels": CHANNELS, "size": SIZE, "pixels": [HEIGHT, WIDTH]}
    versions = environment() | {"cuda": torch.version.cuda}
    record = {"setting": setting, "rounds": args.rounds, "rows": rows, "environment": versions}
    (Path(__file__).parent / "results/roi_align.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
