"""Which candidate belongs to which box."""

from aligndet.assigners.center import assign_center
from aligndet.assigners.hungarian import HungarianAssigner
from aligndet.assigners.iou import IoUAssigner
from aligndet.assigners.sampling import PositivesFirst

__all__ = ["HungarianAssigner", "IoUAssigner", "PositivesFirst", "assign_center"]
