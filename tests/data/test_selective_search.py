"""Selective search and the filter: by hand, against a naive suppression, invariants, odd images."""

import itertools

import cv2
import numpy as np
import pytest

from aligndet.data.selective_search import MODES, filter_proposals, largest_first, selective_search, suppress


def scene(height: int, width: int) -> np.ndarray:
    """A dim noisy ground with a red and a green rectangle."""
    image = np.random.default_rng(0).integers(90, 110, (height, width, 3)).astype(np.uint8)
    image[height // 4 : height // 2, width // 8 : width // 2] = (220, 30, 30)
    image[height // 2 : 7 * height // 8, 5 * width // 8 : 7 * width // 8] = (30, 220, 30)
    return image


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = float(width) * float(height)
    area = [float(box[2] - box[0]) * float(box[3] - box[1]) for box in (a, b)]
    return overlap / (sum(area) - overlap)


def random_boxes(number: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    corner = generator.integers(0, 60, (number, 2))
    return np.concatenate([corner, corner + generator.integers(1, 60, (number, 2))], axis=1).astype(np.float32)


@pytest.mark.parametrize("mode", MODES)
def test_finds_the_painted_rectangles_in_px_of_the_image(mode: str) -> None:
    image = scene(97, 131)
    boxes = selective_search(image, mode=mode)
    assert boxes.dtype == np.float32
    assert boxes.shape[1:] == (4,)
    for truth in ((16, 24, 65, 48), (81, 48, 114, 84)):
        assert max(iou(np.array(truth), box) for box in boxes) > 0.85


def test_resize_maps_boxes_back_with_separate_factors() -> None:
    image = scene(211, 503)
    boxes = selective_search(image, mode="fast", size=151)
    for truth in ((62, 52, 251, 105), (314, 105, 440, 184)):
        assert max(iou(np.array(truth), box) for box in boxes) > 0.85
    # 503 x 211 is searched at 151 x 63, so that whole px there are multiples of these factors here.
    np.testing.assert_allclose(boxes[:, ::2] % (503 / 151) % (503 / 151 - 1e-3), 0, atol=2e-3)
    np.testing.assert_allclose(boxes[:, 1::2] % (211 / 63) % (211 / 63 - 1e-3), 0, atol=2e-3)


def test_size_never_enlarges() -> None:
    image = scene(61, 89)
    np.testing.assert_array_equal(selective_search(image, size=640), selective_search(image))


def test_same_boxes_every_time_in_the_documented_order() -> None:
    image = scene(97, 131)
    boxes = selective_search(image)
    cv2.setRNGSeed(7)
    np.testing.assert_array_equal(boxes, selective_search(image))
    x0, y0, x1, y1 = boxes.T
    keys = list(zip(-(x1 - x0) * (y1 - y0), y0, x0, y1, x1, strict=True))
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys) >= 3


def test_boxes_lie_inside_and_have_an_area() -> None:
    boxes = selective_search(scene(211, 503), size=97)
    assert (boxes >= 0).all()
    assert (boxes <= [503, 211, 503, 211]).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_channels_are_rgb() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (67, 101, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 4)
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    search.switchToSelectiveSearchFast()
    want = {(x, y, x + width, y + height) for x, y, width, height in search.process().tolist()}
    assert set(map(tuple, selective_search(image, mode="fast").tolist())) == want
    assert set(map(tuple, selective_search(image[:, :, ::-1], mode="fast").tolist())) != want


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (3, 2), (1, 503), (20000, 20), (20, 20000)])
@pytest.mark.parametrize("mode", ["soco", "single", "fast"])
def test_tiny_and_extreme_images(height: int, width: int, mode: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    np.testing.assert_array_equal(selective_search(image, mode=mode), [[0, 0, width, height]])


def test_flat_image_is_one_box_and_leaves_no_proposal() -> None:
    boxes = selective_search(np.full((71, 53, 3), 128, np.uint8))
    np.testing.assert_array_equal(boxes, [[0, 0, 53, 71]])
    assert filter_proposals(boxes, (71, 53)).shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "slow"}, "want one of soco, single, fast, quality, got 'slow'"),
        ({"size": 0}, "size"),
        ({"k": 0}, "k: "),
        ({"sigma": float("nan")}, "sigma"),
        ({"mode": "fast", "quirks": True}, "quirks: want mode soco"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_search(scene(31, 37), **options)


@pytest.mark.parametrize(
    "image",
    [np.zeros((31, 37), np.uint8), np.zeros((31, 37, 4), np.uint8), np.zeros((5, 7, 3)), np.zeros((0, 7, 3), np.uint8)],
)
def test_bad_images_are_named(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"want uint8 \[H, W, 3\]"):
        selective_search(image)


def test_filter_by_hand() -> None:
    size = (400, 640)
    rows = {
        "just large enough": (0, 0, 32, 32),
        "too narrow": (100, 0, 131, 40),
        "too flat": (200, 0, 240, 31),
        "just square enough": (0, 100, 120, 140),
        "too long": (200, 100, 321, 140),
        "just high enough": (400, 100, 440, 220),
        "too high": (500, 100, 540, 221),
        "too large": (0, 0, 600, 400),
    }
    kept = filter_proposals(np.array(list(rows.values()), np.float32), size)
    want = ["just square enough", "just high enough", "just large enough"]  # by area, equal areas by y0, then x0
    np.testing.assert_array_equal(kept, [rows[name] for name in want])
    assert kept.dtype == np.float32


def test_largest_area_is_inclusive() -> None:
    # 80 x 80 in 100 x 100 is a ratio of exactly 0.8.
    boxes = np.array([[0, 0, 80, 80], [0, 0, 80, 81]], np.float32)
    np.testing.assert_array_equal(filter_proposals(boxes, (100, 100), nms=1), boxes[:1])
    np.testing.assert_array_equal(filter_proposals(boxes, (100, 100), nms=1, max_ratio=1), boxes[::-1])


def test_every_bound_is_a_setting() -> None:
    boxes = np.array([[0, 0, 40, 10], [50, 0, 60, 10], [100, 0, 105, 10]], np.float32)
    size = (640, 640)
    assert len(filter_proposals(boxes, size)) == 0
    np.testing.assert_array_equal(filter_proposals(boxes, size, min_size=10), boxes[1:2])
    np.testing.assert_array_equal(filter_proposals(boxes, size, min_size=5), boxes[1:])
    np.testing.assert_array_equal(filter_proposals(boxes, size, min_size=5, max_aspect=4), boxes)
    np.testing.assert_array_equal(filter_proposals(boxes, size, min_size=5, max_aspect=4, limit=2), boxes[[0, 2]])
    np.testing.assert_array_equal(filter_proposals(boxes, size, min_size=5, max_aspect=4, limit=1), boxes[:1])


@pytest.mark.parametrize(("longest", "least"), [(640, 32), (1280, 32), (320, 16), (160, 8)])
def test_least_size_follows_small_images(longest: int, least: int) -> None:
    boxes = np.array([[0, 0, least, least], [50, 0, 50 + least - 1, least]], np.float32)
    np.testing.assert_array_equal(filter_proposals(boxes, (127, longest)), boxes[:1])
    assert len(filter_proposals(boxes, (127, longest), min_size=least + 1)) == 0


def test_larger_box_survives_suppression() -> None:
    # IoU of the first two: 40 x 40 / (40 x 60) = 2/3; of the first and third: 1/2, which is not above 1/2.
    boxes = np.array([[0, 0, 40, 40], [0, 0, 40, 60], [0, 30, 40, 60]], np.float32)
    np.testing.assert_array_equal(filter_proposals(boxes, (640, 640), min_size=1), boxes[[1, 2]])
    np.testing.assert_array_equal(filter_proposals(boxes, (640, 640), min_size=1, nms=0.49), boxes[[1]])
    np.testing.assert_array_equal(filter_proposals(boxes, (640, 640), min_size=1, nms=0.7), boxes[[1, 0, 2]])


@pytest.mark.parametrize(
    ("number", "threshold", "seed"), list(itertools.product((0, 1, 2, 113), (0.0, 0.3, 0.5, 1.0), (0, 1)))
)
def test_suppression_equals_a_double_loop(number: int, threshold: float, seed: int) -> None:
    boxes = random_boxes(number, seed)
    kept: list[int] = []
    for row in range(number):
        if all(iou(boxes[row], boxes[other]) <= threshold for other in kept):
            kept.append(row)
    assert suppress(boxes, threshold).tolist() == kept


def test_result_does_not_depend_on_the_order_given() -> None:
    boxes = random_boxes(113, 3)
    want = filter_proposals(boxes, (131, 127), min_size=3)
    assert 3 < len(want) < 113
    shuffled = np.random.default_rng(5).permutation(boxes)
    np.testing.assert_array_equal(filter_proposals(shuffled, (131, 127), min_size=3), want)
    np.testing.assert_array_equal(filter_proposals(want, (131, 127), min_size=3), want)


def test_limit_keeps_large_and_small() -> None:
    sides = np.arange(40, 40 + 11)
    boxes = np.stack([sides * 100, sides * 0, sides * 100 + sides, sides], axis=1).astype(np.float32)
    kept = filter_proposals(boxes, (9000, 9000), limit=3)
    assert (kept[:, 3]).tolist() == [50, 45, 40]


def test_no_boxes() -> None:
    assert filter_proposals(np.zeros((0, 4), np.float32), (31, 37)).shape == (0, 4)
    assert largest_first(np.zeros((0, 4), np.float32)).tolist() == []


@pytest.mark.parametrize(
    ("name", "value"), [("min_size", -1), ("max_aspect", 0.5), ("max_ratio", float("nan")), ("nms", 1.5), ("limit", 0)]
)
def test_bad_bounds_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        filter_proposals(random_boxes(3, 0), (31, 37), **{name: value})


def test_bad_boxes_are_named() -> None:
    with pytest.raises(ValueError, match=r"want \[M, 4\], got \[3, 5\]"):
        filter_proposals(np.zeros((3, 5)), (31, 37))
