"""Claims about numbers that all ranks agree on."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from aligndet.ops.reduce import mean_over_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch, torch.distributed as dist
torch.set_num_threads(1)
from aligndet.ops.reduce import mean_over_ranks
dist.init_process_group("gloo")
value = torch.tensor([3.0, 5.0], requires_grad=True) * (1 + 6 * dist.get_rank())
mean = mean_over_ranks(value)
assert mean.tolist() == [12.0, 20.0] and not mean.requires_grad, mean
assert value.tolist() == [3.0 * (1 + 6 * dist.get_rank()), 5.0 * (1 + 6 * dist.get_rank())], "the input is left alone"
assert mean_over_ranks(torch.tensor(dist.get_rank())).item() == 0.5, "whole numbers have no whole mean"
dist.destroy_process_group()
"""


def test_alone_the_mean_is_the_value_without_a_graph() -> None:
    value = torch.tensor([3.0, 7.0], requires_grad=True) * 2
    mean = mean_over_ranks(value)
    assert mean.tolist() == [6, 14]
    assert not mean.requires_grad


def test_two_ranks_get_the_mean_of_both() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = os.environ | common | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
