"""Compiled parts compute what they computed before, under the same names; processors are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aligndet.engine.compiling import compile_parts
from aligndet.finetune import FineTune
from aligndet.models import DETECTORS, build_detector
from aligndet.pretrain import AlignDet
from tests.scenes import batch_of, boxes_for, small_detector
from tests.test_mistakes import small
from tests.test_pipeline import failure, pretrain_config, scenes, train

__all__ = ["scenes"]  # a fixture


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "fcos" else ()) for name in sorted(DETECTORS)]
)
def test_every_part_is_one_graph_and_gives_the_same_maps(name: str) -> None:
    """Without graph breaks (``fullgraph``), for two sizes of pictures."""
    detector = small(name).eval()
    images = [torch.rand(2, 3, height, width) for height, width in ((64, 96), (96, 64))]
    with torch.no_grad():
        before = [detector.backbone(image) for image in images]
        names = list(detector.state_dict())
        number = compile_parts(detector.convolutional_parts(), backend="eager")
        after = [detector.backbone(image) for image in images]
    assert number == len(detector.convolutional_parts())
    assert list(detector.state_dict()) == names
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_mobilenet_is_one_graph_too() -> None:
    detector = build_detector("fcos", "mobilenet_v2", 3, width=0.25, channels=32, convolutions=1).train()
    compile_parts([detector.backbone], backend="eager")
    assert len(detector.backbone(torch.rand(1, 3, 64, 64))) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own tracing
def test_training_is_the_same_up_to_rounding_and_weights_go_both_ways() -> None:
    """Three steps by autograd on traced graphs, then the weights into a detector that is not compiled."""
    losses, weights = [], []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = FineTune(small_detector()).train()
        if compiled:
            assert compile_parts(model.detector.convolutional_parts(), backend="aot_eager") == 4
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 0.01)
        for seed, size in ((1, 96), (2, 128), (3, 96)):
            boxes = [boxes_for(3, size, torch.Generator().manual_seed(seed)) for _ in range(2)]
            found = model(batch_of(boxes, size=size, seed=seed, classes=3))
            torch.stack(list(found.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append({key: value.item() for key, value in found.items()})
        weights.append(model.state_dict())
    for plain, traced in zip(losses[:3], losses[3:], strict=True):
        assert traced == pytest.approx(plain, rel=1e-4)
    other = FineTune(small_detector())
    other.load_state_dict(weights[1])
    for key, value in other.state_dict().items():
        assert torch.allclose(value.float(), weights[0][key].float(), atol=1e-5), key


def test_a_backbone_that_both_branches_share_is_compiled_once() -> None:
    model = AlignDet(small_detector(), embedding=16)
    assert model.momentum is not None
    parts = [*model.online.convolutional_parts(), *model.momentum.convolutional_parts()]
    assert len(parts) == 8
    assert compile_parts(parts, backend="eager") == 7


def test_processors_are_refused(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, lambda: train(pretrain_config(scenes, tmp_path / "run"), "compile=true"))
    assert "compile: not on processors" in message
    assert not (tmp_path / "run").exists()
    swin = ("compile=true", "model.backbone=swin_t")
    assert "compile: not with Swin" in failure(capsys, lambda: train(pretrain_config(scenes, tmp_path / "run"), *swin))
