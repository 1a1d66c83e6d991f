"""``aligndet propose``: selective search over a folder of images, on all cores, safe to interrupt at any moment.

Results go to a journal beside the output (``FILE.partial``) as they come; the same command again continues from there.
When all images are done the proposal file is written in one step and the journal removed. ``FILE.jsonl`` is the log.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from aligndet.data.folder import list_images, name_below
from aligndet.data.formats import images_of, load_annotations
from aligndet.data.journal import Journal, changes
from aligndet.data.progress import Progress
from aligndet.data.proposals import library_versions, open_proposals, write_proposals
from aligndet.data.recall import evaluate_proposals, table
from aligndet.data.report import write_report
from aligndet.data.selective_search import MODES, check_filter, check_search, filter_proposals, selective_search
from aligndet.data.shards import Shard, parse_shard
from aligndet.data.transforms import read_image
from aligndet.data.workers import available_cores, run_tasks

# (height, width) px and float32 [m, 4]
Found = tuple[tuple[int, int], np.ndarray]


@dataclass(frozen=True)
class Settings:
    """All that the boxes of an image depend on; see ``selective_search`` and ``filter_proposals``.

    Raises:
        ValueError: a setting out of range.
    """

    mode: str = "soco"
    size: int | None = 640  # px, longest side searched; None: full resolution
    k: int | None = None  # scale of the first segmentation; None: the mode's own
    sigma: float | None = None  # px; None: the mode's own
    quirks: bool = False  # of SoCo's code
    min_size: float | None = None  # px; None: 32, less for images under 640 px
    max_aspect: float = 3.0
    max_ratio: float = 0.8
    nms: float = 0.5
    limit: int | None = None  # boxes per image; None: all

    def __post_init__(self) -> None:
        check_search(mode=self.mode, size=self.size, k=self.k, sigma=self.sigma, quirks=self.quirks)
        check_filter(
            min_size=self.min_size,
            max_aspect=self.max_aspect,
            max_ratio=self.max_ratio,
            nms=self.nms,
            limit=self.limit,
        )


DEFAULTS = Settings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet propose``."""
    parser.add_argument("--images", metavar="DIR", help="folder of images, searched with its subfolders")
    parser.add_argument("--annotations", metavar="LABELS", help="only the images that they list, in any format")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="proposal file to write, for example proposals.npz"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace FILE; discard unfinished work made with other settings"
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="only part I of N of the images; `aligndet merge-proposals` joins the parts"
    )
    parser.add_argument(
        "--report", action="store_true", help="statistics and a contact sheet: FILE.report.json, FILE.report.png"
    )
    parser.add_argument(
        "--evaluate", metavar="LABELS", help="print recall of its boxes, also of a FILE that is complete already"
    )
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="FILE", help="proposal files to evaluate in the same table"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds after which an image is given up (default 300)",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--mode", choices=MODES, default=DEFAULTS.mode, help="about 1 : 1.5 : 9 : 30 in time (default soco)"
    )
    search.add_argument(
        "--size",
        type=_size,
        default=DEFAULTS.size,
        metavar="PX",
        help="shrink images to this longest side for the search, or none (default 640)",
    )
    search.add_argument(
        "--k", type=int, help="scale of the first segmentation (default: 300, OpenCV's modes 200, 150, 150)"
    )
    search.add_argument("--sigma", type=float, metavar="PX", help="blur (default: 0.9 for soco, else 0.8)")
    search.add_argument("--quirks", action="store_true", help="soco with the mistakes of SoCo's own code")
    kept = parser.add_argument_group("filter")
    kept.add_argument(
        "--min-size", type=float, metavar="PX", help="least width and height (default 32, less for images under 640 px)"
    )
    kept.add_argument("--max-aspect", type=float, default=DEFAULTS.max_aspect, help="of the sides (default 3)")
    kept.add_argument(
        "--max-ratio", type=float, default=DEFAULTS.max_ratio, help="of sqrt(area) to the image's (default 0.8)"
    )
    kept.add_argument("--nms", type=float, default=DEFAULTS.nms, help="largest IoU of two boxes (default 0.5)")
    kept.add_argument("--limit", type=int, metavar="N", help="most boxes per image, of all sizes (default: no limit)")


def run(args: argparse.Namespace) -> int:
    """Search the images that the options name and write the proposal file; returns the exit code."""
    settings = Settings(
        mode=args.mode,
        size=args.size,
        k=args.k,
        sigma=args.sigma,
        quirks=args.quirks,
        min_size=args.min_size,
        max_aspect=args.max_aspect,
        max_ratio=args.max_ratio,
        nms=args.nms,
        limit=args.limit,
    )
    if args.beside and args.evaluate is None:
        raise ValueError("--beside: want --evaluate LABELS with it")
    shard = None if args.shard is None else parse_shard(args.shard)
    truth = None if args.evaluate is None else load_annotations(args.evaluate)
    others = [open_proposals(path) for path in args.beside]
    judged = _only_judged(args)
    names, root = ((), Path()) if judged and not args.report else _images(args.annotations, args.images)
    if not judged:
        propose(
            names,
            root,
            args.out,
            settings,
            shard=shard,
            workers=args.workers,
            timeout=args.timeout,
            overwrite=args.overwrite,
        )
    if args.report:
        print("report: {}, {}".format(*write_report(open_proposals(args.out), root)))
    if truth is not None:
        print(table([evaluate_proposals(file, truth) for file in (open_proposals(args.out), *others)]))
    return 0


def search_file(root: Path, settings: Settings, name: str) -> Found:
    """Size and filtered boxes of one image file; ValueError where it cannot be read."""
    image = read_image(root / name)
    boxes = selective_search(
        image,
        mode=settings.mode,
        size=settings.size,
        k=settings.k,
        sigma=settings.sigma,
        quirks=settings.quirks,
    )
    size = image.shape[0], image.shape[1]
    boxes = filter_proposals(
        boxes,
        size,
        min_size=settings.min_size,
        max_aspect=settings.max_aspect,
        max_ratio=settings.max_ratio,
        nms=settings.nms,
        limit=settings.limit,
    )
    return size, boxes


def propose(
    images: Sequence[str],
    root: str | Path,
    out: str | Path,
    settings: Settings = DEFAULTS,
    *,
    shard: Shard | None = None,
    workers: int | None = None,
    timeout: float = 300.0,
    overwrite: bool = False,
    search: Callable[[Path, Settings, str], Found] = search_file,
) -> None:
    """Write the proposal file ``out`` for ``images``; continues what an interrupted call with the same ``out`` began.

    An image that cannot be read, takes too long or kills its worker process is recorded in the file's failures and
    left out; on continuing it is not tried again. A complete file with the same images and settings is left alone.

    Args:
        images: file names relative to ``root``; of a name that occurs twice one is kept.
        root: folder of the images.
        out: file to write; its folder is made.
        settings: of search and filter.
        shard: search only this part of ``images``.
        workers: processes; None: one per core. The file does not depend on it.
        timeout: s per image.
        overwrite: replace ``out``, and discard unfinished work that was made with other settings. Unfinished work with
            the same settings is continued all the same, so that a command with this option can be repeated too.
        search: ``(root, settings, name)`` to size and boxes; called in the workers, once per image; picklable.

    Raises:
        ValueError: no images, none of them could be searched, ``out`` exists with other images or settings or cannot be
            written, or another run is writing it.
    """
    root, out, names = Path(root).absolute(), Path(out), list(dict.fromkeys(images))
    parameters: dict[str, Any] = asdict(settings)
    if shard is not None:
        parameters |= shard.parameters(names)
        names = shard.select(names)
    workers = available_cores() if workers is None else workers
    if not names:
        raise ValueError(f"{root}: no images to search")
    if workers < 1 or not timeout > 0:
        raise ValueError(f"want at least 1 worker and a timeout above 0 s, got {workers} and {timeout:g}")
    if out.is_dir():
        raise ValueError(f"--out {out}: want a file name, got a folder")
    if out.exists() and not overwrite:
        _check_complete(out, names, parameters)
        print(f"{out}: complete already, with the same images and settings; nothing to do")
        return
    journal = _open_journal(out, root, settings, overwrite)
    task = functools.partial(search, root, settings)
    log = out.with_name(out.name + ".jsonl")
    with contextlib.closing(journal), _stop_on_sigterm(), Progress(log, "propose") as progress:
        progress.log("start", **_start_values(names, journal, settings, workers))
        _search_all(task, [name for name in names if name not in journal], journal, progress, workers, timeout)
        _finish(out, names, journal, parameters, progress)


def _size(text: str) -> int | None:
    return None if text == "none" else int(text)


def _only_judged(args: argparse.Namespace) -> bool:
    """Whether nothing is to be searched: FILE is there to be judged, and no images are named or no search made it."""
    if args.overwrite or not (args.evaluate or args.report) or not Path(args.out).is_file():
        return False
    return (args.images is None and args.annotations is None) or "source" in open_proposals(args.out).parameters


def _images(annotations: str | None, folder: str | None) -> tuple[Sequence[str], Path]:
    """File names and the folder that they are relative to."""
    if annotations is not None:
        found = load_annotations(annotations)
        root = images_of(found, folder)
        return [name_below(root, name) for name in found.file_names], root
    if folder is None:
        raise ValueError("want --images DIR, --annotations LABELS or both, got neither")
    return list_images(folder), Path(folder)


def _check_complete(out: Path, names: Sequence[str], parameters: dict[str, Any]) -> None:
    complete = open_proposals(out)
    if "source" in complete.parameters:
        raise ValueError(
            f"{out}: exists, boxes of another program ({complete.parameters['source']}); take another --out, or "
            "--overwrite to lose them; --evaluate and --report judge them as they are"
        )
    changed = changes(complete.parameters, parameters)
    if changed:
        raise ValueError(f"{out}: exists, made with other settings ({changed}); take another --out or add --overwrite")
    before = {*complete.names, *complete.failures}
    differing = before ^ set(names)
    if differing:
        raise ValueError(
            f"{out}: exists, made from other images: it has {len(before)}, wanted are {len(names)}, for example "
            f"{min(differing)!r} is only in one of the two; take another --out or add --overwrite"
        )


def _open_journal(out: Path, root: Path, settings: Settings, overwrite: bool) -> Journal:
    path = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot make its folder ({error.strerror})") from None
    versions = library_versions()
    made_with = asdict(settings) | {"images": str(root), "opencv": versions["opencv"]}
    return Journal(path, made_with, overwrite=overwrite)


def _start_values(names: Sequence[str], journal: Journal, settings: Settings, workers: int) -> dict[str, Any]:
    done = sum(name in journal for name in names)
    if done or journal.dropped:
        torn = f", {journal.dropped} bytes of an unfinished record dropped" if journal.dropped else ""
        print(f"{journal.path}: {done} of {len(names)} images are done already{torn}; continuing", file=sys.stderr)
    return {
        "images": len(names),
        "done": done,
        "workers": workers,
        "parameters": asdict(settings),
        "versions": library_versions(),
    }


def _search_all(
    task: Callable[[str], Found], names: list[str], journal: Journal, progress: Progress, workers: int, timeout: float
) -> None:
    progress.begin(len(names))
    with contextlib.closing(run_tasks(task, names, workers=workers, timeout=timeout)) as outcomes:
        for outcome in outcomes:
            if outcome is None:
                progress.show()
                continue
            if outcome.result is not None:
                size, boxes = outcome.result
                journal.add_boxes(outcome.item, size, boxes)
            else:
                reason = str(outcome.failure)
                journal.add_failure(outcome.item, reason)
                progress.warn(f"{outcome.item}: skipped: {reason}")
                progress.log("failure", image=outcome.item, reason=reason)
            progress.advance()


def _finish(out: Path, names: Sequence[str], journal: Journal, parameters: dict[str, Any], progress: Progress) -> None:
    found = [name for name in names if name in journal.found]
    failures = {name: journal.failures[name] for name in names if name in journal.failures}
    if not found:
        journal.remove()
        name, reason = next(iter(failures.items()))
        raise ValueError(f"none of the {len(names)} images could be searched; {name}: {reason}")
    sizes = [journal.found[name][:2] for name in found]
    write_proposals(out, found, sizes, journal.boxes(found), parameters, failures=failures)
    journal.remove()
    counts = [journal.found[name][2] for name in found]
    summary = {
        "images": len(found),
        "failures": len(failures),
        "boxes": sum(counts),
        "mean": round(statistics.mean(counts), 2),
        "median": statistics.median(counts),
        "min": min(counts),
        "max": max(counts),
        "without_boxes": counts.count(0),
    }
    progress.log("end", **summary, **progress.rate())
    progress.end()
    print(
        f"{out}: {sum(counts)} boxes in {len(found)} images (mean {statistics.mean(counts):.1f}, median "
        f"{statistics.median(counts):g}, {min(counts)} to {max(counts)}), {counts.count(0)} images without boxes, "
        f"{len(failures)} skipped"
    )


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: workers stopped, journal closed, the next call continues."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
