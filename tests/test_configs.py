"""Every experiment file that is shipped runs: built at a smaller width, two steps on generated scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aligndet import cli
from aligndet.data.proposals import open_proposals, write_proposals
from aligndet.data.synthetic import make_scenes
from aligndet.engine.log import read_log
from aligndet.models import DETECTORS
from tests.test_pipeline import ROOT

FILES = sorted((ROOT / "configs").rglob("*.yaml"))
# Only what does not fit a test: size of images, of batches and of the backbone, and the length of the run.
SMALLER = ("device=cpu", "threads=1", "log_every=1", "data.workers=0", "data.short_side=[64, 96]", "model.width=0.25")
SHORTER = ("optim.batch=2", "optim.epochs=null", "optim.steps=2", "optim.milestones=[]", "optim.warmup=0")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, images=5, size=96, seed=3, name="train")
    make_scenes(folder, images=3, size=96, seed=4, name="val")
    propose = ["propose", "--annotations", str(folder / "annotations/instances_train.json")]
    propose += ["--images", str(folder / "images"), "--out", str(folder / "p.npz"), "--mode", "single"]
    assert cli.main([*propose, "--workers", "1", "--min-size", "6"]) == 0
    found = open_proposals(folder / "p.npz")
    labels = np.arange(len(found.boxes), dtype=np.int32) % 11
    boxes = [found.boxes_of(row) for row in range(len(found))]
    parameters = found.parameters | {"clusters": 11}
    write_proposals(folder / "c.npz", found.names, found.sizes, boxes, parameters, labels=labels)
    return folder


def test_there_is_a_file_for_every_detector_and_stage() -> None:
    names = {path.stem for path in FILES}
    for detector in DETECTORS:
        assert (ROOT / f"configs/pretrain/{detector}_resnet50.yaml").is_file()
        assert len([name for name in names if name.startswith(f"{detector}_resnet50_")]) == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_runs_two_steps(path: Path, scenes: Path, tmp_path: Path) -> None:
    task = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith("task:"))
    labels = scenes / "annotations"
    data = {
        "pretrain": (f"data.images={scenes / 'images'}", f"data.proposals={scenes / 'c.npz'}", "data.long_side=128"),
        "finetune": (
            *(f"data.train={labels / 'instances_train.json'}", f"data.val={labels / 'instances_val.json'}"),
            *("data.labelled=4", "data.eval_short_side=96", "data.long_side=128"),
        ),
        "image_domain": (f"data.images={scenes / 'images'}", "data.short_side=64"),
    }[task]
    run = f"run={tmp_path / 'run'}"
    assert cli.train(["--cfg", str(path), run, *SMALLER, *SHORTER, *data]) == 0
    records = [record for record in read_log(tmp_path / "run/log.jsonl") if "losses" in record]
    assert [record["step"] for record in records] == [1, 2]
    result = {"pretrain": "pretrained.pt", "finetune": "model.pt", "image_domain": "backbone.pt"}[task]
    content = torch.load(tmp_path / "run" / result, weights_only=True)
    assert content["kind"] in ("pretrained", "detector", "backbone")
    if task == "finetune":
        assert (tmp_path / "run/metrics.json").is_file()


def test_pseudo_classes_are_asked_for(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = ["--cfg", str(ROOT / "configs/pretrain/detr_resnet50.yaml"), f"run={tmp_path / 'run'}", *SMALLER, *SHORTER]
    with pytest.raises(SystemExit):
        cli.train(
            [*cfg, f"data.images={scenes / 'images'}", f"data.proposals={scenes / 'p.npz'}", "data.long_side=128"]
        )
    assert "has no pseudo-classes; `aligndet cluster` makes some" in capsys.readouterr().err


@pytest.mark.parametrize("detector", list(DETECTORS))
@pytest.mark.parametrize(
    "switches",
    [
        ("method.name=soco", "method.candidates=null", "method.scope=null", "method.classification=0"),
        ("method.reference_compatible=true", "data.proposals_per_image=3"),
        ("method.symmetric=true", "method.positives=both", "method.reduction=queries", "method.classification=0.5"),
        ("method.freeze_backbone=false", "method.momentum_schedule=constant", "method.background=0.25"),
        ("method.contrast=0", "data.proposal_order=first", "data.proposals_per_image=3"),
        ("method.localization=0", "method.mistakes=[start, fallback]", "method.scope=batch", "method.candidates=100"),
    ],
    ids=lambda switches: switches[0].partition(".")[2],
)
def test_switches_of_the_paper_s_tables_run(
    detector: str, switches: tuple[str, ...], scenes: Path, tmp_path: Path
) -> None:
    if detector == "detr" and "method.background=0.25" in switches:
        switches = (*switches, "method.candidates=50")
    cfg = ["--cfg", str(ROOT / f"configs/pretrain/{detector}_mobilenet_v2.yaml"), f"run={tmp_path / 'run'}"]
    data = (f"data.images={scenes / 'images'}", f"data.proposals={scenes / 'c.npz'}", "data.long_side=128")
    assert cli.train([*cfg, *SMALLER, *SHORTER, *data, *switches]) == 0
    records = [record for record in read_log(tmp_path / "run/log.jsonl") if "losses" in record]
    assert len(records) == 2
    names = set(records[0]["losses"])
    assert ("region" in names) == ("method.name=soco" in switches)
    assert ("contrast" in names) == ("method.contrast=0" not in switches and "method.name=soco" not in switches)
