"""The average against its formula."""

import copy

import pytest
import torch
from torch import nn

from aligndet.engine.ema import EMA


def modules(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    source = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(5, 5), nn.Linear(7, 2)).to(dtype)
    return source, copy.deepcopy(source).requires_grad_(False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_its_formula_after_each_step(dtype: torch.dtype, tolerance: float) -> None:
    source, target = modules(dtype)
    ema = EMA(source, target)
    naive = [parameter.double().clone() for parameter in target.parameters()]
    for step, momentum in enumerate((0.996, 0.5, 0.0, 0.9, 0.3)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(momentum)
        naive = [momentum * a + (1 - momentum) * b.double() for a, b in zip(naive, source.parameters(), strict=True)]
        for mine, theirs in zip(target.parameters(), naive, strict=True):
            assert (mine.double() - theirs).abs().max() < tolerance, step


def test_momentum_one_changes_no_bit_and_source_never_changes() -> None:
    source, target = modules()
    with torch.no_grad():
        target[0].weight.fill_(-0.0)
    before = [parameter.clone() for parameter in source.parameters()]
    EMA(source, target).update(1.0)
    assert torch.signbit(target[0].weight).all()
    EMA(source, target).update(0.25)
    assert all(torch.equal(a, b) for a, b in zip(before, source.parameters(), strict=True))


def test_works_on_trained_parameters_without_gradient() -> None:
    source, target = modules()
    ema = EMA(source, target)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1)
    sum(parameter.square().sum() for parameter in source.parameters()).backward()
    optimizer.step()
    ema.update(0.0)
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
        assert mine.grad is None


def test_a_shared_backbone_stays_out() -> None:
    source = nn.ModuleDict({"backbone": nn.Linear(3, 2).requires_grad_(False), "head": nn.Linear(2, 5)})
    target = copy.deepcopy(source, {id(source["backbone"]): nn.Identity()}).requires_grad_(False)
    frozen = source["backbone"].weight.clone()
    with torch.no_grad():
        source["head"].weight.zero_()
    EMA(source, target).update(0.0)
    assert torch.equal(source["backbone"].weight, frozen)
    assert not target["head"].weight.any()


def test_names_and_shapes_must_agree() -> None:
    source = nn.ModuleDict({"head": nn.Linear(2, 5)})
    with pytest.raises(ValueError, match=r"neck\.weight"):
        EMA(source, nn.ModuleDict({"head": nn.Linear(2, 5), "neck": nn.Linear(2, 3)}))
    with pytest.raises(ValueError, match=r"head\.weight"):
        EMA(source, nn.ModuleDict({"head": nn.Linear(3, 5)}))
    with pytest.raises(ValueError, match=r"without a namesake in the target: head\.weight, head\.bias"):
        EMA(source, nn.ModuleDict({"head": nn.Identity()}))
