"""Two random crops of each image, for pre-training a backbone in the image domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from aligndet.data.batch import Sample
from aligndet.data.retry import first_readable
from aligndet.data.stream import drawn
from aligndet.data.transforms import flip, read_image


class CropPairs(Dataset[tuple[Sample, Sample]]):
    """Images of a folder, each as two crops of one size with strong colour changes and no boxes.

    Asked for as (index, position), like ``ViewPairs``.

    Args:
        root: folder.
        names: files relative to it.
        size: px, side of the crops.
        scale: least and largest share of the image's area in a crop; its aspect is in 3/4 .. 4/3.
        flip_probability: of the horizontal flip.
        on_error: "skip" or "fail", as for ``ViewPairs``.

    Source:
        The augmentation of SimSiam (arXiv:2011.10566, appendix A).
    """

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        *,
        size: int,
        scale: tuple[float, float] = (0.2, 1.0),
        flip_probability: float = 0.5,
        on_error: str = "skip",
        seed: int = 0,
    ) -> None:
        self.root, self.names, self.size, self.scale = Path(root), tuple(names), size, scale
        self.flip_probability, self.on_error, self.seed = flip_probability, on_error, seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Sample, Sample]:
        index, position = drawn(key)
        (row, pixels), skipped = first_readable(self._load, index, len(self), self.on_error)
        rng = np.random.default_rng((self.seed, position))
        return self._crop(pixels, row, rng, skipped), self._crop(pixels, row, rng, skipped)

    def _load(self, index: int) -> tuple[int, np.ndarray]:
        return index, read_image(self.root / self.names[index])

    def _crop(self, pixels: np.ndarray, row: int, rng: np.random.Generator, skipped: tuple[str, ...]) -> Sample:
        top, left, height, width = _region((pixels.shape[0], pixels.shape[1]), self.scale, rng)
        part = pixels[top : top + height, left : left + width]
        way = cv2.INTER_AREA if height > self.size else cv2.INTER_LINEAR
        image = torch.from_numpy(cv2.resize(part, (self.size, self.size), interpolation=way)).permute(2, 0, 1)
        boxes, nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        if rng.random() < self.flip_probability:
            image, boxes = flip(image, boxes)
        image = _strong_colour(image, rng)
        return Sample(image, boxes, nothing, nothing, (pixels.shape[0], pixels.shape[1]), row, skipped)


def _region(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop; the whole image where ten draws do not fit."""
    for _ in range(10):
        area = size[0] * size[1] * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        height, width = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < height <= size[0] and 0 < width <= size[1]:
            top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
            return int(top), int(left), height, width
    return 0, 0, size[0], size[1]


def _strong_colour(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Jitter 0.4, 0.4, 0.4, 0.1 with p 0.8 in random order; grey with p 0.2; blur 0.1 .. 2 px with p 0.5."""
    if rng.random() < 0.8:
        brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
        hue = rng.uniform(-0.1, 0.1)
        for operation in rng.permutation(4):
            if operation == 0:
                image = F.adjust_brightness(image, brightness)
            elif operation == 1:
                image = F.adjust_contrast(image, contrast)
            elif operation == 2:
                image = F.adjust_saturation(image, saturation)
            else:
                image = F.adjust_hue(image, hue)
    if rng.random() < 0.2:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if rng.random() < 0.5:
        blurred = cv2.GaussianBlur(image.permute(1, 2, 0).contiguous().numpy(), (0, 0), rng.uniform(0.1, 2.0))
        image = torch.from_numpy(blurred).permute(2, 0, 1)
    return image
