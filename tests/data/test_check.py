"""The torture set: each fault is a named error or a counted skip, in `aligndet check` and in training alike."""

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from aligndet import cli
from aligndet.data.check import Report, as_text, check
from aligndet.data.formats import images_of, load_annotations
from aligndet.data.labelled import LabelledImages
from aligndet.data.transforms import read_image
from tests.data import same

GOOD = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def encoded(image: np.ndarray, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def exif_turned(data: bytes) -> bytes:
    """Orientation 6: the camera was turned by a quarter."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    return data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]


def cmyk() -> bytes:
    """A JPEG of printing colours: no ink at all, which is white."""
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


# name -> bytes of a file that is fine
FINE: dict[str, bytes] = {
    "plain.jpg": encoded(GOOD),
    "png named.jpg": encoded(GOOD, ".png"),
    "sixteen.png": encoded(GOOD.astype(np.uint16) * 257, ".png"),
    "grey.png": encoded(GOOD[..., 0], ".png"),
    "alpha.png": encoded(np.dstack([GOOD, GOOD[..., :1]]), ".png"),
    "turned.jpg": exif_turned(encoded(GOOD)),
    "dot.png": encoded(GOOD[:1, :1], ".png"),
    "long.png": encoded(np.zeros((20, 20000, 3), np.uint8), ".png"),
    "ünïcode 日本 with space.jpg": encoded(GOOD),
    "UPPER.JPG": encoded(GOOD[::-1]),
    "cmyk.jpg": cmyk(),
}
# name -> (bytes, the reason that check names, what the message says)
FAULTY: dict[str, tuple[bytes | None, str, str]] = {
    "truncated.jpg": (encoded(GOOD)[:-300], "file cannot be read", "truncated"),
    "truncated.png": (encoded(GOOD, ".png")[:-300], "file cannot be read", "truncated"),
    "empty.jpg": (b"", "file cannot be read", "0 bytes"),
    "text.jpg": (b"<html>not found</html>", "file cannot be read", "not an image"),
    "gone.jpg": (None, "file is missing", "no such file"),
    "Case.jpg": (None, "file is missing", "there is case.JPG"),
    "swapped.png": (encoded(GOOD.transpose(1, 0, 2), ".png"), "size differs from the labels", "says 60 x 40 px"),
}


def write_torture(folder: Path) -> Path:
    """Every file has one box; sizes as of ``GOOD`` where they are not a file's own."""
    (folder / "train").mkdir(parents=True)
    (folder / "annotations").mkdir()
    (folder / "train/case.JPG").write_bytes(encoded(GOOD))
    images, annotations = [], []
    files = [*FINE.items(), *((name, data) for name, (data, *_) in FAULTY.items())]
    for number, (name, data) in enumerate(files, start=1):
        if data is not None:
            (folder / "train" / name).write_bytes(data)
        sizes = {"turned.jpg": (60, 40), "dot.png": (1, 1), "long.png": (20, 20000), "cmyk.jpg": (16, 16)}
        height, width = sizes.get(name, (40, 60))
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations.append({"id": number, "image_id": number, "category_id": 5, "bbox": [0, 0, number, 10]})
    path = folder / "annotations/instances_train.json"
    categories = [{"id": 5, "name": "thing"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_images_of_the_torture_set(tmp_path: Path) -> None:
    path = write_torture(tmp_path)
    report = check(path, format="coco")
    assert report.usable
    assert (report.images, report.readable, report.boxes) == (18, len(FINE), len(FINE))
    assert (report.widths[0], report.widths[2]) == (1, 20000)
    for name, (_, reason, message) in FAULTY.items():
        lines = [line for line in report.problems[reason] if f"/{name}" in line]
        assert len(lines) == 1 and message in lines[0], (name, report.problems)
    assert sum(map(len, report.problems.values())) == len(FAULTY)
    assert report.notes["the same file twice"] == ["ünïcode 日本 with space.jpg is a copy of plain.jpg"]
    assert report.notes["image that the labels do not list"] == ["case.JPG"]
    assert not check(path, format="coco", on_error="fail").usable
    text = as_text(report, 3)
    assert "18 listed, 11 readable" in text and "problem: file cannot be read: 4" in text and "… and 1 more" in text


def test_training_skips_what_check_names_and_shifts_no_label(tmp_path: Path) -> None:
    """The first box of image n is n px wide, so a label that moved to another image would show."""
    annotations = load_annotations(write_torture(tmp_path))
    data = LabelledImages(
        annotations, images_of(annotations, None), short_sides=(40,), long_side=99, flip_probability=0
    )
    skipped = set()
    for index in range(len(data)):
        sample = data[(index, index)]
        number = sample.image_id
        assert annotations.file_names[number - 1] in FINE
        width = sample.original_size[1]
        assert sample.boxes[0, 2].item() == pytest.approx(min(number, width) * sample.image.shape[2] / width, rel=1e-5)
        skipped |= set(sample.skipped)
    assert len(skipped) == len(FAULTY)
    assert all(any(f"/{name}" in line for line in skipped) for name in FAULTY)
    strict = LabelledImages(annotations, data.root, short_sides=(40,), long_side=99, on_error="fail")
    with pytest.raises((ValueError, FileNotFoundError), match=r"truncated\.jpg"):
        strict[(len(FINE), 0)]


def test_fine_images_have_the_right_pixels(tmp_path: Path) -> None:
    for name, data in FINE.items():
        (tmp_path / name).write_bytes(data)
        image = read_image(tmp_path / name)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, name
    true = GOOD[..., ::-1].astype(int)
    for name in ("png named.jpg", "sixteen.png", "alpha.png"):
        assert np.abs(read_image(tmp_path / name).astype(int) - true).max() <= 1, name
    assert (read_image(tmp_path / "grey.png") == GOOD[..., :1]).all()
    assert read_image(tmp_path / "cmyk.jpg").min() >= 250
    upright = read_image(tmp_path / "plain.jpg")
    assert (read_image(tmp_path / "turned.jpg") == np.rot90(upright, k=-1)).all()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"bbox": [float("nan"), 1, 5, 5]}, "bbox is not finite"),
    "infinite": ({"bbox": [1, 1, float("inf"), 5]}, "bbox is not finite"),
    "negative": ({"bbox": [1, 1, -5, 5]}, "a side is below 1 px"),
    "zero": ({"bbox": [1, 1, 0, 5]}, "a side is below 1 px"),
    "outside": ({"bbox": [500, 1, 5, 5]}, "box outside the image"),
    "huge": ({"bbox": [1e300, 1, 5, 5]}, "box outside the image"),
    "text": ({"bbox": "1 1 5 5"}, "bbox is not four numbers"),
    "category": ({"category_id": 77}, "category unknown"),
    "image": ({"image_id": 77}, "image unknown"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_boxes_of_coco(tmp_path: Path, fault: str) -> None:
    path = same.write_coco(tmp_path)
    tree = json.loads(path.read_text())
    change, reason = FAULTS[fault]
    tree["annotations"].insert(1, tree["annotations"][0] | {"id": 1234} | change)
    path.write_text(json.dumps(tree))
    report = check(path, format="coco")
    assert list(report.problems) == [reason]
    assert "annotation 1234" in report.problems[reason][0]
    assert report.usable and report.boxes == 5
    assert not check(path, format="coco", on_error="fail").usable
    assert load_annotations(path).labels.tolist() == [1, 0, 2, 1, 1], "nothing is shifted"
    with pytest.raises(ValueError, match=f"annotation 1234.*{reason}"):
        load_annotations(path, on_error="fail")


@pytest.mark.parametrize(
    ("corners", "reason"),
    [
        (("nan", 1, 5, 5), "bbox is not finite"),
        ((9, 9, 5, 12), "a side is below 1 px"),
        ((5, 5, 5, 9), "a side is below 1 px"),
        ((500, 1, 520, 9), "box outside the image"),
        (("left", 1, 5, 5), "bbox is not finite"),
    ],
)
def test_faulty_boxes_of_voc(tmp_path: Path, corners: tuple[Any, ...], reason: str) -> None:
    path = same.write_voc(tmp_path)
    objects = same.xml_object("cat", *corners) + same.xml_object("dog", 5, 5, 9, 9)
    (tmp_path / "Annotations/c.xml").write_text(same.xml("c.png", objects))
    report = check(path, format="voc")
    assert list(report.problems) == [reason] and "object 1 (cat) of c.png" in report.problems[reason][0]
    assert report.usable and report.boxes == 6


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1 nan 0.5 0.1 0.1", "bbox is not finite"),
        ("1 0.5 0.5 0 0.1", "a side is below 1 px"),
        ("1 0.5 0.5 -0.1 0.1", "a side is below 1 px"),
        ("1 3.5 0.5 0.1 0.1", "box outside the image"),
        ("1 0.5 0.5 0.1", "bbox is not four numbers"),
        ("1 a b c d", "bbox is not four numbers"),
        ("7 0.5 0.5 0.1 0.1", "category unknown"),
        ("cat 0.5 0.5 0.1 0.1", "category unknown"),
        ("1.5 0.5 0.5 0.1 0.1", "category unknown"),
    ],
)
def test_faulty_lines_of_yolo(tmp_path: Path, line: str, reason: str) -> None:
    path = same.write_yolo(tmp_path)
    (tmp_path / "labels/train/c.txt").write_text(f"{line}\n0 0.5 0.5 0.5 0.5\n")
    report = check(path, format="yolo")
    assert list(report.problems) == [reason] and "line 1 of the labels of c.png" in report.problems[reason][0]
    assert report.usable and report.boxes == 6


def broken_json(folder: Path) -> Path:
    path = same.write_coco(folder)
    path.write_text(path.read_text()[:-9])
    return path


def duplicate_ids(folder: Path) -> Path:
    path = same.write_coco(folder)
    path.write_text(path.read_text().replace('"id": 14', '"id": 7'))
    return path


def no_boxes(folder: Path) -> Path:
    path = same.write_coco(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    return path


def crowds_only(folder: Path) -> Path:
    path = same.write_coco(folder)
    path.write_text(path.read_text().replace('"bbox"', '"iscrowd": 1, "bbox"'))
    return path


def no_images(folder: Path) -> Path:
    path = same.write_coco(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"images": [], "annotations": []}))
    return path


def broken_yaml(folder: Path) -> Path:
    path = same.write_yolo(folder)
    path.write_text("names: [cat\ntrain")
    return path


def broken_xmls(folder: Path) -> Path:
    path = same.write_voc(folder)
    for file in (folder / "Annotations").iterdir():
        file.write_text(file.read_text()[:-9])
    return path


def images_elsewhere(folder: Path) -> Path:
    path = same.write_coco(folder)
    (folder / "train").rename(folder / "hidden")
    return path


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (broken_json, "not JSON"),
        (duplicate_ids, "image id 7 occurs twice"),
        (no_boxes, "boxes: 0 to learn from"),
        (crowds_only, "boxes: 0 to learn from, 5 crowds"),
        (no_images, "images: 0 listed"),
        (broken_yaml, "not readable as YAML"),
        (broken_xmls, "xml file that cannot be read: 3"),
        (images_elsewhere, "a b.png is not in"),
    ],
)
def test_data_that_cannot_be_used_has_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Callable[[Path], Path], says: str
) -> None:
    path = write(tmp_path)
    assert cli.main(["check", str(path)]) == 1
    text = capsys.readouterr().out
    assert "NOT usable" in text and says in text
    with pytest.raises((ValueError, FileNotFoundError)):
        found = load_annotations(path)
        LabelledImages(found, images_of(found, None), short_sides=(9,), long_side=9)


def test_one_broken_xml_leaves_out_its_image(tmp_path: Path) -> None:
    path = same.write_voc(tmp_path)
    (tmp_path / "Annotations/a b.xml").write_text("<annotation><object>")
    report = check(path, format="voc")
    assert report.usable and (report.images, report.boxes) == (2, 3)
    assert "a b.xml" in report.problems["xml file that cannot be read"][0]
    assert load_annotations(path).labels.tolist() == [1, 0, 0], "owl 1, dog 0: the cat's file is gone"
    with pytest.raises(ValueError, match=r"a b\.xml.*cannot be read"):
        load_annotations(path, on_error="fail")


def test_calls_that_cannot_be_understood_have_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same.write_voc(tmp_path)
    same.write_coco(tmp_path)
    for arguments, says in [
        ([str(tmp_path / "nothing")], "no such file or folder"),
        ([str(tmp_path / "nothing.json")], "no such file or folder"),
        ([str(tmp_path)], "could be coco or voc"),
        ([str(tmp_path), "--format", "voc", "--workers", "-1"], "want at least 0, got -1"),
        ([str(tmp_path), "--format", "cocoo"], "invalid choice"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["check", *arguments])
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err


def test_the_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    path = same.write_coco(folder)
    before = {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*"))}
    for file in [folder, *before]:
        file.chmod(file.stat().st_mode & ~0o222)
    try:
        assert cli.main(["check", str(path), "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert Report(**found).usable
        assert found["classes"]["dog"] == {"boxes": 3, "images": 2, "small": 3, "medium": 0, "large": 0}
        assert found["classes"]["cat"] == {"boxes": 1, "images": 1, "small": 0, "medium": 1, "large": 0}
        assert (found["images"], found["readable"], found["without_boxes"], found["boxes"]) == (3, 3, 1, 5)
        assert found["widths"] == [128, 128, 128]
        assert found["problems"] == {}
        assert cli.main(["check", str(path), "--json", str(tmp_path / "report.json")]) == 0
        assert "usable" in capsys.readouterr().out
        assert json.loads((tmp_path / "report.json").read_text())["boxes"] == 5
        assert {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*"))} == before, "nothing is written"
    finally:
        for file in [folder, *before]:
            file.chmod(file.stat().st_mode | 0o200)


def test_two_thousand_boxes_and_the_same_one_twice(tmp_path: Path) -> None:
    path = same.write_coco(tmp_path)
    tree = json.loads(path.read_text())
    tree["annotations"] = [{"image_id": 7, "category_id": 3, "bbox": [n % 100, n // 100, 4, 4]} for n in range(2000)]
    tree["annotations"].append(tree["annotations"][7])
    path.write_text(json.dumps(tree))
    report = check(path, format="coco")
    assert report.usable and report.boxes == 2001
    assert report.notes["the same box twice"] == ["a b.png, cat, x0 y0 x1 y1 [7.0, 0.0, 11.0, 4.0]"]
    assert report.notes["class without a box"] == ["dog", "owl"]
    annotations = load_annotations(path)
    sample = LabelledImages(annotations, tmp_path / "train", short_sides=(64,), long_side=128)[(0, 0)]
    assert len(sample.boxes) == 2001


def test_a_plain_folder_is_usable_for_pretraining(tmp_path: Path) -> None:
    same.write_images(tmp_path)
    (tmp_path / "c.png").write_bytes(b"")
    report = check(tmp_path, format="folder")
    assert report.usable and (report.images, report.readable) == (3, 2)
    (tmp_path / "a b.png").write_bytes(b"")
    (tmp_path / "ü.png").write_bytes(b"")
    assert not check(tmp_path, format="folder").usable


def test_processes_report_as_this_one_does(tmp_path: Path) -> None:
    path = write_torture(tmp_path)
    one, two = check(path, format="coco", workers=0), check(path, format="coco", workers=2)
    one.seconds = two.seconds = 0.0
    assert one == two


def test_labels_of_coco_s_size_are_read_in_time(tmp_path: Path) -> None:
    """A twelfth of COCO: 10,000 images, 72,000 boxes; all of it may take 20 s."""
    images = [{"id": n, "file_name": f"{n:012}.jpg", "height": 480, "width": 640} for n in range(10_000)]
    boxes = [
        {"id": n, "image_id": n * 7919 % 10_000, "category_id": n % 80, "bbox": [n % 600, n % 400, 30, 40]}
        for n in range(72_000)
    ]
    categories = [{"id": n, "name": f"class {n}"} for n in range(80)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    began = time.process_time()
    found = load_annotations(path)
    LabelledImages(found, tmp_path, short_sides=(9,), long_side=9)
    assert time.process_time() - began < 20 / 12 * 3, "three times the share, for slow machines"
    assert len(found.boxes) == 72_000
    assert found.file_names[-1] == "000000009999.jpg"


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_images_and_label_files_that_do_not_pair(tmp_path: Path, kind: str) -> None:
    """Endings may be in capitals; an image without a label file and one of these without an image are named."""
    path = same.WRITERS[kind](tmp_path)
    shutil.rmtree(tmp_path / "ImageSets", ignore_errors=True)
    labels, ending = (tmp_path / "Annotations", ".xml") if kind == "voc" else (tmp_path / "labels/train", ".txt")
    images = tmp_path / ("JPEGImages" if kind == "voc" else "images/train")
    named = sorted(file.stem for file in labels.glob(f"*{ending}"))
    (labels / f"{named[0]}{ending}").rename(labels / f"{named[0]}{ending.upper()}")
    before = load_annotations(tmp_path if kind == "voc" else path)
    assert before.report == {} and named[0] in {Path(name).stem for name in before.file_names}
    assert check(tmp_path if kind == "voc" else path, format=kind).notes.keys() <= {
        "the same file twice",
        "image without a label file",
    }
    cv2.imwrite(str(images / "extra.png"), np.full((64, 128, 3), 7, np.uint8))
    if kind == "voc":
        assert check(tmp_path, format=kind).notes["image that the labels do not list"] == ["extra.png"]
        return
    shutil.copy(labels / f"{named[1]}.txt", labels / "lonely.txt")
    notes = check(path, format=kind).notes
    assert str(images / "extra.png") in notes["image without a label file"]
    assert notes["label file without an image"] == [str(labels / "lonely.txt")]
