"""Runs that must not differ: the same seed twice, other numbers of loader workers, one rank or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from aligndet.assigners import PositivesFirst
from aligndet.cli import evaluate_weights
from aligndet.config import load_config
from aligndet.engine import distributed, runfolder
from aligndet.engine.log import read_log
from aligndet.engine.loop import fit
from aligndet.engine.prepare import prepare
from aligndet.models.two_stage import TwoStage
from aligndet.pretrain import AlignDet
from tests.engine.test_checkpoint import same
from tests.ranks import forked
from tests.test_pipeline import finetune_config, pretrain_config, scenes, train

__all__ = ["scenes"]  # a fixture
EVERYTHING = PositivesFirst(10**6)
Config = Callable[..., Path]
both = pytest.mark.parametrize("config", [pretrain_config, finetune_config])
TWO_STAGE = ("model.detector=faster_rcnn", "model.convolutions=null", "model.levels=null", "model.box_head=2fc")
DETECTORS = {"fcos": (), "faster_rcnn": (*TWO_STAGE, "model.head_width=64")}


def end_of(run: Path) -> tuple[object, object]:
    """The last checkpoint without config and versions, and the losses of all steps."""
    state = runfolder.newest(run)[1]
    losses = [(record["step"], record["losses"]) for record in read_log(run / "log.jsonl") if "losses" in record]
    return {key: state[key] for key in ("step", "model", "optimizer", "rng", "skipped")}, losses


@both
def test_seed_and_config_are_all_that_a_run_depends_on(scenes: Path, tmp_path: Path, config: Config) -> None:
    """Twice the same, with 0, 1 and 2 loader workers, deterministic or not: bit for bit; another seed: not."""
    runs = {"first": (), "again": (), "one": ("data.workers=1",), "two": ("data.workers=2",), "other": ("seed=1",)}
    for name, overrides in runs.items():
        path = config(scenes, tmp_path / name)
        train(path, "optim.steps=3", "save_every=3", *overrides, *(() if name == "first" else ("deterministic=true",)))
    ends = {name: end_of(tmp_path / name) for name in runs}
    for name in ("again", "one", "two"):
        assert same(ends["first"], ends[name]), name
    assert not same(ends["first"], ends["other"]), "the comparison can fail"


def test_the_key_switches_operations_without_a_deterministic_form_off(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen, forward = [], AlignDet.forward

    def watched(self: AlignDet, *views: object) -> dict[str, Tensor]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward(self, *views)  # type: ignore[arg-type]

    monkeypatch.setattr(AlignDet, "forward", watched)
    for name, value in (("on", "true"), ("off", "false")):
        train(pretrain_config(scenes, tmp_path / name, steps=1), f"deterministic={value}")
    assert seen == [True, False]


def test_evaluation_reads_the_key_too(scenes: Path, tmp_path: Path) -> None:
    """The weights are not there: what comes before them has happened."""
    config = str(finetune_config(scenes, tmp_path / "run"))
    try:
        for word in ("true", "false"):
            with pytest.raises(SystemExit):
                evaluate_weights(["--cfg", config, "--weights", str(tmp_path / "none.pt"), f"deterministic={word}"])
            assert torch.are_deterministic_algorithms_enabled() == (word == "true")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_learning_rate_is_scaled_and_the_log_says_so(scenes: Path, tmp_path: Path) -> None:
    path = pretrain_config(scenes, tmp_path / "run", steps=1)
    train(path, "optim.lr_scaling=linear", "optim.base_batch=16", "optim.lr=0.08")
    log = read_log(tmp_path / "run/log.jsonl")
    assert [record["lr"] for record in log if "lr" in record] == [0.02]
    assert any("learning rate 0.02 for a batch of 4: 0.08 is for 16" in record.get("note", "") for record in log)


def trained(config: Path, overrides: tuple[str, ...], world: distributed.World) -> dict[str, Tensor]:
    """The trainable parameters after a run that samples nothing at random."""
    training = prepare(load_config(config, overrides), world)
    for module in training.model.modules():
        if isinstance(module, TwoStage):
            module.sample_regions = module.rpn.sample = EVERYTHING
            # Scores of an untrained RPN are so close that rounding decides their order.
            generator = torch.Generator().manual_seed(3)
            nn.init.normal_(cast(nn.Conv2d, module.rpn.score).weight, std=0.5, generator=generator)
    before = {name: value.detach().clone() for name, value in training.model.named_parameters() if value.requires_grad}
    fit(training)
    after = dict(training.model.named_parameters())
    return {name: after[name].detach() - value for name, value in before.items()}


def on_ranks(config: Path, overrides: tuple[str, ...], folder: Path) -> dict[str, Tensor]:
    """What ``trained`` gives on the first of two ranks; the other's is the same."""

    def act(rank: int) -> None:
        world = distributed.start("cpu")
        torch.save(trained(config, overrides, world), folder / f"moved-{rank}.pt")
        distributed.stop(world)

    ranks = forked(act, folder)
    assert [code for code, _ in ranks] == [0, 0], ranks
    moved = [torch.load(folder / f"moved-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(moved[0], moved[1])
    return cast("dict[str, Tensor]", moved[0])


def relative_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of two movements of all parameters, in the L2 norm."""
    left, right = (torch.cat([value.flatten() for value in moved.values()]) for moved in (a, b))
    assert a.keys() == b.keys() and right.norm() > 0
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize(
    ("part", "detector"),
    [
        ("boxes", "fcos"),
        ("boxes", "faster_rcnn"),
        ("contrast", "fcos"),
        ("finetune", "fcos"),
        ("finetune", "faster_rcnn"),
    ],
)
def test_one_rank_with_batch_4_is_two_ranks_with_batch_2(
    scenes: Path, tmp_path: Path, part: str, detector: str
) -> None:
    """Weights move alike within 2e-5 over two steps (measured: 0 to 1.2e-6), the floating-point sums being others.

    The contrast takes its negatives from the images of a rank, so there one rank makes two passes of two images.
    """
    make = finetune_config if part == "finetune" else pretrain_config
    common = (*DETECTORS[detector], "optim.steps=2", "data.short_side=128", "log_every=1")
    common += () if part == "finetune" else ("method.candidates=1000000",)
    common += {"boxes": ("method.contrast=0",), "contrast": ("method.localization=0",), "finetune": ()}[part]
    passes = ("optim.accumulate=2",) if part == "contrast" else ()
    one = trained(make(scenes, tmp_path / "one"), (*common, *passes), distributed.single())
    two = on_ranks(make(scenes, tmp_path / "two"), common, tmp_path)
    assert relative_error(two, one) < 2e-5
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("one", "two")]
    losses = [[record["losses"] for record in log if "losses" in record] for log in logs]
    assert len(losses[0]) == len(losses[1]) == 2
    for ours, theirs in zip(*losses, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4), "the log has the means over ranks"
