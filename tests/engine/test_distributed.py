"""One process without a group, and two with one."""

from pathlib import Path

import pytest
import torch

from aligndet.engine import distributed as d
from aligndet.engine.evaluate import evaluate_detector
from tests.ranks import forked
from tests.scenes import batch_of, boxes_for, small_detector


def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_alone_every_question_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    world = d.start("cpu")
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    assert world == d.single("cpu")
    assert not torch.distributed.is_initialized()
    assert d.highest([3, 0], world) == [3, 0]
    assert d.gather_objects([3], world) == [[3]]
    d.barrier(world)
    d.stop(world)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda"):
        d.start("cuda")
    assert d.start("auto").device.type == "cpu"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("Connection reset by peer", "is gone"),
        ("NCCL error in: x.cpp:1, remote process exited or there was a network error\nncclRemoteError: ...", "is gone"),
        ("NCCL communicator was aborted on rank 1.", "is gone"),
        ("Timed out waiting 5000ms for recv operation to complete", "does not answer"),
        ("NCCL error in: x.cpp:1, invalid usage\nDuplicate GPU detected : rank 0 and rank 1 both on device 1000", ""),
        ("NCCL error in: x.cpp:1, unhandled system error\n/dev/shm/nccl-a1: No space left on device", ""),
        ("The size of tensor a (3) must match the size of tensor b (4)", ""),
    ],
)
def test_only_errors_of_a_lost_rank_are_told_as_such(error: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in how nccl is set up keeps its own words."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(d, "_killed", lambda: iter([(1, "77")]))
    found = d.lost(RuntimeError(error))
    assert words in found and bool(found) == bool(words)


def on_both(rank: int) -> None:
    world = d.start("cpu", timeout=30)
    assert (world.rank, world.size, world.device.type) == (rank, 2, "cpu")
    assert d.highest([rank, 5 - rank, 0], world) == [1, 5, 0]
    assert d.mean(torch.tensor([2.0 * rank, 3.0]), world).tolist() == [1.0, 3.0]
    values = d.gather_objects({"rank": rank, "none": None, "t": torch.full((3,), rank)}, world)
    assert [v["rank"] for v in values] == [0, 1] and values[1]["t"].tolist() == [1, 1, 1]
    assert d.gather_objects(None, world) == [None, None]
    torch.manual_seed(0)
    detector = small_detector(score_threshold=0.0)  # type: ignore[arg-type]
    batches = [batch_of([boxes_for(1, 96, torch.Generator().manual_seed(i))], seed=i) for i in range(3)]
    batches = [type(b)(b.images, b.sizes, b.sizes, (7 - i,), b.targets) for i, b in enumerate(batches)]
    together = evaluate_detector(detector, batches[rank::2], world)
    alone = evaluate_detector(detector, batches, d.single())
    assert list(together) == list(alone) == [5, 6, 7]
    assert all(torch.equal(together[k].boxes, alone[k].boxes) and len(alone[k]) for k in alone)
    d.barrier(world)
    d.stop(world)
    d.stop(world)


def test_two_ranks_agree_gather_and_evaluate_together(tmp_path: Path) -> None:
    ranks = forked(on_both, tmp_path)
    assert [code for code, _ in ranks] == [0, 0], ranks
