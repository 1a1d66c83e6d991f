"""Parameter groups by structure, and the table of parts."""

import copy

import pytest
import torch
from torch import nn

from aligndet.engine.optim import build_optimizer, parameter_table
from aligndet.finetune import FineTune
from aligndet.models.backbones import build_backbone
from aligndet.pretrain import AlignDet
from tests.scenes import batch_of, boxes_for, small_detector


class Net(nn.Module):
    """A backbone with a frozen and a trained layer, norms and biases; its names mislead on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 5, 1).requires_grad_(False), nn.Conv2d(5, 7, 1))
        self.norm_like_name = nn.Linear(7, 2)
        self.plain = nn.GroupNorm(7, 7)
        self.bias_scale = nn.Parameter(torch.ones(1))


def groups_of(model: Net, **options: float) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) by parameter name."""
    optimizer = build_optimizer(model, name="sgd", lr=0.1, weight_decay=0.01, backbone=model.backbone, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    keys = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert len(keys) == len(set(keys)), "groups of equal settings are one group"
    assert all(group["lr"] == pytest.approx(0.1 * group["factor"]) for group in optimizer.param_groups)
    pairs = [(p, key) for group, key in zip(optimizer.param_groups, keys, strict=True) for p in group["params"]]
    return {names[id(parameter)]: key for parameter, key in pairs}


def test_defaults_make_one_group_without_frozen_parameters() -> None:
    found = groups_of(Net())
    assert set(found.values()) == {(0.1, 0.01)}
    assert "backbone.0.weight" not in found
    assert len(found) == 7


def test_every_rule_goes_by_structure() -> None:
    found = groups_of(Net(), backbone_lr=0.5, norm_weight_decay=False, bias_lr=2, bias_weight_decay=0)
    assert found == {
        "bias_scale": (0.1, 0.01),
        "backbone.1.weight": (0.05, 0.01),
        "backbone.1.bias": (0.1, 0.0),
        "norm_like_name.weight": (0.1, 0.01),
        "norm_like_name.bias": (0.2, 0.0),
        "plain.weight": (0.1, 0.0),
        "plain.bias": (0.1, 0.0),
    }


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_channels_last_detector_moves_as_with_the_plain_optimizer(name: str) -> None:
    """Fused CPU kernels are silently wrong where parameter, gradient and state are laid out differently."""
    mine = FineTune(small_detector()).to(memory_format=torch.channels_last).train()
    theirs = copy.deepcopy(mine)
    decay = {"lr": 0.01, "weight_decay": 0.1}
    fast = build_optimizer(mine, name=name, **decay)
    trainable = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    plain = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    slow = plain(trainable, foreach=False, **decay, **({"momentum": 0.9} if name == "sgd" else {}))
    batch = batch_of([boxes_for(3, 96, torch.Generator().manual_seed(0))], classes=3)
    for step in range(3):
        for model, optimizer in ((mine, fast), (theirs, slow)):
            optimizer.zero_grad(set_to_none=True)
            sum(model(batch).values()).backward()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            if a.grad is not None:
                b.grad.copy_(a.grad)
        fast.step()
        slow.step()
        if step == 1:
            fast.load_state_dict(copy.deepcopy(fast.state_dict()))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_to_train_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build_optimizer(Net().requires_grad_(False), name="sgd", lr=0.1, weight_decay=0)
    with pytest.raises(ValueError, match="want sgd or adamw, got 'lion'"):
        build_optimizer(Net(), name="lion", lr=0.1, weight_decay=0)


def test_table_counts_every_parameter_once() -> None:
    model = AlignDet(small_detector())
    rows = {line.split()[0]: line.split()[1:] for line in parameter_table(model).splitlines()[1:]}
    numbers = {part: tuple(int(text.replace(",", "")) for text in row) for part, row in rows.items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert numbers["total"] == (trained, total - trained)
    assert numbers["online.backbone"][0] == 0
    assert numbers["online.neck"] == numbers["momentum.neck"][::-1]
    assert sum(row[0] + row[1] for part, row in numbers.items() if part != "total") == total


def test_position_tables_of_swin_are_spared_with_the_norms() -> None:
    model = nn.ModuleDict({"backbone": build_backbone("swin_t", width=0.25, frozen_stages=0)})
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.5, norm_weight_decay=False)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    tables = [p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 12 and {decays[id(p)] for p in tables} == {0.0}, "2 + 2 + 6 + 2 blocks"
    assert sum(decay == 0.5 for decay in decays.values()) > 40


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_overflow_in_the_first_step_leaves_no_trace(name: str) -> None:
    """As if that step had not been: fp16's scaler begins so high that it is often the first one."""
    moved = []
    for overflows in (False, True):
        torch.manual_seed(0)
        model, scaler = nn.Linear(64, 64), torch.amp.GradScaler("cpu", init_scale=2.0)
        optimizer = build_optimizer(model, name=name, lr=0.1, weight_decay=0.01)
        for gradient in ([float("inf")] if overflows else []) + [1.0, 0.5]:
            scaler.scale(torch.zeros(()))  # the scaler is set up at its first use
            for parameter in model.parameters():
                # Memory that is given back holds what lay there before: the next allocation would show it.
                del parameter.grad
                parameter.grad = torch.full_like(parameter, gradient) * scaler.get_scale()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*moved, rtol=0, atol=0)
