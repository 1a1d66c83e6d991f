"""The losses of the first 20 steps of every detector, in pre-training and fine-tuning: a regression shows at once.

    python -m tests.golden

writes ``tests/golden.json`` anew, after a change that is meant to change them; the commit says why they changed.
``--compare`` prints how far this machine is from the file instead. The file is of one thread, float32, AVX-512.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import torch

from aligndet import cli
from aligndet import config as settings
from aligndet.data.synthetic import make_scenes
from aligndet.engine import distributed
from aligndet.engine.log import read_log
from aligndet.engine.loop import fit
from aligndet.engine.prepare import prepare

PATH = Path(__file__).with_suffix(".json")
STEPS, SIZE = 20, 96
DENSE: dict[str, Any] = {"channels": 32, "convolutions": 1, "levels": 3}
TWO_STAGE: dict[str, Any] = {"channels": 32, "box_head": "2fc", "head_width": 64}
TRANSFORMER: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 2, "feedforward": 64, "queries": 20}
MODELS = {
    "fcos": DENSE,
    "retinanet": DENSE,
    "faster_rcnn": TWO_STAGE,
    "mask_rcnn": TWO_STAGE,
    "detr": TRANSFORMER,
}
TASKS = ("pretrain", "finetune")


def scenes(folder: Path) -> Path:
    """Six generated scenes; their labels are the proposals too, so that no other program has a say."""
    labels = make_scenes(folder, images=6, size=SIZE, seed=5, name="train")
    arguments = ["convert-proposals", "--from", "coco", "--to", "npz", "--images", str(folder / "images")]
    assert cli.main([*arguments, str(labels), str(folder / "proposals.npz")]) == 0
    return folder


def losses(task: str, detector: str, data: Path, run: Path, lr: float = 0.002) -> list[dict[str, float]]:
    """The losses of each step by name."""
    images = {"images": str(data / "images"), "proposals": str(data / "proposals.npz")}
    labels = {"train": str(data / "annotations/instances_train.json")}
    sides = {"short_side": [80, SIZE], "long_side": SIZE, "workers": 0}
    tree = {
        "task": task,
        "run": str(run),
        "device": "cpu",
        "log_every": 1,
        "save_every": STEPS,
        "model": {"detector": detector, "backbone": "resnet18", "width": 0.25} | MODELS[detector],
        "data": (images if task == "pretrain" else labels) | sides,
        "optim": {"lr": lr, "batch": 2, "steps": STEPS, "warmup": 0},
    }
    training = prepare(settings.from_dict(tree), distributed.single())
    fit(training)
    return [record["losses"] for record in read_log(run / "log.jsonl") if "losses" in record]


def measure() -> dict[str, dict[str, list[dict[str, float]]]]:
    """All of them."""
    with tempfile.TemporaryDirectory() as folder:
        data = scenes(Path(folder) / "scenes")
        return {
            task: {name: losses(task, name, data, Path(folder) / f"{task}-{name}") for name in MODELS} for task in TASKS
        }


def deviation(found: list[dict[str, float]], golden: list[dict[str, float]]) -> list[float]:
    """The largest relative deviation of a loss in each step; losses below 0.01 count as 0.01."""
    assert [row.keys() for row in found] == [row.keys() for row in golden]
    return [
        max(abs(row[name] - old[name]) / max(0.01, abs(old[name])) for name in row)
        for row, old in zip(found, golden, strict=True)
    ]


def rounded(value: Any) -> Any:
    """Seven digits are all that float32 has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.7g}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    found = measure()
    if sys.argv[1:] == ["--compare"]:
        old = json.loads(PATH.read_text())
        for task in TASKS:
            for name in MODELS:
                steps = deviation(found[task][name], old[task][name])
                print(f"{task:9} {name:12}", "  ".join(f"{value:.0e}" for value in steps))
    else:
        PATH.write_text(json.dumps(rounded(found)).replace("}, ", "},\n") + "\n")
