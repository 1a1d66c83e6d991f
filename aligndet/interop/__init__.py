"""State dicts of other libraries in and out: each peer has ``from_state_dict`` and ``to_state_dict``."""

from aligndet.interop import detectron2, detr, mmdet, torchvision

__all__ = ["detectron2", "detr", "mmdet", "torchvision"]
