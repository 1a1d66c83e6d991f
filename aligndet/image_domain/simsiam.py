"""SimSiam: a backbone learns that two crops of one image are alike; Chen and He (arXiv:2011.10566)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.models.backbones import Backbone
from aligndet.ops.batch_norm import RowNorm
from aligndet.protocol import Detector, normalise
from aligndet.structures import Batch


class SimSiam(nn.Module):
    """Backbone, projector and predictor; two views -> loss.

    Args:
        backbone: all of it is trained; batch norm has to be trainable ("batch" or "sync").
        projection: outputs and hidden widths of the projector.
        bottleneck: hidden width of the predictor.

    Source:
        Section 3 of the paper: 3-layer projector and 2-layer predictor with batch norm, none after the last layers
        but for the projector's, which has no affine parameters. All norms of projector and predictor are over the
        images of all ranks, as its authors' are; those of the backbone with ``norm`` "sync".
    """

    def __init__(self, backbone: Backbone, *, projection: int = 2048, bottleneck: int = 512) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            *_layer(backbone.channels[-1], projection),
            *_layer(projection, projection),
            nn.Linear(projection, projection, bias=False),
            RowNorm(projection, affine=False),
        )
        self.predictor = nn.Sequential(*_layer(projection, bottleneck), nn.Linear(bottleneck, projection))

    def forward(self, view1: Batch, view2: Batch) -> dict[str, Tensor]:
        """Minus the cosine between each view's prediction and the other's projection, a constant: -1 .. 1.

        Raises:
            ValueError: a batch of one image, which has no batch statistics.
        """
        if len(view1) < 2:
            raise ValueError(f"SimSiam: batch norm wants at least 2 images per rank and pass, got {len(view1)}")
        first, second = self._projections(view1), self._projections(view2)
        loss = _distance(self.predictor(first), second) + _distance(self.predictor(second), first)
        return {"similarity": loss / 2}

    @torch.no_grad()
    def spread(self, view: Batch) -> float:
        """How far projections differ between images: their standard deviation on the unit sphere times sqrt(D).

        Near 1 for healthy training, 0 where everything has collapsed onto one point.
        """
        projected = F.normalize(self._projections(view).float(), dim=1)
        return float(projected.std(dim=0).mean() * projected.shape[1] ** 0.5)

    def _projections(self, view: Batch) -> Tensor:
        images = normalise(view.images, view.sizes, Detector.pixel_mean, Detector.pixel_std)
        return self.projector(self.backbone(images)[-1].mean(dim=(2, 3)))


def _layer(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), RowNorm(outputs), nn.ReLU(inplace=True)]


def _distance(prediction: Tensor, projection: Tensor) -> Tensor:
    return -F.cosine_similarity(prediction.float(), projection.detach().float(), dim=1).mean()
