"""The proposal file: all boxes of a folder of images in one array that loader processes share by memory map.

Layout: an uncompressed ``.npz`` (``numpy.load`` reads it too) with these members. Image i is ``names[i]``, its boxes
are rows ``offsets[i]`` to ``offsets[i + 1]`` of ``boxes``.

    meta     text: JSON with format, version, parameters, versions, failures {name: reason}
    names    text [n], file names relative to the image folder, "/" between folders
    sizes    int32 [n, 2], (height, width) px as decoded, EXIF orientation applied
    offsets  int64 [n + 1], ascending from 0 to M
    boxes    float32 [M, 4] xyxy px of the original image, half-open, largest area first within an image
    labels   int32 [M], pseudo-class of each box, 0 .. K-1; only in files of ``aligndet cluster``, K is in parameters

Images that could not be searched are in ``failures`` and have no row. The same images and parameters give the same
bytes: there is no time stamp in the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np

from aligndet.version import __version__

FORMAT, VERSION = "aligndet proposals", 1
MEMBERS = ("meta", "names", "sizes", "offsets", "boxes")
ALIGNMENT = 64  # bytes; npy headers fill up to it, so a member that starts on it has its data on it
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name and extra fields
_ZIP64_EXTRA = 20  # bytes that zipfile adds for sizes above 4 GiB
_PADDING_FIELD = 0xD935  # id of the extra field that zip alignment tools use for padding


@dataclass(frozen=True, eq=False)
class ProposalFile:
    """Proposals of a set of images; boxes stay on disk and are read as they are asked for.

    Pickled by its path: a loader process opens the file itself and shares the pages.

    Attributes:
        path: absolute path of the file.
        names: n file names relative to the image folder.
        sizes: int32 [n, 2], (height, width) px.
        offsets: int64 [n + 1], rows of ``boxes``.
        boxes: float32 [M, 4] xyxy px, read-only memory map.
        parameters: settings of the search and the filter.
        versions: of the libraries that made it.
        failures: reason for each image that could not be searched; these have no row.
        labels: int32 [M], 0 .. ``clusters`` - 1, or None in files without pseudo-classes.
    """

    path: Path
    names: tuple[str, ...]
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    parameters: dict[str, Any]
    versions: dict[str, str]
    failures: dict[str, str]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_proposals, (self.path,)

    @property
    def clusters(self) -> int | None:
        """How many pseudo-classes the file has, or None."""
        return None if self.labels is None else int(self.parameters["clusters"])

    def labels_of(self, row: int) -> np.ndarray:
        """The pseudo-classes of image ``row``: int64 [m]; zeros in files without any."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        if self.labels is None:
            return np.zeros(end - start, dtype=np.int64)
        return np.array(self.labels[start:end], dtype=np.int64)

    def boxes_of(self, row: int) -> np.ndarray:
        """The boxes of image ``row``: float32 [m, 4] xyxy px, a copy in memory; [0, 4] where it has none."""
        row = range(len(self))[row]  # IndexError beyond the end, negative rows as in lists
        return np.array(self.boxes[self.offsets[row] : self.offsets[row + 1]])


def write_proposals(
    path: str | Path,
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]] | np.ndarray,
    boxes_per_image: Sequence[np.ndarray],
    parameters: Mapping[str, Any],
    *,
    failures: Mapping[str, str] | None = None,
    labels: np.ndarray | None = None,
) -> None:
    """Write a proposal file in one step: a crash leaves the old file or none, never half a file.

    ``boxes_per_image`` is gone through twice and only one image's boxes are held at a time.

    Args:
        path: of the file; a ``.tmp`` beside it is used and replaced.
        names: n distinct file names.
        sizes: (height, width) px of each.
        boxes_per_image: float [m_i, 4] xyxy px of each.
        parameters: JSON values; what the boxes were made with.
        failures: reason for each image that has no row.
        labels: int [M], pseudo-class of each box; ``parameters["clusters"]`` then says how many there are.

    Raises:
        ValueError: lengths disagree, a name occurs twice, boxes are not [m, 4], or labels not 0 .. ``clusters`` - 1.
    """
    path = Path(path)
    if not len(names) == len(sizes) == len(boxes_per_image):
        raise ValueError(f"{path}: {len(names)} names, {len(sizes)} sizes, {len(boxes_per_image)} arrays of boxes")
    if len(set(names)) < len(names):
        double = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{path}: name {double!r} occurs twice")
    counts = [_count(name, boxes) for name, boxes in zip(names, boxes_per_image, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if labels is not None:
        _check_labels(labels, int(offsets[-1]), parameters.get("clusters"))
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "parameters": dict(parameters),
        "versions": library_versions(),
        "failures": dict(failures or {}),
    }
    with _replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_array(archive, "meta", np.array(json.dumps(meta)))
        _write_array(archive, "names", np.array(names, dtype=str if len(names) else "U1"))
        _write_array(archive, "sizes", np.asarray(sizes, dtype=np.int32).reshape(-1, 2))
        _write_array(archive, "offsets", offsets)
        with _member(archive, "boxes") as member:
            shape = (int(offsets[-1]), 4)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for boxes in boxes_per_image:
                member.write(np.ascontiguousarray(boxes, dtype="<f4").tobytes())
        if labels is not None:
            _write_array(archive, "labels", np.asarray(labels, dtype="<i4"))


def open_proposals(path: str | Path) -> ProposalFile:
    """Open a proposal file; boxes are mapped, not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, cut short, of another kind, or its arrays do not fit together.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"proposals {path}: no such file; `aligndet propose` writes one")
    if not path.is_file():
        raise ValueError(f"proposals {path}: want a file, got a folder")
    try:
        with zipfile.ZipFile(path) as archive:
            absent = [name for name in MEMBERS if f"{name}.npy" not in archive.namelist()]
            if absent:
                raise ValueError(f"no {', '.join(absent)} among its members {archive.namelist()}")
            small = {name: _read_array(archive, name) for name in MEMBERS[:-1]}
            boxes = _map_array(archive, path, "boxes")
            labels = _map_array(archive, path, "labels") if "labels.npy" in archive.namelist() else None
        meta = _checked_meta(small["meta"])
        if labels is not None:
            _check_labels(labels, len(boxes), meta["parameters"].get("clusters"))
        _check_arrays(small["names"], small["sizes"], small["offsets"], boxes)
    except zipfile.BadZipFile as error:
        raise ValueError(f"proposals {path}: cut short or not a proposal file ({error})") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"proposals {path}: not a proposal file of `aligndet propose`: {error}") from None
    names = tuple(small["names"].tolist())
    arrays = (small["sizes"], small["offsets"], boxes)
    return ProposalFile(path, names, *arrays, meta["parameters"], meta["versions"], meta["failures"], labels)


def library_versions() -> dict[str, str]:
    """Versions of all that the boxes depend on."""
    return {
        "aligndet": __version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _count(name: str, boxes: np.ndarray) -> int:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}: want boxes [m, 4], got {list(boxes.shape)}")
    return len(boxes)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside ``path`` that takes its place once it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    assert archive.fp is not None
    start = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    return archive.open(info, "w", force_zip64=True)


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with _member(archive, name) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    # Whole, not by streaming: only then is the checksum of the member compared.
    return np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)


def _map_array(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    """The array of an uncompressed member as a memory map of the archive itself."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"member {name} is compressed, so it cannot be mapped")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:])
        start = info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
        file.seek(start)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"member {name} is not an array of npy version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    if fortran or offset - start + dtype.itemsize * int(np.prod(shape)) != info.file_size:
        raise ValueError(f"member {name}: want {dtype} {list(shape)} row by row, got {info.file_size} bytes")
    if 0 in shape:
        return np.zeros(shape, dtype)  # nothing to map
    return np.memmap(path, dtype, "r", offset, shape)


def _checked_meta(array: np.ndarray) -> dict[str, Any]:
    meta = json.loads(str(array))
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"want a meta member of format {FORMAT!r}, got {str(array)[:80]!r}")
    if meta.get("version") != VERSION:
        raise ValueError(f"want format version {VERSION}, got {meta.get('version')!r}; it needs another aligndet")
    absent = [key for key in ("parameters", "versions", "failures") if not isinstance(meta.get(key), dict)]
    if absent:
        raise ValueError(f"meta has no {', '.join(absent)}")
    return meta


def _check_arrays(names: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, boxes: np.ndarray) -> None:
    number, total = len(names), len(boxes)
    for name, array, kind, shape in (
        ("names", names, "U", (number,)),
        ("sizes", sizes, "i", (number, 2)),
        ("offsets", offsets, "i", (number + 1,)),
        ("boxes", boxes, "f", (total, 4)),
    ):
        if array.shape != shape or array.dtype.kind != kind:
            raise ValueError(f"{name}: want {list(shape)} of kind {kind!r}, got {list(array.shape)} {array.dtype}")
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets: want them ascending from 0 to {total}, got {offsets[0]} to {offsets[-1]}")


def _check_labels(labels: np.ndarray, boxes: int, clusters: object) -> None:
    if labels.shape != (boxes,) or labels.dtype.kind != "i" or not isinstance(clusters, int):
        raise ValueError(
            f"labels: want whole numbers [{boxes}] and parameters.clusters, got {labels.dtype} {list(labels.shape)} "
            f"and {clusters!r}"
        )
    if boxes and not 0 <= labels.min() <= labels.max() < clusters:
        raise ValueError(f"labels: want 0 .. {clusters - 1}, got {labels.min()} .. {labels.max()}")
