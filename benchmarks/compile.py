"""What torch.compile of backbone, neck and towers costs at first and gains later, in fine-tuning FCOS.

Each detector trains twice in one process, as it is and compiled as ``compile=true`` does (dynamic sizes), in turns, on
pictures of two sizes. The first steps' cost is that of an empty cache. Times are processor seconds, those of the
compilers included, which other work on the machine does not stretch; on a GPU they are seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import nn

from aligndet.engine.compiling import compile_parts
from aligndet.finetune import FineTune
from aligndet.models import build_detector
from aligndet.structures import Batch, Targets

IMAGES, CLASSES = 2, 5
SMALL: dict[str, Any] = {"channels": 64, "convolutions": 2}  # as in configs/finetune/fcos_mobilenet_v2_lowdata.yaml
DETECTORS = {"mobilenet_v2": SMALL, "resnet50": {}}


def used(device: torch.device) -> float:
    """Seconds: of processors, or on a GPU of the clock once it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def batch(height: int, width: int, device: torch.device) -> Batch:
    rows = torch.arange(2 * IMAGES)
    boxes = torch.tensor([[10.0, 10, 90, 90], [30, 40, 120, 100]]).repeat(IMAGES, 1)
    sizes = torch.tensor([[height, width]] * IMAGES)
    images = torch.randint(0, 256, (IMAGES, 3, height, width), dtype=torch.uint8)
    return Batch(images, sizes, sizes, tuple(range(IMAGES)), Targets(boxes, rows % 2, rows, rows // 2)).to(device)


def trainer(backbone: str, device: torch.device) -> tuple[FineTune, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = FineTune(build_detector("fcos", backbone, CLASSES, **DETECTORS[backbone])).train()
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [value for value in model.parameters() if value.requires_grad]
    return model, torch.optim.SGD(trained, 1e-4, momentum=0.9, fused=True)  # type: ignore[return-value]


def step(model: FineTune, optimizer: torch.optim.Optimizer, item: Batch, device: torch.device) -> float:
    began = used(device)
    torch.stack(list(model(item).values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return used(device) - began


def measure(backbone: str, size: int, rounds: int, device: torch.device) -> dict[str, Any]:
    plain, compiled = trainer(backbone, device), trainer(backbone, device)
    compile_parts(compiled[0].detector.convolutional_parts())
    batches = [batch(size, size, device), batch(size, size + 64, device)]
    clock = time.perf_counter()
    first = {"plain": [step(*plain, item, device) for item in batches]}
    wall = time.perf_counter()
    first["compiled"] = [step(*compiled, item, device) for item in batches]
    waited = {"plain": wall - clock, "compiled": time.perf_counter() - wall}
    seconds: dict[str, list[float]] = {"plain": [], "compiled": []}
    for turn in range(rounds):
        item = batches[turn % 2]
        seconds["plain"].append(step(*plain, item, device))
        seconds["compiled"].append(step(*compiled, item, device))
    ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["compiled"], strict=True))
    gain = statistics.median(a - b for a, b in zip(seconds["plain"], seconds["compiled"], strict=True))
    cost = sum(first["compiled"]) - sum(first["plain"])
    return {
        "first steps": first,
        "first steps, seconds waited": waited,
        "seconds": {key: statistics.median(values) for key, values in seconds.items()},
        "ratio": ratio,
        "pays after steps": cost / gain if gain > 0 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=list(DETECTORS))
    parser.add_argument("--size", type=int, default=256, help="px (default 256)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    path = Path(__file__).parent / "results/compile.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as empty:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": empty, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for backbone in args.backbones:
            row = measure(backbone, args.size, args.rounds, device)
            results[f"fcos {backbone}, {args.device}"] = row
            print(f"{backbone:13} plain {row['seconds']['plain']:.3f} s  compiled {row['seconds']['compiled']:.3f} s")
            print(
                f"{backbone:13} ratio {row['ratio']:.2f}, first two steps {sum(row['first steps']['compiled']):.0f} s"
            )
            setting = {"images": IMAGES, "size": args.size, "rounds": args.rounds, "threads": args.threads}
            record = {"setting": setting, "results": results, "environment": environment()}
            path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
