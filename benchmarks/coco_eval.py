"""Time of COCO's metrics by faster-coco-eval and by pycocotools on as many images as COCO's validation set has.

Synthetic objects and detections with COCO's numbers: 80 classes, 7 objects in an image on average, up to 100
detections, half of them near an object. Boxes are timed twice: ``coco_metrics`` as a run calls it, with reading and
conversion, and the evaluation alone (``averaged``), for masks (polygons of 24 corners) too. Packages take turns in one
process, the other one first in every second round; figures must agree to 1e-12. Ratios are of processor seconds, which
other work on the machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from pycocotools import mask as rle

from aligndet.engine import cocoeval
from aligndet.engine.cocoeval import FAST, SLOW, averaged
from aligndet.engine.evaluate import _records, coco_metrics
from aligndet.engine.truth import read_truth, true_records
from aligndet.structures import Detections

CLASSES, OBJECTS, HEIGHT, WIDTH = 80, 7, 480, 640


def boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    """x, y, width, height px; sides from 8 to 400 px, evenly in their logarithm."""
    sides = np.minimum(np.exp(rng.uniform(np.log(8), np.log(400), (number, 2))), [WIDTH, HEIGHT])
    return np.concatenate([rng.uniform(0, 1, (number, 2)) * ([WIDTH, HEIGHT] - sides), sides], axis=1)


def polygon(box: np.ndarray) -> list[list[float]]:
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return [(box[:2] + box[2:] / 2 * (1 + unit)).flatten().round(2).tolist()]


def data(images: int, folder: Path) -> tuple[Path, dict[int, Detections]]:
    rng = np.random.default_rng(0)
    annotations, found = [], {}
    for image_id in range(images):
        real = boxes(rng, rng.poisson(OBJECTS))
        labels = rng.integers(0, CLASSES, len(real))
        for box, label in zip(real, labels, strict=True):
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label), "bbox": box.tolist()}
            row |= {"area": float(box[2] * box[3]), "iscrowd": int(rng.random() < 0.01)}
            annotations.append(row | {"segmentation": polygon(box)})
        near = rng.integers(0, len(real), 50) if len(real) else np.zeros(0, int)
        rows = np.concatenate([real[near] + rng.normal(0, 4, (len(near), 4)), boxes(rng, 50)])
        rows = np.concatenate([rows[:, :2], rows[:, :2] + np.maximum(rows[:, 2:], 1)], axis=1)
        kinds = np.concatenate([labels[near], rng.integers(0, CLASSES, 50)])
        scores = np.sort(rng.random(len(rows)))[::-1].copy()
        order = rng.permutation(len(rows))
        tensors = torch.from_numpy(rows[order]).float().clamp(min=0), torch.from_numpy(scores).float()
        found[image_id] = Detections(*tensors, torch.from_numpy(kinds[order]))
    path = folder / "instances.json"
    content = {"images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(images)]}
    content |= {"annotations": annotations, "categories": [{"id": i, "name": f"class {i}"} for i in range(CLASSES)]}
    path.write_text(json.dumps(content))
    return path, found


def masked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detections with run lengths of ellipses in their boxes."""
    for record in records:
        record["segmentation"] = rle.frPyObjects(polygon(np.array(record["bbox"])), HEIGHT, WIDTH)[0]
    return records


def timed(call: Callable[[str], Any], rounds: int) -> dict[str, Any]:
    wall: dict[str, list[float]] = {FAST: [], SLOW: []}
    processor: dict[str, list[float]] = {FAST: [], SLOW: []}
    results = {}
    for turn in range(rounds):
        for package in (FAST, SLOW) if turn % 2 == 0 else (SLOW, FAST):
            began, used = time.perf_counter(), time.process_time()
            results[package] = call(package)
            wall[package].append(time.perf_counter() - began)
            processor[package].append(time.process_time() - used)
    np.testing.assert_allclose(results[FAST], results[SLOW], rtol=0, atol=1e-12)
    ratio = statistics.median(slow / fast for slow, fast in zip(processor[SLOW], processor[FAST], strict=True))
    medians = [{key: statistics.median(values) for key, values in kind.items()} for kind in (processor, wall)]
    return {"processor seconds": medians[0], "seconds": medians[1], "times as fast": ratio}


def whole(path: Path, found: dict[int, Detections]) -> Callable[[str], list[float]]:
    def call(package: str) -> list[float]:
        cocoeval.evaluator = lambda: package
        metrics = coco_metrics(path, found)
        return [metrics[name] for name in ("AP", "AP50", "APs", "AR100")]

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path, found = data(args.images, Path(folder))
        results["boxes, coco_metrics"] = timed(whole(path, found), args.rounds)
        truth = read_truth(path, ())
        for iou_type in ("bbox", "segm"):
            records = _records(found, truth, "bbox")
            true = true_records(truth, iou_type)[0]
            records = masked(records) if iou_type == "segm" else records
            key = f"{'masks' if iou_type == 'segm' else 'boxes'}, evaluation alone"
            results[key] = timed(
                lambda package, true=true, records=records, iou_type=iou_type: averaged(
                    truth, [dict(row) for row in true], [dict(row) for row in records], iou_type, package
                )[0],
                args.rounds,
            )
    for name, row in results.items():
        times = "  ".join(f"{package} {value:7.2f} s" for package, value in row["processor seconds"].items())
        print(f"{name:26} {times}  {row['times as fast']:.1f} times as fast")
    packages = {package: version(package) for package in (FAST, SLOW)}
    setting = {"images": args.images, "rounds": args.rounds, "detections": sum(map(len, found.values())), **packages}
    record = {"setting": setting, "results": results, "environment": environment()}
    (Path(__file__).parent / "results/coco_eval.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
