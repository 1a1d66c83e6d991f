"""Few labels, with and without AlignDet: same labels, steps and seeds, same tuning; through the commands of the README.

    python benchmarks/low_data.py --data FOLDER --backbone mobilenet_v2.pth --detector fcos [--study main task peers]

FOLDER/<set>/annotations/instances_{train,val}.json with images beside it. Each cell is a command as a user would type
it, in a folder of its own under ``runs/low_data``: an interrupted benchmark continues where it was. Learning rate, then
weight decay, are chosen for each way of pre-training on fold 0, which is not reported. Studies:

    main    the backbone alone against AlignDet: average precision, steps to the other's final precision, time
    length  main with each row tuned at its own labels and steps; else all are tuned as the first
    task    Table 10 of the paper: contrast alone, boxes alone, both; several seeds of pre-training
    contrast what of the contrast's settings changes its worth beside the boxes; all fine-tuned as tuned for AlignDet
    peers   our defaults against the reference's mistakes (``method.reference_compatible``) and against SoCo

Writes benchmarks/results/low_data_<detector>_<set>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from environment import environment
from low_data_settings import RATES, SETS, STUDIES, WAYS, Setting

from aligndet.engine.log import read_log
from aligndet.engine.precision import PRECISIONS, slow_precision

ROOT = Path(__file__).parents[1]
METRICS = ("AP", "AP50", "AP75")
TUNING_FOLD = 0
DECAYS = (1e-4, 5e-2)
PARTS, LEAST = 4, 50  # validations of a run, the last at its end; steps between two of them at least


class Bench:
    """The cells of one detector on one set; ``jobs`` of them at a time, one thread each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.detector, self.set, self.jobs = args.detector, SETS[args.set], args.jobs
        self.settings = args.settings or self.set.settings
        self.runs = args.runs / args.set
        self.own = self.runs / args.detector
        self.precision = f"optim.amp={args.amp}"
        self.backbone = f"model.backbone_weights={args.backbone}"
        folder = args.data / (self.set.folder or args.set)
        self.train = folder / "annotations/instances_train.json"
        self.val = folder / "annotations/instances_val.json"
        self.images = next(path for path in (folder / "train", folder / "JPEGImages") if path.is_dir())
        whose: tuple[object, ...] = ("--annotations", self.train)
        if self.set.unlabelled:
            self.images, whose = self.runs / "images", ()
            link(self.images, [args.data / name for name in self.set.unlabelled])
        self.proposals = args.proposals or self.runs / "proposals.npz"
        if args.proposals is None:
            words = (*whose, "--images", self.images, "--out", self.proposals, *self.set.propose)
            cell(self.runs / "propose", self.proposals, "-m", "aligndet", "propose", *words)
        if self.detector == "detr" and args.proposals is None:
            clustered = self.runs / "clustered.npz"
            words = ("--proposals", self.proposals, "--images", self.images, "--weights", args.backbone)
            size = ("--short-side", "256", "--long-side", "384", "--clusters", "64", "--backbone", "mobilenet_v2")
            cell(self.runs / "cluster", clustered, "-m", "aligndet", "cluster", *words, *size, "--out", clustered)
            self.proposals = clustered

    def pretrain(self, way: str, seed: int) -> Path:
        """The weights of a way of pre-training."""
        run = self.own / f"pretrain-{folder_of(way)}-{seed}"
        cfg = ("train.py", "--cfg", f"configs/pretrain/{self.detector}_mobilenet_v2.yaml", f"run={run}")
        paths = (f"data.images={self.images}", f"data.proposals={self.proposals}", self.backbone, "data.workers=0")
        own = (*self.set.pretrain, *(WAYS[way].pretrain or ()))
        cell(run, run / "pretrained.pt", *cfg, *paths, f"seed={seed}", "threads=1", self.precision, *own)
        return run / "pretrained.pt"

    def finetune(self, way: str, setting: Setting, rate: float, decay: float, fold: int, seed: int = 0) -> dict:
        """Metrics in per cent, at each validation; ``seed`` of the pre-training."""
        start = self.backbone if WAYS[way].pretrain is None else f"weights={self.pretrain(way, seed)}"
        name = f"{setting.labelled}-{setting.steps}-{folder_of(way)}{seed}-lr{rate:g}-wd{decay:g}-fold{fold}"
        run = self.own / name
        cfg = ("train.py", "--cfg", f"configs/finetune/{self.detector}_mobilenet_v2_lowdata.yaml", f"run={run}")
        data = (f"data.train={self.train}", f"data.val={self.val}", f"data.labelled={setting.labelled}", start)
        varied = (f"seed={fold}", f"data.fold={fold}", f"optim.lr={rate}", f"optim.weight_decay={decay}")
        watched = (f"eval_every={interval(setting.steps)}",) if fold != TUNING_FOLD else ()
        length = (f"optim.steps={setting.steps}", *watched, "data.workers=0", "threads=1", self.precision)
        own = (*self.set.finetune, *WAYS[way].finetune)
        cell(run, run / "metrics.json", *cfg, *data, *varied, *length, *own)
        for path in (*run.glob("checkpoint*"), *run.glob("*.pt")):  # only the metrics are wanted
            path.unlink(missing_ok=True)
        final = json.loads((run / "metrics.json").read_text())
        curve = [100 * record["metrics"]["AP"] for record in read_log(run / "log.jsonl") if "metrics" in record]
        found = {name: 100 * final[name] for name in METRICS} | {"curve": [*curve, 100 * final["AP"]]}
        if "masks" in final:
            found["mask AP"] = 100 * final["masks"]["AP"]
        return found

    def parallel(self, work: Callable[..., object], items: Iterable[Sequence[object]]) -> list:
        """``work`` of each item, in order."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(lambda item: work(*item), items))

    def tune(self, ways: Sequence[str], setting: Setting) -> dict[str, dict]:
        """For each way the learning rate, then the weight decay, that does best on the fold that is not reported."""
        rates = RATES.get(self.detector, (5e-4, 1e-3, 3e-3, 6e-3))
        self.parallel(self.pretrain, [(way, 0) for way in ways if WAYS[way].pretrain is not None])
        cells = [(way, setting, rate, DECAYS[0], TUNING_FOLD) for way in ways for rate in rates]
        found = dict(zip(cells, self.parallel(self.finetune, cells), strict=True))
        chosen = {}
        best = {
            way: max(rates, key=lambda r, w=way: found[(w, setting, r, DECAYS[0], TUNING_FOLD)]["AP"]) for way in ways
        }
        more = [(way, setting, best[way], decay, TUNING_FOLD) for way in ways for decay in DECAYS[1:]]
        found |= dict(zip(more, self.parallel(self.finetune, more), strict=True))
        for way in ways:
            tried = {f"lr {cell[2]:g}, wd {cell[3]:g}": item["AP"] for cell, item in found.items() if cell[0] == way}
            decay = max(DECAYS, key=lambda d, w=way: found[(w, setting, best[w], d, TUNING_FOLD)]["AP"])
            chosen[way] = {"lr": best[way], "weight_decay": decay, "tried": tried}
        return chosen


def main_study(bench: Bench, folds: Sequence[int], own_length: bool) -> dict:
    """Both sides in every setting, each tuned there or, all of them, in the first."""
    ways, rows = STUDIES["main"], []
    tuned = {setting: bench.tune(ways, setting if own_length else bench.settings[0]) for setting in bench.settings}
    cells = [
        (way, setting, tuned[setting][way]["lr"], tuned[setting][way]["weight_decay"], fold)
        for setting in bench.settings
        for way in ways
        for fold in folds
    ]
    found = dict(zip(cells, bench.parallel(bench.finetune, cells), strict=True))
    for setting in bench.settings:
        results = {way: [found[c] for c in cells if c[:2] == (way, setting)] for way in ways}
        row = {"setting": asdict(setting), "tuned": tuned[setting], "results": results}
        rows.append(row | {"passes_at_step": passes(results, setting.steps)})
    print(table(rows), flush=True)
    return {"rows": rows, "seconds": seconds(bench)}


def task_study(bench: Bench, folds: Sequence[int], seeds: Sequence[int]) -> dict:
    """Contrast, boxes, both, after several pre-trainings each; everything fine-tuned as tuned for it."""
    ways = STUDIES["task"]
    tuned = bench.tune(ways, bench.settings[0])
    bench.parallel(bench.pretrain, [(way, seed) for way in ways for seed in seeds])
    cells = [
        (way, setting, tuned[way]["lr"], tuned[way]["weight_decay"], fold, seed)
        for setting in bench.settings
        for way in ways
        for seed in seeds
        for fold in folds
    ]
    found = dict(zip(cells, bench.parallel(bench.finetune, cells), strict=True))
    rows = []
    for setting in bench.settings:
        results = {way: [found[cell] for cell in cells if cell[:2] == (way, setting)] for way in ways}
        rows.append({"setting": asdict(setting), "results": results})
    print(table(rows), flush=True)
    return {"tuned": tuned, "seeds": list(seeds), "rows": rows}


def contrast_study(bench: Bench, folds: Sequence[int]) -> dict:
    """Settings of the contrast one by one, one seed of pre-training."""
    chosen, rows = bench.tune(["AlignDet"], bench.settings[0])["AlignDet"], []
    for setting in bench.settings:
        results = {}
        for way in STUDIES["contrast"]:  # one after the other, so that what is finished can be read in the log
            bench.pretrain(way, 0)
            cells = [(way, setting, chosen["lr"], chosen["weight_decay"], fold) for fold in folds]
            results[way] = bench.parallel(bench.finetune, cells)
            print(way, *(f"{result['AP']:.1f}" for result in results[way]), flush=True)
        rows.append({"setting": asdict(setting), "results": results})
    print(table(rows), flush=True)
    return {"tuned": {"all": chosen}, "rows": rows}


def peers_study(bench: Bench, folds: Sequence[int]) -> dict:
    """Our defaults, the reference's mistakes, SoCo."""
    ways = STUDIES["peers"]
    tuned = bench.tune(ways, bench.settings[0])
    cells = [
        (way, setting, tuned[way]["lr"], tuned[way]["weight_decay"], fold)
        for setting in bench.settings
        for way in ways
        for fold in folds
    ]
    found = dict(zip(cells, bench.parallel(bench.finetune, cells), strict=True))
    rows = []
    for setting in bench.settings:
        results = {way: [found[cell] for cell in cells if cell[:2] == (way, setting)] for way in ways}
        rows.append({"setting": asdict(setting), "results": results})
    print(table(rows), flush=True)
    return {"tuned": tuned, "rows": rows}


def passes(results: dict[str, list[dict]], steps: int) -> int | None:
    """The first validation, in steps, at which AlignDet's mean AP is the other side's final one; None: at none."""
    goal = statistics.fmean(item["AP"] for item in results["backbone only"])
    curves = zip(*(item["curve"] for item in results["AlignDet"]), strict=True)
    for part, values in enumerate(curves, start=1):
        if statistics.fmean(values) >= goal:
            return interval(steps) * part
    return None


def folder_of(way: str) -> str:
    """The name of a way without spaces and commas."""
    return way.replace(",", "").replace(" ", "_")


def interval(steps: int) -> int:
    """Steps from one validation to the next."""
    return max(LEAST, steps // PARTS)


def seconds(bench: Bench) -> dict[str, float]:
    """Seconds of processor time of each stage (in older runs: of the wall's); fine-tuning: longest setting."""
    longest = max(setting.steps for setting in bench.settings)
    notes = [*bench.own.glob("*/command.json"), *bench.runs.glob("*/command.json")]
    read = {path.parent.name: json.loads(path.read_text()) for path in notes}
    taken = {name: note.get("processor_seconds", note["seconds"]) for name, note in read.items()}
    stages = {name: taken[name] for name in ("propose", "cluster", "pretrain-AlignDet-0") if name in taken}
    runs = [value for name, value in taken.items() if f"-{longest}-" in name]
    return stages | {f"finetune {longest} steps": statistics.median(runs)}


def link(folder: Path, sources: Sequence[Path]) -> None:
    """Links in ``folder`` to the images of all ``sources``."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in (image for source in sources for image in source.iterdir()):
        if not (folder / image.name).is_symlink():
            (folder / image.name).symlink_to(image.resolve())


def cell(folder: Path, result: Path, *words: object) -> None:
    """Run python with ``words`` unless ``result`` is there; output, command and times are noted in ``folder``.

    Beside the wall's seconds there are those of the processor, which other work on the machine does not stretch.

    Raises:
        SystemExit: the result was made by another command: its figures would be taken for those of this one.
    """
    text = [str(word) for word in words]
    note = folder / "command.json"
    if result.exists():
        if not note.exists():
            raise SystemExit(f"{result}: by a run that was not seen to end; delete it, and the run writes it again")
        if json.loads(note.read_text())["words"] != text:
            raise SystemExit(f"{folder}: made by another command; delete it or take another --runs")
        return
    print("$ python", *text, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen([sys.executable, *text], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{folder}/output.txt: exit code {process.returncode} of {shlex.join(text)}")
    times = {"seconds": time.perf_counter() - began, "processor_seconds": used.ru_utime + used.ru_stime}
    note.write_text(json.dumps({"words": text} | times))


def table(rows: list[dict]) -> str:
    """Mean and standard deviation of each way in each setting."""
    lines = ["| labels | steps | start | AP | AP50 | AP75 |", "|---|---|---|---|---|---|"]
    for row in rows:
        setting = row["setting"]
        for way, results in row["results"].items():
            cells = []
            for name in METRICS:
                values = [result[name] for result in results]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}")
            lines.append(f"| {setting['labelled']} | {setting['steps']} | {way} | " + " | ".join(cells) + " |")
        if "passes_at_step" in row:
            lines.append(f"AlignDet passes the final AP of the backbone alone at step {row['passes_at_step']}")
    return "\n".join(lines)


def setting_of(text: str) -> Setting:
    """``20x300``: 20 labelled images, 300 steps."""
    labelled, _, steps = text.partition("x")
    return Setting(int(labelled), int(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--backbone", required=True, type=Path, help="MobileNetV2 weights in torchvision's layout")
    parser.add_argument("--detector", required=True, choices=["fcos", "retinanet", "faster_rcnn", "mask_rcnn", "detr"])
    parser.add_argument("--set", default="bccd", choices=SETS)
    parser.add_argument("--study", nargs="+", default=["main"], choices=STUDIES)
    parser.add_argument(
        "--settings",
        type=setting_of,
        nargs="+",
        metavar="LABELSxSTEPS",
        help="rows, the first of which is tuned (study length: all); default: those of the set",
    )
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of pre-training, in study task")
    parser.add_argument("--proposals", type=Path, help="a proposal file; default: made by aligndet propose")
    parser.add_argument(
        "--amp",
        choices=PRECISIONS,
        default="bf16",
        help="precision of every training: bf16 takes a third less time than off where the processor has it",
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/low_data")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    if args.set == "bccd_white" and args.detector != "detr":
        parser.error(f"--set: bccd_white is for detr, got {args.detector}")
    if args.detector == "mask_rcnn" and args.set not in ("coco_by_masks", "coco_people"):
        parser.error(f"--set: {args.set} has no masks for mask_rcnn; take coco_by_masks or coco_people")
    if slow := slow_precision(torch.device("cpu"), args.amp):
        parser.error(f"--amp {args.amp}: {slow.partition(';')[0]}; take --amp off")
    bench = Bench(args)
    path = args.results / f"low_data_{args.detector}_{args.set}.json"
    record = json.loads(path.read_text()) if path.exists() else {"studies": {}}
    for study in args.study:
        if study in ("main", "length"):
            found = main_study(bench, args.folds, study == "length")
        elif study == "task":
            found = task_study(bench, args.folds, args.seeds)
        elif study == "contrast":
            found = contrast_study(bench, args.folds)
        else:
            found = peers_study(bench, args.folds)
        record["studies"][study] = found | {"folds": args.folds, "amp": args.amp, "environment": environment()}
        record |= {"detector": args.detector, "set": args.set, "configuration": asdict(SETS[args.set])}
        args.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
