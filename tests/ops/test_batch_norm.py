"""Claims about batch norm of rows: that of all ranks' rows at once, and what happens with one row or none."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aligndet.engine import distributed
from aligndet.ops.batch_norm import RowNorm
from tests.ranks import forked

ROWS = torch.randn(7, 3, generator=torch.Generator().manual_seed(4)) * 3 + 2
WEIGHTS = torch.randn(7, 3, generator=torch.Generator().manual_seed(5))


def prepared(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    with torch.no_grad():
        for value, numbers in ((norm.weight, [1.0, 2, 3]), (norm.bias, [3.0, 2, 1])):
            value.copy_(torch.tensor(numbers))
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(torch.tensor([0.5, 1, 2]))
    norm.running_var.copy_(torch.tensor([4.0, 9, 16]))
    return norm


def backward(norm: nn.Module, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and gradients of the rows."""
    rows = rows.clone().requires_grad_()
    output: Tensor = norm(rows)
    (output.square() * weights).sum().backward()
    assert rows.grad is not None
    return output.detach(), rows.grad


def test_several_rows_in_one_process_are_those_of_torch() -> None:
    ours, torchs = prepared(RowNorm(3)), prepared(nn.BatchNorm1d(3))
    for mode in (True, False):
        for mine, theirs in zip(
            backward(ours.train(mode), ROWS, WEIGHTS), backward(torchs.train(mode), ROWS, WEIGHTS), strict=True
        ):
            assert torch.equal(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), torchs.buffers(), strict=True))


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_rows_take_the_running_statistics_and_leave_them(number: int) -> None:
    norm = prepared(RowNorm(3)).train()
    output, gradient = backward(norm, ROWS[:number], WEIGHTS[:number])
    by_hand = (ROWS[:number] - torch.tensor([0.5, 1, 2])) / torch.tensor([2.0, 3, 4]) * torch.tensor([1.0, 2, 3])
    assert torch.allclose(output, by_hand + torch.tensor([3.0, 2, 1]), atol=1e-4)
    factor = torch.tensor([1 / 2, 2 / 3, 3 / 4])
    assert torch.allclose(gradient, 2 * output * WEIGHTS[:number] * factor, atol=1e-4)
    assert norm.running_mean is not None and norm.running_mean.tolist() == [0.5, 1, 2]
    assert norm.running_var is not None and norm.running_var.tolist() == [4, 9, 16]
    assert norm.weight.grad is not None and norm.bias.grad is not None


def joint(rank: int) -> None:
    """Two ranks against torch's batch norm of all rows at once, or ours of one process where torch has none."""
    world = distributed.start("cpu")
    for counts in ((4, 3), (7, 0), (1, 1), (1, 0), (0, 0)):
        total = sum(counts)
        alone = prepared(nn.BatchNorm1d(3)).train(total > 1)
        outputs, gradients = backward(alone, ROWS[:total], WEIGHTS[:total])
        part = slice(counts[0], total) if rank else slice(counts[0])
        ours = prepared(RowNorm(3)).train()
        mine = backward(ours, ROWS[part], WEIGHTS[part])
        for got, wanted in zip(mine, (outputs[part], gradients[part]), strict=True):
            assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4), (counts, rank, got, wanted)
        for name in ("running_mean", "running_var"):
            assert torch.allclose(getattr(ours, name), getattr(alone, name), atol=1e-5), (counts, name)
    distributed.stop(world)


def test_two_ranks_have_the_statistics_of_both_and_one_may_be_empty(tmp_path: Path) -> None:
    ranks = forked(joint, tmp_path)
    assert [code for code, _ in ranks] == [0, 0], ranks


def test_without_affine_parameters_too() -> None:
    ours, torchs = RowNorm(3, affine=False), nn.BatchNorm1d(3, affine=False)
    assert torch.equal(ours(ROWS), torchs(ROWS))
    assert torch.allclose(ours(ROWS[:1]), torchs.eval()(ROWS[:1]), atol=1e-6)
