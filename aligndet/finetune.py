"""Fine-tuning: the detector learns from labelled images; twin of ``pretrain.py``."""

from __future__ import annotations

from torch import Tensor, nn

from aligndet.protocol import Detector
from aligndet.structures import Batch, check_boxes


class FineTune(nn.Module):
    """A detector and labelled images -> losses.

    Args:
        detector: any detector of the protocol; what of it is frozen is its own affair.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch; scalars with a graph, also for images without boxes.

        Raises:
            ValueError: a label outside 0 .. K-1, or a box that is not finite or has a side that is not positive.
        """
        check_boxes(batch.targets)
        features = self.detector.features(batch.images, batch.sizes)
        candidates = self.detector.candidates(features, batch.sizes, batch.targets)
        # Class losses first: they check the labels, which box layers of each class take for rows.
        named = self.detector.classification_loss(candidates, batch.targets)
        return self.detector.localization_loss(candidates, batch.targets) | named
