"""Anchors and regions belong to the box that they overlap most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from aligndet.ops.boxes import area, iou_matrix, overlap_areas
from aligndet.ops.counts import counts_of
from aligndet.structures import BACKGROUND, IGNORED, Targets

# Candidate-box pairs looked at in one go: bounds memory for crowded images, about 200 MiB.
PAIRS = 2**23


@dataclass(frozen=True)
class IoUAssigner:
    """Matches by intersection over union.

    In this order: below ``negative`` with every box is BACKGROUND, from ``positive`` on the box of the largest overlap
    (of equal ones the first), in between IGNORED. Then, with ``low_quality``, the candidates that overlap a box most,
    all of those that tie, are given to it where that overlap is at least ``least`` and above 0; of several such boxes
    the last wins.

    Attributes:
        positive, negative: thresholds of the overlap, negative <= positive.
        least: smallest overlap of a low-quality match.
        low_quality: whether each box takes the candidates nearest to it.
        ties: False gives a box only the first of its nearest candidates.
        crowd: a candidate that would be BACKGROUND is IGNORED if at least this share of its own area lies in one of
            the ``crowds`` of its image.

    Source:
        Method section 1.0. Departures: there a box that nothing overlaps takes, with ``least`` 0, everything that
        overlaps nothing; and crowds are background.
    """

    positive: float
    negative: float
    least: float = 0.0
    low_quality: bool = True
    ties: bool = True
    crowd: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.negative <= self.positive <= 1:
            raise ValueError(f"want 0 <= negative <= positive <= 1, got {self.negative} and {self.positive}")
        if not 0 < self.crowd <= 1:
            raise ValueError(f"crowd: want a share above 0 and at most 1, got {self.crowd}")

    @record_function("assignment")
    def __call__(self, candidates: Sequence[Tensor], targets: Targets, *, allowed: Tensor | None = None) -> Tensor:
        """The row of ``targets`` for each candidate of each image.

        Args:
            candidates: per image float [N_b, 4] xyxy px.
            targets: M boxes, in the order of their images, and their crowds.
            allowed: bool [sum of N_b]; others are IGNORED and take no part.

        Returns:
            int64 [sum of N_b], images one after another.
        """
        images = len(candidates)
        counts = counts_of(targets.image, images)
        crowds, crowd_image = targets.crowds, targets.crowd_image
        if crowd_image is not None:
            counts = torch.cat([counts, counts_of(crowd_image, images)])
        numbers = counts.tolist()  # the one host synchronisation
        starts = [sum(numbers[:image]) for image in range(images)]
        masks = allowed.split([len(boxes) for boxes in candidates]) if allowed is not None else None
        parts, first = [], 0
        for image, boxes in enumerate(candidates):
            start, number = starts[image], numbers[image]
            mask = None if masks is None else masks[image]
            rows = self._image(boxes, targets.boxes[start : start + number], mask)
            rows = torch.where(rows >= 0, rows + start, rows)
            if crowds is not None:
                regions = crowds[first : first + numbers[images + image]]
                first += len(regions)
                rows = torch.where((rows == BACKGROUND) & _covered(boxes, regions, self.crowd), IGNORED, rows)
            parts.append(rows)
        return torch.cat(parts)

    def _image(self, candidates: Tensor, boxes: Tensor, allowed: Tensor | None) -> Tensor:
        """Row of ``boxes``, BACKGROUND or IGNORED: int64 [N]."""
        if not len(boxes) or not len(candidates):
            rows = torch.full((len(candidates),), BACKGROUND, dtype=torch.int64, device=candidates.device)
            return rows if allowed is None else torch.where(allowed, rows, IGNORED)
        chunk = max(1, PAIRS // len(boxes))
        starts = range(0, len(candidates), chunk)
        overlaps = [] if len(starts) > 1 else [self._overlaps(candidates, boxes, allowed)]
        best = torch.full((len(boxes),), -1.0, device=boxes.device)
        nearest = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        if self.low_quality:
            for start in starts:
                part = slice(start, start + chunk)
                overlap = overlaps[0] if overlaps else self._overlaps(candidates[part], boxes, _cut(allowed, part))
                value = overlap.amax(dim=0)
                # argmax may return any of several equal values: the lowest row is taken by hand.
                row = (overlap == value).to(torch.int8).argmax(dim=0) + start
                nearest = torch.where(value > best, row, nearest)
                best = torch.maximum(best, value)
        parts = []
        for start in starts:
            part = slice(start, start + chunk)
            overlap = overlaps[0] if overlaps else self._overlaps(candidates[part], boxes, _cut(allowed, part))
            parts.append(self._rows(overlap, best, nearest, start))
        return torch.cat(parts)

    @staticmethod
    def _overlaps(candidates: Tensor, boxes: Tensor, allowed: Tensor | None) -> Tensor:
        """IoU [N, M]; -1 for candidates that take no part."""
        overlap = iou_matrix(candidates.float(), boxes.float())
        return overlap if allowed is None else torch.where(allowed[:, None], overlap, -1.0)

    def _rows(self, overlap: Tensor, best: Tensor, nearest: Tensor, start: int) -> Tensor:
        value = overlap.amax(dim=1)
        first = (overlap == value[:, None]).to(torch.int8).argmax(dim=1)
        rows = torch.where(value < self.negative, BACKGROUND, IGNORED)
        rows = torch.where(value >= self.positive, first, rows)
        if self.low_quality:
            number = torch.arange(start, start + len(overlap), device=overlap.device)
            claimed = overlap == best if self.ties else number[:, None] == nearest
            claimed &= (best >= self.least) & (best > 0)
            last = torch.where(claimed, torch.arange(len(best), device=best.device), -1).amax(dim=1)
            rows = torch.where(last >= 0, last, rows)
        return torch.where(value < 0, IGNORED, rows)


def _cut(allowed: Tensor | None, part: slice) -> Tensor | None:
    return None if allowed is None else allowed[part]


def _covered(candidates: Tensor, regions: Tensor, share: float) -> Tensor:
    """Whether at least ``share`` of each candidate's area lies in one of the regions: bool [N]."""
    if not len(regions):
        return torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device)
    inside = overlap_areas(candidates.float(), regions.float()).amax(dim=1)
    return inside >= share * area(candidates.float()).clamp(min=torch.finfo(torch.float32).tiny)
