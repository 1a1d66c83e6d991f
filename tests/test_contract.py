"""What every detector owes to the rest: images of a batch do not mix, and no rank is left without a gradient.

What exactly does not mix. Each image of a batch computes what it computes alone *padded to the same size*. Padded to
its own size only, features differ: the padding holds zeros in the pixels, but biases and norms make it non-zero from
the first layer on, and group norm averages over it. Assignment does not depend on that padding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from aligndet.assigners import PositivesFirst
from aligndet.data.batch import Sample, collate
from aligndet.finetune import FineTune
from aligndet.losses.boxes import centerness_of
from aligndet.models import DETECTORS, build_detector
from aligndet.models.fcos import FCOSCandidates
from aligndet.models.retinanet import RetinaNetCandidates
from aligndet.models.two_stage import RegionCandidates, TwoStage
from aligndet.pretrain import AlignDet
from aligndet.protocol import Detector, normalise
from aligndet.structures import Batch, Candidates, Targets
from tests.ranks import on_two_ranks
from tests.scenes import boxes_for, views_of

ROOT = Path(__file__).parents[1]
SIZES = ((96, 89), (64, 120), (71, 73), (128, 100))  # (height, width) px; together 128 x 128 padded
everyone = pytest.mark.parametrize("name", list(DETECTORS))
EVERYTHING = PositivesFirst(10**6)  # keeps every candidate that is not IGNORED: sampling at random would not repeat


def small(name: str) -> Detector:
    detector = build_detector(name, "resnet18", 3, width=0.25, channels=64, score_threshold=0.0)
    if isinstance(detector, TwoStage):
        detector.sample_regions = detector.rpn.sample = EVERYTHING
        # Scores of an untrained RPN are so close that rounding decides their order.
        nn.init.normal_(detector.rpn.score.weight, std=0.5)
    nn.init.normal_(_last(detector.predictors["score"]).weight, std=0.1)
    return detector.eval()


def _last(layer: nn.Module) -> nn.Module:
    return [part for part in layer.modules() if isinstance(part, (nn.Conv2d, nn.Linear))][-1]


def sample(number: int, boxes: int, size: tuple[int, int]) -> Sample:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    found = boxes_for(boxes, min(size), generator)
    masks = torch.zeros(boxes, *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, found.long().tolist(), strict=True):
        mask[y0 : (y0 + y1) // 2, x0:x1] = True
    return Sample(pixels, found, torch.arange(boxes) % 3, torch.arange(boxes), size, number, masks=masks)


def candidates_of(detector: Detector, batch: Batch, targets: Targets | None = None) -> Candidates:
    images = normalise(batch.images, batch.sizes, detector.pixel_mean, detector.pixel_std)
    features = detector.backbone(images.to(next(detector.parameters()).dtype))
    return detector.candidates(list(features), batch.sizes, targets)


def losses_of(detector: Detector, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        return FineTune(detector).eval()(batch)


@everyone
def test_an_image_in_a_batch_is_that_image_alone(name: str) -> None:
    """In double precision: convolutions of other batch sizes round otherwise, and thresholds make steps of that."""
    torch.manual_seed(2)
    detector = small(name).double()
    samples = [sample(number, 2, size) for number, size in enumerate(SIZES)]
    batch = collate(samples)
    with torch.no_grad():
        together = candidates_of(detector, batch)
        found = detector.detect(together, batch.sizes)
        assert together.scores is not None
        for number, one in enumerate(samples):
            single = collate([one], size=(128, 128))
            alone = candidates_of(detector, single)
            assert alone.scores is not None
            own = together.scores[together.image == number]
            assert own.shape == alone.scores.shape
            assert (own - alone.scores).abs().max() < 1e-6
            (item,) = detector.detect(alone, single.sizes)
            assert 0 < len(item) == len(found[number])
            assert (item.scores - found[number].scores).abs().max() < 1e-6
            assert torch.equal(item.labels, found[number].labels)
            assert (item.boxes - found[number].boxes).abs().max() < 1e-3  # px
            assert item.boxes.max(dim=0).values[2] <= one.image.shape[2]
            assert item.boxes.max(dim=0).values[3] <= one.image.shape[1]


@everyone
def test_losses_of_an_image_repeated_are_those_of_the_image(name: str) -> None:
    torch.manual_seed(2)
    detector = small(name)
    one = sample(3, 4, (96, 89))
    alone, repeated = losses_of(detector, collate([one])), losses_of(detector, collate([one] * 3))
    assert set(alone) == set(repeated)
    for key, loss in alone.items():
        assert repeated[key].item() == pytest.approx(loss.item(), rel=2e-4), key


@everyone
def test_what_pre_training_keeps_of_an_image_does_not_depend_on_how_many_there_are(name: str) -> None:
    """A bound over all images of a pass would leave 16 images on one GPU an eighth of what 2 of them have."""
    sampling = build_detector(name, "resnet18", 1, width=0.25, channels=32).sampling
    if sampling is None:  # all are kept
        return
    number = 2 * sampling.limit
    kept = []
    for images in (1, 5):
        image = torch.arange(images).repeat_interleave(number)
        rows = sampling(torch.zeros(images * number, dtype=torch.int64), image)
        kept.append(torch.bincount(image[rows], minlength=images))
    assert kept[0].tolist() == [sampling.limit] and kept[1].tolist() == [sampling.limit] * 5


def normalisers(candidates: Candidates, targets: Targets) -> dict[str, float]:
    """What each loss of a single image is divided by, where its form is a sum over candidates or pixels."""
    assert candidates.matched is not None
    positive = (candidates.matched >= 0).nonzero().squeeze(1)
    number = float(len(positive))
    if isinstance(candidates, FCOSCandidates):
        weights = centerness_of(candidates.points[positive], targets.boxes[candidates.matched[positive]])
        return {"box": weights.sum().item(), "centerness": number, "classification": number}
    if isinstance(candidates, RetinaNetCandidates):
        return dict.fromkeys(("box", "classification"), max(1.0, number))
    assert isinstance(candidates, RegionCandidates) and candidates.objectness is not None
    regions, anchors = float(len(candidates.boxes)), float(len(candidates.objectness.scores))
    return {"rpn_score": anchors, "rpn_box": anchors, "box": regions, "classification": regions, "mask": number * 784}


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"])
def test_losses_of_a_batch_are_weighted_means_of_its_images(name: str) -> None:
    """Weights are the normalisers; an image without boxes adds its background's cost, as divided by 1 when alone."""
    torch.manual_seed(2)
    detector = small(name)
    samples = [sample(3, 4, (96, 89)), sample(4, 2, (64, 96)), sample(5, 0, (96, 96))]
    together = losses_of(detector, collate(samples))
    costs, totals = dict.fromkeys(together, 0.0), dict.fromkeys(together, 0.0)
    for one in samples:
        batch = collate([one], size=(96, 96))
        with torch.no_grad():
            weights = normalisers(candidates_of(detector, batch, batch.targets), batch.targets)
        for key, loss in losses_of(detector, batch).items():
            costs[key] += (weights[key] or 1.0) * loss.item()
            totals[key] += weights[key]
    for key, loss in together.items():
        assert loss.item() > 0
        assert loss.item() == pytest.approx(costs[key] / totals[key], rel=5e-4), key


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn"])
def test_assignment_does_not_depend_on_the_size_of_neighbours(name: str) -> None:
    """Positives per box are those of the image alone in its own padding, and where anchors beyond an image are
    IGNORED so is the number of background; FCOS, as in its paper, counts points beyond the image as background."""
    detector = small(name)
    samples = [sample(number, 3, size) for number, size in enumerate(SIZES)]

    def positives_and_background(batch: Batch) -> tuple[list[int], int]:
        found = candidates_of(detector, batch, batch.targets)
        if isinstance(found, RegionCandidates):
            assert found.objectness is not None
            matched = found.objectness.matched
        else:
            assert found.matched is not None
            matched = found.matched
        return torch.bincount(matched[matched >= 0], minlength=len(batch.targets)).tolist(), int((matched == -1).sum())

    with torch.no_grad():
        together, background = positives_and_background(collate(samples))
        alone = [positives_and_background(collate([one])) for one in samples]
    assert together == [count for counts, _ in alone for count in counts]
    assert name == "fcos" or min(together) > 0
    if name != "fcos":
        assert background == sum(number for _, number in alone)


@everyone
@pytest.mark.parametrize("label", [3, 99, -1])
def test_a_label_without_a_class_is_named(name: str, label: int) -> None:
    batch = collate([sample(1, 2, SIZES[0])], multiple=32)
    targets = replace(batch.targets, labels=torch.tensor([0, label]))
    with pytest.raises(ValueError, match=rf"targets.labels: want 0 .. 2, got {label} for box 1 \("):
        FineTune(small(name))(replace(batch, targets=targets))


@pytest.mark.parametrize("name", ["fcos", "retinanet", "faster_rcnn"])
def test_a_crowd_takes_background_out_of_the_losses(name: str) -> None:
    """All of one image is a crowd: its objects stay, its background goes; points (FCOS) know no crowds."""
    detector = small(name)
    plain = collate([sample(3, 3, (96, 96)), sample(4, 2, (96, 96))])
    crowds = replace(plain.targets, crowds=torch.tensor([[0.0, 0, 96, 96]]), crowd_image=torch.tensor([1]))
    with torch.no_grad():
        found = [candidates_of(detector, plain, targets) for targets in (plain.targets, crowds)]
    images, matched = [one.image for one in found], [one.matched for one in found]
    if name == "faster_rcnn":  # ignored regions are not kept at all
        counts = [torch.bincount(image[match == -1], minlength=2) for image, match in zip(images, matched, strict=True)]  # type: ignore[index,arg-type]
        assert counts[0][0] == counts[1][0] > 0 and counts[0][1] > 0 and counts[1][1] == 0
        assert len(found[1].objectness.scores) < len(found[0].objectness.scores)  # type: ignore[attr-defined]
        return
    before, after = matched
    assert before is not None and after is not None
    if name == "fcos":
        assert torch.equal(before, after)
        return
    assert torch.equal(before[images[0] == 0], after[images[0] == 0])
    assert torch.equal(before >= 0, after >= 0)
    boxes = found[0].anchors[images[0] == 1]  # type: ignore[attr-defined]
    inside = (boxes.clamp(0, 96)[:, 2:] - boxes.clamp(0, 96)[:, :2]).prod(1) >= 0.5 * (
        boxes[:, 2:] - boxes[:, :2]
    ).prod(1)
    left = after[images[0] == 1] == -1
    assert int(left.sum()) > 0, "anchors mostly beyond the crowd stay background"
    assert not bool((left & inside).any())


SCRIPT = """
import torch, torch.distributed as dist
from dataclasses import replace
from datetime import timedelta
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
from aligndet.finetune import FineTune
from aligndet.models import DETECTORS, build_detector
from aligndet.pretrain import AlignDet
from aligndet.structures import no_targets
from tests.protocol_page import executed
from tests.scenes import views_of
from tests.test_detectors import with_masks

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.get_rank()

def make(name, classes):
    torch.manual_seed(0)
    if name == "own":
        return executed(0)["CentreDetector"](classes)
    return build_detector(name, "resnet18", classes, width=0.25, channels=32)

def without_boxes(batch):
    return replace(batch, targets=no_targets())

def check(title, model, batches):
    replica = DistributedDataParallel(model.train())
    losses = replica(*batches)
    names = [None, None]
    dist.all_gather_object(names, sorted(losses))
    assert names[0] == names[1], (title, names)
    assert all(bool(loss.isfinite()) for loss in losses.values()), (title, losses)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
    assert not [key for key, value in gradients.items() if value is None], title
    mine = torch.cat([value.flatten() for value in gradients.values()])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(theirs, mine)
    assert bool(mine.isfinite().all()), title
    assert torch.equal(theirs[0], theirs[1]), title
    assert float(mine.abs().sum()) > 0 or title.endswith("none"), title

for name in [*DETECTORS, "own"]:
    # Rank 0 has boxes and rank 1 has none; then neither has. Empty targets come with masks and without.
    for case, counts in (("one", (3, 2) if rank == 0 else (0, 0)), ("none", (0, 0))):
        views = [with_masks(view) for view in views_of(counts)]
        check(f"{name} fine-tuning {case}", FineTune(make(name, 3)), views[:1])
        check(f"{name} pre-training {case}", AlignDet(make(name, 1), embedding=16), views_of(counts))
        if rank == 1:
            views = [without_boxes(view) for view in views]
        check(f"{name} fine-tuning, masks on one rank, {case}", FineTune(make(name, 3)), views[:1])
dist.destroy_process_group()
print("rank", rank, "done")
"""


def test_a_rank_without_boxes_gets_the_gradients_of_the_other() -> None:
    outputs = on_two_ranks(SCRIPT)
    assert "rank 1 done" in outputs[1]


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2", "swin_t"])  # one of each kind; ResNet-18 elsewhere
@pytest.mark.parametrize("name", list(DETECTORS))
def test_every_kind_of_backbone_is_pre_trained_upon(name: str, backbone: str) -> None:
    """One step: everything that learns gets a gradient, the backbone none, whatever its channels and strides are."""
    own: dict[str, object] = {"class_agnostic": True, "box_head": "2fc", "head_width": 64} if "rcnn" in name else {}
    detector = build_detector(name, backbone, 1, width=0.25, channels=64, **own)  # type: ignore[arg-type]
    model = AlignDet(detector, embedding=16).train()
    losses = model(*views_of((4, 3)))
    torch.stack(list(losses.values())).sum().backward()
    assert all(bool(loss.isfinite()) for loss in losses.values()) and losses["contrast"] > 0
    lacking = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not lacking
    assert not any(value.requires_grad for value in detector.backbone.parameters())
