"""``aligndet predict``: detections of a trained detector on images, as JSON and drawn."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cv2

from aligndet.data.folder import list_images
from aligndet.data.transforms import read_image
from aligndet.models import folded
from aligndet.plots.figures import draw_boxes
from aligndet.predict import predict
from aligndet.structures import Detections
from aligndet.weights import load_detector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet predict``."""
    parser.add_argument("--weights", required=True, help="model.pt of a fine-tuning run")
    parser.add_argument("--images", required=True, help="an image, or a folder that is searched recursively")
    parser.add_argument("--out", required=True, help="folder for detections.json and drawn images")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="lowest score kept (default 0.3)")
    parser.add_argument("--short-side", type=int, default=800, help="px the images are resized to (default 800)")
    parser.add_argument("--long-side", type=int, default=1333, help="px, upper bound (default 1333)")
    parser.add_argument("--draw", action="store_true", help="write each image with its boxes too")


def run(args: argparse.Namespace) -> int:
    """Detect, write ``detections.json``: one record per image with file, boxes xyxy px, scores, class names."""
    detector, classes = load_detector(args.weights)
    detector = folded(detector)
    root = Path(args.images)
    names = [root.name] if root.is_file() else list_images(root)
    root = root.parent if root.is_file() else root
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    records, unreadable = [], 0
    for number, name in enumerate(names, 1):
        try:
            sides = {"short_side": args.short_side, "long_side": args.long_side}
            found = predict(detector, [root / name], args.score_threshold, **sides)[0]
        except ValueError as error:
            if len(names) == 1:
                raise
            unreadable += 1
            print(f"skipped: {error}", file=sys.stderr)
            continue
        records.append(_record(name, found, classes))
        if args.draw:
            _draw(root / name, out / "drawn" / Path(name).with_suffix(".png"), found, classes)
        print(f"\r{number}/{len(names)} images, {unreadable} unreadable", end="", file=sys.stderr)
    print(file=sys.stderr)
    (out / "detections.json").write_text(json.dumps(records))
    print(f"{out / 'detections.json'}: {sum(len(r['boxes']) for r in records)} detections in {len(records)} images")
    return 0


def _record(name: str, found: Detections, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "file": name,
        "boxes": found.boxes.round(decimals=2).tolist(),
        "scores": found.scores.tolist(),
        "classes": [classes[label] for label in found.labels.tolist()],
    }


def _draw(source: Path, target: Path, found: Detections, classes: tuple[str, ...]) -> None:
    pairs = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    texts = [f"{classes[label]} {score:.2f}" for label, score in pairs]
    drawn = draw_boxes(read_image(source), found.boxes.numpy(), texts=texts)
    target.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(target), cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
