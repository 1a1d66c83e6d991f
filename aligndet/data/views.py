"""Two views of each unlabelled image; boxes keep their ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from aligndet.data.batch import Sample
from aligndet.data.proposals import ProposalFile
from aligndet.data.retry import first_readable
from aligndet.data.transforms import flip, random_colour, read_image, resize

ORDERS = ("random", "first")


class ViewPairs(Dataset[tuple[Sample, Sample]]):
    """Images of a proposal file, each as two views drawn independently.

    An item is asked for as (index, position): which image, and which sample of the run; its random numbers come from
    the seed and the position alone.

    Args:
        root: folder that the file's names are relative to.
        proposals: boxes; images without any are left out and counted in ``without_proposals``.
        short_sides: px, one drawn per view.
        long_side: px, upper bound.
        flip_probability: of the horizontal flip, per view.
        colour: apply one colour operation of nine per view.
        proposals_per_image: size of the subset that both views share; None: all.
        order: "random", or "first" to take the subset from the beginning of the file, as the reference does.
        pad_first: pad to a multiple of 32 px before flip and colour, as the reference does (a mistake: boxes of flipped
            images are then off by the padding); for measuring what that costs.
        on_error: "skip" takes the next image for one that cannot be read and says so in ``Sample.skipped``.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image of the file has a proposal.

    Source:
        Method section 3; resize, flip, colour, and padding last (in ``collate``).
    """

    def __init__(
        self,
        root: str | Path,
        proposals: ProposalFile,
        *,
        short_sides: tuple[int, ...],
        long_side: int,
        flip_probability: float = 0.5,
        colour: bool = True,
        proposals_per_image: int | None = None,
        order: str = "random",
        pad_first: bool = False,
        on_error: str = "skip",
        seed: int = 0,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"images {root}: no such folder")
        self.proposals = proposals
        self.rows = np.flatnonzero(np.diff(proposals.offsets) > 0)
        self.without_proposals = len(proposals.names) - len(self.rows)
        if not len(self.rows):
            raise ValueError(f"proposals {proposals.path}: none of its {len(proposals.names)} images has a proposal")
        self.short_sides, self.long_side = short_sides, long_side
        self.flip_probability, self.colour = flip_probability, colour
        self.proposals_per_image, self.on_error, self.seed = proposals_per_image, on_error, seed
        if order not in ORDERS:
            raise ValueError(f"order: want one of {', '.join(ORDERS)}, got {order!r}")
        self.order, self.pad_first = order, pad_first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Sample, Sample]:
        index, position = key
        (row, pixels), skipped = first_readable(self._load, index, len(self), self.on_error)
        rng = np.random.default_rng((self.seed, position))
        number = len(self.proposals.boxes_of(row))
        ids = torch.arange(number)
        if self.proposals_per_image is not None and number > self.proposals_per_image:
            if self.order == "first":
                ids = ids[: self.proposals_per_image]
            else:
                ids = torch.from_numpy(np.sort(rng.choice(number, self.proposals_per_image, replace=False)))
        return self._view(pixels, ids, row, rng, skipped), self._view(pixels, ids, row, rng, skipped)

    def _load(self, index: int) -> tuple[int, Tensor]:
        row = int(self.rows[index])
        return row, torch.from_numpy(read_proposed(self.root, self.proposals, row)).permute(2, 0, 1)

    def _view(self, image: Tensor, ids: Tensor, row: int, rng: np.random.Generator, skipped: tuple[str, ...]) -> Sample:
        original = (image.shape[1], image.shape[2])
        image, factors = resize(image, int(rng.choice(self.short_sides)), self.long_side)
        boxes = torch.from_numpy(self.proposals.boxes_of(row))[ids] * factors
        width = image.shape[2]
        if self.pad_first:
            image = F.pad(image, (0, -width % 32, 0, -image.shape[1] % 32))
        if rng.random() < self.flip_probability:
            image, boxes = flip(image, boxes, width)
        if self.colour:
            image = random_colour(image, rng)
        keep = ((boxes[:, 2:] - boxes[:, :2]) > 0.01).all(dim=1)
        boxes, ids = boxes[keep], ids[keep]
        labels = torch.from_numpy(self.proposals.labels_of(row))[ids]
        return Sample(image, boxes, labels, ids, original, row, skipped)


def read_proposed(root: Path, proposals: ProposalFile, row: int) -> np.ndarray:
    """Image ``row`` of a proposal file: uint8 [H, W, 3] RGB.

    Raises:
        ValueError, FileNotFoundError: it cannot be read, or has another size than its boxes are for.
    """
    path = root / proposals.names[row]
    image = read_image(path)
    recorded = tuple(int(side) for side in proposals.sizes[row])
    if image.shape[:2] != recorded:
        raise ValueError(
            f"image {path}: its proposals are for {recorded[1]} x {recorded[0]} px, "
            f"the file has {image.shape[1]} x {image.shape[0]}"
        )
    return image
