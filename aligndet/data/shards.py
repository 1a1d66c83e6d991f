"""Many machines, one proposal file: each searches a part of the images, `aligndet merge-proposals` joins them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aligndet.data.journal import changes
from aligndet.data.proposals import ProposalFile, open_proposals, write_proposals


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (1 .. ``of``) of a list of images.

    Raises:
        ValueError: a number out of range.
    """

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"--shard: want i/n with 1 <= i <= n, got {self.number}/{self.of}")

    def select(self, names: Sequence[str]) -> list[str]:
        """The names of this part: a contiguous stretch, so that joining the parts restores the order."""
        return list(names[len(names) * (self.number - 1) // self.of : len(names) * self.number // self.of])

    def parameters(self, names: Sequence[str]) -> dict[str, Any]:
        """What the file of this part says of it; ``names`` are all images."""
        return {"shard": {"number": self.number, "of": self.of, "images": len(names)}}


def parse_shard(text: str) -> Shard:
    """ "2/8" as a shard; ValueError where it is none."""
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal()):
        raise ValueError(f"--shard: want i/n, for example 2/8, got {text!r}")
    return Shard(int(number), int(of))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet merge-proposals``."""
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="files of `aligndet propose --shard i/n`, all n")
    parser.add_argument("--out", required=True, metavar="FILE", help="proposal file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(args: argparse.Namespace) -> int:
    """Join the files that the options name; returns the exit code."""
    merge_proposals(args.shards, args.out, overwrite=args.overwrite)
    merged = open_proposals(args.out)
    print(f"{args.out}: {len(merged.boxes)} boxes in {len(merged)} images, {len(merged.failures)} skipped")
    return 0


def merge_proposals(shards: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> None:
    """Join the files of all shards of one list of images: the same bytes as one run over the list.

    Args:
        shards: all n files, in any order.
        out: file to write; its folder is made.
        overwrite: replace ``out``.

    Raises:
        FileNotFoundError: a shard is not there.
        ValueError: a shard is missing, there twice, of another list or with other settings; ``out`` exists.
    """
    out = Path(out)
    check_new(out, overwrite)
    files = sorted((_open_shard(path) for path in shards), key=lambda file: int(file.parameters["shard"]["number"]))
    _check_complete(files)
    parameters = {key: value for key, value in files[0].parameters.items() if key != "shard"}
    names = [name for file in files for name in file.names]
    boxes = [file.boxes_of(row) for file in files for row in range(len(file))]
    failures = {name: reason for file in files for name, reason in file.failures.items()}
    sizes = np.concatenate([file.sizes for file in files])
    write_proposals(out, names, sizes, boxes, parameters, failures=failures)


def check_new(out: Path, overwrite: bool) -> None:
    """Make the folder of ``out``; ValueError where it cannot be made or ``out`` is in the way."""
    if out.is_dir():
        raise ValueError(f"{out}: want a file name, got a folder")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists; take another name or add --overwrite")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: cannot make its folder ({error.strerror})") from None


def _open_shard(path: str | Path) -> ProposalFile:
    file = open_proposals(path)
    if "shard" not in file.parameters:
        raise ValueError(f"{path}: want a file of `aligndet propose --shard i/n`, got a whole one")
    if file.labels is not None:
        raise ValueError(f"{path}: has pseudo-classes, which mean other things in each shard; merge, then cluster")
    return file


def _check_complete(files: Sequence[ProposalFile]) -> None:
    first = files[0]
    of, images = first.parameters["shard"]["of"], first.parameters["shard"]["images"]
    for file in files:
        shard = file.parameters["shard"]
        changed = changes(first.parameters | {"shard": 0}, file.parameters | {"shard": 0})
        changed = changed or changes({"of": of, "images": images}, {key: shard[key] for key in ("of", "images")})
        if changed:
            raise ValueError(f"{file.path}: made otherwise than {first.path} ({changed})")
    numbers = [file.parameters["shard"]["number"] for file in files]
    absent = [str(number) for number in range(1, of + 1) if number not in numbers]
    if absent or len(numbers) != of:
        what = f"missing {', '.join(absent)}" if absent else f"one of them is there twice: {numbers}"
        raise ValueError(f"want each of the {of} shards once; {what}")
    names = {name for file in files for name in (*file.names, *file.failures)}
    if len(names) != images:
        raise ValueError(f"shards made from different lists: want {images} images in all, got {len(names)}")
