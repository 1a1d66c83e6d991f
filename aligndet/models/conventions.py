"""How the same detectors are computed elsewhere: what ``conventions="torchvision"`` and its like stand for.

Weights trained in another library only mean the same boxes if grids, coders and thresholds are the same, too.
``aligndet`` is method section 1; the others serve ``aligndet.interop``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from aligndet.models.priors import AnchorShapes, octaves

DENSE_STRIDES, REGION_STRIDES = (8, 16, 32, 64, 128), (4, 8, 16, 32, 64)  # px
Rules = TypeVar("Rules")


@dataclass(frozen=True)
class DenseRules:
    """FCOS.

    Attributes:
        grid: of the points, one of ``priors.GRIDS``.
        linear: distances are strides times a rectified output, not the exponential of a scaled one.
        biased: convolutions of the towers have a bias although a norm follows.
        beside_box: centerness is read from the box tower, and ranking and threshold see the square root of its product
            with the class score.
        overlap: of the suppression.
    """

    grid: str = "centre"
    linear: bool = False
    biased: bool = False
    beside_box: bool = False
    overlap: float = 0.5


@dataclass(frozen=True)
class AnchorRules:
    """RetinaNet.

    Attributes:
        extra: what P6 is made of, one of ``fpn.EXTRAS``.
        relu: between P6 and P7.
        norm: group norm in the towers.
        sizes: of the anchors per level px, None: ``octaves``.
        grid, whole: of the anchors, see ``AnchorShapes``.
        shrink: boxes become at most 62.5 times smaller than their anchors, too.
        most: detections per image.
    """

    extra: str = "input"
    relu: bool = False
    norm: bool = False
    sizes: tuple[tuple[float, ...], ...] | None = None
    grid: str = "corner"
    whole: bool = False
    shrink: bool = True
    most: int = 100

    def shapes(self, strides: tuple[int, ...]) -> AnchorShapes:
        """The anchors of pyramid levels of the given strides."""
        sizes = octaves(strides) if self.sizes is None else self.sizes[: len(strides)]
        return AnchorShapes(sizes, grid=self.grid, whole=self.whole)


@dataclass(frozen=True)
class RegionRules:
    """Faster and Mask R-CNN.

    Attributes:
        sampling_ratio, aligned: of RoIAlign.
        grid, whole: of the RPN's anchors, see ``AnchorShapes``.
        low_quality: each box takes the regions nearest to it in the second stage.
        spare: boxes and masks have an output for the background that nothing reads.
        shrink: as in AnchorRules.
        least: px, shorter sides are dropped: of proposals, of detections; None keeps all, and proposals with any area.
        snapped: masks are pasted into whole pixels.
    """

    sampling_ratio: int = 0
    aligned: bool = True
    grid: str = "corner"
    whole: bool = False
    low_quality: bool = True
    spare: bool = False
    shrink: bool = True
    least: tuple[float, float] | None = None
    snapped: bool = False


_TRUNCATED = tuple(tuple(float(int(4 * stride * 2 ** (i / 3))) for i in range(3)) for stride in DENSE_STRIDES)

DENSE = {
    "aligndet": DenseRules(),
    "torchvision": DenseRules("fitted", linear=True, biased=True, beside_box=True, overlap=0.6),
}
ANCHORS = {
    "aligndet": AnchorRules(),
    "torchvision": AnchorRules("output", True, False, _TRUNCATED, "fitted", whole=True, shrink=False, most=300),
    "torchvision_v2": AnchorRules("input", True, True, _TRUNCATED, "fitted", whole=True, shrink=False, most=300),
    "detectron2": AnchorRules("input", True, shrink=False),
}
REGIONS = {
    "aligndet": RegionRules(),
    "torchvision": RegionRules(2, False, "fitted", True, False, True, False, (1e-3, 1e-2), True),
    "detectron2": RegionRules(low_quality=False, shrink=False),
    "mmdet": RegionRules(low_quality=False),
}


def rules_of(table: Mapping[str, Rules], name: str) -> Rules:
    """A row of one of the tables.

    Raises:
        ValueError: there is no such row.
    """
    if name not in table:
        near = difflib.get_close_matches(name, list(table), n=1, cutoff=0.0)[0]
        raise ValueError(f"conventions: want one of {', '.join(table)}, got {name!r}; the nearest is {near!r}")
    return table[name]
