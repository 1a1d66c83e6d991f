"""``aligndet check``: a data set looked through before training, by the rules that training itself applies."""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from aligndet.data.annotations import Annotations
from aligndet.data.folder import list_images, name_below, place_of
from aligndet.data.formats import FORMATS, coco_file, detect_format, images_of, load_annotations, yolo_file
from aligndet.data.labelled import wrong_size
from aligndet.data.progress import Progress
from aligndet.data.transforms import decode_image, read_file
from aligndet.data.voc import has_lists
from aligndet.data.workers import Outcome, available_cores, run_tasks
from aligndet.data.yolo import PART_MISSING, unpaired

MISSING, UNREADABLE, WRONG_SIZE = "file is missing", "file cannot be read", "size differs from the labels"
PAGES = "file of several pages, of which the first is read"
FEW = 64  # images that are looked through in this process: starting others takes longer
TIMEOUT = 120.0  # s per image
SHOWN = 3  # lines of each reason in the text
Seen = tuple[tuple[int, int], str, int]  # (height, width) px, digest of the bytes, pages


@dataclass
class Report:
    """What ``aligndet check`` found.

    Attributes:
        path: the data set.
        format: one of ``FORMATS``.
        error: why it cannot be read at all; empty where it can.
        images: listed.
        readable: of them that training can use.
        without_boxes: of the readable that have no box to learn from.
        boxes: targets on readable images.
        crowds: boxes that are no targets: crowd regions, objects marked difficult.
        classes: by name: boxes, images, and boxes by COCO's sizes (areas below 32^2 px, below 96^2 px, above).
        widths, heights: least, median and largest of readable images, px.
        problems: reason -> lines; what training skips, or stops at with ``on_error`` "fail".
        notes: reason -> lines; what training takes as it is.
        seconds: that the check took.
        usable: whether there is anything to train on, which there is not where YOLO names a part train that is missing;
            with ``on_error`` "fail": and no problem at all.
    """

    path: str
    format: str
    error: str = ""
    images: int = 0
    readable: int = 0
    without_boxes: int = 0
    boxes: int = 0
    crowds: int = 0
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    heights: tuple[int, ...] = ()
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0
    usable: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet check``."""
    parser.add_argument("data", metavar="DATA", help="COCO json, VOC image set, YOLO yaml, or a folder")
    parser.add_argument("--format", choices=FORMATS, help="default: found out")
    parser.add_argument("--split", metavar="NAME", help="part of a folder or yaml: train, val, … (default: all)")
    parser.add_argument("--images", metavar="DIR", help="folder of the images (default: looked for)")
    parser.add_argument("--masks", action="store_true", help="want a mask for each object, as mask_rcnn does")
    parser.add_argument(
        "--on-error", choices=("skip", "fail"), default="skip", help="fail: not usable with a single problem"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON too; - prints it instead of the text")
    parser.add_argument("--all", action="store_true", help=f"name every case in the text, not the first {SHOWN}")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; 0: none but this (default: one per core)")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 where the data set is usable, 1 where it is not."""
    kind = args.format or detect_format(args.data)
    if not Path(args.data).exists() and "*" not in args.data:
        raise FileNotFoundError(f"data {args.data}: no such file or folder")
    path: str | Path = args.data
    if kind == "coco":
        path = coco_file(path, args.split)
    if kind == "yolo":
        path = yolo_file(path)
    report = check(
        path,
        format=kind,
        split=args.split,
        images=args.images,
        masks=args.masks,
        on_error=args.on_error,
        workers=args.workers,
    )
    content = json.dumps(asdict(report), indent=1)
    if args.json and args.json != "-":
        try:
            Path(args.json).write_text(content + "\n")
        except OSError as error:
            raise ValueError(f"--json {args.json}: cannot write there: {error.strerror}") from None
    print(content if args.json == "-" else as_text(report, None if args.all else SHOWN))
    return 0 if report.usable else 1


def check(
    path: str | Path,
    *,
    format: str,
    split: str | None = None,
    images: str | Path | None = None,
    masks: bool = False,
    on_error: str = "skip",
    workers: int | None = None,
) -> Report:
    """Read all labels and decode all images of a data set. Nothing is written.

    Args:
        format, split, masks: of ``load_annotations``.
        images: folder of the images; None: as the format says, or looked for.
        on_error: "fail" calls a data set with a single problem not usable, as training with that setting does.
        workers: processes; None: one per core, or none for few images; 0: none.

    Raises:
        ValueError: ``workers`` is negative.
    """
    began = time.monotonic()
    report = Report(path=str(path), format=format)
    if workers is not None and workers < 0:
        raise ValueError(f"workers: want at least 0, got {workers}")
    try:
        annotations = load_annotations(path, format=format, split=split, masks=masks)
        root = images_of(annotations, images) if len(annotations) else Path()
    except (ValueError, FileNotFoundError) as error:
        report.error = str(error)
        return report
    report.images, report.problems = len(annotations), dict(annotations.report)
    number = workers if workers is not None else 0 if len(annotations) <= FEW else available_cores()
    seen = _look(annotations, root, report, number)
    _count(annotations, sorted(seen), report)
    _note(annotations, root, seen, report)
    if seen:
        sides = np.array([size for size, *_ in seen.values()])
        report.heights, report.widths = (
            tuple(int(function(sides[:, axis])) for function in (np.min, np.median, np.max)) for axis in (0, 1)
        )
    serves = report.readable > 0 and (report.boxes > 0 or format == "folder")
    serves &= not any(line.startswith("part train: ") for line in report.problems.get(PART_MISSING, []))
    report.usable = serves and not (on_error == "fail" and report.problems)
    report.seconds = round(time.monotonic() - began, 2)
    return report


def as_text(report: Report, shown: int | None) -> str:
    """The report for people; at most ``shown`` lines of each reason, None: all."""
    verdict = "usable" if report.usable else "NOT usable"
    if report.error:
        return f"{report.path}: {verdict}: {report.error}"
    rate = 1000 * report.seconds / max(report.images, 1)
    lines = [
        f"{report.path} ({report.format}): {verdict}",
        f"images: {report.images} listed, {report.readable} readable, {report.without_boxes} of them without boxes; "
        f"looked through in {report.seconds:.1f} s ({rate:.1f} s per thousand)",
    ]
    if report.widths:
        spans = [f"{name} {low} / {middle} / {high}" for name, (low, middle, high) in _spans(report)]
        lines.append(f"sizes, least / median / largest, px: {', '.join(spans)}")
    if report.format != "folder":
        lines.append(f"boxes: {report.boxes} to learn from, {report.crowds} crowds or difficult ones that are ignored")
        width = max([len(name) for name in report.classes] + [5])
        lines.append(f"  {'class':{width}}  {'boxes':>8} {'images':>8} {'small':>8} {'medium':>8} {'large':>8}")
        for name, row in report.classes.items():
            lines.append(f"  {name:{width}}  " + " ".join(f"{value:8}" for value in row.values()))
    for title, part in (("problem", report.problems), ("note", report.notes)):
        for reason, cases in part.items():
            lines.append(f"{title}: {reason}: {len(cases)}")
            lines += [f"    {case}" for case in cases[:shown]]
            if shown is not None and len(cases) > shown:
                lines.append(f"    … and {len(cases) - shown} more")
    return "\n".join(lines)


def inspect_file(root: Path, name: str) -> Seen:
    """Decode an image; raises as ``read_image`` does. Called in the worker processes."""
    path = place_of(root, name)
    data = read_file(path)
    image = decode_image(data, path)
    pages = cv2.imcount(str(path)) if path.suffix.lower() in (".tif", ".tiff") else 1
    return (image.shape[0], image.shape[1]), hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest(), pages


def _spans(report: Report) -> Sequence[tuple[str, tuple[int, ...]]]:
    return ("width", report.widths), ("height", report.heights)


def _look(annotations: Annotations, root: Path, report: Report, workers: int) -> dict[int, Seen]:
    """What training could read, by row; the rest goes into the report."""
    row_of = {name: row for row, name in enumerate(annotations.file_names)}
    failed: dict[int, tuple[str, str]] = {}
    seen: dict[int, Seen] = {}
    task = functools.partial(inspect_file, root)
    for outcome in _outcomes(task, list(row_of), workers):
        row = row_of[outcome.item]
        if outcome.result is None:
            reason = MISSING if str(outcome.failure).startswith("FileNotFoundError") else UNREADABLE
            failed[row] = reason, str(outcome.failure).partition(": ")[2] + (_similar(root / outcome.item))
            continue
        wrong = wrong_size(annotations, row, outcome.result[0])
        if wrong:
            failed[row] = WRONG_SIZE, f"image {root / outcome.item}: {wrong}"
        else:
            seen[row] = outcome.result
    for _, (reason, line) in sorted(failed.items()):
        report.problems.setdefault(reason, []).append(line)
    report.readable = len(seen)
    return dict(sorted(seen.items()))


def _outcomes(task: functools.partial[Seen], names: list[str], workers: int) -> Iterator[Outcome[Seen]]:
    with Progress(Path(os.devnull), "check") as progress:
        progress.begin(len(names))
        if workers == 0:
            for name in names:
                yield _one(task, name)
                progress.advance()
        else:
            with contextlib.closing(run_tasks(task, names, workers=workers, timeout=TIMEOUT)) as outcomes:
                for outcome in outcomes:
                    if outcome is None:
                        progress.show()
                    else:
                        yield outcome
                        progress.advance()
        progress.end()


def _one(task: functools.partial[Seen], name: str) -> Outcome[Seen]:
    try:
        return Outcome(name, task(name), None)
    except (ValueError, FileNotFoundError) as error:
        return Outcome(name, None, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _similar(path: Path) -> str:
    """A hint where a missing file is there with another case or another ending."""
    if path.exists() or not path.parent.is_dir():
        return ""
    wanted = Path(path.name.lower()).stem
    near = [name for name in sorted(os.listdir(path.parent)) if Path(name.lower()).stem == wanted]
    return f"; there is {near[0]}" if near else ""


def _count(annotations: Annotations, rows: Sequence[int], report: Report) -> None:
    """Boxes by class and size, of readable images."""
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))  # [M]
    readable = np.zeros(len(annotations), dtype=bool)
    readable[list(rows)] = True
    target = readable[image] & ~annotations.crowd
    report.boxes, report.crowds = int(target.sum()), int((readable[image] & annotations.crowd).sum())
    report.without_boxes = len(rows) - len(np.unique(image[target]))
    width, height = (annotations.boxes[:, 2:] - annotations.boxes[:, :2]).T
    size = np.digitize(width * height, [32**2, 96**2])  # [M] 0, 1, 2
    for label, name in enumerate(annotations.class_names):
        mine = target & (annotations.labels == label)
        small, medium, large = np.bincount(size[mine], minlength=3).tolist()
        images = len(np.unique(image[mine]))
        row: dict[str, Any] = {"boxes": int(mine.sum()), "images": images}
        report.classes[name] = row | {"small": small, "medium": medium, "large": large}


def _note(annotations: Annotations, root: Path, seen: dict[int, Seen], report: Report) -> None:
    names = annotations.file_names
    first: dict[str, int] = {}
    for row, (_, digest, pages) in seen.items():
        if pages > 1:
            report.notes.setdefault(PAGES, []).append(f"{names[row]}: {pages} pages")
        if first.setdefault(digest, row) != row:
            report.notes.setdefault("the same file twice", []).append(
                f"{names[row]} is a copy of {names[first[digest]]}"
            )
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    rows = np.column_stack([image, annotations.labels, annotations.boxes]) if len(image) else np.zeros((0, 6))
    _, places, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    for place in np.sort(places[counts > 1]).tolist():
        box = [round(value, 2) for value in annotations.boxes[place].tolist()]
        line = f"{names[int(image[place])]}, {annotations.class_names[annotations.labels[place]]}, x0 y0 x1 y1 {box}"
        report.notes.setdefault("the same box twice", []).append(line)
    for name, count in report.classes.items():
        if not count["boxes"]:
            report.notes.setdefault("class without a box", []).append(name)
    if report.format == "yolo":
        without, lonely = unpaired([root / name for name in names])
        report.notes |= {"image without a label file": [str(path) for path in without]} if without else {}
        report.notes |= {"label file without an image": [str(path) for path in lonely]} if lonely else {}
    whole = report.format == "voc" and Path(report.path).is_dir() and not has_lists(Path(report.path))
    with contextlib.suppress(ValueError, FileNotFoundError):
        listed = {name_below(root, name) for name in names}
        extra = [name for name in list_images(root) if name not in listed] if len(names) else []
        if extra and (report.format == "coco" or whole):
            report.notes["image that the labels do not list"] = extra
