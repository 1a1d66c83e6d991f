"""Optimizers with few parameter groups, and the table of what is trained."""

from __future__ import annotations

import torch
from torch import nn

# Layers whose affine parameters are scale and shift of a normalisation.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

# Biases of attention by relative position, which Swin's recipe treats as it does norms.
SWIN_TABLE = "relative_position_bias_table"


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
    """An optimizer over the trainable parameters, grouped by equal learning rate and weight decay.

    Each group carries "factor", what its learning rate is multiplied with besides the schedule.

    Args:
        name: "sgd" or "adamw".
        momentum: of SGD.
        backbone, backbone_lr: part of the model with a factor of its own.
        norm_weight_decay: False takes the affine parameters of norms out of the decay, and Swin's position tables.
        bias_lr, bias_weight_decay: factors for the biases of all other layers (method section 1.2).

    Raises:
        ValueError: nothing is trainable, or an unknown name.
    """
    in_backbone = set() if backbone is None else {id(p) for p in backbone.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            factor, decay = backbone_lr if id(parameter) in in_backbone else 1.0, weight_decay
            if isinstance(module, NORMS) or parameter_name == SWIN_TABLE:
                decay = decay if norm_weight_decay else 0.0
            elif parameter_name == "bias":
                factor, decay = factor * bias_lr, decay * bias_weight_decay
            groups.setdefault((factor, decay), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: every parameter of the model is frozen")
    rows = [
        {"params": params, "factor": factor, "lr": lr * factor, "weight_decay": decay}
        for (factor, decay), params in groups.items()
    ]
    if name == "sgd":
        sgd = torch.optim.SGD(rows, lr=lr, momentum=momentum, fused=True)
        # Where fp16 overflows in the first step, torch's fused kernel leaves the buffers that it has just allocated as
        # they are, and the next step takes what lies there for the momentum.
        for parameter in (p for params in groups.values() for p in params if momentum):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if name == "adamw":
        return torch.optim.AdamW(rows, lr=lr, fused=True)
    raise ValueError(f"optimizer: want sgd or adamw, got {name!r}")


def parameter_table(model: nn.Module) -> str:
    """What is trained and what is frozen, by part, as text; buffers such as frozen norms do not count."""
    rows = []
    for title, part in _parts(model):
        numbers = [(p.numel(), p.requires_grad) for p in part.parameters()]
        trained = sum(number for number, trains in numbers if trains)
        rows.append((title, trained, sum(number for number, _ in numbers) - trained))
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    width = max(len(title) for title, _, _ in rows)
    lines = [f"{'part':{width}}  {'trained':>12}  {'frozen':>12}"]
    return "\n".join(lines + [f"{title:{width}}  {trained:12,}  {frozen:12,}" for title, trained, frozen in rows])


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules two levels down: online.backbone, online.neck, ..., or the top level where that has no children."""
    parts = []
    for name, child in model.named_children():
        inner = list(child.named_children())
        parts += [(f"{name}.{key}", module) for key, module in inner] if inner else [(name, child)]
        own = list(child.named_parameters(recurse=False))
        if own and inner:
            parts.append((name, nn.ParameterList([value for _, value in own])))
    return [(name, part) for name, part in parts if any(True for _ in part.parameters())]
