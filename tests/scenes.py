"""Small batches for tests, with known boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from aligndet.models import build_detector
from aligndet.protocol import Detector
from aligndet.structures import Batch, Targets


def small_detector(num_classes: int = 3, **options: int) -> Detector:
    """An FCOS that runs a step in a few milliseconds."""
    return build_detector(
        "fcos", "resnet18", num_classes=num_classes, width=0.25, channels=32, convolutions=1, levels=3, **options
    )


def boxes_for(number: int, size: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(number, 2, generator=generator) * (size - 40)
    return torch.cat([corner, corner + 16 + torch.rand(number, 2, generator=generator) * 24], dim=1)


def batch_of(boxes: list[Tensor], size: int = 96, seed: int = 3, classes: int = 1) -> Batch:
    """A batch of noise images with the given boxes (one tensor per image); ids are rows within the image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(boxes), 3, size, size), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[size, size - 7]] * len(boxes))
    counts = torch.tensor([len(b) for b in boxes])
    image = torch.repeat_interleave(torch.arange(len(boxes)), counts)
    rows = torch.cat([torch.arange(len(b)) for b in boxes])
    targets = Targets(torch.cat(boxes), rows % classes, (image << 32) + rows, image)
    return Batch(images, sizes, sizes, tuple(range(len(boxes))), targets)


def views_of(counts: tuple[int, ...], size: int = 96) -> tuple[Batch, Batch]:
    """Two views with the same boxes: the second is the first, moved by 5 px."""
    generator = torch.Generator().manual_seed(11)
    boxes = [boxes_for(count, size, generator) for count in counts]
    return batch_of(boxes, size), batch_of([b + 5 for b in boxes], size, seed=4)
