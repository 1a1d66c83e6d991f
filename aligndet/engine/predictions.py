"""``aligndet predict``: detections of a trained detector on images, as COCO results and drawn."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as run_length

from aligndet.data.folder import list_images
from aligndet.data.progress import Progress
from aligndet.data.transforms import read_image
from aligndet.engine.distributed import device_for
from aligndet.engine.partial import Partial
from aligndet.models import folded
from aligndet.plots.figures import COLOURS, draw_boxes, draw_masks
from aligndet.predict import predict
from aligndet.structures import Detections
from aligndet.weights import load_detector


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
    Images that cannot be read are named and left out, unless there is only one; a drawing that cannot be written is
    named. What is done is kept in ``detections.json.partial``, from which the same command continues.
    """
    files = _files(args.images)
    detector, classes = load_detector(args.weights)
    detector = folded(detector).to(device_for(args.device, "--device"))
    detector.score_threshold = min(detector.score_threshold, args.score_threshold)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "detections.json"
    sides = {
        "short_side": detector.short_side if args.short_side is None else args.short_side,
        "long_side": detector.long_side if args.long_side is None else args.long_side,
    }
    print(f"images are resized to a short side of {sides['short_side']} px, the long one at most {sides['long_side']}")
    weights = Path(args.weights).stat()
    made_with = sides | {"score_threshold": args.score_threshold, "weights": [weights.st_size, weights.st_mtime_ns]}
    partial = Partial(path.with_name(path.name + ".partial"), made_with | {"drawn": not args.no_draw})
    with partial, Progress(path.with_name(path.name + ".jsonl"), "predict") as progress:
        left = [(file, name) for file, name in files if name not in partial.done]
        progress.begin(len(left))
        for file, name in left:
            try:
                pixels = read_image(file)
            except ValueError as error:
                if len(files) == 1:
                    partial.remove()
                    raise
                progress.warn(f"skipped: {error}")
                partial.add(name, None)
            else:
                image = torch.from_numpy(pixels).permute(2, 0, 1)
                found = predict(detector, [image], args.score_threshold, **sides)[0]
                if not args.no_draw and not _draw(pixels, out / "drawn" / f"{name}.png", found, classes):
                    progress.warn(f"not drawn: {out / 'drawn' / name}.png cannot be written")
                partial.add(name, {"size": pixels.shape[:2], "found": _annotations(found)})
            progress.advance()
        progress.end()
        progress.log("end", **progress.rate())
        _write(path, [(name, partial.done[name]) for _, name in files], classes)
        partial.remove()
    return 0


def _write(path: Path, results: Sequence[tuple[str, dict[str, Any] | None]], classes: Sequence[str]) -> None:
    """``detections.json`` in one step; images that could not be read, None, keep their number and are left out."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (name, result) in enumerate(results, 1):
        if result is not None:
            height, width = result["size"]
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for record in result["found"]:
                annotations.append({"id": len(annotations) + 1, "image_id": number} | record)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(classes)]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    os.replace(temporary, path)
    unreadable = f", {len(results) - len(images)} could not be read" if len(images) < len(results) else ""
    print(f"{path}: {len(annotations)} detections in {len(images)} images{unreadable}")


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


def _annotations(found: Detections) -> list[dict[str, Any]]:
    records = []
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    for number, ((x0, y0, x1, y1), score, label) in enumerate(rows):
        record: dict[str, Any] = {"category_id": label + 1, "score": score}
        record["bbox"] = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
        record["area"], record["iscrowd"] = round((x1 - x0) * (y1 - y0), 2), 0
        if found.masks is not None:
            encoded = run_length.encode(np.asfortranarray(found.masks[number].numpy().astype(np.uint8)))
            record["area"] = int(run_length.area(encoded))
            record["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
        records.append(record)
    return records


def _draw(pixels: np.ndarray, target: Path, found: Detections, classes: Sequence[str]) -> bool:
    """Write the image with its detections; whether that could be done."""
    labels = found.labels.tolist()
    colours = [COLOURS[label % len(COLOURS)] for label in labels] or list(COLOURS)
    texts = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, found.scores.tolist(), strict=True)]
    if found.masks is not None:
        pixels = draw_masks(pixels, found.masks.numpy(), colours=colours)
    drawn = draw_boxes(pixels, found.boxes.numpy(), colours=colours, texts=texts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return cv2.imwrite(str(target), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    except OSError:
        return False
