"""Reading, resizing and flipping, on uint8 images; boxes stay on the pixels they mark."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from aligndet.data.headers import ANY_DEPTH, file_bytes, is_truncated, unfit_samples

FLAGS = {
    1: ANY_DEPTH,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3] RGB, EXIF orientation applied; grey, alpha and 16 bit become 8-bit RGB.

    Of more than 8 bits the upper 8 that the image uses are kept (``eight_bits``), of several pages the first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image that OpenCV can read, or only a part of one, or has no integers of 8 or 16 bits.
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


def decode_image(data: np.ndarray, path: str | Path, reduction: int = 1) -> np.ndarray:
    """``read_image`` of bytes read; ``path`` for messages. Half a file is refused, which OpenCV fills up with grey.

    A ``reduction`` of 2, 4 or 8 decodes a JPEG at a fraction of its size: blocks of 8 x 8 px become 4 x 4, 2 x 2 or 1.
    """
    content = data.tobytes()
    if is_truncated(content):
        raise ValueError(f"image {path}: truncated: the file ends before the image does ({data.size} bytes)")
    unfit = unfit_samples(content)
    if unfit:
        raise ValueError(f"image {path}: want integers of 8 or 16 bits per channel, got {unfit}")
    try:
        image = cv2.imdecode(data, FLAGS[reduction]) if data.size else None
    except cv2.error:
        image = None
    if image is None:
        raise ValueError(f"image {path}: not an image that can be decoded ({data.size} bytes)")
    if image.dtype != np.uint8:
        try:
            image = eight_bits(image)
        except ValueError as error:
            raise ValueError(f"image {path}: {error}") from None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def eight_bits(image: np.ndarray) -> np.ndarray:
    """An integer image of any shape as uint8: divided by the smallest power of two that brings its maximum below 256.

    So 12 bits of a camera in a file of 16 are divided by 16, the full 16 bits by 256, and values below 256 stay.

    Raises:
        ValueError: other numbers than integers of 8 or 16 bits, or negative ones.
    """
    if image.dtype not in (np.uint8, np.int8, np.uint16, np.int16):
        raise ValueError(f"want integers of 8 or 16 bits per channel, got {image.dtype}")
    if image.dtype.kind == "i" and image.min() < 0:
        raise ValueError(f"want integers of 8 or 16 bits per channel from 0 on, got {image.min()}")
    return (image >> max(int(image.max()).bit_length() - 8, 0)).astype(np.uint8)


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
    changed = resampled(image.permute(1, 2, 0).numpy(), (new_height, new_width))
    return torch.from_numpy(changed).permute(2, 0, 1), factors


def resampled(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A uint8 [H, W, 3] image at ``size`` (height, width) px; itself where it has it.

    Halved by averaging 2 x 2 px while it is twice as large both ways or more, where bilinear would skip pixels and fine
    texture would alias; then bilinear.
    """
    if pixels.shape[:2] == size:
        return pixels
    height, width = float(pixels.shape[0]), float(pixels.shape[1])
    while height >= 2 * size[0] and width >= 2 * size[1]:
        odd = pixels.shape[0] % 2, pixels.shape[1] % 2
        if any(odd):
            pixels = cv2.copyMakeBorder(pixels, 0, odd[0], 0, odd[1], cv2.BORDER_REPLICATE)
        half = pixels.shape[1] // 2, pixels.shape[0] // 2
        pixels = cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)
        height, width = height / 2, width / 2
    if (height, width) != pixels.shape[:2]:  # half of the last pixel of an odd side lies beyond the image
        y, x = height / size[0], width / size[1]
        matrix = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2]])
        ways = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(pixels, matrix, size[::-1], flags=ways, borderMode=cv2.BORDER_REPLICATE)
    lopsided = height >= 2 * size[0] or width >= 2 * size[1]
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if lopsided else cv2.INTER_LINEAR)


def flip(image: Tensor, boxes: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Mirror left and right about the image's own width: x' = W - x; boxes about another ``width``, where given."""
    return image.flip(2), flip_boxes(boxes, image.shape[2] if width is None else width)


def flip_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes of an image of ``width`` px, mirrored left and right: x' = W - x."""
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=1)
