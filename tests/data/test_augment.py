"""Claims about crops and jitter: rectangles and masks stay on their pixels, what vanishes takes its label along."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch import Tensor

from aligndet.data import decode
from aligndet.data.augment import Window, detr_window, follow_masks, jitter_window, plain_window, reduced
from aligndet.data.batch import collate
from aligndet.data.coco import load_coco
from aligndet.data.decode import open_picture, reduction_for
from aligndet.data.labelled import LEAST_SIDE, LabelledImages
from aligndet.data.proposals import open_proposals, write_proposals
from aligndet.data.stream import StepSampler, loader
from aligndet.data.transforms import flip_boxes, read_image, resampled
from aligndet.data.views import ViewPairs

DRAWS: dict[str, Any] = {
    "plain": partial(plain_window, short_sides=(31, 64, 97, 160), long_side=211),
    "detr": partial(
        detr_window, short_sides=(61, 96, 128), long_side=181, first_sides=(80, 101, 120), crop_sides=(37, 90)
    ),
    "jitter": partial(jitter_window, size=96, scale=(0.1, 2.0)),
}


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Odd sizes, thin ones and ones that 2, 4 and 8 divide."""
    kind = rng.integers(4)
    if kind == 0:
        return int(rng.integers(40, 300)), int(rng.integers(40, 300))
    if kind == 1:
        return 2 * int(rng.integers(20, 150)) + 1, 2 * int(rng.integers(20, 150)) + 1
    if kind == 2:
        return 8 * int(rng.integers(8, 50)), 8 * int(rng.integers(8, 50))
    return int(rng.integers(3, 9)), int(rng.integers(100, 400))


def random_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1: whole px, at least one wide, sometimes at the border."""
    x = np.sort(rng.choice(size[1] + 1, 2, replace=False))
    y = np.sort(rng.choice(size[0] + 1, 2, replace=False))
    return int(x[0]), int(y[0]), int(x[1]), int(y[1])


def painted(size: tuple[int, int], box: tuple[int, int, int, int], value: int = 255) -> np.ndarray:
    image = np.zeros((*size, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = value
    return image


def assert_on_its_pixels(image: Tensor, box: Tensor, case: Any, window: Window, tolerance: float = 0.0) -> None:
    """What is white in a black image has the area of its box and the same centre, both measured on the pixels."""
    grain = max(1.0, window.size[0] / window.height, window.size[1] / window.width)  # px, which a pixel has become
    shrinks = max(window.height / window.size[0], window.width / window.size[1])
    # What halving leaves is bilinear, which does not weigh all pixels alike.
    tolerance += 0.25 if shrinks > 1 and not math.log2(shrinks).is_integer() else 0
    grey = image[0].double() / 255
    height, width = grey.shape
    x0, y0, x1, y1 = box.double().tolist()
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if x1 <= x0 or y1 <= y0:
        assert grey.sum() <= 0.01 * grey.numel() * tolerance, case
        return
    mass, area = grey.sum().item(), (x1 - x0) * (y1 - y0)
    # Enlarged borders are ramps; sampled at steps that do not divide them they keep areas to some hundredths of them.
    slack = (0.05 * grain + tolerance) * 2 * ((x1 - x0) + (y1 - y0) + 4) + 0.01 * area
    assert abs(mass - area) <= slack, (case, mass, area)
    # A pixel that is covered by c counts at its middle, c (1 - c) / 2 <= 1/8 px from where its covered part lies.
    for profile, low, high in ((grey.sum(dim=0), x0, x1), (grey.sum(dim=1), y0, y1)):
        centre = ((torch.arange(len(profile)) + 0.5) * profile).sum().item() / max(mass, 1e-9)
        # A border that has become a ramp of width g, its other side cut off, moves the first moment by g^2 / 24.
        ramp = 0.05 * grain + (grain**2 / 24 / (high - low) if grain > 1 else 0)
        allowed = 0.05 + ramp + tolerance + min(0.5, 0.125 / (high - low))
        assert abs(centre - (low + high) / 2) <= allowed or area < 0.1, (case, centre, low, high)


@pytest.mark.parametrize("name", list(DRAWS))
def test_rectangles_and_masks_stay_on_their_pixels(name: str) -> None:
    """400 images each: any size, any rectangle, resized, cropped, perhaps mirrored."""
    rng = np.random.default_rng(7)
    outside = 0
    for case in range(400):
        size = random_size(rng)
        box = random_box(size, rng)
        window, reduction = reduced(DRAWS[name](size, rng), size)
        assert size[0] % reduction == size[1] % reduction == 0
        pixels = painted(size, box)
        image = window.cut(pixels, size, mirrored=bool(case % 2))
        placed = window.place(torch.tensor([box], dtype=torch.float32))
        mask = window.cut_masks(pixels[None, :, :, 0] > 0)
        assert image.shape[1:] == mask.shape[1:] == window.size
        if case % 2:
            placed, mask = flip_boxes(placed, window.size[1]), mask.flip(2)
        # Pixels that are all of the object are of its mask, those that are none of it are not.
        assert bool(mask[0][image[0] == 255].all()), (case, size, box, window)
        assert not bool(mask[0][image[0] == 0].any()), (case, size, box, window)
        assert_on_its_pixels(image, placed[0], (case, size, box), window)
        outside += not image.any()
    assert outside < 300, "most cases show their rectangle"


@pytest.mark.parametrize("length", [99, 100, 101, 102, 103, 104, 127])
@pytest.mark.parametrize("wanted", [12, 24, 25, 33, 49, 50, 60])
def test_a_slope_keeps_its_place_at_any_shrinkage(length: int, wanted: int) -> None:
    """Pixel i of the result lies at (i + 0.5) L / l - 0.5 of the image: also of odd lengths, halved more than once."""
    slope = np.broadcast_to(2 * np.arange(length, dtype=np.uint8)[:, None, None], (length, length, 3))
    for axis in (0, 1):
        result = resampled(np.ascontiguousarray(slope.swapaxes(0, axis)), (wanted, wanted)).astype(float) / 2
        inner = result.mean(axis=(1 - axis, 2))[:-1]  # beyond its last pixel an image goes on as that pixel
        place = (np.arange(wanted)[:-1] + 0.5) * length / wanted - 0.5
        assert np.abs(inner - place).max() <= 0.51, "half a grey level, a quarter of a pixel, twice"
        (end,) = np.polyval(np.polyfit(place, inner, 1), [length - 1])
        assert abs(end - (length - 1)) < 0.3, "a wrong width would move the far end by half a pixel"


def test_reduced_jpegs_are_where_full_ones_are(tmp_path: Path) -> None:
    """White rectangles in JPEGs of every EXIF orientation, decoded as small as their window allows."""
    from PIL import Image

    rng = np.random.default_rng(3)
    reductions = set()
    for case in range(80):
        stored = random_size(rng)
        orientation = 1 + case % 8
        size = stored if orientation < 5 else (stored[1], stored[0])
        x0, y0, x1, y1 = random_box(size, rng)
        upright = Image.fromarray(painted(size, (x0, y0, x1, y1)))
        undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
        undo |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
        turned = upright if orientation == 1 else upright.transpose(Image.Transpose[undo[orientation]])
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned.save(tmp_path / "x.jpg", exif=exif, quality=98, subsampling=0)
        picture = open_picture(tmp_path / "x.jpg")
        assert picture.image is None, "not decoded yet"
        assert picture.size == size
        window, reduction = reduced(jitter_window(size, rng, size=64, scale=(0.1, 1.0)), size)
        pixels = picture.pixels(reduction)
        assert pixels.shape == (size[0] // reduction, size[1] // reduction, 3)
        placed = window.place(torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32))
        assert_on_its_pixels(window.cut(pixels, size), placed[0], (case, size, reduction), window, tolerance=0.2)
        reductions.add(reduction)
    assert reductions == {1, 2, 4, 8}


def test_reductions_by_hand() -> None:
    assert reduction_for((3000, 4000), [(800, 1067)], (3000, 4000)) == 2  # 750 x 1000 at 1/4
    assert reduction_for((3024, 4032), [(504, 672)], (3024, 4032)) == 4  # 378 x 504 at 1/8
    assert reduction_for((3024, 4032), [(378, 504)], (3024, 4032)) == 8
    assert reduction_for((3024, 4032), [(378, 504), (379, 505)], (3024, 4032)) == 4, "the larger view decides"
    assert reduction_for((427, 640), [(100, 150)], (427, 640)) == 1, "2 does not divide 427"
    assert reduction_for((426, 640), [(100, 150)], (426, 640)) == 2, "4 does not divide 426"
    assert reduction_for((480, 640), [(800, 1067)], (480, 640)) == 1
    assert reduction_for((100, 640), [(100, 60)], (480, 640)) == 1, "a part that is wanted at its full height"


def test_pngs_and_slow_decoding_have_the_same_crops(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8), (0, 0), 5)
    cv2.imwrite(str(tmp_path / "a.png"), smooth)
    cv2.imwrite(str(tmp_path / "a.jpg"), smooth, [cv2.IMWRITE_JPEG_QUALITY, 98])
    window, reduction = reduced(Window(17, 35, 201, 203, (50, 50)), (240, 320))
    assert (window, reduction) == (Window(16, 32, 200, 200, (50, 50)), 4)
    whole, fast = (open_picture(tmp_path / "a.jpg", fast).pixels(reduction) for fast in (False, True))
    assert whole.shape == (240, 320, 3)
    assert fast.shape == (60, 80, 3)
    png = open_picture(tmp_path / "a.png").pixels(reduction)
    assert np.array_equal(png, read_image(tmp_path / "a.png"))
    images = [window.cut(pixels, (240, 320)).int() for pixels in (whole, fast, png)]
    assert (images[0] - images[1]).abs().max() <= 6
    assert (images[0] - images[2]).abs().max() <= 6


def test_windows_of_detr_by_hand() -> None:
    """480 x 640 px: half of the samples whole; the others 384 to 600 px of 400, 500 or 600, as far as there are."""
    rng = np.random.default_rng(0)
    draw = partial(
        detr_window,
        short_sides=tuple(range(480, 801, 32)),
        long_side=1333,
        first_sides=(400, 500, 600),
        crop_sides=(384, 600),
    )
    windows = [draw((480, 640), rng) for _ in range(2000)]
    crops = [w for w in windows if (w.height, w.width) != (480, 640)]
    assert 920 < len(crops) < 1080
    # At 400 px a pixel of the crop is 1.2 px of the image, at 600 px 0.8: 384 * 0.8 = 307.2 is the least.
    assert min(w.height for w in crops) == pytest.approx(307, abs=3)
    assert max(w.height for w in crops) == 480
    assert min(w.width for w in crops) == pytest.approx(307, abs=3)
    # At most 600 px: of 640 x 480 at 500 (667 px) that is 576, at 400 (533 px) all of its 640.
    assert max(w.width for w in crops) == 640
    for window in windows:
        assert 0 <= window.top <= 480 - window.height
        assert 0 <= window.left <= 640 - window.width
        assert min(window.size) in range(480, 801, 32) or max(window.size) == 1333
        assert window.size[0] / window.size[1] == pytest.approx(window.height / window.width, rel=0.003)
    assert len({min(w.size) for w in windows}) >= 11


def test_windows_of_jitter_by_hand() -> None:
    # Scale 1: the long side is 96; scale 2: 144 x 192, of which 96 x 96 are a part of 320 x 320 px.
    whole = jitter_window((480, 640), np.random.default_rng(0), size=96, scale=(1.0, 1.0))
    assert whole == Window(0, 0, 480, 640, (72, 96))
    assert jitter_window((480, 640), np.random.default_rng(0), size=96, scale=(0.1, 0.1)).size == (8, 10)
    places = set()
    for seed in range(300):
        window = jitter_window((480, 640), np.random.default_rng(seed), size=96, scale=(2.0, 2.0))
        assert (window.height, window.width, window.size) == (320, 320, (96, 96))
        places.add((window.top, window.left))
    assert max(top for top, _ in places) > 150
    assert max(left for _, left in places) > 300
    assert len(places) > 250
    assert jitter_window((1, 20000), np.random.default_rng(0), size=96, scale=(2.0, 2.0)).size == (1, 96)


def scenes(folder: Path, images: int = 12) -> Path:
    """Images with rectangles and ellipses of one grey value per class; the class can be read off the pixels."""
    rng = np.random.default_rng(5)
    tree: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": str(n)} for n in range(8)],
    }
    folder.mkdir(exist_ok=True)
    for number in range(images):
        size = (8 * int(rng.integers(20, 40)), 8 * int(rng.integers(20, 40))) if number % 2 else (161, 233)
        image = np.zeros((*size, 3), np.uint8)
        for label in rng.permutation(8).tolist():
            shape = np.zeros(size, np.uint8)
            centre = (int(rng.integers(size[1])), int(rng.integers(size[0])))
            axes = (int(rng.integers(4, 50)), int(rng.integers(4, 50)))
            cv2.ellipse(shape, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
            shape[image[..., 0] > 0] = 0  # each pixel belongs to one object
            if shape.sum() < 30:
                continue
            image[shape > 0] = 30 * (label + 1)
            rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
            x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            counts = rle.encode(np.asfortranarray(shape))["counts"].decode()
            record = {"image_id": number, "category_id": label, "iscrowd": 0}
            record |= {"bbox": [int(x0), int(y0), int(x1 - x0), int(y1 - y0)]}
            tree["annotations"].append(record | {"segmentation": {"size": list(size), "counts": counts}})
        crowd = {"image_id": number, "category_id": 0, "iscrowd": 1, "bbox": [20, 30, 60, 50]}
        tree["annotations"].append(crowd | {"segmentation": {"size": list(size), "counts": [size[0] * size[1]]}})
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        cv2.imwrite(str(folder / name), image, [cv2.IMWRITE_JPEG_QUALITY, 98])
        tree["images"].append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
    for number, annotation in enumerate(tree["annotations"]):
        annotation["id"] = number
    (folder / "labels.json").write_text(json.dumps(tree))
    return folder / "labels.json"


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", ["detr", "jitter"])
def test_what_vanishes_takes_its_label_and_mask_along(name: str, masks: bool, tmp_path: Path) -> None:
    annotations = load_coco(scenes(tmp_path), masks=masks)
    data = LabelledImages(annotations, tmp_path, short_sides=(99,), long_side=99, window=DRAWS[name])
    seen, dropped, crowds, deviations = 0, 0, 0, []
    for position in range(240):
        row = position % len(data)
        sample = data[(row, position)]
        height, width = sample.image.shape[1:]
        assert len(sample.boxes) == len(sample.labels) == len(sample.ids)
        sides = sample.boxes[:, 2:] - sample.boxes[:, :2]
        assert (sides >= LEAST_SIDE).all()
        assert (sample.boxes >= 0).all()
        assert (sample.boxes[:, 2] <= width).all()
        assert (sample.boxes[:, 3] <= height).all()
        assert sample.crowds is not None
        crowds += len(sample.crowds)
        assert (sample.crowds[:, 2] <= width).all()
        dropped += len(annotations.rows_of(row)) - len(sample.boxes)
        if sample.masks is None:
            continue
        assert sample.masks.shape == (len(sample.boxes), height, width)
        for label, box, mask in zip(sample.labels.tolist(), sample.boxes, sample.masks, strict=True):
            inside = cv2.erode(mask.numpy().astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
            if inside.sum() < 5:
                continue
            greys = sample.image[0][torch.from_numpy(inside)].float()
            assert greys.median().item() == pytest.approx(30 * (label + 1), abs=4), "pixels of another object"
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            hull = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (hull[:2] - box[:2] > -1).all(), "the mask is in its box"
            assert (hull[2:] - box[2:] < 1).all()
            deviations.append((hull - box).abs().max().item())
            seen += 1
    assert dropped > 20
    assert 0 < crowds < 240, "a crowd vanishes too"
    if masks:
        assert seen > 200
        # Tips thinner than a pixel fall between the nearest pixels; all but a few boxes end where their masks do.
        assert np.quantile(deviations, 0.95) < 1.01


def test_boxes_that_a_crop_cuts_follow_their_masks() -> None:
    """An L of which the crop leaves the foot: the box ends where the foot does. A whole object keeps its box."""
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, 7:, 2:5] = True
    masks[1, 2:4, 2:4] = True
    placed = torch.tensor([[-5.0, 0.0, 5.0, 10.0], [1.75, 1.75, 4.25, 4.25], [-9.0, 1.0, 3.0, 4.0]])
    clipped = placed.clamp(0, 10)
    found = follow_masks(clipped, placed, masks)
    assert found.tolist() == [[2, 7, 5, 10], [1.75, 1.75, 4.25, 4.25], [0, 0, 0, 0]]
    assert follow_masks(clipped[:0], placed[:0], masks[:0]).shape == (0, 4)


def test_worker_count_changes_nothing_and_squares_have_one_size(tmp_path: Path) -> None:
    annotations = load_coco(scenes(tmp_path), masks=True)
    data = LabelledImages(annotations, tmp_path, short_sides=(99,), long_side=99, window=DRAWS["jitter"])

    def run(workers: int) -> list[Any]:
        sampler = StepSampler(len(data), batch=3, steps=6, seed=5)
        return list(loader(data, sampler, partial(collate, size=(96, 96)), workers, pin=False))

    for one, two in zip(run(0), run(2), strict=True):
        assert one.images.shape == (3, 3, 96, 96)
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.targets.boxes, two.targets.boxes)
        assert torch.equal(one.targets.masks, two.targets.masks)
        assert one.images.is_contiguous(memory_format=torch.channels_last)


def test_one_decoding_serves_both_views_and_is_as_small_as_the_larger_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(2).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.jpg"), image)
    box = np.array([[100, 120, 400, 360]], np.float32)
    write_proposals(tmp_path / "p.npz", ["a.jpg"], [(480, 640)], [box], {})
    decoded = []
    real = decode.decode_image
    monkeypatch.setattr(decode, "decode_image", lambda *arguments: decoded.append(arguments[2]) or real(*arguments))
    pairs = ViewPairs(tmp_path, open_proposals(tmp_path / "p.npz"), short_sides=(60, 120, 240, 300), long_side=640)
    slow = ViewPairs(
        tmp_path,
        open_proposals(tmp_path / "p.npz"),
        short_sides=(60, 120, 240, 300),
        long_side=640,
        fast_decode=False,
    )
    seen = set()
    for position in range(24):
        decoded.clear()
        first, second = pairs[(0, position)]
        largest = max(first.image.shape[1], second.image.shape[1])
        assert decoded == [{60: 8, 120: 4, 240: 2, 300: 1}[largest]]
        seen.add(decoded[0])
        for fast, full in zip((first, second), slow_pair(slow, position, monkeypatch, real), strict=True):
            assert torch.equal(fast.boxes, full.boxes)
            assert fast.image.shape == full.image.shape
            assert fast.original_size == full.original_size == (480, 640)
    assert len(seen) >= 3


def slow_pair(pairs: ViewPairs, position: int, monkeypatch: pytest.MonkeyPatch, real: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode_image", real)
        return pairs[(0, position)]


def test_a_header_that_lies_is_an_error_of_that_image(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((64, 64, 3), np.uint8))
    picture = open_picture(tmp_path / "a.jpg")
    lying = decode.Picture(picture.path, (128, 64), data=picture.data)
    with pytest.raises(ValueError, match=r"a\.jpg: its header says 64 x 128 px, decoded at 1/2 it has 32 x 32"):
        lying.pixels(2)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-40])
    with pytest.raises(ValueError, match=r"a\.jpg: truncated"):
        open_picture(tmp_path / "a.jpg").pixels(2)
