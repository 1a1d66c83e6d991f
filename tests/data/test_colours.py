"""Colours by tables and OpenCV's filters are torchvision's operations, to the last level or to one."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from aligndet.data.colours import COLOURS, draw_colour

# Largest difference in levels. Mixing with grey or a smoothed image rounds in another place.
ALLOWED = dict.fromkeys(COLOURS, 0) | {"colour": 1, "sharpness": 1}


def of_torchvision(name: str, magnitude: int) -> Callable[[Tensor], Tensor]:
    factor = 0.1 + 0.18 * magnitude
    return {
        "identity": lambda image: image,
        "autocontrast": F.autocontrast,
        "equalize": F.equalize,
        "solarize": lambda image: F.solarize(image, threshold=int(25.6 * magnitude)),
        "colour": lambda image: F.adjust_saturation(image, factor),
        "contrast": lambda image: F.adjust_contrast(image, factor),
        "brightness": lambda image: F.adjust_brightness(image, factor),
        "sharpness": lambda image: F.adjust_sharpness(image, factor),
        "posterize": lambda image: F.posterize(image, bits=4 - int(0.4 * magnitude)),
    }[name]


def random_image(case: int, rng: np.random.Generator) -> np.ndarray:
    """Noise, smooth patches, one level, few levels, one channel empty; from 1 x 1 px on."""
    height, width = (1, 1) if case == 0 else rng.integers(1, 90, 2).tolist()
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    kinds = (
        noise,
        cv2.GaussianBlur(noise, (0, 0), 2.0),
        np.full_like(noise, rng.integers(256)),
        (noise // 40 + rng.integers(0, 200)).astype(np.uint8),
        noise * np.array([1, 0, 1], np.uint8),
    )
    return kinds[case % len(kinds)].reshape(height, width, 3)


@pytest.mark.parametrize("name", list(COLOURS))
def test_colours_are_those_of_torchvision(name: str) -> None:
    rng = np.random.default_rng(11)
    for case in range(60):
        image = torch.from_numpy(random_image(case, rng)).permute(2, 0, 1)
        before = image.clone()
        for magnitude in range(1, 10):
            expected = of_torchvision(name, magnitude)(image)
            for ours in (COLOURS[name](image, magnitude), COLOURS[name](image.contiguous(), magnitude)):
                assert ours.dtype == torch.uint8
                assert ours.shape == image.shape
                difference = (ours.int() - expected.int()).abs().max().item()
                assert difference <= ALLOWED[name], (name, case, magnitude, tuple(image.shape), difference)
        assert torch.equal(image, before), "nothing is changed in place: the other view has the same pixels"


def test_all_operations_and_magnitudes_are_drawn() -> None:
    rng = np.random.default_rng(0)
    drawn = {draw_colour(rng) for _ in range(2000)}
    assert drawn == {(name, magnitude) for name in COLOURS for magnitude in range(1, 10)}
