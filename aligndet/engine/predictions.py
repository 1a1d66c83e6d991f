"""``aligndet predict``: detections of a trained detector on images, as COCO results and drawn."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as run_length

from aligndet.data.folder import list_images
from aligndet.data.transforms import read_image
from aligndet.engine.distributed import device_for
from aligndet.models import folded
from aligndet.plots.figures import COLOURS, draw_boxes, draw_masks
from aligndet.predict import predict
from aligndet.structures import Detections
from aligndet.weights import evaluation_size, load_detector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet predict``."""
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="images, or folders that are searched recursively")
    parser.add_argument("--weights", required=True, help="model.pt of a fine-tuning run, or of aligndet convert")
    parser.add_argument("--out", required=True, help="folder for detections.json and the drawn images")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="lowest score kept (default 0.3)")
    parser.add_argument("--short-side", type=int, help="px the images are resized to (default: data.eval_short_side)")
    parser.add_argument("--long-side", type=int, help="px, upper bound (default: data.long_side of the training)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--no-draw", action="store_true", help="write detections.json only")


def run(args: argparse.Namespace) -> int:
    """Detect, draw, and write ``detections.json`` in COCO's format: images, categories (ids from 1), annotations.

    Annotations are COCO's results with ids: bbox x, y, width, height px, score, and run lengths where there are masks.
    Images that cannot be read are named and left out, unless there is only one.
    """
    files = _files(args.images)
    detector, classes = load_detector(args.weights)
    detector = folded(detector).to(device_for(args.device, "--device"))
    detector.score_threshold = min(detector.score_threshold, args.score_threshold)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    unreadable = 0
    short_side, long_side = evaluation_size(args.weights)
    sides = {"short_side": args.short_side or short_side, "long_side": args.long_side or long_side}
    print(f"images are resized to a short side of {sides['short_side']} px, the long one at most {sides['long_side']}")
    for number, (file, name) in enumerate(files, 1):
        try:
            found = predict(detector, [file], args.score_threshold, **sides)[0]
        except ValueError as error:
            if len(files) == 1:
                raise
            unreadable += 1
            print(f"skipped: {error}", file=sys.stderr)
            continue
        pixels = read_image(file)
        images.append({"id": number, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
        annotations += _annotations(found, number, len(annotations) + 1)
        if not args.no_draw:
            _draw(pixels, out / "drawn" / f"{name}.png", found, classes)
        print(f"\r{number}/{len(files)} images, {unreadable} unreadable", end="", file=sys.stderr)
    print(file=sys.stderr)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(classes)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    path = out / "detections.json"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
    print(f"{path}: {len(annotations)} detections in {len(images)} images")
    return 0


def _files(arguments: Sequence[str]) -> list[tuple[Path, str]]:
    """Each image once, with the name it gets in the results: relative to the folder that was given.

    Names that are the same get the name of that folder (of a file: the one it lies in) in front.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder without images, or names that are still the same.
    """
    found: dict[Path, tuple[Path, str, str]] = {}  # by absolute path: as given, relative name, folder
    for argument in map(Path, arguments):
        if not argument.exists():
            raise FileNotFoundError(f"images {argument}: no such file or folder")
        place = Path(os.path.abspath(argument))
        if argument.is_file():
            found.setdefault(place, (argument, argument.name, place.parent.name))
        else:
            for name in list_images(argument):
                found.setdefault(place / name, (argument / name, name, place.name))
    counts = Counter(name for _, name, _ in found.values())
    files = [(path, name if counts[name] == 1 else f"{folder}/{name}") for path, name, folder in found.values()]
    first: dict[str, Path] = {}
    for path, name in files:
        if first.setdefault(name, path) != path:
            raise ValueError(f"images {path}: the results would call it {name} like {first[name]}; want runs apart")
    return files


def _annotations(found: Detections, image: int, first: int) -> list[dict[str, Any]]:
    records = []
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    for number, ((x0, y0, x1, y1), score, label) in enumerate(rows):
        record: dict[str, Any] = {"id": first + number, "image_id": image, "category_id": label + 1, "score": score}
        record["bbox"] = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
        record["area"], record["iscrowd"] = round((x1 - x0) * (y1 - y0), 2), 0
        if found.masks is not None:
            encoded = run_length.encode(np.asfortranarray(found.masks[number].numpy().astype(np.uint8)))
            record["area"] = int(run_length.area(encoded))
            record["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
        records.append(record)
    return records


def _draw(pixels: np.ndarray, target: Path, found: Detections, classes: Sequence[str]) -> None:
    labels = found.labels.tolist()
    colours = [COLOURS[label % len(COLOURS)] for label in labels] or list(COLOURS)
    texts = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, found.scores.tolist(), strict=True)]
    if found.masks is not None:
        pixels = draw_masks(pixels, found.masks.numpy(), colours=colours)
    drawn = draw_boxes(pixels, found.boxes.numpy(), colours=colours, texts=texts)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(target), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)):
        raise ValueError(f"{target}: cannot be written")
