"""Hostile files: whatever a config or a label file says, it is read or refused in one line, at once."""

import json
import os
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from pycocotools import mask as rle

from aligndet import load_config
from aligndet.data.coco import find_images
from aligndet.data.crops import CropPairs
from aligndet.data.folder import list_images
from aligndet.data.formats import load_annotations
from aligndet.data.labelled import LabelledImages
from aligndet.data.segmentation import _decoded, run_lengths
from aligndet.data.transforms import read_image
from tests import fuzz
from tests.data import same

PIXELS = np.full((10, 10, 3), 200, np.uint8)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(tmp_path, seed=7)
    fuzzer.run(3200)
    assert not fuzzer.strangers, "\n".join(fuzzer.strangers[:5])
    assert sum(sum(outcomes.values()) for outcomes in fuzzer.tried.values()) == 3200
    assert fuzzer.unknown_keys > 100
    for kind, least in {"config": 100, "coco": 300, "yolo": 50}.items():
        assert min(fuzzer.tried[kind].values()) > least, f"{kind}: both outcomes occur, or the mutations are one-sided"


def test_the_rule_of_the_fuzzer_can_be_broken() -> None:
    def raising(error: Exception) -> Any:
        raise error

    assert fuzz.outcome(lambda: raising(ValueError("x"))) == "refused"
    strange = (KeyError("x"), RecursionError(), ValueError("two\nlines"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"))
    for error in strange:
        with pytest.raises(fuzz.StrangeOutcomeError):
            fuzz.outcome(lambda error=error: raising(error))
    late = time.process_time() + fuzz.LIMIT + 0.01
    with pytest.raises(fuzz.StrangeOutcomeError, match="took"):
        fuzz.outcome(lambda: next(None for _ in iter(int, 1) if time.process_time() > late))
    with pytest.raises(fuzz.StrangeOutcomeError, match="unknown key"):
        fuzz.outcome(lambda: None, stranger=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: !!python/object/apply:os.mkdir [executed]", "could not determine a constructor for the tag"),
        ("seed: &a 1\nrun: *a", "aliases .* are not read, write the value out"),
        ("seed: 1\nseed: 2", "key 'seed' twice"),
        ("seed: " + "[" * 3000, "nested too deep"),
        ("seed: " + "- " * 3000, "YAML"),
        ("seed: 0x" + "f" * 9000, "want a whole number below 2\\*\\*63"),
        ("optim: {lr: 1" + "0" * 400 + "}", "optim.lr: want a number, got 1000"),
        ("seed: " + "9" * 5000, "not readable as YAML"),
        ("seed: 2024-99-99", "not readable as YAML: month must be"),
    ],
)
def test_hostile_yaml_is_one_line(tmp_path: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(line)
    with pytest.raises(ValueError, match=f"^config c.yaml: .*{message}") as caught:
        load_config("c.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert os.listdir() == ["c.yaml"]


def test_the_valid_config_of_the_fuzzer_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(fuzz.valid_config()))
    assert load_config(tmp_path / "c.yaml").optim.milestones == (10, 15)


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "", "/x.png", "a/../../x.png", "."])
def test_names_that_no_file_of_the_folder_has(tmp_path: Path, name: str) -> None:
    path = same.write_coco(tmp_path)
    tree = json.loads(path.read_text())
    tree["images"][1]["file_name"] = name
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"instances_train.json: images\[1\].file_name"):
        load_annotations(path)


def test_voc_lists_name_files_of_their_folder_only(tmp_path: Path) -> None:
    path = same.write_voc(tmp_path / "voc")
    (tmp_path / "voc/secret.xml").write_text(same.xml("c.png", same.xml_object("spy", 1, 1, 9, 9)))
    path.write_text("c\n../secret\n" + str(tmp_path / "voc/secret") + "\n")
    found = load_annotations(path)
    assert list(found.file_names) == ["c.png"]
    assert "spy" not in found.class_names
    assert ["leaves the image folder" in line for line in found.report["xml file that cannot be read"]] == [True] * 2


def linked(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with links, and a file elsewhere."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
        cv2.imwrite(str(folder / "real.png"), PIXELS)
    return root, outside


@pytest.mark.parametrize("name", ["link.png", "folder/real.png"])
def test_links_are_followed_names_that_leave_the_folder_are_not(tmp_path: Path, name: str) -> None:
    root, outside = linked(tmp_path)
    (root / name.partition("/")[0]).symlink_to(outside if "/" in name else outside / "real.png")
    assert list_images(root) == sorted([name, "real.png"])
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}]
    tree = {"images": [{"id": 1, "file_name": name}], "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(tree))
    found = load_annotations(tmp_path / "a.json")
    data = LabelledImages(found, find_images(found.path, root, found.file_names), short_sides=(10,), long_side=10)
    assert data[(0, 0)].image_id == 1
    for bad in ("../outside/real.png", str(outside / "real.png")):
        tree["images"][0]["file_name"] = bad  # type: ignore[index]
        (tmp_path / "a.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match="leaves the image folder"):
            load_annotations(tmp_path / "a.json")


def test_links_inside_are_followed_and_loops_end(tmp_path: Path) -> None:
    root, _ = linked(tmp_path)
    (root / "deep").mkdir()
    (root / "deep/up").symlink_to(root)
    (root / "deep/self").symlink_to("self")
    (root / "again.png").symlink_to("real.png")
    (tmp_path / "door").symlink_to(root)  # the folder itself may be a link
    started = time.perf_counter()
    assert list_images(tmp_path / "door") == list_images(root) == ["again.png", "real.png"]
    assert time.perf_counter() - started < 1
    (root / "a.png").symlink_to("b.png")
    (root / "b.png").symlink_to("a.png")
    assert list_images(root) == ["a.png", "again.png", "b.png", "real.png"]
    data = CropPairs(root, ["a.png", "real.png"], size=10)
    assert "a.png: cannot be read" in data[(0, 0)][0].skipped[0]


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x.png: cannot be read: .*not a regular file"):
        read_image(tmp_path / "x.png")


def test_compressed_run_lengths_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        height, width = rng.integers(1, 300, 2).tolist()
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        counts = rle.encode(np.asfortranarray(mask))["counts"]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel()])))  # where a run of the columns ends
        assert _decoded(counts).tolist() == np.diff([0, *edges, height * width]).tolist()
        text = counts.decode()
        if mask.any():
            assert run_lengths({"size": [height, width], "counts": text}, (height, width)) == (counts, "")
            for size in ((height + 1, width), (height, width + 1)):
                assert "do not make up" in run_lengths({"size": list(size), "counts": text}, size)[1]


@pytest.mark.parametrize(
    "segmentation",
    [
        [[0, 0, 1e308, 0, 1e308, 1e308]],
        [[0, 0, float("nan"), 0, 5, 5]],
        [[0, 0, 5, 0, 10**400, 5]],
        [[0, 0, 900_000, 0, 0, 900_000] * 3],
        {"size": [10, 10], "counts": [50, -20, 70]},
        {"size": [10, 10], "counts": [50, 2**40]},
        {"size": [10, 10], "counts": "oooooooooooo"},
        {"size": [10, 10], "counts": "\x01\x02"},
        {"size": [10, 10], "counts": {}},
    ],
)
def test_masks_that_pycocotools_would_not_survive(segmentation: Any) -> None:
    encoded, reason = run_lengths(segmentation, (10, 10))
    assert encoded == b""
    assert reason
