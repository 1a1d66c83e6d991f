"""Claims about numbers that all ranks agree on."""

import torch

from aligndet.ops.reduce import mean_over_ranks
from tests.ranks import on_two_ranks

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
    on_two_ranks(SCRIPT, timeout=120)
