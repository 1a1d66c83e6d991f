"""Detections for images in one call."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from aligndet.predict import predict
from tests.scenes import small_detector


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in ((61, 97), (113, 53))]


def test_boxes_are_inside_each_image_and_files_give_the_same(tmp_path: Path) -> None:
    detector = small_detector(score_threshold=0.0).train()
    results = predict(detector, images(), 0.0, short_side=96, long_side=128)
    assert len(results) == 2
    for image, result in zip(images(), results, strict=True):
        height, width = image.shape[1:]
        assert len(result) > 0
        assert result.boxes.min() >= 0
        assert (result.boxes.max(dim=0).values <= torch.tensor([width, height, width, height])).all()
        assert (result.scores.diff() <= 0).all()
    assert detector.training
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, images(), strict=True):
        cv2.imwrite(str(path), np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1]))
    again = predict(detector, [str(paths[0]), paths[1]], 0.0, short_side=96, long_side=128)
    for one, two in zip(results, again, strict=True):
        assert torch.equal(one.boxes, two.boxes)


def test_the_threshold_drops_what_is_below_it() -> None:
    detector = small_detector(score_threshold=0.0)
    (everything,) = predict(detector, images()[:1], 0.0, short_side=96, long_side=128)
    threshold = everything.scores.median().item()
    (some,) = predict(detector, images()[:1], threshold, short_side=96, long_side=128)
    assert 0 < len(some) < len(everything)
    assert torch.equal(some.boxes, everything.boxes[everything.scores >= threshold])
    assert predict(detector, [], 0.0) == []


def test_bad_arguments_are_named_and_leave_the_mode(tmp_path: Path) -> None:
    detector = small_detector().train()
    with pytest.raises(ValueError, match=r"drops scores below 0\.05"):
        predict(detector, images(), 0.01)
    for single in (images()[0], "a.png", tmp_path):
        with pytest.raises(ValueError, match="want a list"):
            predict(detector, single)
    with pytest.raises(ValueError, match=r"want uint8 \[3, H, W\]"):
        predict(detector, [images()[0].float()])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        predict(detector, [broken])
    assert detector.training
