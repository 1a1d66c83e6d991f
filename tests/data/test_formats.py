"""Claims about formats: the same data gives the same targets in each; the format is found out; parts are told apart."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from aligndet.data.annotations import Names
from aligndet.data.formats import detect_format, images_of, load_annotations
from aligndet.data.headers import image_size, is_truncated
from aligndet.data.labelled import LabelledImages
from aligndet.data.transforms import read_image
from tests.data import same


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_every_format_gives_the_same_targets(tmp_path: Path, kind: str, whole: bool) -> None:
    path = same.WRITERS[kind](tmp_path / kind)
    found = load_annotations(tmp_path / kind if whole else path, split="train")
    assert detect_format(tmp_path / kind) == detect_format(path) == kind
    assert found.class_names == same.CLASSES
    assert list(found.file_names) == list(same.BOXES)
    assert found.sizes.tolist() == [[64, 128]] * 3
    assert found.offsets.tolist() == [0, 2, 2, 5]
    assert found.labels.tolist() == [1, 0, 2, 1, 1]
    assert found.boxes.tolist() == [list(box) for boxes in same.BOXES.values() for _, *box in boxes]
    assert found.report == {}
    root = images_of(found, None)
    data = LabelledImages(found, root, short_sides=(32, 48), long_side=500)
    assert len(data) == 2
    sample = data[(1, 4)]
    assert sample.labels.tolist() == [2, 1, 1]
    only = load_annotations(path, classes=("owl", "cat"))
    assert (only.class_names, only.labels.tolist()) == (("owl", "cat"), [1, 0])
    with pytest.raises(ValueError, match="no class 'dogs'; the nearest is 'dog'"):
        load_annotations(path, classes=("dogs",))


def test_samples_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    samples = []
    for kind, write in same.WRITERS.items():
        found = load_annotations(write(tmp_path / kind))
        data = LabelledImages(found, images_of(found, None), short_sides=(32, 48), long_side=500, seed=3)
        samples.append([data[(index % 2, index)] for index in range(8)])
    for one, *others in zip(*samples, strict=True):
        for other in others:
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.boxes, other.boxes)
            assert torch.equal(one.labels, other.labels)


def test_a_written_coco_file_reads_back(tmp_path: Path) -> None:
    found = load_annotations(same.write_voc(tmp_path))
    path = tmp_path / "x.json"
    path.write_text(json.dumps(found.to_coco()))
    again = load_annotations(path)
    assert again.boxes.tolist() == found.boxes.tolist()
    assert again.labels.tolist() == found.labels.tolist()
    assert list(again.file_names) == list(found.file_names)
    part = found.to_coco([2])
    assert [image["file_name"] for image in part["images"]] == ["ü.png"]
    assert [a["bbox"] for a in part["annotations"]] == [[1, 2, 2, 3], [100, 40, 28, 24], [5, 5, 20, 20]]


def test_voc_difficult_objects_are_no_targets(tmp_path: Path) -> None:
    path = same.write_voc(tmp_path)
    objects = same.xml_object("dog", 1, 1, 30, 30) + same.xml_object("dog", 41, 11, 60, 30, difficult=1)
    (tmp_path / "Annotations/c.xml").write_text(same.xml("c.png", objects))
    found = load_annotations(path)
    assert found.boxes[found.rows_of(1)].tolist() == [[0, 0, 30, 30]]
    assert found.crowds_of(1).tolist() == [[40, 10, 60, 30]]
    assert [a["iscrowd"] for a in found.to_coco([1])["annotations"]] == [0, 1]


def test_voc_layouts(tmp_path: Path) -> None:
    """A devkit with two years, each year, a pattern over years, xml beside images; splits that do not exist."""
    for year in ("VOC2007", "VOC2012"):
        same.write_voc(tmp_path / "kit" / year)
    (tmp_path / "kit/VOC2012/Annotations/c.xml").unlink()
    both = load_annotations(tmp_path / "kit", split="train")
    assert list(both.file_names)[2:4] == ["VOC2007/JPEGImages/ü.png", "VOC2012/JPEGImages/a b.png"]
    assert both.root == tmp_path / "kit"
    assert len(both.boxes) == 10
    assert {reason: len(lines) for reason, lines in both.report.items()} == {"xml file that cannot be read": 1}
    pattern = load_annotations(f"{tmp_path}/kit/VOC20*/ImageSets/Main/train.txt")
    assert pattern.boxes.tolist() == both.boxes.tolist()
    lists = tmp_path / "kit/VOC2007/ImageSets/Main"
    (lists / "other.txt").write_text("ü\nmore\nmore\n")  # in train, too; without an xml file
    several = load_annotations(f"{lists}/*.txt")
    assert sorted(several.file_names) == sorted(name.split("/")[-1] for name in both.file_names if "VOC2007" in name)
    assert {reason: len(lines) for reason, lines in several.report.items()} == {
        "xml file that cannot be read": 1,
        "listed twice": 1,
    }
    (lists / "other.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no split 'val' in ImageSets/Main; there are \['train'\]"):
        load_annotations(tmp_path / "kit", split="val")
    with pytest.raises(FileNotFoundError, match=r"val\.txt: no such file"):
        load_annotations(tmp_path / "kit/VOC2007/ImageSets/Main/val.txt")
    bare = tmp_path / "bare"
    shutil.copytree(tmp_path / "kit/VOC2007/JPEGImages", bare)
    for file in (tmp_path / "kit/VOC2007/Annotations").iterdir():
        shutil.copy(file, bare)
    found = load_annotations(bare)
    assert found.root == bare
    assert sorted(found.file_names) == sorted(same.BOXES)
    assert len(found.boxes) == 5


def test_voc_class_ids_do_not_depend_on_the_split(tmp_path: Path) -> None:
    same.write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/val.txt").write_text("a b\n")
    found = load_annotations(tmp_path, split="val")
    assert found.class_names == same.CLASSES
    assert found.labels.tolist() == [1, 0]
    (tmp_path / "classes.txt").write_text("owl\nfox\ndog\n")
    found = load_annotations(tmp_path, split="val")
    assert found.class_names == ("owl", "fox", "dog")
    assert found.labels.tolist() == [2]
    assert list(found.report) == ["category unknown"]
    assert "object 2 (cat) of a b.png" in found.report["category unknown"][0]


def test_yolo_layouts(tmp_path: Path) -> None:
    """Names by number, lists of images, exports with ../, polygons; errors name the key."""
    path = same.write_yolo(tmp_path)
    polygon = [(8, 8), (40, 8), (40, 24), (8, 24)]
    line = "2 " + " ".join(f"{x / 128} {y / 64}" for x, y in polygon)
    (tmp_path / "labels/train/c.txt").write_text(line)
    (tmp_path / "val.txt").write_text("images/train/ü.png\n./images/train/gone.jpg\n")
    path.write_text("names: {0: cat, 5: dog, 2: owl}\ntrain: ../images/train\nval: val.txt\n")
    found = load_annotations(path, split="train", masks=True, classes=("owl",))
    assert found.boxes.tolist() == [[8, 8, 40, 24]]
    assert found.masks_of(found.rows_of(1), (64, 128)).nonzero()[1].min() == 8
    assert found.masks_of(found.rows_of(1), (64, 128)).sum() == 32 * 16
    assert len(found.report["without a segmentation"]) == 1
    val = load_annotations(path, split="val")
    assert list(val.file_names) == ["ü.png", "gone.jpg"]
    assert val.category_ids.tolist() == [0, 2, 5]
    assert len(load_annotations(path)) == 4, "both splits, each image once"
    for text, message in [
        ("names: [a, b]\nnc: 3\ntrain: images/train", "nc: want the 2 of names, got 3"),
        ("names: [a, a]\ntrain: images/train", "class name a occurs twice"),
        ("names: {}\ntrain: images/train", "names: want a list of names"),
        ("names: [a]\nval: images/train", "no split train; it has val"),
        ("train: images/train", "names is not there"),
        ("names: [a\n", "not readable as YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_annotations(path, split="train")
    path.write_text("names: [a]\ntrain: nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere is not in"):
        load_annotations(path)


def test_a_folder_of_images_is_a_data_set_without_boxes(tmp_path: Path) -> None:
    same.write_images(tmp_path / "deep/er")
    found = load_annotations(tmp_path)
    assert detect_format(tmp_path) == "folder"
    assert (len(found), len(found.boxes), found.class_names) == (3, 0, ())
    with pytest.raises(ValueError, match="none of the 3 images has a usable box"):
        LabelledImages(found, tmp_path, short_sides=(9,), long_side=9)
    with pytest.raises(ValueError, match="needs masks, which folder does not have"):
        load_annotations(tmp_path, masks=True)


def test_ambiguous_and_unknown_paths_are_named(tmp_path: Path) -> None:
    same.write_voc(tmp_path)
    path = same.write_coco(tmp_path)
    with pytest.raises(ValueError, match="could be coco or voc; name the format"):
        load_annotations(tmp_path)
    assert load_annotations(tmp_path, format="voc").path == str(tmp_path)
    assert load_annotations(tmp_path, format="coco").path == str(path)
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    assert load_annotations(tmp_path, format="coco", split="train").path == str(path)
    with pytest.raises(ValueError, match="several COCO files, name one or a split"):
        load_annotations(tmp_path, format="coco")
    with pytest.raises(FileNotFoundError, match="no COCO json of split test"):
        load_annotations(tmp_path, format="coco", split="test")
    with pytest.raises(FileNotFoundError, match="nothing: no such file or folder"):
        load_annotations(tmp_path / "nothing")
    with pytest.raises(ValueError, match="want one of coco, voc, yolo, folder, got 'cocoo'"):
        load_annotations(tmp_path, format="cocoo")


def test_real_xml_and_real_json_say_the_same(shared: Path) -> None:
    """Blood cells, 205 images: the JSON was made from the xml by others. Boxes and classes agree, but for four."""
    folder = shared / "data" / "bccd"
    for split, boxes in (("train", 2804), ("val", 1137)):
        voc = load_annotations(folder, format="voc", split=split)
        coco = load_annotations(folder, format="coco", split=split)
        assert len(coco.boxes) == len(voc.boxes) == boxes
        assert {reason: len(lines) for reason, lines in voc.report.items()} == {"a side is below 1 px": 1}
        assert sorted(voc.class_names) == sorted(coco.class_names) == ["Platelets", "RBC", "WBC"]
        row_of = {name: row for row, name in enumerate(coco.file_names)}
        assert set(row_of) == set(voc.file_names)
        differing = 0
        for row, name in enumerate(voc.file_names):
            rows = voc.rows_of(row), coco.rows_of(row_of[name])
            named = [
                {(data.class_names[data.labels[r]], *data.boxes[r].tolist()) for r in part}
                for data, part in zip((voc, coco), rows, strict=True)
            ]
            differing += len(named[0] ^ named[1])
        assert differing == 0


def test_sizes_from_headers_are_those_of_the_pixels(tmp_path: Path, shared: Path) -> None:
    image = np.zeros((23, 31, 3), np.uint8)
    for suffix in (".jpg", ".png", ".bmp", ".webp", ".tif"):
        (tmp_path / f"a{suffix}").write_bytes(cv2.imencode(suffix, image)[1].tobytes())
        assert image_size(tmp_path / f"a{suffix}") == (23, 31)
    plain = cv2.imencode(".jpg", image)[1].tobytes()
    blocks = {}
    for order, sign in (("<", b"II*\0"), (">", b"MM\0*")):
        for orientation in range(1, 9):
            number = [
                part.to_bytes(size, "little" if order == "<" else "big")
                for part, size in ((8, 4), (1, 2), (0x0112, 2), (3, 2), (1, 4), (orientation, 2), (0, 2), (0, 4))
            ]
            exif = b"Exif\0\0" + sign + b"".join(number)
            blocks[orientation] = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
            path = tmp_path / "turned.jpg"
            path.write_bytes(plain[:2] + blocks[orientation] + plain[2:])
            assert image_size(path) == read_image(path).shape[:2] == ((31, 23) if orientation > 4 else (23, 31))
    for first, second in ((1, 6), (6, 1), (3, 8)):  # of two blocks the first counts
        path.write_bytes(plain[:2] + blocks[first] + blocks[second] + plain[2:])
        assert image_size(path) == read_image(path).shape[:2]
    for path in [*sorted((shared / "data/coco_by_masks/val").glob("*.jpg"))[:20]]:
        assert image_size(path) == read_image(path).shape[:2]
    assert image_size(tmp_path / "none.jpg") == (0, 0)
    (tmp_path / "bad.jpg").write_bytes(plain[:12])
    assert image_size(tmp_path / "bad.jpg") == (0, 0)


def test_half_a_file_is_told_from_a_whole_one() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for suffix, options in ((".jpg", []), (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]), (".png", [])):
        data = cv2.imencode(suffix, image, options)[1].tobytes()
        assert not is_truncated(data)
        assert not is_truncated(data + b"\0" * 100), "some cameras append"
        assert all(is_truncated(data[:length]) for length in (30, len(data) // 2, len(data) - 3))
    thumbnail = cv2.imencode(".jpg", image[:8, :8])[1].tobytes()
    whole = cv2.imencode(".jpg", image)[1].tobytes()
    inside = whole[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + whole[2:]
    assert not is_truncated(inside)
    assert is_truncated(inside[: len(inside) // 2]), "the thumbnail's end is not the image's"


def test_names_in_one_array() -> None:
    texts = ["a.jpg", "", "ü/ñ 日本.png", "\udcff.jpg"]
    names = Names(texts)
    assert list(names) == texts
    assert (names[-1], names[1:3], len(names)) == (texts[-1], texts[1:3], 4)
    with pytest.raises(IndexError):
        names[4]
