"""What the bytes of an image file say without decoding it: its size, and whether the file is whole."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import cv2
import numpy as np

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
TIFF = (b"II*\0", b"MM\0*")
_ALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that say the size
_PNG_END = b"IEND\xaeB`\x82"  # with its checksum
_ORIENTATION, _BITS, _KIND = 0x0112, 0x0102, 0x0153  # tags of TIFF, of which EXIF is a block
ANY_DEPTH = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH  # 8 bits are decoded as without the second flag
_FLOAT = 3  # a kind of samples


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) px of an image as ``read_image`` gives it, EXIF orientation applied; (0, 0) where it is none.

    JPEG and PNG by their headers; other formats are decoded.
    """
    try:
        data = file_bytes(path)
    except OSError:
        return 0, 0
    head = data[: 1 << 16].tobytes()
    size = None
    if head.startswith(JPEG):
        size = jpeg_size(data)
    elif head.startswith(PNG) and head[12:16] == b"IHDR" and b"eXIf" not in head:
        width, height = struct.unpack(">II", head[16:24])
        size = height, width
    return size or _decoded_size(data)


def jpeg_size(data: np.ndarray) -> tuple[int, int] | None:
    """(height, width) px that the bytes of a JPEG state, EXIF orientation applied; None for other files."""
    head = data[: 1 << 16].tobytes()
    if not head.startswith(JPEG):
        return None
    return _jpeg_size(head) or (_jpeg_size(data.tobytes()) if data.size > len(head) else None)


def file_bytes(path: str | Path) -> np.ndarray:
    """The bytes of a regular file: uint8 [n]; OSError for any other, of which a pipe would wait for ever."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise OSError(errno.EINVAL, "not a regular file")
    return np.fromfile(path, dtype=np.uint8)


def is_truncated(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker or a PNG its last chunk; decoders fill such files up with grey, silently."""
    if data.startswith(JPEG):
        return data.find(b"\xff\xd9", _scan_start(data)) < 0
    return data.startswith(PNG) and data.rfind(_PNG_END) < 0


def unfit_samples(data: bytes) -> str:
    """What the samples of a TIFF file are where they are no integers of at most 16 bits; empty for all other files."""
    if not data.startswith(TIFF):
        return ""
    bits = _tiff_value(data, _BITS) or 1
    if _tiff_value(data, _KIND) == _FLOAT:
        return f"floating point of {bits} bits"
    return f"integers of {bits} bits" if bits > 16 else ""


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of the segments of a JPEG up to its pixels, as far as ``data`` goes."""
    found, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF or marker in _ALONE:  # padding, or a marker alone
            place += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack(">H", data[place + 2 : place + 4])
        found.append((marker, place + 4, place + 2 + length))
        place += 2 + length
        if marker == 0xDA:
            break
    return found


def _scan_start(data: bytes) -> int:
    """Where the pixels of a JPEG begin: behind headers, whose thumbnails have end markers of their own."""
    segments = _segments(data)
    return segments[-1][2] if segments else 0


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    turned: bool | None = None  # by the first EXIF block, as OpenCV reads it
    for marker, start, end in _segments(data):
        if marker == 0xE1 and turned is None and data[start : start + 6] == b"Exif\0\0":
            turned = _orientation(data[start + 6 : end]) in (5, 6, 7, 8)
        if marker in _FRAMES and start + 5 <= len(data):
            height, width = struct.unpack(">HH", data[start + 1 : start + 5])
            if not height:
                return None  # said at the end of the pixels
            return (width, height) if turned else (height, width)
    return None


def _orientation(tiff: bytes) -> int:
    """The orientation that an EXIF block says, 1 .. 8; 1 where it says none."""
    value = _tiff_value(tiff, _ORIENTATION)
    return 1 if value is None else value


def _tiff_value(tiff: bytes, wanted: int) -> int | None:
    """The first of the 16 bit numbers under a tag of the first image; None where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return None
        (first,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, first)
        for entry in range(entries):
            place = first + 2 + 12 * entry
            tag, _, count = struct.unpack_from(order + "HHI", tiff, place)
            if tag == wanted:
                if count > 2:  # more than fit into the entry: it says where they are
                    (place,) = struct.unpack_from(order + "I", tiff, place + 8)
                    return int(struct.unpack_from(order + "H", tiff, place)[0])
                return int(struct.unpack_from(order + "H", tiff, place + 8)[0])
    except struct.error:
        pass
    return None


def _decoded_size(data: np.ndarray) -> tuple[int, int]:
    if not data.size or unfit_samples(data.tobytes()):
        return 0, 0
    try:
        image = cv2.imdecode(data, ANY_DEPTH)
    except cv2.error:
        image = None
    return (0, 0) if image is None else (image.shape[0], image.shape[1])
