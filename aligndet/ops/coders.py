"""Boxes as offsets from priors, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aligndet.ops.constants import constants

# A box is decoded to at most 62.5 times the width and height of its prior.
LARGEST = math.log(1000 / 16)


@dataclass(frozen=True)
class DeltaCoder:
    """Centre offsets in units of the prior's sides and logarithms of the ratios of sides, divided by ``stds``.

    Attributes:
        stds: positive; of x, y, width, height.
        shrink: decoded boxes are also at least 1 / 62.5 of their priors (torchvision has no such bound).

    Source:
        R-CNN (arXiv:1311.2524), appendix C; method section 1.0.
    """

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    shrink: bool = True

    def encode(self, priors: Tensor, boxes: Tensor) -> Tensor:
        """The float32 offsets [N, 4] from ``priors`` to ``boxes``, both float [N, 4] xyxy px with sides > 0."""
        priors, boxes = priors.float(), boxes.float()
        side, other = priors[:, 2:] - priors[:, :2], boxes[:, 2:] - boxes[:, :2]
        shift = (boxes[:, :2] + boxes[:, 2:] - priors[:, :2] - priors[:, 2:]) / (2 * side)
        return torch.cat([shift, (other / side).log()], dim=1) / constants(self.stds, priors, torch.float32)

    def decode(self, priors: Tensor, deltas: Tensor) -> Tensor:
        """The float32 boxes [..., 4] xyxy px at ``deltas`` [..., 4] from ``priors`` [..., 4]; the two broadcast."""
        priors = priors.float()
        deltas = deltas.float() * constants(self.stds, priors, torch.float32)
        side = priors[..., 2:] - priors[..., :2]
        centre = priors[..., :2] + 0.5 * side + deltas[..., :2] * side
        half = 0.5 * deltas[..., 2:].clamp(-LARGEST if self.shrink else None, LARGEST).exp() * side
        return torch.cat([centre - half, centre + half], dim=-1)
