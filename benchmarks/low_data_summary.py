"""One table of all results of ``low_data.py``, and what may be claimed of them: gains, means over detectors, steps.

Reads benchmarks/results/low_data_<detector>_<set>.json and prints; it writes nothing. A gain is the mean over folds of
AlignDet's average precision less that of the backbone alone, both tuned alike. Means are over detectors; where one has
been measured on several sets there is a mean with each of them.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
METRICS = ("AP", "AP50", "AP75")
SIDES = ("backbone only", "AlignDet")
SHORT_AIM, LONG_AIM = 5.0, 2.3  # AP; the latter is the paper's mean at 1 to 10 % of the labels


def main_rows(path: Path) -> list[dict]:
    """The rows of study "main" of one file, with what was measured; none where it has not run."""
    record = json.loads(path.read_text())
    rows = record["studies"].get("main", {}).get("rows", [])
    return [row | {"detector": record["detector"], "set": record["set"]} for row in rows]


def figures(results: list[dict]) -> str:
    """``mean ± standard deviation`` over folds of each metric."""
    columns = [[result[name] for result in results] for name in METRICS]
    return " / ".join(f"{statistics.fmean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns)


def gain(row: dict) -> float:
    """Points of average precision."""
    after, before = (statistics.fmean(r["AP"] for r in row["results"][side]) for side in reversed(SIDES))
    return after - before


def choices(rows: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Ways to take one set of each detector: the sets of those that have several, and the rows."""
    sets = sorted({(row["detector"], row["set"]) for row in rows})
    several = [[pair for pair in sets if pair[0] == name] for name in sorted({name for name, _ in sets})]
    for chosen in itertools.product(*several):
        named = [pair for pair, others in zip(chosen, several, strict=True) if len(others) > 1]
        label = "".join(f", {name} on {where}" for name, where in named)
        yield label, [row for row in rows if (row["detector"], row["set"]) in chosen]


def gains_at(rows: list[dict], short: bool) -> list[list[float]]:
    """By detector, of its rows with the least, or the most, steps."""
    found = []
    for name in sorted({row["detector"] for row in rows}):
        own = [row for row in rows if row["detector"] == name]
        steps = (min if short else max)(row["setting"]["steps"] for row in own)
        found.append([gain(row) for row in own if row["setting"]["steps"] == steps])
    return found


def verdict(title: str, by_detector: list[list[float]], aim: float) -> str:
    """Whether every detector gains, and enough on average."""
    gains = [value for own in by_detector for value in own]
    mean = statistics.fmean(statistics.fmean(own) for own in by_detector)
    word = "reached" if mean >= aim else "NOT reached"
    everyone = "every row gains" if min(gains) > 0 else "NOT every row gains"
    return (
        f"{title}: {everyone} ({min(gains):+.1f} to {max(gains):+.1f} AP); "
        f"mean over {len(by_detector)} detectors {mean:+.1f}, aim {aim:+.1f}: {word}"
    )


def other_studies(path: Path) -> list[str]:
    """The rows of all other studies of one file: each way of pre-training, over its seeds and folds."""
    record, lines = json.loads(path.read_text()), []
    for study, found in record["studies"].items():
        for row in found["rows"] if study != "main" else []:
            setting = row["setting"]
            start = f"| {study} | {record['set']}, {setting['labelled']} | {setting['steps']} | `{record['detector']}` "
            lines += [f"{start}| {way} | {figures(runs)} | {len(runs)} |" for way, runs in row["results"].items()]
    return lines


def main() -> None:
    files = sorted(RESULTS.glob("low_data_*.json"))
    rows = [row for path in files for row in main_rows(path)]
    print("| set, labels | steps | detector | backbone only: AP / AP50 / AP75 | AlignDet | AP gain | passes at step |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        setting, (before, after) = row["setting"], (figures(row["results"][side]) for side in SIDES)
        start = f"| {row['set']}, {setting['labelled']} | {setting['steps']} | `{row['detector']}` | {before} "
        print(f"{start}| **{after}** | {gain(row):+.1f} | {row['passes_at_step'] or 'never'} |")
    for where, chosen in choices(rows):
        print(verdict(f"shortest schedule{where}", gains_at(chosen, True), SHORT_AIM))
        print(verdict(f"longest schedule{where}", gains_at(chosen, False), LONG_AIM))
    early = [row for row in rows if (row["passes_at_step"] or 10**9) <= row["setting"]["steps"] / 2]
    print(f"the other's final AP is reached in half the steps or less in {len(early)} of {len(rows)} rows")
    if lines := [line for path in files for line in other_studies(path)]:
        print("\n| study | set, labels | steps | detector | pre-training | AP / AP50 / AP75 | runs |")
        print("|---|---|---|---|---|---|---|")
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
