"""State dicts of other libraries in and out: each peer has ``from_state_dict`` and ``to_state_dict``."""

from aligndet.interop import detr, torchvision

__all__ = ["detr", "torchvision"]
