"""Pre-train whole object detectors without labels, fine-tune them with few."""

from aligndet import data, evaluate, interop, losses, weights
from aligndet.config import Config, load_config
from aligndet.finetune import FineTune
from aligndet.models import build_detector
from aligndet.predict import predict
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.structures import BACKGROUND, IGNORED, Batch, Candidates, Detections, Targets
from aligndet.version import __version__

__all__ = [
    "BACKGROUND",
    "IGNORED",
    "AlignDet",
    "Batch",
    "Candidates",
    "Config",
    "Detections",
    "Detector",
    "FineTune",
    "Targets",
    "__version__",
    "build_detector",
    "data",
    "evaluate",
    "interop",
    "load_config",
    "losses",
    "predict",
    "weights",
]
