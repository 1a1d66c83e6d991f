"""``aligndet plot``: losses and average precision of runs over their steps, as a PNG."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from aligndet.engine.log import read_log
from aligndet.plots import figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet plot``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or log.jsonl files; one line each")
    parser.add_argument("--out", required=True, help="PNG to write")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="default: all, then AP where it was measured")


def run(args: argparse.Namespace) -> int:
    """Draw one panel per loss and, where runs have validations, one of AP; returns the exit code.

    Raises:
        FileNotFoundError: a run has no log.
        ValueError: matplotlib is missing, ``--out`` is no .png, no run has a loss yet, or ``--losses`` names one that
            no run has.
    """
    figures.require()
    if Path(args.out).suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: want a name that ends in .png")
    logs = {folder: _records(Path(folder)) for folder in args.runs}
    records = [record for log in logs.values() for record in log]
    known = dict.fromkeys(name for record in records for name in record.get("losses", {}))
    if not known:
        raise ValueError(f"{', '.join(logs)}: want logged losses, got none; no step has been logged yet")
    for name in args.losses or []:
        if name not in known:
            raise ValueError(f"--losses: want some of {', '.join(known)}, got {name}")
    measured = any("metrics" in record for record in records)
    curves = {title: [_with_precision(record) for record in log] for title, log in _titles(logs).items()}
    figures.curves_figure(args.out, curves, args.losses or list(known), ("AP",) if measured else ())
    print(f"{args.out}: {len(logs)} runs, {', '.join(args.losses or known)}{', AP' if measured else ''}")
    return 0


def _records(path: Path) -> list[dict[str, Any]]:
    """The log of a run; behind it the metrics of its end, which are in ``metrics.json`` alone."""
    records, result = read_log(_log_of(path)), path / "metrics.json"
    if path.is_dir() and result.is_file():
        last = max((record["step"] for record in records if "losses" in record), default=0)
        records.append({"step": last, "metrics": json.loads(result.read_text())})
    return records


def _log_of(path: Path) -> Path:
    log = path / "log.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise FileNotFoundError(f"run {path}: no {'log.jsonl in it' if path.is_dir() else 'such file or folder'}")
    return log


def _titles(logs: dict[str, Any]) -> dict[str, Any]:
    """By the last part of each path, as long as those differ."""
    short = [Path(name).name for name in logs]
    return dict(zip(short, logs.values(), strict=True)) if len(set(short)) == len(short) else logs


def _with_precision(record: dict[str, Any]) -> dict[str, Any]:
    """A validation as a record of the figure: AP in per cent."""
    precision = record.get("metrics", {}).get("AP")
    return record if precision is None else {"step": record["step"], "losses": {"AP": 100 * precision}}
