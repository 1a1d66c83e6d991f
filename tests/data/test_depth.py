"""Claims about depth: 12 bits of a camera are no black picture, 8 bits stay, and every reader sees the same."""

import io
import json
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from aligndet import cli
from aligndet.data.check import PAGES, check
from aligndet.data.decode import open_picture
from aligndet.data.formats import load_annotations
from aligndet.data.headers import image_size
from aligndet.data.labelled import LabelledImages
from aligndet.data.proposals import open_proposals
from aligndet.data.transforms import read_image
from aligndet.predict import predict
from tests.scenes import small_detector

ROOT = Path(__file__).parents[2]
COLOUR = np.random.default_rng(0).integers(0, 256, (41, 61, 3), dtype=np.uint8)  # BGR
GREY = COLOUR[..., 0]


def written(path: Path, image: np.ndarray) -> Path:
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    return path


def rgb(image: np.ndarray) -> np.ndarray:
    """What ``read_image`` should give of 8 bits: grey three times, BGR turned round."""
    return np.dstack([image] * 3) if image.ndim == 2 else image[..., ::-1]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize("eight", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize(("bits", "divisor"), [(16, 256), (14, 64), (12, 16), (10, 4), (9, 2), (8, 1)])
def test_the_upper_bits_that_are_used(tmp_path: Path, suffix: str, eight: np.ndarray, bits: int, divisor: int) -> None:
    """Random lower bits below a picture of 8 bits: the picture comes out, exactly."""
    lower = np.random.default_rng(1).integers(0, divisor, eight.shape)
    deep = (eight.astype(np.int64) * divisor + lower).astype(np.uint16)
    assert int(deep.max()) >> (bits - 1) == 1, f"the maximum has {bits} bits"
    image = read_image(written(tmp_path / f"x{suffix}", deep))
    assert image.dtype == np.uint8 and (image == rgb(eight)).all()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((0, 4095, 2048, 15), (0, 255, 128, 0)),  # below 4096: / 16
        ((0, 4096, 2048, 31), (0, 128, 64, 0)),  # below 8192: / 32
        ((0, 65535, 255, 256), (0, 255, 0, 1)),
        ((0, 100, 7, 1), (0, 100, 7, 1)),  # 8 bits in a file of 16 are not made brighter
        ((0, 0, 0, 0), (0, 0, 0, 0)),
    ],
)
def test_values_by_hand(tmp_path: Path, values: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    image = read_image(written(tmp_path / "x.png", np.array([values], np.uint16)))
    assert image[0].tolist() == [[value] * 3 for value in wanted]


def packed_tiff(values: np.ndarray, bits: int) -> bytes:
    """A grey TIFF, written by hand, whose samples of ``bits`` bits lie without gaps in each row."""
    height, width = values.shape
    rows = ["".join(f"{value:0{bits}b}" for value in row) for row in values.tolist()]
    rows = [row + "0" * (-len(row) % 16) for row in rows]
    pixels = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    short, long = 3, 4
    tags = [(256, short, width), (257, short, height), (258, short, bits), (259, short, 1), (262, short, 1)]
    tags += [(273, long, 8), (277, short, 1), (278, short, height), (279, long, len(pixels))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_twelve_bits_without_gaps(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(packed_tiff(GREY[:8, :16].astype(np.int64) * 16 + 15, 12))
    assert (read_image(tmp_path / "x.tif") == rgb(GREY[:8, :16])).all()
    assert image_size(tmp_path / "x.tif") == (8, 16)


def of_pillow(mode: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def test_eight_bits_are_what_they_were_in_one_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte OpenCV's colour image, of grey, alpha, palettes, one bit, printing colours and compressions."""
    files = {
        f"{name}{suffix}": cv2.imencode(suffix, image)[1].tobytes()
        for name, image in {"grey": GREY, "colour": COLOUR, "alpha": np.dstack([COLOUR, GREY])}.items()
        for suffix in (".png", ".tif", ".jpg", ".bmp", ".webp")
        if name != "alpha" or suffix in (".png", ".tif")
    }
    for mode in ("1", "P", "L", "RGB", "CMYK"):
        files |= {
            f"{mode}.tif": of_pillow(mode, "TIFF"),
            f"{mode}-lzw.tif": of_pillow(mode, "TIFF", compression="tiff_lzw"),
        }
        files |= {f"{mode}.png": of_pillow(mode, "PNG")} if mode != "CMYK" else {}
    files["fax.tif"] = of_pillow("1", "TIFF", compression="group4")
    files["jpeg.tif"] = of_pillow("RGB", "TIFF", compression="jpeg")
    decode, calls = cv2.imdecode, []
    monkeypatch.setattr(cv2, "imdecode", lambda *arguments: calls.append(1) or decode(*arguments))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        before = decode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        calls.clear()
        assert (read_image(tmp_path / name) == before[..., ::-1]).all(), name
        assert len(calls) == 1, name


def test_every_reader_sees_the_same(tmp_path: Path) -> None:
    """Training, propose and predict on 12 bits in a file of 16 are those on the picture of 8 bits."""
    scene = np.full((96, 128), 60, np.uint8)
    scene[20:60, 30:80], scene[70:90, 5:25] = 200, 130
    for name, image in {"eight.png": scene, "twelve.tif": scene.astype(np.uint16) * 16}.items():
        written(tmp_path / name, image)
    eight, twelve = (open_picture(tmp_path / name).pixels() for name in ("eight.png", "twelve.tif"))
    assert (eight == rgb(scene)).all() and (twelve == eight).all()
    images = [
        {"id": number, "file_name": name, "height": 96, "width": 128}
        for number, name in enumerate(("eight.png", "twelve.tif"), start=1)
    ]
    labels = [{"id": n, "image_id": n, "category_id": 1, "bbox": [30, 20, 50, 40]} for n in (1, 2)]
    tree = {"images": images, "annotations": labels, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "l.json").write_text(json.dumps(tree))
    found = load_annotations(tmp_path / "l.json")
    data = LabelledImages(found, tmp_path, short_sides=(48,), long_side=64, flip_probability=0)
    assert torch.equal(data[(0, 0)].image, data[(1, 0)].image) and data[(1, 0)].image.max() > 150
    out = tmp_path / "p.npz"
    arguments = ["--images", str(tmp_path), "--out", str(out), "--mode", "single", "--min-size", "6", "--workers", "1"]
    assert cli.main(["propose", *arguments]) == 0
    proposals = open_proposals(out)
    assert len(proposals.boxes_of(0)) > 0
    assert proposals.boxes_of(0).tolist() == proposals.boxes_of(1).tolist()
    files = [tmp_path / "eight.png", tmp_path / "twelve.tif"]
    one, other = predict(small_detector(score_threshold=0.0), files, 0.0, short_side=96, long_side=128)
    assert len(one) > 0 and torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


def test_one_place_decodes_pixels() -> None:
    """``headers.py`` asks for sizes only."""
    places = {path.name for path in (ROOT / "aligndet").rglob("*.py") if ".imdecode(" in path.read_text()}
    assert places == {"transforms.py", "headers.py"}
    assert not [path for path in (ROOT / "aligndet").rglob("*.py") if ".imread(" in path.read_text()]


@pytest.mark.parametrize(
    ("image", "got"),
    [
        ((GREY / 255).astype(np.float32), "floating point of 32 bits"),
        ((COLOUR / 255).astype(np.float32), "floating point of 32 bits"),
        (GREY / 255, "floating point of 64 bits"),
        (GREY.astype(np.int32), "integers of 32 bits"),
    ],
    ids=["grey", "colour", "double", "long"],
)
def test_other_numbers_are_refused_with_what_is_wanted(
    tmp_path: Path, image: np.ndarray, got: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "x.tif", image)
    with pytest.raises(ValueError, match=rf"x\.tif: want integers of 8 or 16 bits per channel, got {got}"):
        read_image(path)
    assert image_size(path) == (0, 0), "as of all that cannot be read"
    assert capfd.readouterr().err == "", "OpenCV is not asked, which would say more"


def test_signed_integers(tmp_path: Path) -> None:
    deep = GREY.astype(np.int16) * 16
    assert (read_image(written(tmp_path / "x.tif", deep)) == rgb(GREY)).all()
    with pytest.raises(ValueError, match=r"x\.tif: want integers of 8 or 16 bits per channel from 0 on, got -7"):
        read_image(written(tmp_path / "x.tif", np.maximum(deep - 100, -7).astype(np.int16)))


def test_check_names_files_of_several_pages(tmp_path: Path) -> None:
    written(tmp_path / "single.tif", GREY)
    cv2.imwritemulti(str(tmp_path / "pages.tif"), [GREY, 255 - GREY, GREY])
    written(tmp_path / "other.png", 255 - GREY)
    report = check(tmp_path, format="folder")
    assert report.usable and report.problems == {}
    assert report.notes == {PAGES: ["pages.tif: 3 pages"]}
    assert (read_image(tmp_path / "pages.tif") == rgb(GREY)).all()
