"""Names of tensors here and in another library, both ways, with nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligndet.models.transformer import Transformer
from aligndet.protocol import Detector

# (prefix of the names here, prefix of the names there); what follows a prefix is the same on both sides.
Pair = tuple[str, str]


@dataclass(frozen=True)
class Change:
    """A tensor that is stored otherwise there.

    Attributes:
        prefix: of its name here.
        come, go: its values there to those here, and back; exact inverses of each other.
    """

    prefix: str
    come: Callable[[Tensor], Tensor]
    go: Callable[[Tensor], Tensor]


def rolled(prefix: str, rows: int) -> Change:
    """The first ``rows`` rows there (background) are the last here."""
    return Change(prefix, lambda value: value.roll(-rows, 0), lambda value: value.roll(rows, 0))


def reordered(prefix: str, order: Sequence[int], dim: int = 0) -> Change:
    """Entry ``order[i]`` of ``dim`` there is entry i here; of tensors with another number none is moved."""
    there = torch.tensor(list(order))
    here = there.argsort()

    def moved(value: Tensor, rows: Tensor) -> Tensor:
        fits = value.ndim > dim and value.shape[dim] == len(rows)
        return value.index_select(dim, rows) if fits else value

    return Change(prefix, lambda value: moved(value, there), lambda value: moved(value, here))


@torch.no_grad()
def fill(
    detector: Detector,
    state: Mapping[str, Tensor],
    pairs: Sequence[Pair],
    changes: Sequence[Change],
    source: str,
    *,
    fresh: str | None = None,
) -> Detector:
    """Copy the tensors of ``state`` into ``detector`` and return it, in evaluation mode.

    Args:
        state: by their names there.
        changes: what is stored otherwise.
        source: named in errors.
        fresh: prefix of names here that keep their values where ``state`` has none or another shape; None: no name may.

    Raises:
        ValueError: a tensor of either side has no counterpart, or another shape there; all are listed with shapes.
    """
    own = detector.state_dict()
    foreign, wrong = [], []
    missing = set(own)
    for name, value in state.items():
        here = _renamed(name, [(there, ours) for ours, there in pairs])
        if here is None or here not in own:
            foreign.append(f"{name} {list(value.shape)}")
            continue
        change = _change_of(here, changes)
        value = value if change is None else change.come(value)
        missing.discard(here)
        if value.shape != own[here].shape and (fresh is None or not here.startswith(fresh)):
            wrong.append(f"{name} {list(value.shape)} for {here} {list(own[here].shape)}")
        elif value.shape == own[here].shape:
            own[here].copy_(value)
    missing = {name for name in missing if fresh is None or not name.startswith(fresh)}
    lacking = [f"{name} {list(own[name].shape)}" for name in own if name in missing]
    parts = [
        f"{title}: {', '.join(names)}"
        for title, names in (
            ("no place for", foreign),
            ("not in the state dict", lacking),
            ("shapes differ", wrong),
        )
        if names
    ]
    if parts:
        raise ValueError(f"{source}: {'; '.join(parts)}")
    return detector.eval()


def names_there(detector: Detector, pairs: Sequence[Pair], changes: Sequence[Change]) -> dict[str, Tensor]:
    """The detector's tensors under their names there, as copies.

    Raises:
        ValueError: a tensor has no name there; all of them are listed with shapes.
    """
    found, foreign = {}, []
    for name, value in detector.state_dict().items():
        there = _renamed(name, pairs)
        if there is None:
            foreign.append(f"{name} {list(value.shape)}")
            continue
        change = _change_of(name, changes)
        found[there] = (value if change is None else change.go(value)).detach().clone()
    if foreign:
        raise ValueError(f"no counterpart for {', '.join(foreign)}")
    return found


def transformer_pairs(head: Transformer, root: str, parts: Mapping[str, str]) -> list[Pair]:
    """Names of DETR's layers: ``parts`` of a layer here and there, below ``root`` in which each half has ``layers``."""
    layers = [("encoder", i) for i in range(len(head.encoder))] + [("decoder", i) for i in range(len(head.decoder))]
    return [
        (f"head.{half}.{i}.{here}.", f"{root}{half}.layers.{i}.{there}.")
        for half, i in layers
        for here, there in parts.items()
    ]


def _renamed(name: str, pairs: Sequence[Pair]) -> str | None:
    """By the longest prefix."""
    best = max((pair for pair in pairs if name.startswith(pair[0])), key=lambda pair: len(pair[0]), default=None)
    return None if best is None else best[1] + name[len(best[0]) :]


def _change_of(name: str, changes: Sequence[Change]) -> Change | None:
    return next((change for change in changes if name.startswith(change.prefix)), None)
