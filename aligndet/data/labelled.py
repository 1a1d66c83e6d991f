"""Labelled images, for fine-tuning and for evaluation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from aligndet.data.annotations import Annotations
from aligndet.data.augment import Draw, Size, Window, follow_masks, plain_window, reduced, wide_enough
from aligndet.data.batch import Sample
from aligndet.data.decode import open_picture
from aligndet.data.folder import place_of
from aligndet.data.headers import image_size
from aligndet.data.retry import first_readable
from aligndet.data.stream import drawn
from aligndet.data.transforms import flip_boxes, read_image, resize
from aligndet.ops.boxes import clip

LEAST_SIDE = 1.0  # px; an object of which a crop leaves less, in height or width, is left out


class _Loaded(NamedTuple):
    """An image of ``size`` (height, width) px, perhaps decoded smaller, and what becomes of it."""

    row: int
    size: Size
    pixels: np.ndarray
    window: Window
    mirrored: bool


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
        window: draws the part of each image and its new size, instead of the whole at one of ``short_sides``.
        flip_probability: of the horizontal flip.
        crowds: False leaves crowd regions out: they are background then, as in the reference.
        fast_decode: decode large JPEGs at 1/2, 1/4 or 1/8 where that is no smaller than what is wanted.
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
        window: Draw | None = None,
        flip_probability: float = 0.5,
        crowds: bool = True,
        fast_decode: bool = True,
        on_error: str = "skip",
        seed: int = 0,
    ) -> None:
        self.annotations, self.root = annotations, Path(root)
        wanted = np.arange(len(annotations)) if rows is None else rows
        self.rows = np.array([row for row in wanted.tolist() if len(annotations.rows_of(row))], dtype=np.int64)
        self.without_boxes = len(wanted) - len(self.rows)
        if not len(self.rows):
            raise ValueError(f"annotations {annotations.path}: {_nothing(annotations, len(wanted))}")
        self.crops = window is not None
        self.window = window or partial(plain_window, short_sides=short_sides, long_side=long_side)
        self.flip_probability, self.crowds, self.on_error, self.seed = flip_probability, crowds, on_error, seed
        self.fast_decode = fast_decode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, position = drawn(key)
        loaded, skipped = first_readable(partial(self._load, position), index, len(self), self.on_error)
        image = loaded.window.cut(loaded.pixels, loaded.size, loaded.mirrored)
        boxes, labels, masks = self._objects(loaded)
        crowds = self._crowds(loaded) if self.crowds else None
        if loaded.mirrored:
            crowds = None if crowds is None else flip_boxes(crowds, image.shape[2])
            boxes = flip_boxes(boxes, image.shape[2])
            masks = None if masks is None else masks.flip(2)
        image_id = int(self.annotations.image_ids[loaded.row])
        kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        if (
            not kept.all()
        ):  # rounding may leave nothing of a sliver at the border; nearly always there is none to copy for
            boxes, labels, masks = boxes[kept], labels[kept], None if masks is None else masks[kept]
        return Sample(image, boxes, labels, torch.arange(len(boxes)), loaded.size, image_id, skipped, masks, crowds)

    def wide(self) -> np.ndarray:
        """Which images are wider than high: bool [n]; sizes that the labels do not state are read from the files."""
        sizes = self.annotations.sizes[self.rows]
        unknown = np.flatnonzero(sizes.min(axis=1) == 0)
        for place in unknown.tolist():
            sizes[place] = image_size(place_of(self.root, self.annotations.file_names[self.rows[place]]))
        return np.asarray(sizes[:, 1] > sizes[:, 0])

    def _load(self, position: int, index: int) -> _Loaded:
        """An image, decoded no larger than the part of it that is drawn before needs."""
        row = int(self.rows[index])
        picture = open_picture(place_of(self.root, self.annotations.file_names[row]), self.fast_decode)
        wrong = wrong_size(self.annotations, row, picture.size)
        if wrong:
            raise ValueError(f"image {picture.path}: {wrong}")
        rng = np.random.default_rng((self.seed, position))
        window, reduction = reduced(self.window(picture.size, rng), picture.size)
        mirrored = bool(rng.random() < self.flip_probability)
        return _Loaded(row, picture.size, picture.pixels(reduction), window, mirrored)

    def _objects(self, loaded: _Loaded) -> tuple[Tensor, Tensor, Tensor | None]:
        """Boxes, labels and masks in the window; after a crop without those of which nothing is left to see."""
        boxes, labels, rows = _targets(self.annotations, loaded.row, loaded.size)
        boxes, masks = loaded.window.place(boxes), None
        if self.annotations.masks is not None:
            masks = loaded.window.cut_masks(self.annotations.masks_of(rows, loaded.size))
        if not self.crops:
            return boxes, labels, masks
        clipped = clip(boxes, torch.tensor(loaded.window.size))
        if masks is not None:
            clipped = follow_masks(clipped, boxes, masks)
        kept = wide_enough(clipped, LEAST_SIDE)
        return clipped[kept], labels[kept], None if masks is None else masks[kept]

    def _crowds(self, loaded: _Loaded) -> Tensor:
        """The crowd regions in the window: float32 [r, 4] xyxy px."""
        size = torch.tensor(loaded.size)
        boxes = loaded.window.place(clip(torch.from_numpy(self.annotations.crowds_of(loaded.row)), size))
        if self.crops:
            boxes = clip(boxes, torch.tensor(loaded.window.size))
        return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]


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
        original = (pixels.shape[1], pixels.shape[2])
        boxes, labels, _ = _targets(self.annotations, index, original)
        image_id = int(self.annotations.image_ids[index])
        ids, blank = torch.arange(len(boxes)), bool(skipped)
        return Sample(image, boxes * factors, labels, ids, original, image_id, skipped, blank=blank)


def wrong_size(annotations: Annotations, row: int, size: tuple[int, int]) -> str:
    """How the ``size`` (height, width) px of an image differs from what its labels say; "" where it does not."""
    height, width = annotations.sizes[row].tolist()
    if min(height, width) == 0 or (height, width) == size:
        return ""
    return f"{annotations.path} says {width} x {height} px, the file has {size[1]} x {size[0]}"


def _nothing(annotations: Annotations, images: int) -> str:
    """That there is nothing to learn from, and why, where something was left out."""
    why = [f"{len(lines)} annotations left out: {reason}" for reason, lines in annotations.report.items()]
    if why and annotations.masks is not None:
        why.append("this detector needs a mask for each object")
    reasons = f" ({'; '.join(why)})" if why else ""
    return f"none of the {images} images has a usable box{reasons}"


def _read(annotations: Annotations, root: Path, row: int) -> Tensor:
    path = place_of(root, annotations.file_names[row])
    image = read_image(path)
    wrong = wrong_size(annotations, row, (image.shape[0], image.shape[1]))
    if wrong:
        raise ValueError(f"image {path}: {wrong}")
    return torch.from_numpy(image).permute(2, 0, 1)


def _targets(annotations: Annotations, row: int, size: Size) -> tuple[Tensor, Tensor, np.ndarray]:
    """Boxes, labels and rows of an image; clipped here: a file without image sizes could not be on reading."""
    rows = annotations.rows_of(row)
    boxes = clip(torch.from_numpy(annotations.boxes[rows]), torch.tensor(size))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[inside], torch.from_numpy(annotations.labels[rows])[inside], rows[inside.numpy()]
