"""Every experiment file that is shipped runs: built at a smaller width, two steps on generated scenes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aligndet import cli
from aligndet.config import load_config
from aligndet.data.proposals import open_proposals, write_proposals
from aligndet.data.synthetic import make_scenes
from aligndet.engine.distributed import World
from aligndet.engine.log import Log, read_log
from aligndet.engine.stages import fine_tuning
from aligndet.finetune import FineTune
from aligndet.models import DETECTORS, build_detector
from aligndet.models.backbones import build_backbone
from aligndet.pretrain import AlignDet
from aligndet.weights import export_pretrained
from tests.test_pipeline import ROOT

# Files that are another one for longer: NAME is BASE with this length, these milestones and perhaps another warm-up.
LONGER: dict[str, tuple[str, dict[str, object]]] = {
    "detr_resnet50_100e": ("detr_resnet50_50e", {"epochs": 100, "milestones": (80,)}),
    "detr_resnet50_150e": ("detr_resnet50_50e", {"epochs": 150, "milestones": (100,)}),
    "detr_resnet50_750k": ("detr_resnet50_375k", {"steps": 750_000, "milestones": (600_000,), "warmup": 500}),
    "mask_rcnn_swin_s_3x": ("mask_rcnn_swin_s_1x", {"epochs": 36, "milestones": (27, 33)}),
}
for name in ("fcos", "retinanet", "faster_rcnn", "mask_rcnn"):
    start = f"{name}_resnet50"
    LONGER[f"{start}_2x"] = (f"{start}_1x", {"epochs": 24, "milestones": (16, 22)})
    LONGER[f"{start}_3x"] = (f"{start}_1x", {"epochs": 36, "milestones": (24, 33)})
    LONGER[f"{start}_90k"] = (f"{start}_12k", {"steps": 90_000, "milestones": (60_000, 82_500)})
# Files with the data and the length of VOC's protocol: all else is BASE's.
VOC = {"epochs": None, "steps": 12_000, "milestones": (9_000, 11_000)}
VOC_FILES: dict[str, tuple[str, dict[str, object]]] = {
    f"{name}_resnet50_voc": (f"{name}_resnet50_1x", VOC) for name in ("fcos", "retinanet", "faster_rcnn")
} | {"detr_resnet50_voc": ("detr_resnet50_50e", {"epochs": 100, "milestones": (70,)})}
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
        found = {
            name.removeprefix(f"{detector}_resnet50_") for name in names if name.startswith(f"{detector}_resnet50_")
        }
        if detector == "detr":
            assert found == {"50e", "100e", "150e", "375k", "750k", "voc"}
        else:
            assert found == {"1x", "2x", "3x", "12k", "90k"} | ({"voc"} if detector != "mask_rcnn" else set())


@pytest.mark.parametrize("name", list(LONGER))
def test_longer_schedules_differ_in_nothing_else(name: str) -> None:
    base, changes = LONGER[name]
    longer, shorter = (load_config(ROOT / f"configs/finetune/{stem}.yaml", ["data.train=a"]) for stem in (name, base))
    assert longer.run == f"runs/finetune/{name}"
    assert longer == replace(shorter, run=longer.run, optim=replace(shorter.optim, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(VOC_FILES))
def test_voc_differs_in_data_and_length_only(name: str) -> None:
    base, changes = VOC_FILES[name]
    voc, coco = (load_config(ROOT / f"configs/finetune/{stem}.yaml", ["data.train=a"]) for stem in (name, base))
    data = replace(coco.data, short_side=tuple(range(480, 801, 32)), voc_metrics="11-point", augment="plain")
    optim = replace(coco.optim, **changes)  # type: ignore[arg-type]
    assert voc == replace(coco, run=f"runs/finetune/{name}", data=data, optim=optim)


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
    run, smaller = f"run={tmp_path / 'run'}", SMALLER
    if "augment: jitter" in path.read_text():  # has a size of its own
        smaller = (
            *(key for key in SMALLER if not key.startswith("data.short_side")),
            "data.jitter_size=96",
            "model.backbone=swin_t",
        )
    assert cli.train(["--cfg", str(path), run, *smaller, *SHORTER, *data]) == 0
    records = [record for record in read_log(tmp_path / "run/log.jsonl") if "losses" in record]
    assert [record["step"] for record in records] == [1, 2]
    result = {"pretrain": "pretrained.pt", "finetune": "model.pt", "image_domain": "backbone.pt"}[task]
    content = torch.load(tmp_path / "run" / result, weights_only=True)
    assert content["kind"] in ("pretrained", "detector", "backbone")
    if task == "finetune":
        assert (tmp_path / "run/metrics.json").is_file()


@pytest.mark.parametrize(
    ("switch", "copied"),
    [
        ("method.modules=[neck]", {"neck"}),
        ("method.keep_predictors=false", {"neck", "head"}),
        ("method.reference_compatible=true", {"neck", "head"}),
        ("method.keep_predictors=true", {"neck", "head", "predictors"}),
    ],
)
def test_the_switches_of_hand_over_reach_it(switch: str, copied: set[str], scenes: Path, tmp_path: Path) -> None:
    common = ["device=cpu", "threads=1", "data.workers=0", "model.width=0.25"]
    model = build_detector("fcos", "mobilenet_v2", 1, width=0.25, channels=64, convolutions=2, levels=4)
    torch.save(export_pretrained(AlignDet(model, embedding=8)), tmp_path / "p.pt")
    labels = f"data.train={scenes / 'annotations/instances_train.json'}"
    given = [*common, labels, "data.val=null", f"weights={tmp_path / 'p.pt'}", f"run={tmp_path}", switch]
    config = load_config(ROOT / "configs/finetune/fcos_mobilenet_v2_lowdata.yaml", given)
    world = World(0, 1, torch.device("cpu"))
    stage = fine_tuning(config, Log(tmp_path, world), world)
    assert isinstance(stage.model, FineTune)
    found, before = dict(stage.model.detector.named_parameters()), dict(model.named_parameters())
    for part in ("neck", "head", "predictors"):
        names = [name for name in found if name.startswith(f"{part}.") and name in before and found[name].dim() == 4]
        names = [name for name in names if name.startswith("predictors.box") or part != "predictors"]
        same = [torch.equal(found[name], before[name]) for name in names]
        assert same and set(same) == {part in copied}, (part, names)


def test_parts_stand_on_a_backbone_of_their_own_where_the_file_s_is_not_taken(scenes: Path, tmp_path: Path) -> None:
    """Table 9 without its first row: the neck from pre-training, the backbone from ImageNet."""
    small = {"backbone": "mobilenet_v2", "width": 0.25}
    model = build_detector("fcos", num_classes=1, **small, channels=64, convolutions=2, levels=4)  # type: ignore[arg-type]
    torch.save(export_pretrained(AlignDet(model, embedding=8)), tmp_path / "p.pt")
    other = build_backbone("mobilenet_v2", width=0.25)
    torch.save(other.state_dict(), tmp_path / "b.pt")
    common = ["device=cpu", "threads=1", "data.workers=0", "model.width=0.25", "data.val=null", f"run={tmp_path}"]
    common += [f"data.train={scenes / 'annotations/instances_train.json'}", f"weights={tmp_path / 'p.pt'}"]
    path, backbone = (
        ROOT / "configs/finetune/fcos_mobilenet_v2_lowdata.yaml",
        f"model.backbone_weights={tmp_path / 'b.pt'}",
    )
    with pytest.raises(ValueError, match="weights contain a backbone already"):
        load_config(path, [*common, backbone])
    world = World(0, 1, torch.device("cpu"))
    stage = fine_tuning(load_config(path, [*common, backbone, "method.modules=[neck]"]), Log(tmp_path, world), world)
    assert isinstance(stage.model, FineTune)
    found = stage.model.detector.state_dict()
    assert all(torch.equal(found[f"backbone.{key}"], value) for key, value in other.state_dict().items())
    learned = model.state_dict()
    assert torch.equal(found["neck.output.0.weight"], learned["neck.output.0.weight"])
    assert not torch.equal(found["head.box.0.weight"], learned["head.box.0.weight"])


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
    if detector == "detr" and not any(switch.startswith("method.contrast=") for switch in switches):
        switches = (*switches, "method.contrast=1")  # which its small file leaves out
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
