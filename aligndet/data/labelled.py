"""Labelled images, for fine-tuning and for evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from aligndet.data.annotations import Annotations
from aligndet.data.batch import Sample
from aligndet.data.retry import first_readable
from aligndet.data.transforms import flip, read_image, resize
from aligndet.ops.boxes import clip


class LabelledImages(Dataset[Sample]):
    """Images of an annotation file with their boxes, resized and flipped at random.

    Asked for as (index, position), like ``ViewPairs``. Images without a box are left out and counted in
    ``without_boxes``; crowd regions are no targets, but travel with them.

    Args:
        annotations: boxes and labels.
        root: folder that the file names are relative to.
        rows: int64, which images of the file; None: all.
        short_sides: px, one drawn per sample.
        long_side: px, upper bound.
        flip_probability: of the horizontal flip.
        crowds: False leaves crowd regions out: they are background then, as in the reference.
        on_error: "skip" takes the next image for one that cannot be read.

    Raises:
        ValueError: no image has a box.
    """

    def __init__(
        self,
        annotations: Annotations,
        root: str | Path,
        *,
        short_sides: tuple[int, ...],
        long_side: int,
        rows: np.ndarray | None = None,
        flip_probability: float = 0.5,
        crowds: bool = True,
        on_error: str = "skip",
        seed: int = 0,
    ) -> None:
        self.annotations, self.root = annotations, Path(root)
        wanted = np.arange(len(annotations)) if rows is None else rows
        self.rows = np.array([row for row in wanted.tolist() if len(annotations.rows_of(row))], dtype=np.int64)
        self.without_boxes = len(wanted) - len(self.rows)
        if not len(self.rows):
            raise ValueError(f"annotations {annotations.path}: none of the {len(wanted)} images has a usable box")
        self.short_sides, self.long_side = short_sides, long_side
        self.flip_probability, self.crowds, self.on_error, self.seed = flip_probability, crowds, on_error, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, position = key
        (row, pixels), skipped = first_readable(self._load, index, len(self), self.on_error)
        rng = np.random.default_rng((self.seed, position))
        image, factors = resize(pixels, int(rng.choice(self.short_sides)), self.long_side)
        boxes, labels, rows = _targets(self.annotations, row, pixels)
        boxes = boxes * factors
        crowds = _crowds(self.annotations, row, pixels) * factors if self.crowds else None
        masks = None if self.annotations.masks is None else _masks(self.annotations, rows, pixels, image)
        if rng.random() < self.flip_probability:
            crowds = None if crowds is None else flip(image, crowds)[1]
            image, boxes = flip(image, boxes)
            masks = None if masks is None else masks.flip(2)
        original = (pixels.shape[1], pixels.shape[2])
        image_id = int(self.annotations.image_ids[row])
        return Sample(image, boxes, labels, torch.arange(len(boxes)), original, image_id, skipped, masks, crowds)

    def _load(self, index: int) -> tuple[int, Tensor]:
        row = int(self.rows[index])
        return row, _read(self.annotations, self.root, row)


class EvaluationImages(Dataset[Sample]):
    """All images of an annotation file, in its order, at one size; asked for by index.

    An unreadable image is an error that names it; with ``on_error`` "skip" it becomes a blank image that says so in
    ``Sample.skipped``, so that its objects count as missed.
    """

    def __init__(
        self, annotations: Annotations, root: str | Path, *, short_side: int, long_side: int, on_error: str = "skip"
    ) -> None:
        self.annotations, self.root = annotations, Path(root)
        self.short_side, self.long_side, self.on_error = short_side, long_side, on_error

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        skipped: tuple[str, ...] = ()
        try:
            pixels = _read(self.annotations, self.root, index)
        except (ValueError, FileNotFoundError) as error:
            if self.on_error == "fail":
                raise
            skipped = (str(error),)
            height, width = np.maximum(self.annotations.sizes[index], 1).tolist()
            pixels = torch.zeros(3, height, width, dtype=torch.uint8)
        image, factors = resize(pixels, self.short_side, self.long_side)
        boxes, labels, _ = _targets(self.annotations, index, pixels)
        original = (pixels.shape[1], pixels.shape[2])
        image_id = int(self.annotations.image_ids[index])
        return Sample(image, boxes * factors, labels, torch.arange(len(boxes)), original, image_id, skipped)


def wrong_size(annotations: Annotations, row: int, size: tuple[int, int]) -> str:
    """How the ``size`` (height, width) px of an image differs from what its labels say; "" where it does not."""
    height, width = annotations.sizes[row].tolist()
    if min(height, width) == 0 or (height, width) == size:
        return ""
    return f"{annotations.path} says {width} x {height} px, the file has {size[1]} x {size[0]}"


def _read(annotations: Annotations, root: Path, row: int) -> Tensor:
    path = root / annotations.file_names[row]
    image = read_image(path)
    wrong = wrong_size(annotations, row, (image.shape[0], image.shape[1]))
    if wrong:
        raise ValueError(f"image {path}: {wrong}")
    return torch.from_numpy(image).permute(2, 0, 1)


def _targets(annotations: Annotations, row: int, pixels: Tensor) -> tuple[Tensor, Tensor, np.ndarray]:
    """Boxes, labels and rows of an image; clipped here: a file without image sizes could not be on reading."""
    rows = annotations.rows_of(row)
    boxes = clip(torch.from_numpy(annotations.boxes[rows]), torch.tensor(pixels.shape[1:]))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[inside], torch.from_numpy(annotations.labels[rows])[inside], rows[inside.numpy()]


def _crowds(annotations: Annotations, row: int, pixels: Tensor) -> Tensor:
    """The crowd regions of an image, clipped to it: float32 [r, 4] xyxy px."""
    boxes = clip(torch.from_numpy(annotations.crowds_of(row)), torch.tensor(pixels.shape[1:]))
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]


def _masks(annotations: Annotations, rows: np.ndarray, pixels: Tensor, image: Tensor) -> Tensor:
    """The masks of boxes at the size of the resized ``image``: bool [m, H, W]; the nearest pixel decides."""
    masks = torch.from_numpy(annotations.masks_of(rows, (pixels.shape[1], pixels.shape[2])))
    if masks.shape[1:] == image.shape[1:] or not len(masks):
        return masks.new_zeros(0, *image.shape[1:]) if not len(masks) else masks
    resized = F.interpolate(masks[:, None].to(torch.uint8), size=image.shape[1:], mode="nearest-exact")
    return resized[:, 0].bool()
