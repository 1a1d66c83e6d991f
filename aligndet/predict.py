"""Detections for images in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from aligndet.data.batch import Sample, collate
from aligndet.data.transforms import read_image, resize
from aligndet.protocol import Detector
from aligndet.structures import Detections


def predict(
    detector: Detector,
    images: Sequence[Tensor | str | Path],
    score_threshold: float | None = None,
    *,
    short_side: int | None = None,
    long_side: int | None = None,
) -> list[Detections]:
    """The detections of each image, best first, on the CPU; the detector's mode is left as it was.

    Args:
        images: uint8 [3, H, W] RGB tensors or files.
        score_threshold: lowest score kept, not below ``detector.score_threshold``, which acts first; None: 0.05, or the
            detector's where that is higher (0.2 for torchvision's FCOS).
        short_side, long_side: px the images are resized to, as in training; None: ``detector.short_side`` and
            ``.long_side``, which are those of its run for a detector of ``load_detector``, else 800 and 1333.

    Returns:
        One Detections per image, boxes in px of that image.

    Raises:
        ValueError: a tensor that is not such an image, an unreadable file, or a threshold below the detector's.
    """
    if isinstance(images, (str, Path, Tensor)):
        raise ValueError("images: want a list of tensors or files, got one; pass [image]")
    short_side = detector.short_side if short_side is None else short_side
    long_side = detector.long_side if long_side is None else long_side
    if min(short_side, long_side) < 1:
        raise ValueError(f"short_side, long_side: want at least 1 px, got {short_side}, {long_side}")
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold: want a number in 0 .. 1, got {score_threshold}")
    if score_threshold is None:
        score_threshold = max(0.05, detector.score_threshold)
    if score_threshold < detector.score_threshold:
        raise ValueError(
            f"score_threshold: the detector drops scores below {detector.score_threshold}, got {score_threshold}; "
            "set detector.score_threshold lower first"
        )
    device = next(detector.parameters()).device
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    results = []
    try:
        # Not inference_mode: what a detector caches here must still serve in training.
        with torch.no_grad():
            for image in images:
                pixels = _pixels(image)
                resized, _ = resize(pixels, short_side, long_side)
                height, width = pixels.shape[1:]
                nothing = torch.zeros(0, dtype=torch.int64)
                sample = Sample(resized, torch.zeros(0, 4), nothing, nothing, (height, width), 0)
                batch = collate([sample], multiple=detector.size_divisor).to(device)
                candidates = detector.candidates(detector.features(batch.images, batch.sizes), batch.sizes)
                found = detector.detect(candidates, batch.sizes)[0]
                found = found.resized((resized.shape[1], resized.shape[2]), (height, width)).to("cpu")
                results.append(found.chosen(found.scores >= score_threshold))
    finally:
        for module, training in modes:
            module.training = training
    return results


def _pixels(image: Tensor | str | Path) -> Tensor:
    if isinstance(image, (str, Path)):
        return torch.from_numpy(read_image(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ValueError(f"images: want paths or uint8 tensors [3, H, W] RGB, got {type(image).__name__}")
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"images: want uint8 [3, H, W] RGB, got {image.dtype} {list(image.shape)}")
    return image.cpu()
