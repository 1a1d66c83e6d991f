"""DETR: a set of boxes from queries, without anchors or suppression; Carion et al. (arXiv:2005.12872)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aligndet.assigners.hungarian import HungarianAssigner, shares_of
from aligndet.losses.boxes import giou_loss
from aligndet.models.backbones import Backbone
from aligndet.models.transformer import Transformer, inside_cells
from aligndet.ops.boxes import centre_to_corners, clip
from aligndet.ops.constants import constants
from aligndet.ops.precise import in_float32
from aligndet.ops.reduce import mean_over_ranks
from aligndet.protocol import Detector, pooled_mean
from aligndet.structures import BACKGROUND, Candidates, Detections, Targets, check_labels, class_of, scores_of

BACKGROUND_WEIGHT = 0.1  # of a query without a box in the classification loss
DISTANCE_WEIGHT, OVERLAP_WEIGHT = 5.0, 2.0  # of the two box losses


@dataclass(frozen=True)
class DETRCandidates(Candidates):
    """Queries, layer by layer and image by image; without targets those of the last decoder layer only.

    Attributes:
        embeddings: float [E, D], of the queries that ``sample`` keeps; losses of boxes and classes are of all queries.
        boxes: float32 [N, 4], (centre x, centre y, width, height) in shares of the image's sides, 0 .. 1.
        sizes: int64 [B, 2], (height, width) px of the images.
        nearest: int64 [E], which box each query with an embedding is on, by a matching that knows coordinates alone.
            None without embeddings or targets.
    """

    boxes: Tensor
    sizes: Tensor
    nearest: Tensor | None = None

    def box_ids(self, targets: Targets) -> Tensor:
        """By coordinates alone: a query is the same object in two views whatever its class. Method section 2.8."""
        if self.nearest is None:
            return super().box_ids(targets)
        return replace(self, matched=self.nearest, nearest=None).box_ids(targets)


class BoxPredictor(nn.Module):
    """Three linear layers with ReLU between them, and a sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, width) for width in (channels, channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C] -> [..., 4]`` in float32, 0 .. 1."""
        first, second, last = self.layers
        return in_float32(last, second(first(x).relu()).relu()).sigmoid()


class DETR(Detector):
    """DETR on the coarsest features.

    Args:
        backbone: its last output is used.
        num_classes: K.
        channels: C of the transformer, a multiple of ``heads`` and of 4.
        queries: Q, the most objects that are found in an image.
        encoder_layers, decoder_layers: of the transformer; every decoder layer is trained to predict.
        heads: of every attention.
        feedforward: hidden width of the transformer's linear layers.
        dropout: of the transformer.
        score_threshold: class probability below which nothing is detected; DETR itself keeps every query.

    Source:
        Method section 1.5.
    """

    size_divisor = 1
    sampling = None
    # Of a query without a box: its weight in the class loss, and in what that is divided by; ``reference`` has others.
    background_weights = (BACKGROUND_WEIGHT, BACKGROUND_WEIGHT)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 256,
        queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or feedforward < 1:
            raise ValueError(f"heads, feedforward: want at least 1, got {heads}, {feedforward}")
        if channels < 1 or channels % heads or channels % 4:
            raise ValueError(f"channels: want a multiple of 4 and of the {heads} heads, got {channels}")
        if queries < 1 or encoder_layers < 0 or decoder_layers < 1:
            raise ValueError(
                "want at least one query, one decoder layer and no negative number of encoder layers, "
                f"got queries={queries}, decoder_layers={decoder_layers}, encoder_layers={encoder_layers}"
            )
        self.channels, self.score_threshold, self.decoder_layers = channels, score_threshold, decoder_layers
        self.assigner = HungarianAssigner(1.0, DISTANCE_WEIGHT, OVERLAP_WEIGHT)
        self.backbone, self.finest = backbone, backbone.strides[0]
        self.neck = nn.Conv2d(backbone.channels[-1], channels, 1)
        self.head = Transformer(
            channels,
            queries,
            layers=(encoder_layers, decoder_layers),
            heads=heads,
            width=feedforward,
            dropout=dropout,
        )
        # One output more than classes, the last: no object.
        self.predictors = nn.ModuleDict({"score": self.score_layer(num_classes + 1), "box": BoxPredictor(channels)})

    def score_layer(self, width: int, hidden: bool = False) -> nn.Module:
        """A linear layer; hidden: two (method section 2.4)."""
        last = nn.Linear(self.channels, width)
        if not hidden:
            return last
        return nn.Sequential(nn.Linear(self.channels, self.channels), nn.ReLU(inplace=True), last)

    def candidates(self, features: list[Tensor], sizes: Tensor, targets: Targets | None = None) -> DETRCandidates:
        """See Detector; the rows are queries, layer by layer, image by image."""
        outputs = self._outputs(features, sizes)
        if targets is None:
            outputs = outputs[-1:]
        layers, images, queries = outputs.shape[:3]
        image = torch.arange(images, device=sizes.device).repeat_interleave(queries).repeat(layers)
        scores = self.predictors["score"](outputs) if "score" in self.predictors else None
        boxes = self.predictors["box"](outputs)  # always: queries are matched by what they predict
        matched, nearest = None, None
        if targets is not None:
            if scores is not None:
                check_labels(targets, scores.shape[3] - 1)
            probabilities = None if scores is None else scores.float().softmax(dim=3)
            matched = self.assigner(boxes, probabilities, targets, sizes).flatten()
        embeddings, queries_of = None, outputs.flatten(0, 2)
        if "embedding" in self.predictors:
            if matched is not None and targets is not None:
                nearest = matched if scores is None else self.assigner(boxes, None, targets, sizes).flatten()
                if self.sample is not None:
                    rows = self.sample(nearest, image)
                    nearest, queries_of = nearest[rows], queries_of[rows]
            embeddings = self.predictors["embedding"](queries_of)
        scores = None if scores is None else scores.flatten(0, 2)
        return DETRCandidates(scores, embeddings, image, matched, boxes.flatten(0, 2), sizes, nearest)

    def tied_parts(self) -> list[nn.Module]:
        """The queries: query q asks the same question in both branches. Method section 2.1."""
        return [self.head.queries]

    def region_features(self, features: list[Tensor], boxes: Tensor, image: Tensor, height: int) -> Tensor:
        """The mean over each box of what the transformer reads: [N, C]."""
        return pooled_mean([self.neck(features[-1])], boxes, image, height)

    def localization_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """L1 of box shares and generalised IoU, summed over matched queries of all layers, over the number of boxes."""
        assert isinstance(candidates, DETRCandidates) and candidates.matched is not None
        positive = (candidates.matched >= 0).nonzero().squeeze(1)
        boxes = candidates.boxes[positive]
        truth = shares_of(targets, candidates.sizes)[candidates.matched[positive]]
        number = mean_over_ranks(boxes.new_full((), float(len(targets)))).clamp(min=1)
        distance = F.l1_loss(boxes, truth, reduction="sum") / number
        overlap = giou_loss(centre_to_corners(boxes), centre_to_corners(truth)).sum() / number
        return {"box": DISTANCE_WEIGHT * distance, "overlap": OVERLAP_WEIGHT * overlap}

    def classification_loss(self, candidates: Candidates, targets: Targets) -> dict[str, Tensor]:
        """Softmax cross-entropy, weighted mean over queries, summed over layers; "no object" is the last class."""
        assert candidates.matched is not None
        scores = scores_of(candidates)
        classes = scores.shape[1] - 1
        labels = class_of(targets, candidates.matched, classes)
        labels = torch.where(labels == BACKGROUND, classes, labels)
        own, share = self.background_weights
        weight, shares = (torch.where(candidates.matched == BACKGROUND, value, 1.0) for value in (own, share))
        cost = F.cross_entropy(scores.float(), labels, reduction="none")
        # Each layer matches as many queries as the next, so one layer's weights are an L-th of all.
        least = torch.finfo(torch.float32).tiny if share else 1.0  # without boxes there may be nothing to divide by
        total = mean_over_ranks(shares.sum() / self.decoder_layers).clamp(min=least)
        return {"classification": (cost * weight).sum() / total}

    @torch.no_grad()
    def detect(self, candidates: Candidates, sizes: Tensor) -> list[Detections]:
        """The best class of each query above the threshold, best 100; nothing is suppressed."""
        assert isinstance(candidates, DETRCandidates)
        images = len(sizes)
        score, label = scores_of(candidates).float().softmax(dim=1)[:, :-1].max(dim=1)
        boxes = centre_to_corners(candidates.boxes) * sizes.flip(1).repeat(1, 2)[candidates.image]
        parts = zip(boxes.view(images, -1, 4), score.view(images, -1), label.view(images, -1), sizes, strict=True)
        return [self._detect(*part) for part in parts]

    def _outputs(self, features: list[Tensor], sizes: Tensor) -> Tensor:
        """What each query knows after each decoder layer: [L, B, Q, C]."""
        cells = self.neck(features[-1])
        # The finest map gives the padded size up to its stride; the largest image gives it exactly if it reaches there.
        bound = constants([self.finest * int(side) for side in features[0].shape[2:]], sizes, sizes.dtype)
        largest = sizes.amax(dim=0)
        padded = torch.where(largest > bound - self.finest, torch.minimum(largest, bound), bound)
        outputs: Tensor = self.head(cells, inside_cells(sizes, padded, (cells.shape[2], cells.shape[3])))
        return outputs

    def _detect(self, boxes: Tensor, score: Tensor, label: Tensor, size: Tensor) -> Detections:
        best = score.argsort(descending=True, stable=True)[:100]
        best = best[score[best] > self.score_threshold]
        return Detections(clip(boxes[best], size), score[best], label[best])
