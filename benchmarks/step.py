"""Time of one AlignDet pre-training step beside torchvision's FCOS training step, and peak memory of each.

ResNet-50, 2 images of 320 x 320 (two views of each in pre-training), 50 boxes per image, one thread by default. Both
sides take turns in one process for the time; each has a process of its own for the peak memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from environment import environment
from torch import Tensor

from aligndet.engine.ema import EMA
from aligndet.models import build_detector
from aligndet.pretrain import AlignDet
from aligndet.structures import Batch, Targets

IMAGES, SIZE, BOXES = 2, 320, 50


def random_boxes(number: int) -> Tensor:
    corner = torch.rand(number, 2) * (SIZE - 96)
    return torch.cat([corner, corner + 32 + torch.rand(number, 2) * 64], dim=1)


def random_batch(images: Tensor, boxes: list[Tensor]) -> Batch:
    rows = torch.arange(IMAGES * BOXES)
    targets = Targets(torch.cat(boxes), torch.zeros_like(rows), rows, rows // BOXES)
    sizes = torch.tensor([[SIZE, SIZE]] * IMAGES)
    return Batch(images, sizes, sizes, tuple(range(IMAGES)), targets)


def ours() -> Callable[[], None]:
    detector = build_detector("fcos", "resnet50", num_classes=1)
    model = AlignDet(detector).train().to(memory_format=torch.channels_last)
    assert model.momentum is not None
    average = EMA(model.online, model.momentum)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9, fused=True)
    images = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    boxes = [random_boxes(BOXES) for _ in range(IMAGES)]
    flipped = [
        (SIZE - b[:, [2, 1, 0, 3]]).abs() * b.new_tensor([1, 0, 1, 0]) + b * b.new_tensor([0, 1, 0, 1]) for b in boxes
    ]
    views = random_batch(images, boxes), random_batch(images.flip(3), flipped)

    def step() -> None:
        losses = model(*views)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.996)

    return step


def torchvision_fcos() -> Callable[[], None]:
    model = torchvision.models.detection.fcos_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=SIZE, max_size=SIZE
    ).train()
    # Without the download of published weights torchvision trains every layer; these two are what it would freeze.
    for name, parameter in model.backbone.body.named_parameters():
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, momentum=0.9, fused=True)
    images = [torch.rand(3, SIZE, SIZE) for _ in range(IMAGES)]
    labels = torch.zeros(BOXES, dtype=torch.int64)
    targets = [{"boxes": random_boxes(BOXES), "labels": labels} for _ in range(IMAGES)]

    def step() -> None:
        losses = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


SIDES = {"aligndet": ours, "torchvision": torchvision_fcos}


def peak_gib(side: str, threads: int) -> float:
    command = [sys.executable, __file__, "--side", side, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--side", choices=SIDES, help="only run a few steps of this side and print its peak memory, GiB"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.side:
        step = SIDES[args.side]()
        for _ in range(3):
            step()
        # Not ru_maxrss, which a new process takes over from the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) / 2**20)
        return
    steps = {name: build() for name, build in SIDES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(args.rounds + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["aligndet"], seconds["torchvision"], strict=True)]
    memory = {name: peak_gib(name, args.threads) for name in SIDES}
    record = {
        "setting": {"images": IMAGES, "size": SIZE, "boxes": BOXES, "rounds": args.rounds},
        "seconds": medians,
        "ratio": statistics.median(ratios),
        "peak_gib": memory,
        "environment": environment(),
    }
    for name in SIDES:
        print(f"{name:12} {medians[name]:6.2f} s/step  {memory[name]:5.2f} GiB peak")
    print(f"ratio {record['ratio']:.2f}")
    path = Path(__file__).parent / "results/step.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
