"""SoCo: backbone and neck learn from boxes of two views; the paper's main competitor, on the same protocol and data."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.ops.batch_norm import RowNorm
from aligndet.protocol import Detector
from aligndet.structures import Batch, Targets, check_boxes


class SoCo(nn.Module):
    """A detector and two views -> one loss: features of a box in one view predict those of the same box in the other.

    Proposals are taken as final boxes: there is no assignment and no box loss. What learns is what ``region_features``
    uses: backbone, neck and, for two-stage detectors, the box head; the rest of the detector stays as it is. The online
    branch has a projector and a predictor on top, the momentum branch a projector; the loss is
    ``2 - 2 cos(predicted, projected)``, both ways, averaged over the boxes that both views have.

    Args:
        detector: any detector of the protocol; changed in place.
        embedding: outputs of projector and predictor.
        hidden: width of their hidden layers.

    Source:
        SoCo (arXiv:2106.02637), section 3: object-level BYOL on selective-search boxes with RoIAlign features. Differs
        in the views: there crops of which one is a quarter the size; here the two views that AlignDet sees, so that the
        methods can be compared. Projector and predictor as in BYOL (arXiv:2006.07733), with batch norm over the boxes
        of all ranks; fewer than two boxes in all are normalised by the running statistics.
    """

    def __init__(self, detector: Detector, *, embedding: int = 256, hidden: int = 4096) -> None:
        super().__init__()
        self.online = detector
        used = _used_by_regions(detector)
        for name, value in detector.named_parameters():
            if name not in used:
                value.requires_grad_(False)
        width = _region_width(detector)
        self.projector = _two_layers(width, hidden, embedding)
        self.predictor = _two_layers(embedding, hidden, embedding)
        average = nn.ModuleDict({"online": detector, "projector": self.projector})
        self.momentum = copy.deepcopy(average).requires_grad_(False)
        self.train(self.training)

    @property
    def averaged(self) -> nn.ModuleDict:
        """What ``momentum`` is the average of, under the same names."""
        return nn.ModuleDict({"online": self.online, "projector": self.projector})

    def forward(self, view1: Batch, view2: Batch) -> dict[str, Tensor]:
        """The loss of both views; 0 with a graph where no box is in both.

        Raises:
            ValueError: a box is not finite or has a side that is not positive.
        """
        for view in (view1, view2):
            check_boxes(view.targets)
        first, second = _common(view1.targets, view2.targets)
        both = ((view1, first), (view2, second))
        predicted = [self.predictor(self._projected(self.online, self.projector, *item)) for item in both]
        branch, projector = self.momentum["online"], self.momentum["projector"]
        assert isinstance(branch, Detector) and isinstance(projector, nn.Sequential)
        with torch.no_grad():
            projected = [self._projected(branch, projector, *item) for item in both]
        costs = [_distance(predicted[0], projected[1]), _distance(predicted[1], projected[0])]
        return {"region": torch.stack(costs).mean()}

    def left_behind(self) -> list[str]:
        """Names of the parts of the detector that have learned nothing."""
        used = _used_by_regions(self.online)
        tops = {name.partition(".")[0] for name in used}
        return [name for name, _ in self.online.named_children() if name not in tops]

    def _projected(self, branch: Detector, projector: nn.Module, view: Batch, rows: Tensor) -> Tensor:
        targets = view.targets
        features = branch.features(view.images, view.sizes)
        regions = branch.region_features(features, targets.boxes[rows], targets.image[rows], view.images.shape[2])
        projected: Tensor = projector(regions.float())
        return projected


def _common(first: Targets, second: Targets) -> tuple[Tensor, Tensor]:
    """Rows of the boxes that both have, in the same order: int64 [n] each."""
    same = first.ids[:, None] == second.ids
    rows = same.nonzero(as_tuple=True)
    return rows[0], rows[1]


def _distance(predicted: Tensor, projected: Tensor) -> Tensor:
    similarity = F.cosine_similarity(predicted.float(), projected.float(), dim=1)
    return (2 - 2 * similarity).sum() / max(1, len(similarity)) + 0.0 * predicted.sum()


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    # Statistics over boxes keep BYOL from one answer for all of them, which layer norm has reached after 20 steps.
    return nn.Sequential(nn.Linear(inputs, hidden), RowNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


def _probe(detector: Detector) -> Tensor:
    """``region_features`` of one box on a small black image."""
    device = next(detector.parameters()).device
    features = detector.features(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device), torch.tensor([[64, 64]], device=device)
    )
    box = torch.tensor([[8.0, 8.0, 40.0, 40.0]], device=device)
    return detector.region_features(features, box, torch.zeros(1, dtype=torch.int64, device=device), 64)


def _region_width(detector: Detector) -> int:
    mode = detector.training
    with torch.no_grad():
        width = _probe(detector.eval()).shape[1]
    detector.train(mode)
    return int(width)


def _used_by_regions(detector: Detector) -> set[str]:
    """Names of the trainable parameters under backbone, neck and whatever else ``region_features`` passes through.

    By the graph, not by name: every tensor that a region's features have a path to belongs to a part that learns.
    """
    mode = detector.training
    with torch.enable_grad():
        total = _probe(detector.eval()).sum()
        names = [(name, value) for name, value in detector.named_parameters() if value.requires_grad]
        gradients = torch.autograd.grad(total, [value for _, value in names], allow_unused=True)
    detector.train(mode)
    tops = {name.partition(".")[0] for (name, _), found in zip(names, gradients, strict=True) if found is not None}
    return {name for name, _ in names if name.partition(".")[0] in tops}
