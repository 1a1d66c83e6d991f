"""Images per second and core of the data path, beside torchvision v2 doing the same; memory of four loader processes.

python benchmarks/loader.py [--images FOLDER] [--number 12] [--only speed|reduction|memory]

Both sides read the same JPEGs and make the same draws: sizes, flips, colours. torchvision: ``decode_jpeg``, then
``v2.functional`` on uint8 tensors [3, H, W]. Times are processor seconds of one thread, both sides in turn in one
process, so that other work on the machine weighs on both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as nn
from environment import environment
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2 import functional as F

from aligndet.data.augment import Window, jitter_window, plain_window, reduced
from aligndet.data.batch import Sample, collate, collate_views
from aligndet.data.coco import load_coco
from aligndet.data.colours import COLOURS, draw_colour
from aligndet.data.decode import open_picture, reduction_for
from aligndet.data.folder import list_images
from aligndet.data.labelled import LabelledImages
from aligndet.data.stream import StepSampler, loader
from aligndet.data.transforms import decode_image, flip_boxes, read_image, resampled

SHORT, LONG = tuple(range(640, 801, 32)), 1333
DRAW = {
    "views": partial(plain_window, short_sides=SHORT, long_side=LONG),
    "finetune": partial(plain_window, short_sides=SHORT, long_side=LONG),
    "jitter": partial(jitter_window, size=1024, scale=(0.1, 2.0)),
}
STAGES = ("decode", "resize", "flip", "colour", "collate")
Seconds = dict[str, float]


@contextmanager
def timed(seconds: Seconds, stage: str) -> Iterator[None]:
    began = time.process_time()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.process_time() - began


def photographs(folder: Path, source: str | None, number: int, long_side: int) -> list[Path]:
    """JPEGs (quality 90) with a given long side: enlarged or shrunk photographs, or else textures of all scales."""
    rng = np.random.default_rng(0)
    names = list_images(source) if source else []
    paths = []
    for row in range(number):
        size = (long_side * 3 // 4, long_side) if row % 4 else (long_side, long_side * 3 // 4)
        if source:
            image = read_image(Path(source) / names[row * len(names) // number])
        else:
            image = np.zeros((*size, 3), np.float32)
            for octave in range(2, 9):
                noise = rng.normal(0, 2.0 ** (6 - 0.6 * octave), (2**octave, 2**octave, 3)).astype(np.float32)
                image += cv2.resize(noise, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
            image = (image + 128).clip(0, 255).astype(np.uint8)
        turned = image if (image.shape[0] > image.shape[1]) == (size[0] > size[1]) else np.rot90(image)
        resized = cv2.resize(np.ascontiguousarray(turned), (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
        paths.append(folder / f"{long_side}_{row}.jpg")
        quality = [cv2.IMWRITE_JPEG_QUALITY, 90]
        assert cv2.imwrite(str(paths[-1]), cv2.cvtColor(resized, cv2.COLOR_RGB2BGR), quality)
    return paths


def plans(task: str, size: tuple[int, int], seed: int) -> tuple[list[Window], list[bool], list[tuple[str, int]], int]:
    """Windows, flips and colours of the views of an image (one in fine-tuning, without colour), and the reduction."""
    rng, windows, flips, colours = np.random.default_rng(seed), [], [], []
    for _ in range(2 if task == "views" else 1):
        windows.append(DRAW[task](size, rng))
        flips.append(bool(rng.random() < 0.5))
        colours.append(draw_colour(rng) if task == "views" else ("identity", 1))
    if task == "views":
        return windows, flips, colours, reduction_for(size, [window.size for window in windows], size)
    window, reduction = reduced(windows[0], size)
    return [window], flips, colours, reduction


def ours(path: Path, task: str, seed: int, seconds: Seconds, *, fast: bool) -> list[torch.Tensor]:
    """The views of one image as the package makes them, step by step."""
    with timed(seconds, "decode"):
        picture = open_picture(path, fast)
    windows, flips, colours, reduction = plans(task, picture.size, seed)
    with timed(seconds, "decode"):
        pixels = picture.pixels(reduction)
    with timed(seconds, "resize"):
        images = [window.cut(pixels, picture.size, mirror) for window, mirror in zip(windows, flips, strict=True)]
        boxes = [window.place(BOXES) for window in windows]
    with timed(seconds, "flip"):
        [flip_boxes(b, w.size[1]) for b, w, mirror in zip(boxes, windows, flips, strict=True) if mirror]
    with timed(seconds, "colour"):
        return [COLOURS[name](image, magnitude) for image, (name, magnitude) in zip(images, colours, strict=True)]


def of_torchvision(path: Path, task: str, seed: int, seconds: Seconds) -> list[torch.Tensor]:
    """The same by torchvision; crops as its own transforms make them, from the whole image resized."""
    with timed(seconds, "decode"):
        image = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
    size = (image.shape[1], image.shape[2])
    windows, flips, colours, _ = plans(task, size, seed)
    boxes = tv_tensors.BoundingBoxes(BOXES, format="XYXY", canvas_size=size)
    with timed(seconds, "resize"):
        images = [_resized(image, boxes, window) for window in windows]
    with timed(seconds, "flip"):
        images = [[F.horizontal_flip(v) for v in i] if mirror else i for i, mirror in zip(images, flips, strict=True)]
    with timed(seconds, "colour"):
        return [_coloured(i[0], *colour) for i, colour in zip(images, colours, strict=True)]


def _resized(image: torch.Tensor, boxes: torch.Tensor, window: Window) -> list[torch.Tensor]:
    height, width = (round(n * size / part) for n, size, part in _axes(image, window))
    whole = [F.resize(value, [height, width], antialias=True) for value in (image, boxes)]
    if (height, width) == window.size:
        return whole
    top, left = window.top * height // image.shape[1], window.left * width // image.shape[2]
    return [F.crop(value, top, left, *window.size) for value in whole]


def _axes(image: torch.Tensor, window: Window) -> tuple[tuple[int, int, int], ...]:
    return (
        (image.shape[1], window.size[0], window.height),
        (image.shape[2], window.size[1], window.width),
    )


def _coloured(image: torch.Tensor, name: str, magnitude: int) -> torch.Tensor:
    factor = 0.1 + 0.18 * magnitude
    operations: dict[str, Callable[[], torch.Tensor]] = {
        "identity": lambda: image,
        "autocontrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
        "solarize": lambda: F.solarize(image, threshold=int(25.6 * magnitude)),
        "colour": lambda: F.adjust_saturation(image, factor),
        "contrast": lambda: F.adjust_contrast(image, factor),
        "brightness": lambda: F.adjust_brightness(image, factor),
        "sharpness": lambda: F.adjust_sharpness(image, factor),
        "posterize": lambda: F.posterize(image, bits=4 - int(0.4 * magnitude)),
    }
    return operations[name]()


BOXES = torch.tensor([[10.0, 20.0, 90.0, 75.0]] * 7)  # COCO has seven objects per image
EMPTY, NONE = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)


def joined(images: Sequence[list[torch.Tensor]]) -> Any:
    """A batch as the package makes it."""
    samples = [[Sample(image, EMPTY, NONE, NONE, (1, 1), 0) for image in views] for views in images]
    return collate_views([(a, b) for a, b in samples]) if len(samples[0]) == 2 else collate([s[0] for s in samples])


def stacked(images: Sequence[list[torch.Tensor]]) -> torch.Tensor:
    """A batch as DETR and torchvision's detectors make it: padded, then stacked."""
    flat = [image for views in images for image in views]
    height, width = (-(-max(image.shape[axis] for image in flat) // 32) * 32 for axis in (1, 2))
    return torch.stack([nn.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in flat])


def speed(paths: list[Path], task: str, rounds: int) -> dict[str, Any]:
    """Seconds per image of each stage on both sides, medians over rounds, batches of 2 images."""
    sides: dict[str, tuple[Callable[..., list[torch.Tensor]], Callable[..., Any]]] = {
        "ours": (partial(ours, fast=True), joined),
        "ours, full decoding": (partial(ours, fast=False), joined),
        "torchvision": (of_torchvision, stacked),
    }
    table: dict[str, list[Seconds]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, (views, join) in sides.items():
            seconds: Seconds = {}
            for first in range(0, len(paths), 2):
                batch = [
                    views(path, task, 1000 * number + first + k, seconds)
                    for k, path in enumerate(paths[first : first + 2])
                ]
                with timed(seconds, "collate"):
                    join(batch)
            if number:  # the first round warms up
                table[name].append({stage: seconds.get(stage, 0.0) / len(paths) for stage in STAGES})
    totals = {name: [sum(row.values()) for row in rows] for name, rows in table.items()}
    ratios = [theirs / own for own, theirs in zip(totals["ours"], totals["torchvision"], strict=True)]
    result: dict[str, Any] = {"task": task, "ratio": round(statistics.median(ratios), 2)}
    result["ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    for name, rows in table.items():
        stages = {stage: round(1000 * statistics.median(row[stage] for row in rows), 2) for stage in STAGES}
        result[name] = {"images_per_second": round(1 / statistics.median(totals[name]), 2), "milliseconds": stages}
    return result


def reduction_table(paths: list[Path]) -> list[dict[str, Any]]:
    """What decoding at 1/2, 1/4, 1/8 saves, and how far pixels are from areas averaged in full decoding, in levels."""
    rows = []
    for reduction in (2, 4, 8):
        seconds: Seconds = {}
        differences: dict[str, list[np.ndarray]] = {"reduced": [], "full": [], "bilinear": []}
        for path in paths:
            data = np.fromfile(path, dtype=np.uint8)
            with timed(seconds, "full"):
                whole = decode_image(data, path)
                size = (int(whole.shape[0] / reduction / 1.25), int(whole.shape[1] / reduction / 1.25))
                full = resampled(whole, size)
            with timed(seconds, "reduced"):
                reduced = resampled(decode_image(data, path, reduction), size)
            area = cv2.resize(whole, (size[1], size[0]), interpolation=cv2.INTER_AREA).astype(int)
            bilinear = cv2.resize(whole, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
            for name, pixels in (("reduced", reduced), ("full", full), ("bilinear", bilinear)):
                differences[name].append(np.abs(area - pixels).ravel())
        every = {name: np.concatenate(parts) for name, parts in differences.items()}
        rows.append(
            {
                "reduction": reduction,
                "speed_up": round(seconds["full"] / seconds["reduced"], 2),
                "mean_difference": {name: round(float(d.mean()), 2) for name, d in every.items()},
                "quantile_99": {name: int(np.quantile(d, 0.99)) for name, d in every.items()},
            }
        )
    return rows


def memory(folder: Path, image: Path, batch: int) -> dict[str, Any]:
    """Labels of train2017's size, with polygons; four loader processes over images that are links to one file."""
    number, objects = 118_287, 860_001
    path = folder / "instances_train.json"
    _write_labels(path, number, objects, read_image(image).shape[:2])
    for row in range(number):
        os.symlink(image, folder / f"{row:012d}.jpg")
    before, seconds, began = _resident(), Seconds(), time.perf_counter()
    with timed(seconds, "index"):
        annotations = load_coco(path)
    built, wall = _resident(), time.perf_counter() - began
    data = LabelledImages(annotations, folder, short_sides=SHORT, long_side=LONG)
    batches = iter(loader(data, StepSampler(len(data), batch=batch, steps=10_000), collate, workers=4, pin=False))
    used = []
    for step in range(60):
        next(batches)
        if step % 20 == 19:
            used.append(_proportional())
    return {
        "images": number,
        "objects": len(annotations.boxes),
        "file_mib": path.stat().st_size >> 20,
        "index_processor_seconds": round(seconds["index"], 1),
        "index_wall_seconds": round(wall, 1),
        "index_peak_mib": built["VmHWM"],
        "resident_before_mib": before["VmRSS"],
        "workers": 4,
        "images_per_batch": batch,
        "pss_mib_after_20_40_60_steps": used,
    }


def _write_labels(path: Path, number: int, objects: int, size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    shape = np.stack([1 + np.cos(angles), 1 + np.sin(angles)], axis=1) / 2
    with path.open("w") as file:
        images = [
            {"id": n, "file_name": f"{n:012d}.jpg", "height": size[0], "width": size[1], "license": 3}
            for n in range(number)
        ]
        file.write('{"info": {}, "images": ' + json.dumps(images) + ', "annotations": [')
        for n in range(objects):
            corner, sides = rng.uniform(0, 300, 2), rng.uniform(5, 150, 2)
            polygon = np.round(corner + sides * shape, 2).ravel().tolist()
            record = {"segmentation": [polygon], "area": float(sides.prod()), "iscrowd": 0, "image_id": n % number}
            record |= {
                "bbox": [*corner.round(2).tolist(), *sides.round(2).tolist()],
                "category_id": n % 80 + 1,
                "id": n,
            }
            file.write((", " if n else "") + json.dumps(record))
        categories = [{"id": n, "name": f"class {n}"} for n in range(1, 81)]
        file.write('], "categories": ' + json.dumps(categories) + "}")


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) >> 10 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def _proportional() -> int:
    """MiB of this process and its children together, shared pages counted once."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in [str(os.getpid()), *children]:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total >> 10


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photographs (default: generated textures)")
    parser.add_argument("--number", type=int, default=12, help="images of each size (default 12)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("speed", "reduction", "memory"))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "loader.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    out = Path(args.out)
    result: dict[str, Any] = json.loads(out.read_text()) if args.only and out.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = photographs(folder, args.images, args.number, 640)
        large = photographs(folder, args.images, max(2, args.number // 3), 2560)
        result["images"] = "photographs, enlarged" if args.images else "generated textures"
        if args.only in (None, "speed"):
            result["speed"] = []
            for paths, side in ((small, 640), (large, 2560)):
                for task in DRAW:
                    row = {"long_side": side} | speed(paths, task, args.rounds)
                    result["speed"].append(row)
                    print(json.dumps(row))
        if args.only in (None, "reduction"):
            result["reduction"] = {"640": reduction_table(small), "2560": reduction_table(large)}
            print(json.dumps(result["reduction"]))
        if args.only in (None, "memory"):
            result["memory"] = memory(folder, small[1], batch=2)
            print(json.dumps(result["memory"]))
    result["environment"] = environment()
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
