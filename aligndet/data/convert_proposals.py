"""``aligndet convert-proposals``: boxes of other programs become a proposal file, or a file for the reference code."""

from __future__ import annotations

import argparse
import json
import os
import random
from operator import itemgetter
from pathlib import Path

from aligndet.data.foreign import FORMATS, Foreign, read_foreign
from aligndet.data.proposals import write_proposals
from aligndet.data.shards import check_new

TARGETS = ("npz", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet convert-proposals``."""
    parser.add_argument("--from", dest="source_format", required=True, choices=FORMATS, help="what IN is")
    parser.add_argument("--to", dest="target_format", required=True, choices=TARGETS, help="what OUT becomes")
    parser.add_argument("source", metavar="IN")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--images", metavar="DIR", help="image folder; for soco, and where IN has no sizes")
    parser.add_argument("--annotations", metavar="COCO.json", help="the file that the image ids of results are from")
    parser.add_argument("--min-score", type=float, metavar="S", help="results: only those of this score or more")
    parser.add_argument("--limit", type=int, metavar="N", help="results: at most N per image, best scores first")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(args: argparse.Namespace) -> int:
    """Convert the file that the options name; returns the exit code."""
    out = Path(args.out)
    check_new(out, args.overwrite)
    foreign = read_foreign(
        args.source,
        args.source_format,
        images=args.images,
        annotations=args.annotations,
        min_score=args.min_score,
        limit=args.limit,
    )
    try:
        (write_npz if args.target_format == "npz" else write_reference)(foreign, out)
    except OSError as error:
        raise ValueError(f"{out}: cannot write ({error.strerror})") from None
    found = foreign.found
    classes = f", {len(found.class_names)} pseudo-classes" if foreign.clustered else ""
    print(f"{out}: {len(found.boxes)} boxes in {len(found)} images{classes}")
    for reason, lines in found.report.items():
        print(f"{len(lines)} boxes left out, {reason}; the first: {lines[0]}")
    return 0


def write_npz(foreign: Foreign, path: Path) -> None:
    """Write a proposal file. Errors of ``write_proposals``."""
    found, parameters, labels = foreign.found, dict(foreign.parameters), None
    if foreign.clustered:
        parameters["clusters"], labels = len(found.class_names), found.labels
    ends = zip(found.offsets[:-1], found.offsets[1:], strict=True)
    boxes = [found.boxes[start:end] for start, end in ends]
    write_proposals(path, found.file_names, found.sizes, boxes, parameters, failures=foreign.failures, labels=labels)


def write_reference(foreign: Foreign, path: Path) -> None:
    """Write the COCO json that AlignDet's code reads, in one step: a crash leaves the old file or none.

    One category, selective_search, or cluster_1 .. cluster_K where the boxes have pseudo-classes; image ids are those
    of the source, 1 .. n where it has none. Images that could not be searched are not in it. The boxes of an image are
    in an order drawn once: two of the authors' detectors see the first 50 only, which by area would be the large ones.
    """
    content = foreign.found.to_coco()
    random.Random(0).shuffle(content["annotations"])
    content["annotations"].sort(key=itemgetter("image_id"))  # keeps that order within an image
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
