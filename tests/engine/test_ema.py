"""The average against its formula."""

import copy

import pytest
import torch
from torch import nn

from aligndet.engine.ema import EMA, ModelAverage


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


def test_an_update_takes_no_memory() -> None:
    """Method section 8.20: the reference makes a new tensor of each parameter in each step."""
    source, target = modules()
    ema = EMA(source, target)
    places = [parameter.data_ptr() for parameter in target.parameters()]
    with torch.profiler.profile(profile_memory=True) as profile:
        ema.update(0.5)
    assert max(event.self_cpu_memory_usage for event in profile.events()) == 0
    assert [parameter.data_ptr() for parameter in target.parameters()] == places


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


class Counted(nn.Module):
    """One weight, one moving statistic, one counter, one frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.fixed = nn.Parameter(torch.tensor([1 / 3]), requires_grad=False)
        self.register_buffer("mean", torch.tensor([10.0]))
        self.register_buffer("seen", torch.tensor(0))


def test_the_average_of_a_model_by_hand() -> None:
    """d is min(0.25, 2/11), min(0.25, 3/12), min(0.25, 4/13): 2/11, 1/4 and 1/4."""
    model = Counted()
    average = ModelAverage(model, 0.25)
    for weight, mean, expected_weight, expected_mean in (
        (12.0, -1.0, 2 / 11 * 1 + 9 / 11 * 12, 2 / 11 * 10 - 9 / 11),
        (0.0, -1.0, 110 / 11 / 4, 11 / 44 - 3 / 4),  # a quarter of 10, and of 1
        (4.0, 3.0, 2.5 / 4 + 3, -0.5 / 4 + 9 / 4),
    ):
        with torch.no_grad():
            model.weight[0], model.mean[0] = weight, mean
            model.seen += 1
        average.update()
        assert average.module.weight[0].item() == pytest.approx(expected_weight, abs=1e-6)
        assert average.module.mean.item() == pytest.approx(expected_mean, abs=1e-6)
    assert average.module.weight[1].item() == -2.0
    assert torch.equal(average.module.fixed, model.fixed), "what never changes keeps every bit"
    assert average.module.seen.item() == 3
    assert (model.weight[0].item(), model.mean.item()) == (4.0, 3.0)
    assert not average.module.weight.requires_grad


@pytest.mark.parametrize(("updates", "decay"), [(1, 2 / 11), (300, 301 / 310), (8989, 8990 / 8999), (8990, 0.999)])
def test_the_decay_rises_with_the_number_of_updates(updates: int, decay: float) -> None:
    average = ModelAverage(Counted(), 0.999)
    average.updates = updates
    assert average.decay == pytest.approx(decay, rel=1e-12)


def test_a_continued_average_is_the_same_to_the_last_bit() -> None:
    torch.manual_seed(1)
    values = torch.randn(9, 2)

    def run(average: ModelAverage, model: Counted, part: torch.Tensor) -> None:
        for value in part:
            with torch.no_grad():
                model.weight.copy_(value)
            average.update()

    model, other = Counted(), Counted()
    whole = ModelAverage(model, 0.6)
    run(whole, model, values[:4])
    state = copy.deepcopy(whole.state_dict())
    run(whole, model, values[4:])
    cut = ModelAverage(other, 0.6)
    cut.load_state_dict(state)
    run(cut, other, values[4:])
    assert cut.updates == whole.updates == 9
    assert torch.equal(cut.module.weight, whole.module.weight)
    cut.updates = 0  # a forgotten counter would show
    run(cut, other, values[:1])
    run(whole, model, values[:1])
    assert not torch.equal(cut.module.weight, whole.module.weight)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="want a number between 0 and 1"):
        ModelAverage(Counted(), decay)
