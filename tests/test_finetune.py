"""Claims about fine-tuning: it learns, and it survives images without boxes."""

from pathlib import Path

import pytest
import torch

from aligndet.assigners import PositivesFirst
from aligndet.data.annotations import Annotations
from aligndet.data.batch import collate
from aligndet.data.coco import load_coco
from aligndet.data.labelled import LabelledImages
from aligndet.data.synthetic import make_scenes
from aligndet.engine.evaluate import coco_metrics
from aligndet.finetune import FineTune
from aligndet.models import build_detector
from aligndet.protocol import Detector
from aligndet.structures import Batch, Detections
from tests.scenes import small_detector, views_of

RATES = {"fcos": 2e-3, "retinanet": 2e-3}


def overfitted(detector: Detector, batch: Batch, rate: float, steps: int) -> list[Detections]:
    """What a detector finds on the batch that it was trained on for ``steps``."""
    model = FineTune(detector).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-4)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20, 2 * (1 - step / steps))
        optimizer.zero_grad()
        torch.stack(list(model(batch).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes)
        return detector.detect(candidates, batch.sizes)


def batch_of_all(annotations: Annotations, folder: Path, side: int) -> Batch:
    dataset = LabelledImages(annotations, folder, short_sides=(side,), long_side=side, flip_probability=0.0)
    return collate([dataset[(index, index)] for index in range(len(dataset))])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RATES))
def test_four_images_are_overfitted(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = make_scenes(tmp_path, images=4, size=128, seed=7, name="train")
    annotations = load_coco(path)
    batch = batch_of_all(annotations, tmp_path / "images", 128)
    assert len(batch) == 4
    detector = build_detector(
        name,
        "resnet18",
        num_classes=len(annotations.class_names),
        width=0.5,
        channels=64,
        convolutions=1,
        levels=3,
        norm="batch",
        frozen_stages=0,
    )
    found = overfitted(detector, batch, RATES[name], 220)
    metrics = coco_metrics(path, dict(zip(batch.image_ids, found, strict=True)))
    assert metrics["AP"] > 0.9, metrics


def test_images_and_batches_without_boxes_give_a_gradient_to_every_parameter() -> None:
    for counts in ((0, 0), (3, 0)):
        model = FineTune(small_detector()).train()
        batch, _ = views_of(counts)
        losses = model(batch)
        assert set(losses) == {"box", "centerness", "classification"}
        assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        model.zero_grad()


@pytest.mark.slow
def test_two_stages_overfit_boxes_and_masks(tmp_path: Path) -> None:
    """Mask R-CNN, which is Faster R-CNN with one head more."""
    torch.manual_seed(0)
    path = make_scenes(tmp_path, images=4, size=128, seed=7, name="train")
    annotations = load_coco(path, masks=True)
    batch = batch_of_all(annotations, tmp_path / "images", 256)
    detector = build_detector(
        "mask_rcnn",
        "resnet18",
        num_classes=len(annotations.class_names),
        width=0.5,
        channels=64,
        norm="batch",
        frozen_stages=0,
        box_head="2fc",
    )
    detector.sample = PositivesFirst(128, "image", 0.75)
    found = overfitted(detector, batch, 1e-3, 260)  # masks begin near nothing
    pasted = {number: item.resized((256, 256), (128, 128)) for number, item in zip(batch.image_ids, found, strict=True)}
    assert coco_metrics(path, pasted)["AP"] > 0.9
    assert coco_metrics(path, pasted, "segm")["AP"] > 0.9


@pytest.mark.slow
def test_detr_overfits_four_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = make_scenes(tmp_path, images=4, size=128, seed=7, name="train")
    annotations = load_coco(path)
    batch = batch_of_all(annotations, tmp_path / "images", 128)
    detector = build_detector(
        "detr",
        "resnet18",
        num_classes=len(annotations.class_names),
        width=0.5,
        channels=64,
        queries=20,
        encoder_layers=2,
        decoder_layers=3,
        feedforward=256,
        dropout=0.0,
        norm="batch",
        frozen_stages=0,
    )
    found = overfitted(detector, batch, 1e-3, 600)
    metrics = coco_metrics(path, dict(zip(batch.image_ids, found, strict=True)))
    assert metrics["AP"] > 0.9, metrics
