"""Faster R-CNN with a feature pyramid; Ren et al. (arXiv:1506.01497), Lin et al. (arXiv:1612.03144)."""

from __future__ import annotations

from aligndet.models.two_stage import TwoStage


class FasterRCNN(TwoStage):
    """Boxes and classes of regions; everything it is made of stands in ``two_stage``."""
