"""Claims about generated scenes: exact boxes and masks, the same bytes again, COCO that pycocotools reads."""

import contextlib
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from aligndet.data.synthetic import Difficulty, make_scenes
from aligndet.data.transforms import read_image
from aligndet.engine.evaluate import coco_metrics
from tests.truth import detections_of


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def test_boxes_are_tight_and_masks_are_disjoint(tmp_path: Path) -> None:
    path = make_scenes(tmp_path, images=7, size=(101, 131), seed=5)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
    seen = 0
    for image in coco.getImgIds():
        assert read_image(tmp_path / "images" / coco.loadImgs(image)[0]["file_name"]).shape == (101, 131, 3)
        total = np.zeros((101, 131), int)
        for annotation in coco.loadAnns(coco.getAnnIds(image)):
            mask = coco.annToMask(annotation).astype(bool)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            x, y, width, height = annotation["bbox"]
            assert (x, y, x + width, y + height) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert annotation["area"] == mask.sum() == rle.area(annotation["segmentation"])
            total += mask
            seen += 1
        assert total.max() <= 1
    assert seen >= 14


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_scenes(tmp_path / name, images=3, size=64, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_ground_truth_as_detections_is_perfect(tmp_path: Path) -> None:
    path = make_scenes(tmp_path, images=5, size=96, seed=2, classes=("ring", "box"), objects=(3, 4))
    metrics = coco_metrics(path, detections_of(path))
    assert metrics["AP"] == pytest.approx(1.0)
    tree = json.loads(path.read_text())
    assert [category["name"] for category in tree["categories"]] == ["ring", "box"]
    counts = np.bincount([a["image_id"] for a in tree["annotations"]])[1:]
    assert counts.min() >= 1
    assert counts.max() <= 4


def test_difficulty_bounds_the_size_of_objects(tmp_path: Path) -> None:
    easy = Difficulty(extents=(0.5, 0.6), typical=1.0, lumps=(0, 0))
    path = make_scenes(tmp_path, images=9, size=100, seed=1, objects=(1, 1), difficulty=easy)
    sides = [max(a["bbox"][2:]) for a in json.loads(path.read_text())["annotations"]]
    assert min(sides) >= 25, "at least half visible"
    assert max(sides) <= 64


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cube"):
        make_scenes(tmp_path, images=1, size=64, seed=0, classes=("cube",))
    for arguments in ({"images": 0}, {"size": 8}, {"seed": -1}, {"objects": (5, 2)}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            make_scenes(tmp_path, **({"images": 1, "size": 64, "seed": 0} | arguments))
