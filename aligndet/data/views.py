"""Two views of each unlabelled image; boxes keep their ids."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from aligndet.data.augment import Size, Window, plain_window
from aligndet.data.batch import Sample
from aligndet.data.colours import COLOURS, draw_colour
from aligndet.data.decode import open_picture, reduction_for
from aligndet.data.folder import place_of
from aligndet.data.proposals import ProposalFile
from aligndet.data.retry import first_readable
from aligndet.data.stream import drawn
from aligndet.data.transforms import flip_boxes, read_image

ORDERS = ("random", "first")


class _Plan(NamedTuple):
    """What one view does with its image."""

    window: Window
    mirrored: bool
    colour: tuple[str, int] | None  # name and magnitude


class _Loaded(NamedTuple):
    """An image of ``size`` (height, width) px, perhaps decoded smaller, with the proposals that both views have."""

    row: int
    ids: Tensor
    size: Size
    pixels: np.ndarray
    plans: tuple[_Plan, _Plan]


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
        order: "random", or "first" to take the same subset of an image in each epoch, as the reference does.
        pad_first: pad to a multiple of 32 px before flip and colour, as the reference does (a mistake: boxes of flipped
            images are then off by the padding); for measuring what that costs.
        fast_decode: decode large JPEGs at 1/2, 1/4 or 1/8 where that is no smaller than both views.
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
        fast_decode: bool = True,
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
        self.order, self.pad_first, self.fast_decode = order, pad_first, fast_decode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Sample, Sample]:
        index, position = drawn(key)
        loaded, skipped = first_readable(partial(self._load, position), index, len(self), self.on_error)
        first, second = loaded.plans
        return self._view(loaded, first, skipped), self._view(loaded, second, skipped)

    def wide(self) -> np.ndarray:
        """Which images are wider than high: bool [n]."""
        sizes = self.proposals.sizes[self.rows]
        return np.asarray(sizes[:, 1] > sizes[:, 0])

    def _load(self, position: int, index: int) -> _Loaded:
        """An image, decoded once for both of its views; all is drawn before, so that it need be no larger than they."""
        row = int(self.rows[index])
        picture = open_picture(place_of(self.root, self.proposals.names[row]), self.fast_decode)
        _check_size(picture.path, self.proposals, row, picture.size)
        rng = np.random.default_rng((self.seed, position))
        ids = self._subset(row, len(self.proposals.boxes_of(row)), rng)
        plans = (self._plan(picture.size, rng), self._plan(picture.size, rng))
        reduction = reduction_for(picture.size, [plan.window.size for plan in plans], picture.size)
        return _Loaded(row, ids, picture.size, picture.pixels(reduction), plans)

    def _subset(self, row: int, number: int, rng: np.random.Generator) -> Tensor:
        """The proposals that both views have: int64, ascending."""
        limit = self.proposals_per_image
        if limit is None or number <= limit:
            return torch.arange(number)
        if self.order == "first":
            # Of an order of its own: the files are sorted by area, those of the authors hardly (method section 7.5).
            rng = np.random.default_rng((row, number))
        return torch.from_numpy(np.sort(rng.choice(number, limit, replace=False)))

    def _plan(self, size: Size, rng: np.random.Generator) -> _Plan:
        window = plain_window(size, rng, short_sides=self.short_sides, long_side=self.long_side)
        mirrored = bool(rng.random() < self.flip_probability)
        return _Plan(window, mirrored, draw_colour(rng) if self.colour else None)

    def _view(self, loaded: _Loaded, plan: _Plan, skipped: tuple[str, ...]) -> Sample:
        ids = loaded.ids
        image = plan.window.cut(loaded.pixels, loaded.size, plan.mirrored and not self.pad_first)
        boxes = plan.window.place(torch.from_numpy(self.proposals.boxes_of(loaded.row))[ids])
        if plan.mirrored:
            boxes = flip_boxes(boxes, image.shape[2])
        if self.pad_first:
            image = F.pad(image, (0, -image.shape[2] % 32, 0, -image.shape[1] % 32))
            image = image.flip(2) if plan.mirrored else image
        if plan.colour is not None:
            name, magnitude = plan.colour
            image = COLOURS[name](image, magnitude)
        keep = ((boxes[:, 2:] - boxes[:, :2]) > 0.01).all(dim=1)
        boxes, ids = boxes[keep], ids[keep]
        labels = torch.from_numpy(self.proposals.labels_of(loaded.row))[ids]
        return Sample(image, boxes, labels, ids, loaded.size, loaded.row, skipped)


def read_proposed(root: Path, proposals: ProposalFile, row: int) -> np.ndarray:
    """Image ``row`` of a proposal file: uint8 [H, W, 3] RGB.

    Raises:
        ValueError, FileNotFoundError: it cannot be read, or has another size than its boxes are for.
    """
    path = place_of(root, proposals.names[row])
    image = read_image(path)
    _check_size(path, proposals, row, (image.shape[0], image.shape[1]))
    return image


def _check_size(path: str | Path, proposals: ProposalFile, row: int, size: Size) -> None:
    recorded = tuple(int(side) for side in proposals.sizes[row])
    if size != recorded:
        raise ValueError(
            f"image {path}: its proposals are for {recorded[1]} x {recorded[0]} px, the file has {size[1]} x {size[0]}"
        )
