"""Losses as plain functions."""

from aligndet.losses.boxes import centerness_of, giou_loss, iou_loss
from aligndet.losses.contrastive import box_contrastive_loss
from aligndet.losses.focal import sigmoid_focal_loss

__all__ = ["box_contrastive_loss", "centerness_of", "giou_loss", "iou_loss", "sigmoid_focal_loss"]
