"""Classification with far more background than objects."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aligndet.structures import IGNORED


def sigmoid_focal_loss(scores: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss summed over candidates and classes.

    Args:
        scores: float [N, K] logits, one independent sigmoid per class.
        labels: int64 [N], 0 .. K-1 or BACKGROUND; rows that are IGNORED cost nothing.
        alpha: weight of the object class, 1 - alpha that of the others.
        gamma: how strongly easy decisions are discounted.

    Returns:
        Scalar >= 0 in float32 (float64 for float64 inputs), also under autocast; 0 for no candidates.

    Source:
        Lin et al. (arXiv:1708.02002), equation 5.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(dtype)
        classes = torch.arange(scores.shape[1], device=scores.device)
        truth = (labels[:, None] == classes).to(dtype)  # [N, K]
        cost = F.binary_cross_entropy_with_logits(scores, truth, reduction="none")
        wrong = (scores.sigmoid() - truth).abs()  # 1 - p_t
        cost = cost * wrong**gamma * (alpha * truth + (1 - alpha) * (1 - truth))
        return (cost * (labels != IGNORED)[:, None]).sum()
