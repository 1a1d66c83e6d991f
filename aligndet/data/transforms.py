"""Reading, resizing, flipping and colour, on uint8 images; boxes stay on the pixels they mark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from aligndet.data.headers import file_bytes, is_truncated


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3] RGB, EXIF orientation applied; grey, alpha and 16 bit become 8-bit RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image that OpenCV can read, or only a part of one.
    """
    return decode_image(read_file(path), path)


def read_file(path: str | Path) -> np.ndarray:
    """The bytes of a file: uint8 [n]; errors of ``read_image``. (cv2.imread itself fails on some non-ASCII paths.)"""
    try:
        return file_bytes(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path}: no such file") from None
    except OSError as error:
        raise ValueError(f"image {path}: cannot be read: {error}") from None


def decode_image(data: np.ndarray, path: str | Path) -> np.ndarray:
    """``read_image`` of bytes read; ``path`` for messages. Half a file is refused, which OpenCV fills up with grey."""
    if is_truncated(data.tobytes()):
        raise ValueError(f"image {path}: truncated: the file ends before the image does ({data.size} bytes)")
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except cv2.error:
        image = None
    if image is None:
        raise ValueError(f"image {path}: not an image that can be decoded ({data.size} bytes)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def resized_size(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) px with the aspect kept: short side as wanted unless the long one would pass its bound.

    ``int(side * scale + 0.5)``, at least 1 (method section 1.0).
    """
    scale = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resize(image: Tensor, short_side: int, long_side: int) -> tuple[Tensor, Tensor]:
    """A uint8 [3, H, W] image at its new size, and what box coordinates are multiplied with: float32 [4].

    Width and height have factors of their own, from the rounded sizes.
    """
    height, width = image.shape[1:]
    new_height, new_width = resized_size((height, width), short_side, long_side)
    factors = torch.tensor([new_width / width, new_height / height] * 2, dtype=torch.float32)
    if (new_height, new_width) == (height, width):
        return image, factors
    pixels = image.permute(1, 2, 0).numpy()
    # Area averaging where the image shrinks, so that fine texture does not alias; bilinear where it grows.
    way = cv2.INTER_AREA if new_height < height else cv2.INTER_LINEAR
    changed = cv2.resize(pixels, (new_width, new_height), interpolation=way)
    return torch.from_numpy(changed).permute(2, 0, 1), factors


def flip(image: Tensor, boxes: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Mirror left and right about the image's own width: x' = W - x; boxes about another ``width``, where given."""
    width = image.shape[2] if width is None else width
    x0, y0, x1, y1 = boxes.unbind(1)
    return image.flip(2), torch.stack([width - x1, y0, width - x0, y1], dim=1)


def _factor(magnitude: int) -> float:
    return 0.1 + 0.18 * magnitude


# Magnitudes are whole numbers 1 .. 9 (method section 3).
COLOURS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "identity": lambda image, magnitude: image,
    "autocontrast": lambda image, magnitude: F.autocontrast(image),
    "equalize": lambda image, magnitude: F.equalize(image),
    "solarize": lambda image, magnitude: F.solarize(image, threshold=int(25.6 * magnitude)),
    "colour": lambda image, magnitude: F.adjust_saturation(image, _factor(magnitude)),
    "contrast": lambda image, magnitude: F.adjust_contrast(image, _factor(magnitude)),
    "brightness": lambda image, magnitude: F.adjust_brightness(image, _factor(magnitude)),
    "sharpness": lambda image, magnitude: F.adjust_sharpness(image, _factor(magnitude)),
    "posterize": lambda image, magnitude: F.posterize(image, bits=4 - int(0.4 * magnitude)),
}


def random_colour(image: Tensor, rng: np.random.Generator) -> Tensor:
    """One of the nine colour operations, uniformly, at a random magnitude; uint8 [3, H, W] in and out."""
    name = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    return COLOURS[name](image, int(rng.integers(1, 10)))
