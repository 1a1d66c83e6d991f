"""The proposal file: round trip, memory map, pickling, atomic writing, damaged and foreign files."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from aligndet.data.proposals import ALIGNMENT, MEMBERS, open_proposals, write_proposals

NAMES = ("a/first.jpg", "zweites Bild ü 图.png", "c.jpg")
SIZES = [(31, 37), (41, 43), (47, 53)]
PARAMETERS = {"mode": "fast", "size": 640, "nms": 0.5, "limit": None}


def some_boxes() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.random((number, 4), dtype=np.float32) for number in (5, 0, 7)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "proposals.npz"
    write_proposals(path, NAMES, SIZES, some_boxes(), PARAMETERS, failures={"d.jpg": "ValueError: broken"})
    return path


def test_round_trip(path: Path) -> None:
    file = open_proposals(str(path))
    assert len(file) == 3
    assert file.names == NAMES
    assert file.sizes.tolist() == [list(size) for size in SIZES]
    assert file.offsets.tolist() == [0, 5, 5, 12]
    assert file.parameters == PARAMETERS
    assert set(file.versions) >= {"aligndet", "opencv", "numpy"}
    assert file.failures == {"d.jpg": "ValueError: broken"}
    for row, boxes in enumerate(some_boxes()):
        assert file.boxes_of(row).dtype == np.float32
        np.testing.assert_array_equal(file.boxes_of(row), boxes)
    np.testing.assert_array_equal(file.boxes_of(-1), some_boxes()[2])
    with pytest.raises(IndexError):
        file.boxes_of(3)


def test_boxes_are_mapped_and_copies_are_writable(path: Path) -> None:
    file = open_proposals(path)
    assert isinstance(file.boxes, np.memmap)
    assert file.boxes.mode == "r"
    assert file.boxes.offset % ALIGNMENT == 0
    assert file.boxes.flags.aligned
    boxes = file.boxes_of(0)
    assert type(boxes) is np.ndarray
    boxes += 1
    np.testing.assert_array_equal(file.boxes_of(0), some_boxes()[0])


def test_numpy_reads_it_without_us(path: Path) -> None:
    with np.load(path) as arrays:
        assert set(arrays.files) == set(MEMBERS)
        assert arrays["names"].tolist() == list(NAMES)
        assert json.loads(str(arrays["meta"]))["parameters"] == PARAMETERS
        np.testing.assert_array_equal(arrays["boxes"], np.concatenate(some_boxes()))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_same_content_same_bytes(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    write_proposals(other, NAMES, SIZES, some_boxes(), PARAMETERS, failures={"d.jpg": "ValueError: broken"})
    assert other.read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.npz", "proposals.npz"]


def test_a_loader_process_gets_a_path_not_the_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_proposals("large.npz", ["one.jpg"], [(31, 37)], [np.ones((100_003, 4), np.float32)], {})
    data = pickle.dumps(open_proposals("large.npz"))
    assert len(data) < 1000
    monkeypatch.chdir(tmp_path.parent)  # a worker may run elsewhere
    copy = pickle.loads(data)
    assert isinstance(copy.boxes, np.memmap)
    assert copy.boxes_of(0).shape == (100_003, 4)


@pytest.mark.parametrize("number", [0, 3])
def test_without_images_or_boxes(tmp_path: Path, number: int) -> None:
    path = tmp_path / "empty.npz"
    write_proposals(path, NAMES[:number], SIZES[:number], [np.zeros((0, 4), np.float32)] * number, {})
    file = open_proposals(path)
    assert len(file) == number
    assert file.boxes.shape == (0, 4)
    assert file.sizes.shape == (number, 2)
    for row in range(number):
        assert file.boxes_of(row).shape == (0, 4)


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    class Breaking(list):
        def __getitem__(self, row: int) -> np.ndarray:
            raise OSError("disk full")

        def __iter__(self):
            self.rounds = getattr(self, "rounds", 0) + 1
            yield np.zeros((1, 4), np.float32)
            if self.rounds > 1:
                raise OSError("disk full")
            yield from [np.zeros((1, 4), np.float32)] * 2

    with pytest.raises(OSError, match="disk full"):
        write_proposals(path, NAMES, SIZES, Breaking([0, 0, 0]), PARAMETERS)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["proposals.npz"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npz: no such file"):
        open_proposals(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="want a file, got a folder"):
        open_proposals(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_cut_short_anywhere(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"proposals\.npz: cut short or not a proposal file"):
        open_proposals(path)


def test_flipped_bit_in_names_or_offsets(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index("first".encode("utf-32-le"))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"proposals\.npz: .*CRC"):
        open_proposals(path)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"foreign\.npz: .*no meta, names, sizes, offsets, boxes among .*weights"):
        open_proposals(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a proposal file"):
        open_proposals(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"meta": np.array('{"format": "other"}')}, "want a meta member of format 'aligndet proposals'"),
        ({"meta": np.array('{"format": "aligndet proposals", "version": 2}')}, "want format version 1, got 2"),
        ({"meta": np.array("no json")}, "not a proposal file"),
        ({"meta": np.array('{"format": "aligndet proposals", "version": 1}')}, "meta has no parameters"),
        ({"sizes": np.zeros((2, 2), np.int32)}, r"sizes: want \[3, 2\]"),
        ({"offsets": np.array([0, 5, 4, 12])}, "offsets: want them ascending"),
        ({"offsets": np.array([0, 5, 5, 13])}, "from 0 to 12, got 0 to 13"),
        ({"boxes": np.zeros((12, 5), np.float32)}, r"boxes: want \[12, 4\]"),
        ({"names": np.array([{}, [], ()], dtype=object)}, "allow_pickle=False"),
    ],
)
def test_files_that_do_not_fit_together(path: Path, changed: dict[str, np.ndarray], message: str) -> None:
    with np.load(path) as arrays:
        members = dict(arrays) | changed
    np.savez(path, **members)
    with pytest.raises(ValueError, match=message):
        open_proposals(path)


def test_files_of_numpy_itself_are_fine_and_compressed_ones_are_refused(path: Path) -> None:
    with np.load(path) as arrays:
        members = dict(arrays)
    np.savez(path, **members)
    np.testing.assert_array_equal(open_proposals(path).boxes_of(2), some_boxes()[2])
    np.savez_compressed(path, **members)
    with pytest.raises(ValueError, match="boxes is compressed"):
        open_proposals(path)


@pytest.mark.parametrize(
    ("names", "sizes", "boxes", "message"),
    [
        (NAMES, SIZES[:2], some_boxes(), "3 names, 2 sizes, 3 arrays"),
        (("a", "b", "a"), SIZES, some_boxes(), "name 'a' occurs twice"),
        (NAMES, SIZES, [np.zeros(4)] * 3, r"a/first.jpg: want boxes \[m, 4\], got \[4\]"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, names: tuple, sizes: list, boxes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_proposals(tmp_path / "p.npz", names, sizes, boxes, {})
    assert not list(tmp_path.iterdir())
