"""Which of the matched candidates are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aligndet.structures import BACKGROUND


@dataclass(frozen=True)
class PositivesFirst:
    """Keeps positives, drawn uniformly, and fills up with background.

    Attributes:
        limit: most candidates kept, per batch or per image.
        scope: "batch" or "image".
        background: share of ``limit``, rounded up, that positives never take.
        negatives: most background rows per kept positive; None: no such bound.

    Source:
        Method section 2.5: the reference keeps 2048 per batch and view, background only where positives run out.
    """

    limit: int
    scope: str = "batch"
    background: float = 0.0
    negatives: float | None = None

    def __post_init__(self) -> None:
        if self.scope not in ("batch", "image"):
            raise ValueError(f"scope: want 'batch' or 'image', got {self.scope!r}")
        if not isinstance(self.limit, int) or self.limit < 1:
            raise ValueError(f"limit: want a whole number of candidates of at least 1, got {self.limit}")
        if not 0 <= self.background <= 1:
            raise ValueError(f"background: want a share in 0 .. 1, got {self.background}")
        if self.negatives is not None and not self.negatives >= 0:
            raise ValueError(f"negatives: want a number of at least 0, got {self.negatives}")

    def __call__(self, matched: Tensor, image: Tensor) -> Tensor:
        """The kept rows.

        Args:
            matched: int64 [N], row of a box, BACKGROUND or IGNORED (never kept).
            image: int64 [N].

        Returns:
            int64 [n], ascending; drawn from torch's global random numbers.
        """
        group = image if self.scope == "image" else torch.zeros_like(image)
        # 0.9 of 10 is 9 and not, by the error of the product, 10.
        kept_free = math.ceil(self.limit * self.background - 1e-6)
        positive = _first(matched >= 0, group, self.limit - kept_free)
        taken = _positions(positive, group, right=True) - _positions(positive, group)
        room = self.limit - taken
        if self.negatives is not None:
            room = torch.minimum(room, (taken * self.negatives).to(room.dtype))
        fill = _first(matched == BACKGROUND, group, room)
        return (positive | fill).nonzero().squeeze(1)


def _first(wanted: Tensor, group: Tensor, limit: int | Tensor) -> Tensor:
    """Of the wanted rows, at most ``limit`` of each group, uniformly: bool [N]."""
    # Sorted by (group, unwanted, random), the rank within a group says who is in.
    key = torch.rand(len(wanted), dtype=torch.float64, device=wanted.device) / 2 + group + 0.5 * ~wanted
    order = key.argsort()
    ordered = group[order]
    rank = torch.arange(len(wanted), device=wanted.device) - torch.searchsorted(ordered, ordered)
    ranks = torch.empty_like(rank)
    ranks[order] = rank
    return wanted & (ranks < limit)


def _positions(chosen: Tensor, group: Tensor, right: bool = False) -> Tensor:
    """How many chosen rows are of a group before that of each row, or up to it (``right``): int64 [N].

    Searching waits for no GPU and adds nothing up, whose order could change from run to run.
    """
    last = torch.iinfo(torch.int64).max
    return torch.searchsorted(torch.where(chosen, group, last).sort().values, group, right=right)
