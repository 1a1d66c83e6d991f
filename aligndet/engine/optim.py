"""The optimizer with its few parameter groups, and the table of what is trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

NORMS = (
    nn.modules.batchnorm._NormBase,  # batch, sync-batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    backbone: nn.Module | None = None,
    backbone_lr: float = 1.0,
    norm_weight_decay: bool = True,
    bias_lr: float = 1.0,
    bias_weight_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters, one group for each combination of learning rate and decay.

    Each group carries ``"factor"``: its share of the base learning rate. A schedule sets
    ``group["lr"] = base * group["factor"]`` in every step.

    Args:
        model: parameters without gradient are left out.
        name: "sgd" or "adamw".
        lr: base learning rate.
        weight_decay: base weight decay.
        momentum: of SGD.
        backbone: the part of ``model`` whose factor is ``backbone_lr``.
        backbone_lr: factor on ``lr``.
        norm_weight_decay: False takes weights and biases of norm layers out of the decay.
        bias_lr: factor on ``lr`` for the biases of all other layers.
        bias_weight_decay: factor on ``weight_decay`` for the biases of all other layers.

    Raises:
        ValueError: unknown name, or the model has nothing to train.

    Source:
        Method sections 1.0, 1.2 (bias factors of FCOS) and 1.9.
    """
    if name not in ("sgd", "adamw"):
        raise ValueError(f"optimizer: want sgd or adamw, got {name!r}")
    inside = set() if backbone is None else {id(parameter) for parameter in backbone.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, norm, bias in _trainable(model):
        factor = backbone_lr if id(parameter) in inside else 1.0
        decay = weight_decay
        if norm:
            decay = weight_decay if norm_weight_decay else 0.0
        elif bias:
            factor, decay = factor * bias_lr, weight_decay * bias_weight_decay
        groups.setdefault((factor, decay), []).append(parameter)
    if not groups:
        raise ValueError("optimizer: the model has no trainable parameter; everything in it is frozen")
    rows = [
        {"params": parameters, "lr": lr * factor, "weight_decay": decay, "factor": factor}
        for (factor, decay), parameters in groups.items()
    ]
    # The fused kernels of the CPU take every tensor for contiguous: with a gradient or a resumed state laid out otherwise
    # than its parameter they are silently wrong. Those of CUDA check. On CPU a loop is fastest for SGD, foreach for AdamW.
    fused = all(parameter.is_cuda for parameters in groups.values() for parameter in parameters)
    foreach = None if fused else name == "adamw"
    if name == "sgd":
        return torch.optim.SGD(rows, lr=lr, momentum=momentum, fused=fused, foreach=foreach)
    return torch.optim.AdamW(rows, lr=lr, fused=fused, foreach=foreach)


def parameter_table(model: nn.Module) -> str:
    """What is trained and what is frozen: one line per part of the model with its numbers of parameters, and a total.

    A module without a forward pass of its own (a detector, a ModuleDict) is listed part by part. Tied parameters are
    counted once, where they come first.
    """
    counts: dict[str, list[int]] = {}
    seen: set[int] = set()
    for part, parameters in _parts(model, ""):
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts.setdefault(part, [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    rows = [(part, *numbers) for part, numbers in counts.items()]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'parameters':{width}}  {'trained':>12}  {'frozen':>12}"]
    return "\n".join(lines + [f"{part:{width}}  {trained:12,}  {frozen:12,}" for part, trained, frozen in rows])


def _trainable(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool, bool]]:
    """(parameter, of a norm layer, bias) for each trainable parameter, tied ones once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, isinstance(module, NORMS), name == "bias"


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, list[nn.Parameter]]]:
    own = [(f"{prefix}{name}", [parameter]) for name, parameter in module.named_parameters(recurse=False)]
    yield from own
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward:
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(child.parameters())
