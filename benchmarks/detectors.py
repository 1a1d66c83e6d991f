"""Training step and inference of every detector beside its twin in torchvision (DETR: in Hugging Face transformers).

ResNet-50, frozen batch norm, stem and first stage frozen, 80 classes on both sides; random weights. Training: 2 images
of 320 x 320 with 10 boxes each, forward, backward and SGD. Inference: one image of 640 x 640, uint8 (ours) or float
(the twin's interface) to boxes, with batch norms folded on our side, as in ``eval.py``.
Both sides take turns in one process. Faster and Mask R-CNN have the 2fc head, which is
torchvision's. ``pip install aligndet[bench]`` brings transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from environment import environment
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers import __version__ as transformers_version

from aligndet.finetune import FineTune
from aligndet.models import build_detector, folded
from aligndet.structures import Batch, Targets

IMAGES, SIZE, BOXES, CLASSES, LARGE = 2, 320, 10, 80, 640
TWINS = {
    "fcos": "fcos_resnet50_fpn",
    "retinanet": "retinanet_resnet50_fpn",
    "faster_rcnn": "fasterrcnn_resnet50_fpn",
    "mask_rcnn": "maskrcnn_resnet50_fpn",
    "detr": "transformers DetrForObjectDetection",
}
Step = Callable[[], None]


def random_boxes(number: int = BOXES) -> Tensor:
    corner = torch.rand(number, 2) * (SIZE - 160)
    return torch.cat([corner, corner + 32 + torch.rand(number, 2) * 128], dim=1)


def masks_of(boxes: Tensor) -> Tensor:
    """The upper halves of boxes: bool [M, SIZE, SIZE]."""
    masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0 : (y0 + y1) // 2, x0:x1] = True
    return masks


def training(model: nn.Module, losses: Callable[[], list[Tensor]]) -> Step:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4, momentum=0.9, fused=True)

    def step() -> None:
        torch.stack(losses()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(name: str) -> tuple[Step, Step]:
    """One training step; one inference."""
    options: dict[str, Any] = {"box_head": "2fc"} if name in ("faster_rcnn", "mask_rcnn") else {}
    model = FineTune(build_detector(name, "resnet50", CLASSES, **options)).train()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    boxes = torch.cat([random_boxes() for _ in range(IMAGES)])
    rows = torch.arange(len(boxes))
    masks = masks_of(boxes) if name == "mask_rcnn" else None
    sizes = torch.tensor([[SIZE, SIZE]] * IMAGES)
    images = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    batch = Batch(images, sizes, sizes, (0, 1), Targets(boxes, rows % CLASSES, rows, rows // BOXES, masks))
    detector = folded(build_detector(name, "resnet50", CLASSES, **options))
    large, size = torch.randint(0, 256, (1, 3, LARGE, LARGE), dtype=torch.uint8), torch.tensor([[LARGE, LARGE]])

    def infer() -> None:
        with torch.inference_mode():
            detector.detect(detector.candidates(detector.features(large, size), size), size)

    return training(model, lambda: list(model(batch).values())), infer


def torchvisions(name: str, number: int = BOXES) -> tuple[Step, Step]:
    build = getattr(torchvision.models.detection, TWINS[name])
    sides = {"min_size": SIZE, "max_size": SIZE}
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES + (name.endswith("rcnn")), **sides).train()
    freeze(model.backbone.body)
    # As it comes with pre-trained backbones: three stages train.
    for key, parameter in model.backbone.body.named_parameters():
        parameter.requires_grad_(key.startswith(("layer2", "layer3", "layer4")))
    images = [torch.rand(3, SIZE, SIZE) for _ in range(IMAGES)]
    boxes = [random_boxes(number) for _ in range(IMAGES)]
    labels = torch.arange(number) % (CLASSES - 1) + 1
    targets = [{"boxes": b, "labels": labels, "masks": masks_of(b).to(torch.uint8)} for b in boxes]
    test = build(weights=None, weights_backbone=None, num_classes=model_classes(name), min_size=LARGE, max_size=LARGE)
    freeze(test.backbone.body)
    test.eval()
    large = [torch.rand(3, LARGE, LARGE)]

    def infer() -> None:
        with torch.inference_mode():
            test(large)

    return training(model, lambda: list(model(images, targets).values())), infer


def model_classes(name: str) -> int:
    return CLASSES + (1 if name.endswith("rcnn") else 0)


def freeze(body: nn.Module) -> None:
    """Frozen batch norms in the place of trained ones, as pre-trained backbones have."""
    for parent in list(body.modules()):
        for key, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, key, FrozenBatchNorm2d(child.num_features))


def hugging_face(name: str, number: int = BOXES) -> tuple[Step, Step]:
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"]),
        num_labels=CLASSES,
        auxiliary_loss=True,
    )
    model = DetrForObjectDetection(config).train()
    for key, parameter in model.named_parameters():
        if "backbone" in key:  # transformers freezes all of it; DETR as published trains three stages
            parameter.requires_grad_("embedder.embedder" not in key and "stages.0" not in key)
    pixels = torch.rand(IMAGES, 3, SIZE, SIZE)
    labels = []
    for _ in range(IMAGES):
        boxes = random_boxes(number) / SIZE
        shares = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
        labels.append({"class_labels": torch.arange(number), "boxes": shares})
    test = DetrForObjectDetection(config).eval()
    large = torch.rand(1, 3, LARGE, LARGE)

    def infer() -> None:
        with torch.inference_mode():
            found = test(large)
            found.logits.softmax(-1)[..., :-1].max(-1)

    return training(model, lambda: [model(pixels, labels=labels).loss]), infer


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each side and the median ratio, for training and inference."""
    twin = hugging_face(name) if name == "detr" else torchvisions(name)
    found = {}
    for title, mine, other in zip(("training", "inference"), ours(name), twin, strict=True):
        seconds: dict[str, list[float]] = {"aligndet": [], "twin": []}
        for turn in range(rounds + 2):
            for side, step in (("aligndet", mine), ("twin", other)):
                began = time.perf_counter()
                step()
                if turn >= 2:  # the first two warm up
                    seconds[side].append(time.perf_counter() - began)
        ratio = statistics.median(a / b for a, b in zip(seconds["aligndet"], seconds["twin"], strict=True))
        found[title] = {side: statistics.median(values) for side, values in seconds.items()} | {"ratio": ratio}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("detectors", nargs="*", default=list(TWINS), help=f"of {', '.join(TWINS)}; default: all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    path = Path(__file__).parent / "results/detectors.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.detectors:
            torch.manual_seed(0)
            found = measure(name, args.rounds)
            results.setdefault(f"{threads} threads", {})[name] = {"twin": TWINS[name]} | found
            line = "   ".join(
                f"{title} {part['aligndet']:.3f} s against {part['twin']:.3f} s: {part['ratio']:.2f} x"
                for title, part in found.items()
            )
            print(f"{threads} threads  {name:12} {line}", flush=True)
    setting = {"images": IMAGES, "size": SIZE, "boxes": BOXES, "inference_size": LARGE, "rounds": args.rounds}
    record = {
        "setting": setting,
        "results": results,
        "environment": environment() | {"transformers": transformers_version},
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
