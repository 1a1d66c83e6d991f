"""Mask R-CNN: Faster R-CNN that also says which pixels of a box belong to the object; He et al. (arXiv:1703.06870)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet.models.roi_head import own_class
from aligndet.models.two_stage import RegionCandidates, TwoStage
from aligndet.ops.constants import constants
from aligndet.ops.masks import crop
from aligndet.ops.reduce import mean_over_ranks
from aligndet.structures import Candidates, Detections, Targets

POOLED = 14  # cells per side of the mask head's input; its output has twice as many


class MaskRCNN(TwoStage):
    """A ``TwoStage`` with a mask head.

    Without ``Targets.masks`` the mask head has a loss of 0, with a graph; with ``needs_masks`` off it has none at all.

    Source:
        Method section 1.4.
    """

    needs_masks = True

    def localization_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """Those of Faster R-CNN, and the cross-entropy of the class's mask, mean over the cells of positive regions."""
        losses = super().localization_loss(candidates, targets)
        if not self.needs_masks:
            return losses
        assert isinstance(candidates, RegionCandidates) and candidates.matched is not None
        cost = self._mask_cost(candidates, targets)
        cells = (candidates.matched >= 0).sum().float() * (0 if targets.masks is None else (2 * POOLED) ** 2)
        # Every rank takes part, also one whose batch has neither boxes nor masks: the others would wait for it.
        return losses | {"mask": cost / mean_over_ranks(cells).clamp(min=1)}

    @torch.no_grad()
    def detect(self, candidates: Candidates, sizes: Tensor) -> list[Detections]:
        """Those of Faster R-CNN with the probabilities of each box's pixels as ``patches``."""
        found = super().detect(candidates, sizes)
        assert isinstance(candidates, RegionCandidates)
        counts = [len(item) for item in found]
        boxes, labels = torch.cat([item.boxes for item in found]), torch.cat([item.labels for item in found])
        image = torch.repeat_interleave(
            torch.arange(len(found), device=boxes.device), constants(counts, boxes, torch.int64)
        )
        patches = own_class(self._masks(candidates.levels, boxes, image), labels).float().sigmoid()
        return [
            replace(item, patches=part, snapped=self.rules.snapped)
            for item, part in zip(found, patches.split(counts), strict=True)
        ]

    def _mask_cost(self, candidates: RegionCandidates, targets: Targets) -> Tensor:
        """Cross-entropy summed over the cells of positive regions; 0 with a graph where there are no masks."""
        assert candidates.matched is not None and self.mask_head is not None
        if targets.masks is None:
            layers = [*self.mask_head.parameters(), *self.predictors["mask"].parameters()]
            return 0.0 * torch.stack([layer.sum() for layer in layers]).sum()
        positive = (candidates.matched >= 0).nonzero().squeeze(1)
        match, boxes = candidates.matched[positive], candidates.boxes[positive]
        logits = own_class(self._masks(candidates.levels, boxes, candidates.image[positive]), targets.labels[match])
        truth = crop(targets.masks, match, boxes, 2 * POOLED)
        return F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="sum")

    def _masks(self, levels: list[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
        """Logits [n, K, 2 POOLED, 2 POOLED]."""
        assert self.mask_head is not None
        pooled = self.pool(levels, boxes, image, POOLED)
        logits: Tensor = self.predictors["mask"](self.mask_head(pooled))
        return logits
