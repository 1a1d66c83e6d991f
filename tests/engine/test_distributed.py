"""One process without a group, and two with one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aligndet.engine import distributed

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
torch.set_num_threads(1)
from aligndet.engine import distributed as d
world = d.start("cpu")
assert world.size == 2 and world.device.type == "cpu"
assert d.agree(world.rank == 1, world) is True
assert d.agree(False, world) is False
values = d.gather_objects({"rank": world.rank, "none": None, "t": torch.full((3,), world.rank)}, world)
assert [v["rank"] for v in values] == [0, 1] and values[1]["t"].tolist() == [1, 1, 1]
assert d.gather_objects(None, world) == [None, None]
from aligndet.engine.evaluate import evaluate_detector
from tests.scenes import batch_of, boxes_for, small_detector
torch.manual_seed(0)
detector = small_detector(score_threshold=0.0)
batches = [batch_of([boxes_for(1, 96, torch.Generator().manual_seed(i))], seed=i) for i in range(3)]
batches = [type(b)(b.images, b.sizes, b.sizes, (7 - i,), b.targets) for i, b in enumerate(batches)]
together = evaluate_detector(detector, batches[world.rank :: 2], world)
alone = evaluate_detector(detector, batches, d.single())
assert list(together) == list(alone) == [5, 6, 7]
assert all(torch.equal(together[k].boxes, alone[k].boxes) and len(alone[k]) for k in alone)
d.barrier(world)
d.stop(world)
d.stop(world)
print("rank", world.rank, "done")
"""


def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_alone_every_question_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    assert world == distributed.single("cpu")
    assert not torch.distributed.is_initialized()
    assert distributed.agree(True, world) is True
    assert distributed.agree(False, world) is False
    assert distributed.gather_objects([3], world) == [[3]]
    distributed.barrier(world)
    distributed.stop(world)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clean(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda"):
        distributed.start("cuda")
    assert distributed.start("auto").device.type == "cpu"


def test_two_ranks_agree_gather_and_evaluate_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = os.environ | common | {"PYTHONPATH": str(ROOT)}
    ranks = []
    for rank in ("0", "1"):
        own = environment | {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", SCRIPT]
        ranks.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
    assert "rank 1 done" in outputs[1]
