"""The values that travel through the pipeline; plain tensors, no behaviour that depends on a model.

Letters: B images, N candidates, M boxes, K classes, D embedding width, H W pixels. Boxes are ``x0, y0, x1, y1`` in
px, half-open (width = x1 - x0). Sizes are ``(height, width)`` in px.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from aligndet.ops.constants import constants
from aligndet.ops.masks import paste

BACKGROUND, IGNORED = -1, -2


@dataclass(frozen=True)
class Targets:
    """The boxes of a batch, one row per box, images one after another.

    Attributes:
        boxes: float32 [M, 4] xyxy px of the padded batch tensor, x0 < x1 and y0 < y1.
        labels: int64 [M], what: 0 .. K-1 (pre-training: 0, or the cluster of the proposal).
        ids: int64 [M], which: unique in the batch; equal ids in two views are the same box.
        image: int64 [M], 0 .. B-1, ascending.
        masks: bool [M, H, W] or None where the data has none.
        crowds: float32 [R, 4] xyxy px, regions with objects that nobody outlined one by one; None where the data has
            none. ``IoUAssigner`` ignores the background inside; assigners without overlaps take no notice.
        crowd_image: int64 [R], 0 .. B-1, ascending; None exactly where ``crowds`` is.
    """

    boxes: Tensor
    labels: Tensor
    ids: Tensor
    image: Tensor
    masks: Tensor | None = None
    crowds: Tensor | None = None
    crowd_image: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same targets on ``device``."""
        return replace(
            self, **{item.name: _moved(getattr(self, item.name), device, non_blocking) for item in fields(self)}
        )


@dataclass(frozen=True)
class Candidates:
    """What a detector proposes: points, anchors, RoIs or queries, flattened over the batch.

    Each detector returns its own frozen subclass with the fields its losses need.

    Attributes:
        scores: float [N, K'], output of ``predictors["score"]`` (class logits); None while that layer is absent.
        embeddings: float [N, D], output of ``predictors["embedding"]``; None while that layer is absent.
        image: int64 [N], 0 .. B-1.
        matched: int64 [N], row of the Targets, BACKGROUND or IGNORED; None without targets.
    """

    scores: Tensor | None
    embeddings: Tensor | None
    image: Tensor
    matched: Tensor | None

    def box_ids(self, targets: Targets) -> Tensor:
        """The id of the box that each candidate was matched to: int64 [N], BACKGROUND or IGNORED where there is none.

        Raises:
            ValueError: the candidates were computed without targets.
        """
        if self.matched is None:
            raise ValueError("candidates without targets have no box ids; pass targets to Detector.candidates")
        # Rows -1 and -2 of this table are BACKGROUND and IGNORED: indexing needs no masks and works without boxes.
        table = torch.cat([targets.ids, constants([IGNORED, BACKGROUND], targets.ids, torch.int64)])  # [M + 2]
        return table[self.matched]


@dataclass(frozen=True)
class Detections:
    """The detections of one image, best first.

    Attributes:
        boxes: float32 [n, 4] xyxy px (of the original image, unless a function says otherwise).
        scores: float32 [n] in 0 .. 1, descending.
        labels: int64 [n], 0 .. K-1.
        masks: bool [n, H, W] or None for detectors without masks.
        patches: float [n, S, S], probabilities spread over each box: masks as a detector gives them, before
            ``resized`` pastes them into the image.
        snapped: whether ``patches`` are pasted into whole pixels.
        encoded: in place of ``masks`` where many images are kept: pycocotools' run lengths of each.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    patches: Tensor | None = None
    snapped: bool = False
    encoded: tuple[dict[str, Any], ...] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device | str) -> Detections:
        """The same detections on ``device``."""
        names = ("boxes", "scores", "labels", "masks", "patches")
        return replace(self, **{name: _moved(getattr(self, name), device, False) for name in names})

    def resized(self, size: tuple[int, int], original: tuple[int, int]) -> Detections:
        """Boxes carried from an image resized to ``size`` back to its ``original`` size, clipped to it.

        Both sizes are (height, width) px. Width and height have factors of their own, since each was rounded.
        ``patches`` become ``masks`` of the original size; masks that are there already are not resized.
        """
        height, width = original
        factors = self.boxes.new_tensor([width / size[1], height / size[0]]).repeat(2)
        limits = self.boxes.new_tensor([width, height]).repeat(2)
        boxes = torch.minimum((self.boxes * factors).clamp(min=0), limits)
        if self.patches is None:
            return replace(self, boxes=boxes)
        return replace(self, boxes=boxes, masks=paste(self.patches, boxes, original, self.snapped), patches=None)

    def chosen(self, rows: Tensor) -> Detections:
        """Only the given rows: int64 [k] or bool [n]."""
        masks, patches = (None if part is None else part[rows] for part in (self.masks, self.patches))
        encoded = self.encoded
        if encoded is not None:
            encoded = tuple(encoded[row] for row in torch.arange(len(self))[rows.cpu()].tolist())
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows], masks, patches, self.snapped, encoded)


@dataclass(frozen=True)
class Batch:
    """Images of one step with their boxes.

    Attributes:
        images: uint8 [B, 3, H, W] RGB, zero-padded at the bottom and right.
        sizes: int64 [B, 2], (height, width) px of each image inside the padded tensor.
        original_sizes: int64 [B, 2], (height, width) px of the files.
        image_ids: the B ids of the annotation file (pre-training: rows of the proposal file).
        targets: the boxes; empty for unlabelled images.
        skipped: one line for each image that could not be read and was replaced by the next one, or is blank.
        blank: those of ``image_ids`` that could not be read and have nothing in their place (evaluation).
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    image_ids: tuple[int, ...]
    targets: Targets
    skipped: tuple[str, ...] = ()
    blank: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``; images stay uint8 and are normalised there."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            sizes=self.sizes.to(device, non_blocking=non_blocking),
            original_sizes=self.original_sizes.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; called by ``DataLoader(pin_memory=True)``."""
        pinned = {item.name: _pinned(getattr(self.targets, item.name)) for item in fields(self.targets)}
        return replace(
            self,
            images=self.images.pin_memory(),
            sizes=self.sizes.pin_memory(),
            original_sizes=self.original_sizes.pin_memory(),
            targets=replace(self.targets, **pinned),
        )


def class_of(targets: Targets, matched: Tensor, classes: int) -> Tensor:
    """The class of the box in each row: int64 [N], BACKGROUND and IGNORED stay what they are.

    Args:
        matched: int64 [N], row of ``targets``, BACKGROUND or IGNORED.
        classes: K.

    Raises:
        ValueError: see ``check_labels``.
    """
    check_labels(targets, classes)
    # Rows -1 and -2 of this table are BACKGROUND and IGNORED: indexing needs no masks and works without boxes.
    table = torch.cat([targets.labels, constants([IGNORED, BACKGROUND], targets.labels, torch.int64)])  # [M + 2]
    return table[matched]


def check_labels(targets: Targets, classes: int) -> None:
    """Refuse labels outside 0 .. K-1, which would pass for background.

    Raises:
        ValueError: there is one. On a GPU, which is not waited for, it is CUDA's device-side assertion.
    """
    wrong = (targets.labels < 0) | (targets.labels >= classes)
    if wrong.is_cuda:
        torch._assert_async(~wrong.any(), f"targets.labels: want 0 .. {classes - 1}")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        box = ", ".join(f"{side:g}" for side in targets.boxes[row].tolist())
        raise ValueError(
            f"targets.labels: want 0 .. {classes - 1}, got {int(targets.labels[row])} for box {row} ({box})"
        )


def check_boxes(targets: Targets) -> None:
    """Refuse boxes that are not finite or have a side that is not positive: one spoils the matches of all others.

    Raises:
        ValueError: there is one. On a GPU, which is not waited for, it is CUDA's device-side assertion.
    """
    boxes = targets.boxes
    # Comparisons with nan are false; the difference of two infinities is nan.
    wrong = ~((boxes[:, 2:] - boxes[:, :2] > 0) & (boxes[:, 2:] - boxes[:, :2] < torch.inf)).all(dim=1)
    if wrong.is_cuda:
        torch._assert_async(~wrong.any(), "targets.boxes: want finite x0 < x1, y0 < y1")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        box = ", ".join(f"{side:g}" for side in boxes[row].tolist())
        raise ValueError(
            f"targets.boxes: want finite x0 < x1, y0 < y1, got box {row} of image {int(targets.image[row])} ({box})"
        )


def scores_of(candidates: Candidates) -> Tensor:
    """The class scores of candidates.

    Raises:
        ValueError: their detector has none any more.
    """
    if candidates.scores is None:
        raise ValueError(
            "predictors.score: the detector has no class scores, which AlignDet without pseudo-classes takes away; "
            "load what it has learned into a new one (aligndet.weights.load_pretrained)"
        )
    return candidates.scores


def no_targets(device: torch.device | str = "cpu") -> Targets:
    """Targets of a batch without a single box."""
    rows = torch.zeros(0, dtype=torch.int64, device=device)
    return Targets(torch.zeros(0, 4, device=device), rows, rows, rows)


def _moved(value: Tensor | None, device: torch.device | str, non_blocking: bool) -> Any:
    return None if value is None else value.to(device, non_blocking=non_blocking)


def _pinned(value: Tensor | None) -> Any:
    return None if value is None else value.pin_memory()
