"""A detector of one's own, written against the protocol alone, goes through both stages with no change elsewhere."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.engine.ema import EMA
from aligndet.finetune import FineTune
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector
from aligndet.structures import BACKGROUND, Candidates, Detections, Targets
from aligndet.weights import export_pretrained, load_pretrained
from tests.scenes import views_of

STRIDE = 16


@dataclass(frozen=True)
class CellCandidates(Candidates):
    """Cells of one map; their boxes are xyxy px."""

    boxes: Tensor


class Stem(nn.Module):
    """``[B, 3, H, W] -> [[B, 24, H / 16, W / 16]]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, STRIDE, stride=STRIDE)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.patches(images).relu()]


class CellDetector(Detector):
    """One box per 16 px cell; a cell belongs to the first box whose centre it holds. Knows nothing of sampling."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = Stem()
        self.neck = nn.Conv2d(24, 32, 3, padding=1)
        self.predictors = nn.ModuleDict({"score": self.score_layer(num_classes), "box": nn.Linear(32, 4)})

    def score_layer(self, width: int, hidden: bool = False) -> nn.Module:
        if hidden:
            return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, width))
        return nn.Linear(32, width)

    def candidates(self, features: list[Tensor], sizes: Tensor, targets: Targets | None = None) -> CellCandidates:
        maps = self.neck(features[0]).relu()
        images, _, rows, columns = maps.shape
        cells = maps.permute(0, 2, 3, 1).reshape(-1, 32)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centres = (torch.stack([x, y], dim=2).reshape(-1, 2).repeat(images, 1) + 0.5) * STRIDE
        sides = self.predictors["box"](cells).exp() * STRIDE
        boxes = torch.cat([centres - sides[:, :2], centres + sides[:, 2:]], dim=1)
        image = torch.arange(images).repeat_interleave(rows * columns)
        scores = self.predictors["score"](cells) if "score" in self.predictors else None
        embeddings = self.predictors["embedding"](cells) if "embedding" in self.predictors else None
        matched = None
        if targets is not None:
            matched = torch.full((len(cells),), BACKGROUND)
            middle = (targets.boxes[:, :2] + targets.boxes[:, 2:]) // (2 * STRIDE)
            cell = targets.image * rows * columns + middle[:, 1].long() * columns + middle[:, 0].long()
            matched[cell.flip(0)] = torch.arange(len(targets)).flip(0)
        return CellCandidates(scores, embeddings, image, matched, boxes)

    def localization_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        assert isinstance(candidates, CellCandidates)
        assert candidates.matched is not None
        positive = candidates.matched >= 0
        truth = targets.boxes[candidates.matched[positive]]
        loss = F.l1_loss(candidates.boxes[positive], truth, reduction="sum")
        return {"box": loss / max(1, len(truth)) / STRIDE}

    def classification_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        assert candidates.scores is not None
        assert candidates.matched is not None
        truth = torch.zeros_like(candidates.scores)
        positive = (candidates.matched >= 0).nonzero().squeeze(1)
        truth[positive, targets.labels[candidates.matched[positive]]] = 1
        return {"classification": F.binary_cross_entropy_with_logits(candidates.scores, truth)}

    def detect(self, candidates: Candidates, sizes: Tensor) -> list[Detections]:
        assert isinstance(candidates, CellCandidates)
        assert candidates.scores is not None
        found = []
        for image in range(len(sizes)):
            mine = candidates.image == image
            scores, labels = candidates.scores[mine].sigmoid().max(dim=1)
            order = scores.argsort(descending=True)[:10]
            found.append(Detections(candidates.boxes[mine][order], scores[order], labels[order]))
        return found


def test_a_detector_of_ones_own_pretrains_transfers_fine_tunes_and_detects(tmp_path: Path) -> None:
    model = AlignDet(CellDetector(1), embedding=16).train()
    assert model.momentum is not None
    frozen = copy.deepcopy(model.online.backbone.state_dict())
    average = EMA(model.online, model.momentum)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    costs = []
    for _ in range(40):
        losses = model(*views_of((5, 3)))
        assert set(losses) == {"box", "contrast"}
        total = torch.stack(list(losses.values())).sum()
        costs.append({name: loss.item() for name, loss in losses.items()})
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(0.9)
    assert costs[-1]["box"] < 0.7 * costs[0]["box"]
    assert costs[-1]["contrast"] < costs[0]["contrast"]
    after = model.online.backbone.state_dict()
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)

    path = tmp_path / "pretrained.pt"
    torch.save(export_pretrained(model), path)
    detector = CellDetector(3)
    report = load_pretrained(detector, path)
    assert set(report.kept) == {"predictors.score.weight", "predictors.score.bias"}
    view, _ = views_of((5, 3))
    losses = FineTune(detector)(view)
    assert set(losses) == {"box", "classification"}
    assert losses["box"].item() < 0.7 * FineTune(CellDetector(3))(view)["box"].item()
    with torch.no_grad():
        found = detector.detect(detector.candidates(detector.features(view.images, view.sizes), view.sizes), view.sizes)
    assert [len(one) for one in found] == [10, 10]
