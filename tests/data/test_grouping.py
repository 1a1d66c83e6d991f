"""SoCo's grouping: against a slow loop, and its parts by hand."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from aligndet.data.grouping import corner_inside, local_binary_patterns, soco_search, touching
from aligndet.data.selective_search import selective_search
from tests import reference_selective_search as reference


def photograph(seed: int, height: int, width: int) -> np.ndarray:
    """Coloured blobs with grain: a dozen or more segments."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 8, width // 8, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (image + generator.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def segments(image: np.ndarray, k: float) -> np.ndarray:
    return cv2.ximgproc.segmentation.createGraphSegmentation(0.9, k, 100).processImage(image)


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize(("seed", "height", "width", "k"), [(0, 61, 89, 60), (1, 97, 53, 100), (2, 71, 73, 30)])
def test_same_boxes_in_the_same_order_as_a_loop(seed: int, height: int, width: int, k: float, quirks: bool) -> None:
    image = photograph(seed, height, width)
    labels = segments(image, k)
    assert labels.max() >= 7
    want = reference.soco_boxes(image, labels, quirks=quirks)
    got = soco_search(image, k, 0.9, quirks=quirks)
    assert [tuple(box) for box in got.astype(int).tolist()] == want


def test_quirks_change_boxes() -> None:
    image = photograph(0, 61, 89)
    plain, quirks = (soco_search(image, 100, 0.9, quirks=quirks) for quirks in (False, True))
    assert plain[:, 2].max() == 89
    assert quirks[:, 2].max() == 88
    assert not np.isin(quirks[:, 2:], plain[:, 2:]).all()


def test_last_region_is_the_image_and_there_are_one_less_unions_than_segments() -> None:
    image = photograph(3, 83, 101)
    boxes = soco_search(image, 100, 0.9)
    assert len(boxes) == 2 * (segments(image, 100).max() + 1) - 1
    assert boxes[-1].tolist() == [0, 0, 101, 83]


def test_segments_end_at_corners() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20, :30] = image[20:, 30:] = 250  # with eight neighbours, as in scikit-image, these would be one segment
    boxes = soco_search(image, 300, 0.1)
    assert sorted(boxes[:4].tolist()) == [[0, 0, 30, 20], [0, 20, 30, 40], [30, 0, 60, 20], [30, 20, 60, 40]]
    assert len(boxes) == 7


def test_touching_by_hand() -> None:
    labels = np.array([[0, 0, 1], [2, 0, 1], [2, 3, 3]], np.int32)
    assert touching(labels).tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]]
    assert touching(np.array([[0, 1], [2, 0]], np.int32)).tolist() == [[0, 1], [0, 2]]  # not 1 with 2: only a corner
    assert touching(np.zeros((3, 5), np.int32)).shape == (0, 2)


def test_corner_inside_is_asymmetric_and_misses_crossing_boxes() -> None:
    outer, inner, cross_a, cross_b = (0, 0, 10, 10), (2, 2, 5, 5), (20, 24, 30, 26), (24, 20, 26, 30)
    assert corner_inside(np.array([outer, inner])).tolist() == [[0, 1]]
    assert corner_inside(np.array([inner, outer])).tolist() == []
    assert corner_inside(np.array([cross_a, cross_b])).tolist() == []
    assert corner_inside(np.array([outer, (10, 0, 20, 10)])).tolist() == []  # side by side: not strictly inside


def test_patterns_by_hand() -> None:
    flat = np.full((5, 7, 1), 9, np.uint8)
    assert (local_binary_patterns(flat)[1:-1, 1:-1] == 255).all()  # equal counts as at least as bright
    # At the left border the points 3, 4 and 5 are outside, where it is black.
    assert local_binary_patterns(flat)[2, 0, 0] == 255 - (8 + 16 + 32)
    peak = flat.copy()
    peak[2, 3] = 200
    codes = local_binary_patterns(peak)[..., 0]
    assert codes[2, 3] == 0
    assert codes[2, 2] == 255  # brighter to the right, the rest equal
    image = np.random.default_rng(0).integers(0, 256, (11, 13, 3)).astype(np.uint8)
    want = [[[reference.pattern(image[..., c], y, x) for c in range(3)] for x in range(13)] for y in range(11)]
    np.testing.assert_array_equal(local_binary_patterns(image), want)


def test_a_photograph_of_640_px_takes_less_than_a_second_of_one_core() -> None:
    image = photograph(5, 480, 640)
    began = time.process_time()
    selective_search(image)
    assert time.process_time() - began < 1.0  # 0.2 to 0.3 s when nothing else runs; a loop over pixels takes longer


def test_shared_photographs_hold_their_people_in_proposals(shared: Path) -> None:
    path = sorted((shared / "data" / "coco_by_person" / "train").glob("*.jpg"))[0]
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    boxes = selective_search(image)
    assert len(boxes) > 20
    assert boxes[0].tolist() == [0, 0, image.shape[1], image.shape[0]]
