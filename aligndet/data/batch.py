"""Samples into batches; padding comes last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aligndet.structures import Batch, Targets


@dataclass(frozen=True)
class Sample:
    """One image on its way into a batch.

    Attributes:
        image: uint8 [3, H, W] RGB.
        boxes: float32 [m, 4] xyxy px of ``image``.
        labels: int64 [m].
        ids: int64 [m], which box of the image; 0 .. 2^32-1.
        original_size: (height, width) px of the file.
        image_id: id of the annotation file, or row of the proposal file.
        skipped: a line for each image that could not be read before this one.
        masks: bool [m, H, W], or None.
        crowds: float32 [r, 4] xyxy px of ``image``, regions of many objects; None: nothing is known of them.
        blank: whether the image itself could not be read and is black.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    ids: Tensor
    original_size: tuple[int, int]
    image_id: int
    skipped: tuple[str, ...] = ()
    masks: Tensor | None = None
    crowds: Tensor | None = None
    blank: bool = False


def collate(samples: Sequence[Sample], *, multiple: int = 32, size: tuple[int, int] | None = None) -> Batch:
    """Images padded with zeros at the bottom and right to one size and laid out channels last, boxes joined.

    Box ids become (position in the batch << 32) + id in the image: the same in every view of the image.

    Args:
        multiple: height and width are multiples of it, px.
        size: (height, width) px at least; None: the largest sample.
    """
    sizes = torch.tensor([sample.image.shape[1:] for sample in samples])
    least = sizes.amax(dim=0) if size is None else torch.maximum(sizes.amax(dim=0), torch.tensor(size))
    height, width = ((least + multiple - 1) // multiple * multiple).tolist()
    # Channels last, as images are decoded and as models want them: rows are copied whole.
    images = torch.empty(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for place, sample, (rows, columns) in zip(images, samples, sizes.tolist(), strict=True):
        place[:, :rows, :columns] = sample.image
        place[:, rows:], place[:, :rows, columns:] = 0, 0
    counts = torch.tensor([len(sample.boxes) for sample in samples])
    image = torch.arange(len(samples)).repeat_interleave(counts)
    crowds = [sample.crowds for sample in samples if sample.crowds is not None]
    numbers = torch.tensor([0 if sample.crowds is None else len(sample.crowds) for sample in samples])
    targets = Targets(
        boxes=torch.cat([sample.boxes for sample in samples]).float().reshape(-1, 4),
        labels=torch.cat([sample.labels for sample in samples]),
        ids=(image << 32) + torch.cat([sample.ids for sample in samples]),
        image=image,
        masks=_masks(samples, (height, width)),
        crowds=torch.cat(crowds).float().reshape(-1, 4) if crowds else None,
        crowd_image=torch.arange(len(samples)).repeat_interleave(numbers) if crowds else None,
    )
    return Batch(
        images=images,
        sizes=sizes,
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        image_ids=tuple(sample.image_id for sample in samples),
        targets=targets,
        skipped=tuple(line for sample in samples for line in sample.skipped),
        blank=tuple(sample.image_id for sample in samples if sample.blank),
    )


def collate_views(pairs: Sequence[tuple[Sample, Sample]], *, multiple: int = 32) -> tuple[Batch, Batch]:
    """Two batches of one common size, so that both views pass the backbone as one."""
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    largest = torch.tensor([sample.image.shape[1:] for sample in first + second]).amax(dim=0).tolist()
    size = (largest[0], largest[1])
    return collate(first, multiple=multiple, size=size), collate(second, multiple=multiple, size=size)


def _masks(samples: Sequence[Sample], size: tuple[int, int]) -> Tensor | None:
    """The masks of all samples on the padded image: bool [M, H, W]; None where a sample has none."""
    if any(sample.masks is None for sample in samples):
        return None
    joined = torch.zeros(sum(len(sample.boxes) for sample in samples), *size, dtype=torch.bool)
    start = 0
    for sample in samples:
        assert sample.masks is not None
        count, height, width = sample.masks.shape
        joined[start : start + count, :height, :width] = sample.masks
        start += count
    return joined
