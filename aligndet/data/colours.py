"""The colour operations of pre-training, on uint8 images, by tables of 256 values and OpenCV's filters."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

GREY = (0.2989, 0.587, 0.114)  # of red, green and blue, as in torchvision
_RAMP = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)


def draw_colour(rng: np.random.Generator) -> tuple[str, int]:
    """A name of ``COLOURS``, uniformly, and its magnitude, a whole number 1 .. 9 (method section 3)."""
    name = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    return name, int(rng.integers(1, 10))


def _factor(magnitude: int) -> float:
    return 0.1 + 0.18 * magnitude


def _pixels(image: Tensor) -> np.ndarray:
    """The same memory as [H, W, 3] where it is laid out so, as that of images read from files is; else a copy."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _image(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _looked_up(image: Tensor, table: Tensor) -> Tensor:
    """Each value replaced by its entry of ``table``: uint8 [256], or [3, 256] for one table per channel."""
    shaped = table.numpy() if table.ndim == 1 else np.ascontiguousarray(table.T.numpy())[None]
    return _image(cv2.LUT(_pixels(image), shaped))


def _autocontrast(image: Tensor, magnitude: int) -> Tensor:
    """Torchvision's operation on a ramp that spans what each channel of the image spans."""
    channels = cv2.split(_pixels(image))
    tables = []
    for low, high, _, _ in map(cv2.minMaxLoc, channels):
        ramp = torch.arange(256, dtype=torch.uint8).clamp(int(low), int(high)).reshape(1, 1, 256)
        tables.append(F.autocontrast(ramp)[0, 0])
    return _looked_up(image, torch.stack(tables))


def _equalize(image: Tensor, magnitude: int) -> Tensor:
    """The values of each channel spread so that all are about as frequent, as Pillow does it."""
    tables, pixels = [], _pixels(image)
    for channel in range(3):
        counts = torch.from_numpy(cv2.calcHist([pixels], [channel], None, [256], [0, 256]).reshape(256)).long()
        step = (pixels.shape[0] * pixels.shape[1] - int(counts[counts.nonzero()[-1]])) // 255
        below = counts.cumsum(0) - counts
        same = torch.arange(256)
        tables.append((torch.div(below + step // 2, step, rounding_mode="floor") if step else same).clamp(0, 255))
    return _looked_up(image, torch.stack(tables).to(torch.uint8))


def _solarize(image: Tensor, magnitude: int) -> Tensor:
    return _looked_up(image, F.solarize(_RAMP, threshold=int(25.6 * magnitude))[0, 0])


def _brightness(image: Tensor, magnitude: int) -> Tensor:
    return _looked_up(image, F.adjust_brightness(_RAMP, _factor(magnitude))[0, 0])


def _contrast(image: Tensor, magnitude: int) -> Tensor:
    """Values drawn to, or pushed from, the mean grey of the image."""
    factor, pixels = _factor(magnitude), _pixels(image)
    grey = cv2.transform(pixels, np.array([[*GREY, -0.5]], np.float32))  # rounded, less a half: cut off as there
    ramp = torch.arange(256, dtype=torch.float32)
    return _looked_up(image, (ramp * factor + (1 - factor) * cv2.mean(grey)[0]).clamp(0, 255).to(torch.uint8))


def _colour(image: Tensor, magnitude: int) -> Tensor:
    """Each pixel drawn to, or pushed from, its own grey."""
    factor = _factor(magnitude)
    mixed = factor * np.eye(3) + (1 - factor) * np.array([GREY])
    # OpenCV rounds to the nearest value, torchvision cuts off.
    return _image(cv2.transform(_pixels(image), np.hstack([mixed, np.full((3, 1), -0.5)]).astype(np.float32)))


def _sharpness(image: Tensor, magnitude: int) -> Tensor:
    """Pixels drawn to, or pushed from, a smoothed image; those of the border stay."""
    factor, pixels = _factor(magnitude), _pixels(image)
    if min(pixels.shape[:2]) <= 2:
        return image
    smooth = np.ones((3, 3), np.float32) / 13
    smooth[1, 1] *= 5
    sharp = np.float32(1 - factor) * smooth
    sharp[1, 1] += np.float32(factor)
    result = cv2.filter2D(pixels, -1, sharp)
    for row in (0, -1):
        result[row], result[:, row] = pixels[row], pixels[:, row]
    return _image(result)


# Equal to torchvision's up to one level; brightness, solarize, posterize, autocontrast and equalize exactly.
COLOURS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "identity": lambda image, magnitude: image,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "solarize": _solarize,
    "colour": _colour,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "posterize": lambda image, magnitude: F.posterize(image, bits=4 - int(0.4 * magnitude)),
}
