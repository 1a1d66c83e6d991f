"""Selective search: seconds and boxes of all modes, SoCo's own boxes found, use of two cores, labelled objects found.

    python benchmarks/proposals.py modes --images DIR [DIR ...] [--number 6]     per image, one thread, without decoding
    python benchmarks/proposals.py soco --images DIR [DIR ...] [--number 4]      recall of SoCo's boxes at IoU 0.5
    python benchmarks/proposals.py workers --images DIR [DIR ...] [--rounds 3]   use of 2 cores; needs Linux
    python benchmarks/proposals.py recall --labels LABELS [LABELS ...]           of all images, with decoding; minutes

``--number`` images of each folder are taken at even steps. Each part replaces its own in results/proposals.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from environment import environment
from soco_definition import definition

from aligndet.data.folder import list_images
from aligndet.data.formats import images_of, load_annotations
from aligndet.data.proposals import open_proposals, write_proposals
from aligndet.data.propose import Settings, search_file
from aligndet.data.recall import evaluate_proposals, pairwise_iou, table
from aligndet.data.selective_search import MODES, filter_proposals, selective_search
from aligndet.data.transforms import read_image
from aligndet.data.workers import run_tasks

SIZES = (256, 400, 640)
COCO_IMAGES, CORES = 118_287, 32  # of train2017; of the machine that the hours are for
WAYS = [
    Settings(),
    Settings(k=100),
    Settings(k=50),
    Settings(mode="single"),
    Settings(mode="fast", size=256),
    Settings(mode="fast", size=384),
]
Images = dict[str, np.ndarray]


def measure(images: Images, mode: str, size: int) -> dict[str, Any]:
    """One row of the table of modes: means over the images, and how many are left without a box."""
    seconds, raw, kept = [], [], []
    for image in images.values():
        began = time.process_time()
        found = selective_search(image, mode=mode, size=size)
        proposals = filter_proposals(found, image.shape[:2])
        seconds.append(time.process_time() - began)
        raw.append(len(found))
        kept.append(len(proposals))
    return {
        "mode": mode,
        "size": size,
        "seconds": round(statistics.mean(seconds), 4),
        "seconds_max": round(max(seconds), 4),
        "raw": round(statistics.mean(raw), 1),
        "kept": round(statistics.mean(kept), 1),
        "kept_median": statistics.median(kept),
        "kept_min": min(kept),
        "kept_max": max(kept),
        "images_without": kept.count(0),
        "coco_hours": round(COCO_IMAGES * statistics.mean(seconds) / CORES / 3600, 2),
    }


def modes(args: argparse.Namespace) -> dict[str, Any]:
    """All modes at three sizes; photographs smaller than 640 px are enlarged to it first."""
    images = {name: enlarged(image, max(SIZES)) for name, image in chosen(args.images, args.number).items()}
    selective_search(next(iter(images.values())), size=SIZES[0])  # the first call loads tables
    print("mode     size  s/image    most     raw    kept  least  most  without  h for COCO")
    rows = []
    for mode in MODES:
        for size in SIZES:
            row = measure(images, mode, size)
            rows.append(row)
            print(
                f"{mode:8} {size:4} {row['seconds']:8.3f} {row['seconds_max']:7.3f} {row['raw']:7.1f} "
                f"{row['kept']:7.1f} {row['kept_min']:6} {row['kept_max']:5} {row['images_without']:8} "
                f"{row['coco_hours']:11.2f}",
                flush=True,
            )
    return {"images": {name: list(image.shape[:2]) for name, image in images.items()}, "rows": rows}


def soco(args: argparse.Namespace) -> dict[str, Any]:
    """How many of the boxes of SoCo's definition each way finds; also itself, on the picture saved once more."""
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "definition, saved again": lambda image: definition(saved_again(image)),
        "soco --quirks": functools.partial(ours, mode="soco", quirks=True),
        "soco": functools.partial(ours, mode="soco"),
        "single": functools.partial(ours, mode="single"),
        "fast, 256 px": functools.partial(ours, mode="fast", size=256),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    counts: dict[str, list[int]] = {way: [] for way in ("definition", *ways)}
    seconds = []
    for image in chosen(args.images, args.number).values():
        began = time.process_time()
        wanted = definition(image)
        seconds.append(time.process_time() - began)
        counts["definition"].append(len(wanted))
        for way, search in ways.items():
            boxes = search(image)
            counts[way].append(len(boxes))
            found[way] += pairwise_iou(boxes, wanted).max(axis=0, initial=0).tolist()
    rows = [{"way": "definition", "boxes": round(statistics.mean(counts["definition"]), 1), "recall": 1.0}]
    for way in ways:
        recall = float((np.array(found[way]) >= 0.5).mean())
        rows.append({"way": way, "boxes": round(statistics.mean(counts[way]), 1), "recall": round(recall, 3)})
    for row in rows:
        print(f"{row['way']:24} {row['boxes']:6.1f} boxes per image, {100 * row['recall']:5.1f} % of SoCo's")
    return {"images": len(seconds), "rows": rows, "seconds_of_definition": round(statistics.mean(seconds), 2)}


def ours(image: np.ndarray, **options: Any) -> np.ndarray:
    """Our proposals by SoCo's filter, with its 32 px."""
    return filter_proposals(selective_search(image, **options), image.shape[:2], min_size=32)


def workers(args: argparse.Namespace) -> dict[str, Any]:
    """How much of two cores the workers use, of what the machine's other work leaves them; the best round of each."""
    paths = [str(path) for folder in args.images for path in spread(folder, args.number)]
    rows = {number: max(rate_of(paths, number) for _ in range(args.rounds)) for number in (1, 2)}
    for number, (efficiency, rate, parent) in rows.items():
        print(
            f"{number} workers: {100 * efficiency:.2f} % busy, {rate:.2f} images per s of a core, parent {parent:.4f} s"
        )
    efficiency, rate, parent = rows[2]
    relative = efficiency * rate / rows[1][1]
    hours = COCO_IMAGES / (relative * rows[1][1] * CORES) / 3600
    print(f"efficiency over 2 cores {100 * relative:.1f} %; COCO train2017 on {CORES} cores like these: {hours:.2f} h")
    return {
        "images": len(paths),
        "busy": {str(number): round(row[0], 4) for number, row in rows.items()},
        "per_core_second": {str(number): round(row[1], 3) for number, row in rows.items()},
        "efficiency": round(relative, 4),
        "parent_seconds_per_image": round(parent, 5),
        "coco_hours": round(hours, 3),
        "load_average": round(os.getloadavg()[0], 1),
    }


def rate_of(paths: list[str], number: int) -> tuple[float, float, float]:
    """Share of its time that a worker searches, images per second of that, and the parent's CPU seconds per image.

    Time in which a worker could run, but other work had the core, does not count: Linux's ``schedstat`` has it.
    """
    used = time.process_time()
    clocks = [outcome.result for outcome in run_tasks(clocked, paths, workers=number, timeout=300) if outcome]
    used = time.process_time() - used
    searching = alive = 0.0
    for pid in {clock[0] for clock in clocks}:
        mine = sorted(clock[1:] for clock in clocks if clock[0] == pid)
        first, last = mine[0][0], mine[-1][1]
        alive += last[0] - first[0] - (last[2] - first[2])
        searching += sum(after[1] - before[1] for before, after in mine)
    return searching / alive, len(clocks) / searching, used / len(clocks)


def clocked(path: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Search an image by default settings: process id, clocks before and after."""
    before = clocks_now()
    search_file(Path("/"), Settings(), path)
    return os.getpid(), before, clocks_now()


def clocks_now() -> tuple[float, float, float]:
    """Of this thread, s: the wall clock, on a core, ready but waiting for a core."""
    ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return time.monotonic(), int(ran) / 1e9, int(waited) / 1e9


def recall(args: argparse.Namespace) -> dict[str, Any]:
    """Recall of labelled objects of whole data sets, in several ways; seconds are CPU time with decoding."""
    results: dict[str, Any] = {}
    for labels in args.labels:
        truth = load_annotations(labels)
        root = images_of(truth, None)
        rows = []
        for settings in WAYS:
            began = time.process_time()
            found = [search_file(root, settings, name) for name in truth.file_names]
            seconds = (time.process_time() - began) / len(found)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "p.npz"
                sizes, boxes = zip(*found, strict=True)
                write_proposals(out, truth.file_names, sizes, boxes, vars(settings))
                rows.append(evaluate_proposals(open_proposals(out), truth) | {"seconds": round(seconds, 3)})
            print(table(rows).splitlines()[-1], f" {seconds:.3f} s", flush=True)
        print(f"{labels}\n{table(rows)}", flush=True)
        results["/".join(Path(labels).parts[-3:])] = rows
    return {"sets": results}


def chosen(folders: list[str], number: int) -> Images:
    """Images of each folder at even steps."""
    return {
        f"{path.parent.name}/{path.name}": read_image(path) for folder in folders for path in spread(folder, number)
    }


def spread(folder: str, number: int) -> list[Path]:
    """Absolute paths of ``number`` images of a folder at even steps."""
    names = list_images(folder)
    rows = np.linspace(0, len(names) - 1, min(number, len(names))).astype(int)
    return [(Path(folder) / names[row]).absolute() for row in rows]


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """The image with a longest side of at least ``side`` px."""
    scale = side / max(image.shape[:2])
    if scale <= 1:
        return image
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)


def saved_again(image: np.ndarray) -> np.ndarray:
    """The image after one more JPEG compression, quality 95."""
    data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def main() -> None:
    """Measure one part, print it, write it into the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"modes": modes, "soco": soco, "workers": workers, "recall": recall}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--images", nargs="+", default=[], metavar="DIR")
    parser.add_argument("--labels", nargs="+", default=[], metavar="LABELS")
    parser.add_argument("--number", type=int, default=6, help="images of each folder (default 6)")
    parser.add_argument("--rounds", type=int, default=3, help="of workers (default 3)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "proposals.json"))
    args = parser.parse_args()
    if not (args.labels if args.part == "recall" else args.images):
        parser.error("want --labels" if args.part == "recall" else "want --images")
    cv2.setNumThreads(1)
    result = parts[args.part](args) | {"environment": environment() | {"opencv_threads": 1}}
    out = Path(args.out)
    before = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(
        json.dumps({key: before[key] for key in parts if key in before} | {args.part: result}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
