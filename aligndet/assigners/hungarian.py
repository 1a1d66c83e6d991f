"""DETR's assigner: one query per box, at the smallest total cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.profiler import record_function

from aligndet.ops.boxes import centre_to_corners, corners_to_centre, generalized_iou
from aligndet.structures import BACKGROUND, Targets

# What a pair costs that has no finite cost: a diverged network then ends in its loss, not in the solver.
HOPELESS = 1e6


@dataclass(frozen=True)
class HungarianAssigner:
    """Queries and boxes, one to one: boxes beyond the number of queries stay without one.

    Attributes:
        score: weight of minus the probability of the box's class.
        distance: weight of the L1 distance of (centre x, centre y, width, height) in shares of the image's sides.
        overlap: weight of minus the generalised IoU.

    Source:
        DETR (arXiv:2005.12872), equation 1 and appendix A.2; method section 1.5.
    """

    score: float = 1.0
    distance: float = 5.0
    overlap: float = 2.0

    @torch.no_grad()
    @record_function("assignment")
    def __call__(self, boxes: Tensor, probabilities: Tensor | None, targets: Targets, sizes: Tensor) -> Tensor:
        """The row of ``targets`` that each query of each image and decoder layer belongs to.

        All layers share one cost tensor and one transfer to the host.

        Args:
            boxes: float [L, B, Q, 4], (centre x, centre y, width, height) in shares of the image's sides.
            probabilities: float [L, B, Q, K'] of classes; None leaves them out of the cost.
            targets: M boxes, in the order of their images.
            sizes: int64 [B, 2], (height, width) px.

        Returns:
            int64 [L, B, Q]: row of ``targets`` or BACKGROUND.
        """
        layers, images, queries = boxes.shape[:3]
        matched = torch.full((layers, images, queries), BACKGROUND, dtype=torch.int64)
        if not len(targets):
            return matched.to(boxes.device)
        cost = self.costs(boxes, probabilities, targets, sizes)
        # Image numbers travel with the costs: float32 holds them exactly.
        packed = torch.cat([cost.flatten(), targets.image.to(cost.dtype)]).cpu()
        cost = packed[: cost.numel()].view(cost.shape)
        counts = torch.bincount(packed[cost.numel() :].to(torch.int64), minlength=images).tolist()
        start = 0
        for image, count in enumerate(counts):
            for layer in range(layers if count else 0):
                row, query = linear_sum_assignment(cost[layer, start : start + count].numpy())
                matched[layer, image, torch.from_numpy(query)] = torch.from_numpy(row) + start
            start += count
        return matched.to(boxes.device)

    def costs(self, boxes: Tensor, probabilities: Tensor | None, targets: Targets, sizes: Tensor) -> Tensor:
        """What every box costs with every query of its own image: float32 [L, M, Q]; arguments as above."""
        truth = shares_of(targets, sizes)[:, None]  # [M, 1, 4]
        candidates = boxes.float()[:, targets.image]  # [L, M, Q, 4]
        cost = self.distance * (candidates - truth).abs().sum(dim=3)
        cost -= self.overlap * generalized_iou(centre_to_corners(candidates), centre_to_corners(truth))
        if probabilities is not None:
            index = targets.labels[None, :, None, None].expand(len(boxes), -1, boxes.shape[2], 1)
            cost -= self.score * probabilities.float()[:, targets.image].gather(3, index)[..., 0]
        return torch.nan_to_num(cost, nan=HOPELESS, posinf=HOPELESS, neginf=-HOPELESS)


def shares_of(targets: Targets, sizes: Tensor) -> Tensor:
    """Boxes as (centre x, centre y, width, height) in shares of the sides of their images: float32 [M, 4].

    Args:
        sizes: int64 [B, 2], (height, width) px of the images, without padding.
    """
    sides = sizes.flip(1).repeat(1, 2)[targets.image]  # [M, 4]: width, height, width, height
    return corners_to_centre(targets.boxes.float()) / sides
