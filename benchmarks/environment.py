"""What a benchmark ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import cv2
import numpy
import torch
import torchvision

import aligndet


def environment() -> dict[str, object]:
    """Library versions and hardware, as plain values for JSON."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    return {
        "aligndet": aligndet.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "opencv": cv2.__version__,
        "processor": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": len(names) or None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
