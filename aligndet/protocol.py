"""All that the method may ask of a detector.

Pre-training, fine-tuning, resume, DDP and evaluation work through this page alone: a detector that implements the five
abstract methods gets all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from aligndet.assigners.sampling import PositivesFirst
from aligndet.ops.constants import constants
from aligndet.ops.roi_align import multilevel_roi_align
from aligndet.structures import Candidates, Detections, Targets

# (matched int64 [N], image int64 [N]) -> int64 [n], the rows that are kept
Sampler = Callable[[Tensor, Tensor], Tensor]


class Detector(nn.Module, ABC):
    """A detector: ``features -> candidates -> losses or detections``. Abstract; every subclass is final.

    Attributes:
        backbone: ``[B, 3, H, W] -> list of [B, C_l, H_l, W_l]``, fine to coarse.
        predictors: the task layers and only they: "score", "box", "centerness", "mask", "embedding". A detector fills
            ``Candidates.scores`` and ``Candidates.embeddings`` exactly when it has a layer of that name.
        pixel_mean, pixel_std: RGB normalisation in units of 0 .. 255.
        size_divisor: images are padded to a multiple of it, px.
        short_side, long_side: px to which ``predict`` resizes images where it is not told; a file of ``load_detector``
            brings those of its run.
        sample: which of the matched candidates to keep; None keeps what the detector keeps by itself. Asked once per
            call of ``candidates`` with targets, before any embedding is computed: only kept candidates pay for one.
        sample_anchors: the same for the anchors of a first stage, where there is one.
        sampling: the ``sample`` that suits the detector while it has no labels; None: all candidates.
        needs_masks: whether it learns from ``Targets.masks``.
        localizes: False says that nobody will read the box outputs; a detector whose assignment does not depend on them
            may then leave them out.
    """

    backbone: nn.Module
    predictors: nn.ModuleDict
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    size_divisor: int = 32
    short_side: int = 800
    long_side: int = 1333
    score_threshold: float = 0.05
    sample: Sampler | None = None
    sample_anchors: Sampler | None = None
    sampling: PositivesFirst | None = PositivesFirst(2048, "image")
    localizes: bool = True
    needs_masks: bool = False

    @abstractmethod
    def score_layer(self, width: int, hidden: bool = False) -> nn.Module:
        """A new classification layer with ``width`` outputs on the features that "score" reads.

        With ``hidden`` it has one hidden layer with ReLU: the projection g of the paper (method section 2.4).
        """

    @abstractmethod
    def candidates(self, features: list[Tensor], sizes: Tensor, targets: Targets | None = None) -> Candidates:
        """Neck, head and, with ``targets``, assignment.

        Args:
            features: the backbone's outputs.
            sizes: int64 [B, 2], (height, width) px of the images inside the padded tensor.
            targets: boxes to match the candidates to; None at test time.
        """

    @abstractmethod
    def localization_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """Losses that need no class labels (box, centerness, RPN, mask): scalars with a graph, also without boxes."""

    @abstractmethod
    def classification_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """The losses that need class labels; scalars with a graph, also without boxes."""

    @abstractmethod
    def detect(self, candidates: Candidates, sizes: Tensor) -> list[Detections]:
        """Threshold, suppress, rank: one Detections per image, boxes in px of the batch tensor clipped to ``sizes``."""

    def ignore_classes(self) -> None:
        """From now on boxes do not depend on the class, for pre-training without classes; by default they never do."""

    def mask_parts(self) -> list[nn.Module]:
        """The parts that learn from ``Targets.masks`` alone; by default none."""
        return []

    def tied_parts(self) -> list[nn.Module]:
        """The parts that a second branch of the detector shares with it instead of copying; by default none."""
        return []

    def region_features(self, features: list[Tensor], boxes: Tensor, image: Tensor, height: int) -> Tensor:
        """What the detector's shared layers know of given boxes: float [N, F]; by default the coarsest features' mean.

        Args:
            features: the backbone's outputs.
            boxes: float32 [N, 4] xyxy px.
            image: int64 [N], 0 .. B-1.
            height: px of the padded images.
        """
        return pooled_mean(features[-1:], boxes, image, height)

    @record_function("backbone")
    def features(self, images: Tensor, sizes: Tensor) -> list[Tensor]:
        """The backbone's outputs for uint8 images [B, 3, H, W] of the given ``sizes`` int64 [B, 2]."""
        return list(self.backbone(normalise(images, sizes, self.pixel_mean, self.pixel_std)))


def normalise(images: Tensor, sizes: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(images - mean) / std`` in float32, with exact zeros in the padding, laid out channels-last.

    Channels-last is where convolutions are fastest: on CPU a MobileNetV2 takes a quarter of the time.

    Args:
        images: uint8 (or float) [B, 3, H, W] RGB in 0 .. 255.
        sizes: int64 [B, 2], (height, width) px of each image inside the padded tensor.
        mean, std: three numbers each, in units of 0 .. 255.
    """
    offset = constants(mean, images, torch.float32).view(1, 3, 1, 1)
    scale = constants(std, images, torch.float32).view(1, 3, 1, 1)
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) < sizes[:, :1]  # [B, H]
    columns = torch.arange(width, device=images.device) < sizes[:, 1:]  # [B, W]
    inside = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return (images - offset) / scale * inside


def pooled_mean(levels: list[Tensor], boxes: Tensor, image: Tensor, height: int) -> Tensor:
    """The mean over each box of a feature map, from the map of the box's size: float [N, C].

    Args:
        levels: maps [B, C, H_l, W_l], fine to coarse; their strides follow from ``height``.
        boxes, image, height: see ``Detector.region_features``.
    """
    strides = tuple(2 ** round(math.log2(height / level.shape[2])) for level in levels)
    pooled = multilevel_roi_align(levels, boxes, image, 7, strides=strides, canonical=14.0 * strides[0])
    return pooled.mean(dim=(2, 3))
