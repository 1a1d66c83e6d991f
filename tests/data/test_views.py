"""Claims about views: boxes on their pixels, ids kept, one subset for both, nothing depends on history."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from aligndet.data.batch import Sample, collate, collate_views
from aligndet.data.colours import COLOURS
from aligndet.data.crops import CropPairs
from aligndet.data.proposals import ProposalFile, open_proposals, write_proposals
from aligndet.data.transforms import flip, read_image, resize, resized_size
from aligndet.data.views import ViewPairs


def painted(folder: Path, sizes: list[tuple[int, int]]) -> tuple[ProposalFile, list[np.ndarray]]:
    """Black images with one white rectangle each, and that rectangle as the only proposal."""
    names, boxes = [], []
    for number, (height, width) in enumerate(sizes):
        x0, y0, x1, y1 = width // 5, height // 3, width // 5 + width // 2, height // 3 + height // 4
        image = np.zeros((height, width, 3), np.uint8)
        image[y0:y1, x0:x1] = 255
        names.append(f"{number}.png")
        assert cv2.imwrite(str(folder / names[-1]), image)
        boxes.append(np.array([[x0, y0, x1, y1]], np.float32))
    write_proposals(folder / "p.npz", names, sizes, boxes, {})
    return open_proposals(folder / "p.npz"), boxes


def measured(image: Tensor) -> Tensor:
    """The edges of the white rectangle in an image, to a fraction of a pixel: mass keeps under resampling."""
    grey = image[0].double() / 255
    rows, columns = grey.sum(dim=1), grey.sum(dim=0)
    # Rows and columns that cross the rectangle in full, not those its blurred border runs through.
    profiles = grey[rows > 0.99 * rows.max()].mean(dim=0), grey[:, columns > 0.99 * columns.max()].mean(dim=1)
    edges = []
    for profile in profiles:
        centres = torch.arange(len(profile), dtype=torch.float64) + 0.5
        middle, width = (profile * centres).sum() / profile.sum(), profile.sum()
        edges.append((middle - width / 2, middle + width / 2))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1])


@pytest.mark.parametrize("short_sides", [(640,), (672, 704), (736, 768, 800), (192, 224, 256), (61, 97)])
def test_a_painted_rectangle_coincides_with_its_box(tmp_path: Path, short_sides: tuple[int, ...]) -> None:
    sizes = [(480, 640), (427, 640), (640, 427), (211, 503), (97, 61)]
    proposals, _ = painted(tmp_path, sizes)
    pairs = ViewPairs(tmp_path, proposals, short_sides=short_sides, long_side=1333, colour=False)
    flips = set()
    for position in range(4 * len(sizes)):
        batches = collate_views([pairs[(position % len(sizes), position)], pairs[(0, position)]])
        for batch in batches:
            height, width = batch.sizes[0].tolist()
            image = batch.images[0]
            error = (measured(image[:, :height, :width]) - batch.targets.boxes[0]).abs().max()
            assert error < 1, (sizes[position % len(sizes)], short_sides, error)
            assert not image[:, height:].any()
            assert not image[:, :, width:].any()
            flips.add(bool(batch.targets.boxes[0, 0] > width - batch.targets.boxes[0, 2]))
    assert flips == {True, False}, "both flipped and unflipped views were measured"


def test_a_box_that_a_view_loses_takes_no_other_with_it(tmp_path: Path) -> None:
    """Method 8.10: labels and ids of the boxes behind it stay theirs."""
    assert cv2.imwrite(str(tmp_path / "a.png"), np.zeros((100, 100, 3), np.uint8))
    boxes = np.array([[0, 0, 95, 90], [50, 10, 50.015, 60], [10, 20, 40, 60], [70, 70, 90, 95]], np.float32)
    write_proposals(
        tmp_path / "p.npz", ["a.png"], [(100, 100)], [boxes], {"clusters": 9}, labels=np.array([5, 6, 7, 8], np.int32)
    )
    found = open_proposals(tmp_path / "p.npz")
    order = {side: number for number, side in enumerate(found.boxes_of(0)[:, 2].round().tolist())}
    sides = set()
    for position in range(20):  # at 50 px it is 0.0075 px wide and left out, at 200 px 0.03
        pairs = ViewPairs(tmp_path, found, short_sides=(50, 200), long_side=400, flip_probability=0.0, colour=False)
        for view in pairs[0, position]:
            scale = view.image.shape[1] / 100
            own = [order[round(float(box[2]) / scale)] for box in view.boxes]
            assert view.ids.tolist() == own and view.labels.tolist() == found.labels_of(0)[own].tolist()
            sides.add((view.image.shape[1], len(own)))
    assert sides == {(50, 3), (200, 4)}


def test_resized_sizes_by_hand() -> None:
    # 480 x 640 to a short side of 800: scale 5/3, 1066.67 -> 1067. 400 x 1000: the long side binds, 1333/1000.
    assert resized_size((480, 640), 800, 1333) == (800, 1067)
    assert resized_size((400, 1000), 800, 1333) == (533, 1333)
    assert resized_size((1, 20000), 800, 1333) == (1, 1333)
    image, factors = resize(torch.zeros(3, 7, 11, dtype=torch.uint8), 10, 100)
    assert image.shape == (3, 10, 16)
    assert factors.tolist() == pytest.approx([16 / 11, 10 / 7] * 2)


def test_flip_is_about_the_width_of_the_image() -> None:
    image = torch.arange(3 * 2 * 5, dtype=torch.uint8).reshape(3, 2, 5)
    mirrored, boxes = flip(image, torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
    assert boxes.tolist() == [[2.0, 0.0, 4.0, 2.0]]
    assert torch.equal(mirrored[:, :, 2:4].flip(2), image[:, :, 1:3])
    assert torch.equal(flip(*flip(image, boxes))[1], boxes)


def scene(folder: Path, counts: tuple[int, ...] = (7, 0, 300)) -> ProposalFile:
    generator = np.random.default_rng(3)
    names, boxes, sizes = [], [], []
    for number, count in enumerate(counts):
        names.append(f"{number}.jpg")
        sizes.append((120, 160))
        cv2.imwrite(str(folder / names[-1]), generator.integers(0, 256, (120, 160, 3), dtype=np.uint8))
        corner = generator.uniform(0, 80, (count, 2))
        boxes.append(np.concatenate([corner, corner + 37], axis=1).astype(np.float32))
    write_proposals(folder / "p.npz", names, sizes, boxes, {})
    return open_proposals(folder / "p.npz")


def pairs_of(folder: Path, **options: object) -> ViewPairs:
    settings: dict[str, object] = {"short_sides": (96, 128), "long_side": 200}
    return ViewPairs(folder, open_proposals(folder / "p.npz"), **(settings | options))  # type: ignore[arg-type]


def test_images_without_proposals_are_left_out_and_counted(tmp_path: Path) -> None:
    scene(tmp_path)
    pairs = pairs_of(tmp_path)
    assert (len(pairs), pairs.without_proposals) == (2, 1)
    (tmp_path / "none").mkdir()
    scene(tmp_path / "none", (0, 0))
    with pytest.raises(ValueError, match="none of its 2 images has a proposal"):
        pairs_of(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        ViewPairs(tmp_path / "nowhere", open_proposals(tmp_path / "p.npz"), short_sides=(96,), long_side=96)


def test_both_views_share_a_random_subset_that_changes(tmp_path: Path) -> None:
    scene(tmp_path)
    pairs = pairs_of(tmp_path, proposals_per_image=13)
    subsets = []
    for position in range(40):
        first, second = pairs[(1, position)]
        assert torch.equal(first.ids, second.ids)
        assert len(first.ids.unique()) == 13
        subsets.append(frozenset(first.ids.tolist()))
    assert len(set(subsets)) == 40
    assert len(frozenset.union(*subsets)) > 200, "every proposal is seen sooner or later"
    assert len(pairs[(0, 0)][0].ids) == 7, "an image with fewer keeps all"


def test_a_sample_depends_on_seed_and_position_alone(tmp_path: Path) -> None:
    scene(tmp_path)
    pairs, again = pairs_of(tmp_path), pairs_of(tmp_path)
    wanted = pairs[(1, 29)]
    for position in range(5):
        again[(0, position)]
    assert all(torch.equal(a.image, b.image) for a, b in zip(wanted, again[(1, 29)], strict=True))
    assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(wanted, again[(1, 29)], strict=True))
    other = pairs_of(tmp_path, seed=1)[(1, 29)]
    assert any(
        a.image.shape != b.image.shape or not torch.equal(a.image, b.image) for a, b in zip(wanted, other, strict=True)
    )
    assert any(
        a.image.shape != b.image.shape or not torch.equal(a.image, b.image)
        for a, b in (pairs[(1, p)] for p in range(4))
    ), "the two views differ"


def test_unreadable_images_are_replaced_and_named(tmp_path: Path) -> None:
    scene(tmp_path)
    (tmp_path / "0.jpg").write_bytes(b"not an image")
    first, second = pairs_of(tmp_path)[(0, 5)]
    assert first.image_id == second.image_id == 2
    assert len(first.skipped) == 1
    assert "0.jpg: not an image" in first.skipped[0]
    with pytest.raises(ValueError, match=r"0\.jpg: not an image"):
        pairs_of(tmp_path, on_error="fail")[(0, 5)]
    cv2.imwrite(str(tmp_path / "2.jpg"), np.zeros((160, 120, 3), np.uint8))
    with pytest.raises(ValueError, match=r"not one of 2 images can be read; the first: image .*0\.jpg"):
        pairs_of(tmp_path)[(0, 5)]
    with pytest.raises(ValueError, match=r"proposals are for 160 x 120 px, the file has 120 x 160"):
        pairs_of(tmp_path, on_error="fail")[(1, 5)]


def test_collate_pads_last_and_numbers_boxes_across_the_batch() -> None:
    def sample(height: int, width: int, ids: list[int]) -> Sample:
        image = torch.full((3, height, width), 200, dtype=torch.uint8)
        rows = torch.tensor(ids, dtype=torch.int64)
        return Sample(image, torch.rand(len(ids), 4), torch.zeros_like(rows), rows, (7, 5), 3, ("x",) * len(ids))

    batch = collate([sample(37, 61, [4, 0]), sample(31, 67, []), sample(29, 11, [4])])
    assert batch.images.shape == (3, 3, 64, 96)
    assert batch.images.sum().item() == 200 * 3 * (37 * 61 + 31 * 67 + 29 * 11)
    assert batch.sizes.tolist() == [[37, 61], [31, 67], [29, 11]]
    assert batch.targets.image.tolist() == [0, 0, 2]
    assert batch.targets.ids.tolist() == [4, 0, (2 << 32) + 4]
    assert batch.skipped == ("x",) * 3
    empty = collate([sample(5, 5, [])])
    assert empty.targets.boxes.shape == (0, 4)
    assert empty.targets.ids.dtype == torch.int64
    first, second = collate_views([(sample(37, 61, [1]), sample(90, 20, [1]))])
    assert first.images.shape == second.images.shape == (1, 3, 96, 64)
    assert torch.equal(first.targets.ids, second.targets.ids)


@pytest.mark.parametrize("magnitude", [1, 4, 9])
@pytest.mark.parametrize("name", list(COLOURS))
def test_colours_are_those_of_pillow(name: str, magnitude: int) -> None:
    from PIL import Image, ImageEnhance, ImageOps

    pixels = np.random.default_rng(1).integers(20, 220, (53, 71, 3), dtype=np.uint8)
    pixels = cv2.GaussianBlur(pixels, (0, 0), 2.0)
    image, factor = Image.fromarray(pixels), 0.1 + 0.18 * magnitude
    expected = {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "solarize": lambda: ImageOps.solarize(image, int(25.6 * magnitude)),
        "colour": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda: ImageOps.posterize(image, 4 - int(0.4 * magnitude)),
    }[name]()
    ours = COLOURS[name](torch.from_numpy(pixels).permute(2, 0, 1), magnitude)
    assert ours.dtype == torch.uint8
    difference = (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs()
    # Pillow rounds grey values before it blends, torchvision after: up to two levels for strong factors.
    assert difference.max() <= 2, difference.max()


def test_crops_have_their_size_and_share_nothing_but_the_image(tmp_path: Path) -> None:
    scene(tmp_path)
    crops = CropPairs(tmp_path, ["0.jpg", "1.jpg"], size=32)
    first, second = crops[(1, 7)]
    assert first.image.shape == second.image.shape == (3, 32, 32)
    assert not torch.equal(first.image, second.image)
    assert torch.equal(first.image, CropPairs(tmp_path, ["0.jpg", "1.jpg"], size=32)[(1, 7)][0].image)
    assert len(first.boxes) == 0
    collate_views([crops[(0, 1)], crops[(1, 2)]])


def test_read_image_follows_exif_and_takes_any_depth(tmp_path: Path) -> None:
    from PIL import Image

    wide = np.zeros((20, 50, 3), np.uint8)
    wide[:, :25, 0] = 250  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(wide).save(tmp_path / "turned ü.jpg", exif=exif, quality=95)
    turned = read_image(tmp_path / "turned ü.jpg")
    assert turned.shape == (50, 20, 3)
    assert turned[:20, :, 0].mean() > 200 > 50 > turned[30:, :, 0].mean()
    Image.fromarray(wide).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(wide[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([wide, wide[..., :1]])).save(tmp_path / "alpha.png")
    cv2.imwrite(str(tmp_path / "deep.png"), (wide.astype(np.uint16) * 257))
    Image.fromarray(wide).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "really_a_png.jpg")
    for name in ("cmyk.jpg", "grey.png", "alpha.png", "deep.png", "really_a_png.jpg"):
        image = read_image(tmp_path / name)
        assert (image.shape, image.dtype) == ((20, 50, 3), np.uint8), name
    Image.fromarray(wide[:1, :1]).save(tmp_path / "dot.png")
    assert read_image(tmp_path / "dot.png").shape == (1, 1, 3)
    (tmp_path / "empty.jpg").write_bytes(b"")
    data = (tmp_path / "turned ü.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[:20])
    for name in ("empty.jpg", "cut.jpg"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg: no such file"):
        read_image(tmp_path / "none.jpg")
