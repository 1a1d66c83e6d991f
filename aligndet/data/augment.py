"""Which part of an image becomes which size: plain resizing, DETR's crops, jitter of scale; boxes and masks follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from aligndet.data.decode import reduction_for
from aligndet.data.transforms import resampled, resized_size

Size = tuple[int, int]  # (height, width) px
UNLIMITED = 2**31  # px


@dataclass(frozen=True)
class Window:
    """A part of an image, and the size that it gets.

    A crop of a resized image is a part of the original that is resized once: nothing is computed that is cut off
    afterwards, and the pixels are resampled once, not twice.

    Attributes:
        top, left, height, width: px of the whole image.
        size: (height, width) px of the result.
    """

    top: int
    left: int
    height: int
    width: int
    size: Size

    def factors(self) -> Tensor:
        """What distances are multiplied with: float32 [4], two equal ones each for x and y."""
        return torch.tensor([self.size[1] / self.width, self.size[0] / self.height] * 2, dtype=torch.float32)

    def place(self, boxes: Tensor) -> Tensor:
        """Boxes of the whole image in px of the result, not clipped to it: float32 [m, 4]."""
        return (boxes - torch.tensor([self.left, self.top] * 2)) * self.factors()

    def cut(self, pixels: np.ndarray, image: Size, mirrored: bool = False) -> Tensor:
        """The part of an image of size ``image`` at its new size, perhaps mirrored left and right: uint8 [3, h, w].

        Args:
            pixels: uint8 [H, W, 3], the image or a reduction of it that the window's sides are multiples of.
        """
        reduction = image[0] // pixels.shape[0]
        rows, columns = (
            slice(start // reduction, (start + length) // reduction)
            for start, length in ((self.top, self.height), (self.left, self.width))
        )
        part = pixels[rows, columns]
        # Whichever is smaller is mirrored, and nothing is copied once more.
        early = mirrored and part.shape[0] * part.shape[1] < self.size[0] * self.size[1]
        resized = resampled(cv2.flip(part, 1) if early else part, self.size)
        resized = cv2.flip(resized, 1) if mirrored and not early else np.ascontiguousarray(resized)
        return torch.from_numpy(resized).permute(2, 0, 1)

    def cut_masks(self, masks: np.ndarray) -> Tensor:
        """The part of masks bool [m, H, W] of the whole image at its new size; the nearest pixel decides."""
        part = masks[:, self.top : self.top + self.height, self.left : self.left + self.width]
        cut = np.zeros((len(masks), *self.size), dtype=np.uint8)
        for mask, place in zip(part, cut, strict=True):
            wanted = (self.size[1], self.size[0])
            cv2.resize(mask.view(np.uint8), wanted, dst=place, interpolation=cv2.INTER_NEAREST_EXACT)
        return torch.from_numpy(cut).view(torch.bool)


Draw = Callable[[Size, np.random.Generator], Window]


def plain_window(image: Size, rng: np.random.Generator, *, short_sides: tuple[int, ...], long_side: int) -> Window:
    """The whole image with one of ``short_sides``, unless its long side would pass ``long_side`` (px)."""
    size = resized_size(image, int(rng.choice(short_sides)), long_side)
    return Window(0, 0, *image, size)


def detr_window(
    image: Size,
    rng: np.random.Generator,
    *,
    short_sides: tuple[int, ...],
    long_side: int,
    first_sides: tuple[int, ...],
    crop_sides: tuple[int, int],
) -> Window:
    """DETR's recipe: half of the samples as ``plain_window``, the others cropped before.

    Args:
        short_sides, long_side: px, of the result.
        first_sides: px, one drawn as the short side of the image that the crop is taken from.
        crop_sides: px, least and largest height and width of the crop in it, drawn uniformly and apart.

    Source:
        DETR's datasets/coco.py (method section 5.3): 400, 500, 600; 384 to 600.
    """
    if rng.random() < 0.5:
        return plain_window(image, rng, short_sides=short_sides, long_side=long_side)
    first = resized_size(image, int(rng.choice(first_sides)), UNLIMITED)
    height, width = (int(rng.integers(min(crop_sides[0], n), min(crop_sides[1], n), endpoint=True)) for n in first)
    part = _part(image, first, (height, width), rng)
    return replace(part, size=resized_size((part.height, part.width), int(rng.choice(short_sides)), long_side))


def jitter_window(image: Size, rng: np.random.Generator, *, size: int, scale: tuple[float, float]) -> Window:
    """Large-scale jitter: the image at a random scale, and of that a random part of at most ``size`` x ``size`` px.

    Args:
        size: px; at scale 1 the long side of the image is as long.
        scale: least and largest, drawn uniformly.

    Source:
        Simple Copy-Paste (arXiv:2012.07177): 0.1 to 2.0; standard jitter is 0.8 to 1.25.
    """
    long_side = max(1, int(size * rng.uniform(*scale) + 0.5))
    resized = resized_size(image, long_side, long_side)
    return _part(image, resized, (min(size, resized[0]), min(size, resized[1])), rng)


def _part(image: Size, resized: Size, crop: Size, rng: np.random.Generator) -> Window:
    """A random part of an image that is of ``crop`` px where the image is of ``resized`` px; whole px of the image."""
    places = []
    for whole, length, wanted in zip(image, resized, crop, strict=True):
        extent = min(whole, max(1, round(whole * wanted / length)))
        places.append((int(rng.integers(whole - extent, endpoint=True)), extent))
    (top, height), (left, width) = places
    return Window(top, left, height, width, crop)


def reduced(window: Window, image: Size) -> tuple[Window, int]:
    """The window with its edges on pixels of a reduced JPEG of the image, and how strongly that may be reduced.

    Alike for all formats, so that crops do not depend on them. A window of the whole image stays as it is.
    """
    reduction = reduction_for((window.height, window.width), [window.size], image)
    edges = (window.top, window.left, window.height, window.width)
    top, left, height, width = (edge // reduction * reduction for edge in edges)
    return Window(top, left, height, width, window.size), reduction


def follow_masks(boxes: Tensor, placed: Tensor, masks: Tensor) -> Tensor:
    """Boxes that a crop has cut, drawn together to what is left of their masks.

    Args:
        boxes: float32 [m, 4], clipped to the crop.
        placed: float32 [m, 4], before that.
        masks: bool [m, h, w] of the crop.

    Returns:
        float32 [m, 4]; without area where the mask is empty.
    """
    cut = ((boxes - placed).abs() > 0.01).any(dim=1)
    hulls = torch.stack([_hull(mask) for mask in masks]) if len(masks) else boxes
    tight = torch.cat([torch.maximum(boxes[:, :2], hulls[:, :2]), torch.minimum(boxes[:, 2:], hulls[:, 2:])], dim=1)
    empty = (hulls[:, 2:] <= hulls[:, :2]).any(dim=1)
    return torch.where(cut[:, None], tight, boxes).masked_fill(empty[:, None], 0.0)


def _hull(mask: Tensor) -> Tensor:
    """The box around a mask: float32 [4], zeros for an empty one."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    if not len(rows):
        return torch.zeros(4)
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def wide_enough(boxes: Tensor, least: float) -> Tensor:
    """Which boxes have sides of at least ``least`` px: bool [m]."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= least).all(dim=1)
