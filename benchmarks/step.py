"""Time of one AlignDet pre-training step beside a training step of the twin, and peak memory of each, per detector.

ResNet-50, 2 images of 320 x 320 (two views of each in pre-training), 50 boxes per image, one thread by default. The
twin is torchvision's detector with the same head (DETR: Hugging Face's), as in ``detectors.py``; ours of Faster and
Mask R-CNN is also timed with the paper's 4conv1fc head. DETR pre-trains with 256 pseudo-classes. Both sides take turns
in one process for the time; each has a process of its own for the peak memory. ``--parts`` prints where our step spends
its time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectors import IMAGES, SIZE, TWINS, Step, hugging_face, random_boxes, torchvisions
from environment import environment
from torch import Tensor

from aligndet.engine.ema import EMA
from aligndet.models import build_detector
from aligndet.pretrain import AlignDet
from aligndet.structures import Batch, Targets

BOXES, CLUSTERS = 50, 256
PAPER_HEAD = "4conv1fc"


def random_batch(images: Tensor, boxes: list[Tensor], labels: Tensor) -> Batch:
    rows = torch.arange(IMAGES * BOXES)
    targets = Targets(torch.cat(boxes), labels, rows, rows // BOXES)
    sizes = torch.tensor([[SIZE, SIZE]] * IMAGES)
    return Batch(images, sizes, sizes, tuple(range(IMAGES)), targets)


def ours(name: str, box_head: str = "2fc") -> Step:
    two_stage = name.endswith("rcnn")
    options: dict[str, Any] = {"box_head": box_head, "class_agnostic": True} if two_stage else {}
    classes = CLUSTERS if name == "detr" else 1
    model = AlignDet(build_detector(name, "resnet50", classes, **options), classification=float(name == "detr")).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert model.momentum is not None
    average = EMA(model.online, model.momentum, apart=("predictors.score.",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4, momentum=0.9, fused=True)
    images = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    boxes = [random_boxes(BOXES) for _ in range(IMAGES)]
    labels = torch.randint(0, classes, (IMAGES * BOXES,))
    flipped = [torch.stack([SIZE - b[:, 2], b[:, 1], SIZE - b[:, 0], b[:, 3]], dim=1) for b in boxes]
    views = random_batch(images, boxes, labels), random_batch(images.flip(3), flipped, labels)

    def step() -> None:
        losses = model(*views)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.996)

    return step


def twin(name: str) -> Step:
    return (hugging_face if name == "detr" else torchvisions)(name, BOXES)[0]


def side(name: str, which: str) -> Step:
    return twin(name) if which == "twin" else ours(name, PAPER_HEAD if which == PAPER_HEAD else "2fc")


def peak_gib(name: str, which: str, threads: int) -> float:
    command = [sys.executable, __file__, name, "--side", which, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """Median seconds of each side, the median ratio, and the peak memory of each."""
    which = ["aligndet", "twin", *([PAPER_HEAD] if name.endswith("rcnn") else [])]
    steps = {key: side(name, key) for key in which}
    seconds: dict[str, list[float]] = {key: [] for key in which}
    for turn in range(rounds + 2):
        for key, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 2:  # the first two warm up
                seconds[key].append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(seconds["aligndet"], seconds["twin"], strict=True))
    steps.clear()
    return {
        "twin": TWINS[name],
        "seconds": {key: statistics.median(values) for key, values in seconds.items()},
        "ratio": ratio,
        "peak_gib": {key: peak_gib(name, key, threads) for key in which},
    }


def show_parts(name: str) -> None:
    step = ours(name)
    step()
    with torch.profiler.profile() as profile:
        step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detectors", nargs="*", default=list(TWINS), help=f"of {', '.join(TWINS)}; default: all")
    parser.add_argument("--side", help="only run a few steps of this side and print its peak memory, GiB")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.side:
        step = side(args.detectors[0], args.side)
        for _ in range(3):
            step()
        # Not ru_maxrss, which a new process takes over from the one that started it.
        status = Path("/proc/self/status").read_text()
        print(int(status.partition("VmHWM:")[2].split()[0]) / 2**20)
        return
    path = Path(__file__).parent / "results/step.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    results = record.get("results", {})
    for name in args.detectors:
        if args.parts:
            show_parts(name)
            continue
        found = results[name] = measure(name, args.rounds, args.threads)
        for key, value in found["seconds"].items():
            print(f"{name:12} {key:9} {value:6.2f} s/step  {found['peak_gib'][key]:5.2f} GiB peak")
        print(f"{name:12} ratio {found['ratio']:.2f}", flush=True)
    if not args.parts:
        setting = {"images": IMAGES, "size": SIZE, "boxes": BOXES, "rounds": args.rounds, "threads": args.threads}
        record = {"setting": setting, "results": results, "environment": environment()}
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
