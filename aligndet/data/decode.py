"""Images that are decoded once it is known how large they have to be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aligndet.data.headers import jpeg_size
from aligndet.data.transforms import decode_image, read_file

REDUCTIONS = (8, 4, 2, 1)  # of the sides of a JPEG, that its decoder can do on the way


@dataclass(frozen=True)
class Picture:
    """An image file that has been read, and decoded only where its size cannot be known otherwise.

    Attributes:
        path: of the file.
        size: (height, width) px as ``read_image`` gives it, EXIF orientation applied.
        data: uint8 [n], the bytes of a JPEG; None where ``image`` is there.
        image: uint8 [H, W, 3] RGB.
    """

    path: str | Path
    size: tuple[int, int]
    data: np.ndarray | None = None
    image: np.ndarray | None = None

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """The image: uint8 [H, W, 3] RGB; a JPEG at 1/``reduction`` of its sides, which has to divide both.

        Raises:
            ValueError: it cannot be decoded, or has another size than its header says.
        """
        if self.image is not None:
            return self.image
        assert self.data is not None
        image = decode_image(self.data, self.path, reduction)
        if image.shape[:2] != (self.size[0] // reduction, self.size[1] // reduction):
            raise ValueError(
                f"image {self.path}: its header says {self.size[1]} x {self.size[0]} px, decoded at 1/{reduction} it "
                f"has {image.shape[1]} x {image.shape[0]}; data.fast_decode=false does not ask the header"
            )
        return image


def open_picture(path: str | Path, fast: bool = True) -> Picture:
    """Read an image file; with ``fast`` false it is decoded at once and at its full size.

    Raises:
        FileNotFoundError, ValueError: as ``read_image``.
    """
    data = read_file(path)
    size = jpeg_size(data) if fast else None
    if size is not None:
        return Picture(path, size, data=data)
    image = decode_image(data, path)
    return Picture(path, (image.shape[0], image.shape[1]), image=image)


def reduction_for(part: tuple[int, int], wanted: Iterable[tuple[int, int]], image: tuple[int, int]) -> int:
    """The strongest reduction of ``REDUCTIONS`` that leaves a part of an image at least as large as each of ``wanted``.

    It divides both sides of the image, so that a pixel of the reduced image stands for whole pixels everywhere, at the
    last row and column too, whichever way EXIF turns it. All sizes are (height, width) px.
    """
    height, width = (max(sides) for sides in zip(*wanted, strict=True))
    for reduction in REDUCTIONS:
        enough = part[0] // reduction >= height and part[1] // reduction >= width
        if enough and image[0] % reduction == 0 and image[1] % reduction == 0:
            return reduction
    return 1
