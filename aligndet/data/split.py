"""``aligndet split``: the labelled folds of low-data protocols, as COCO files."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aligndet.data.annotations import Annotations
from aligndet.data.coco import plain_id
from aligndet.data.formats import coco_file, detect_format, has_parts, images_of, load_annotations
from aligndet.data.splits import LAST_FOLD, choose_labelled, share_of

FOLDS, PERCENT = (1, 2, 3, 4, 5), (1.0, 5.0, 10.0, 20.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet split``."""
    parser.add_argument("annotations", metavar="LABELS", help="COCO json, VOC image set, YOLO yaml, or a folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for NAME.FOLD@PERCENT.json")
    parser.add_argument(
        "--percent", type=float, nargs="+", help="of the images (default 1 5 10 20, as far as that is an image)"
    )
    parser.add_argument("--folds", type=int, nargs="+", default=FOLDS, help="seeds of the draws (default 1 2 3 4 5)")
    parser.add_argument("--format", choices=("coco", "voc", "yolo"), help="default: found out")
    parser.add_argument("--split", metavar="NAME", help="part of a folder or yaml: val, … (default: train)")


def run(args: argparse.Namespace) -> int:
    """Write the folds and say of which part they are and how many images each has."""
    for fold in args.folds:
        if not 0 <= fold <= LAST_FOLD:
            raise ValueError(f"--folds: want whole numbers 0 .. {LAST_FOLD}, got {fold}")
    kind = args.format or detect_format(args.annotations)
    parts = has_parts(args.annotations, kind)
    split = args.split or ("train" if parts else None)
    source = coco_file(args.annotations, split) if kind == "coco" else Path(args.annotations)
    tree, stem, root = _tree(source, kind, split)
    number, out = len(tree["images"]), Path(args.out)
    percents = args.percent or [percent for percent in PERCENT if percent * number >= 100] or PERCENT
    counts = {percent: share_of(number, percent) for percent in percents}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for percent, count in counts.items():
            for fold in args.folds:
                path = out / f"{stem}.{fold}@{percent:g}.json"
                temporary = path.with_name(path.name + ".tmp")
                temporary.write_text(json.dumps(part_of(tree, choose_labelled(number, count, fold).tolist())))
                os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there: {error.strerror}") from None
    print(f"{source}: {f'part {split}' if parts else 'all'}, {number} images")
    for percent in [] if args.percent else PERCENT:
        if percent not in counts:
            print(f"no folds of {percent:g} %, which is less than one image")
    for percent, count in counts.items():
        folds = ",".join(map(str, args.folds))
        print(f"{out}/{stem}.{{{folds}}}@{percent:g}.json: {count} of {number} images each")
    if root is not None:
        print(f"file names are relative to {root}: train with data.train_images={root}")
    return 0


def part_of(tree: dict[str, Any], images: Sequence[int]) -> dict[str, Any]:
    """A COCO tree with some of its images, in the order of the file, and their annotations; the rest stays."""
    kept = [tree["images"][row] for row in sorted(images)]
    ids = {plain_id(image["id"]) for image in kept}
    annotations = [annotation for annotation in tree["annotations"] if plain_id(annotation["image_id"]) in ids]
    return tree | {"images": kept, "annotations": annotations}


def _tree(path: Path, kind: str, split: str | None) -> tuple[dict[str, Any], str, Path | None]:
    """The labels as COCO json, the name that the folds get, and the image folder, None where it is not found."""
    if kind == "folder":
        raise ValueError(f"data {path}: holds no labels to split")
    annotations = load_annotations(path, format=kind, split=split)
    if kind == "coco":  # as it stands there, nothing left out: load_annotations has only proved that it is COCO
        return json.loads(path.read_bytes()), path.stem, _folder(annotations)
    name = "_".join(["instances", split] if split else ["instances", path.stem.replace("*", "")])
    return annotations.to_coco(), name, images_of(annotations, None)


def _folder(annotations: Annotations) -> Path | None:
    try:
        return images_of(annotations, None)
    except FileNotFoundError:  # folds are written all the same: images may be elsewhere
        return None
