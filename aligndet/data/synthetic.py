"""Generated scenes: photograph-like pictures of several textured objects with exact masks and boxes, as COCO data.

For demonstrations and tests without any download: nothing here is as hard as real photographs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from aligndet.data.synthetic_textures import (
    PATTERNS,
    Field,
    Size,
    Stamp,
    background,
    blob,
    colour,
    paint_stamp,
    photograph,
    random_surface,
    stamp,
    surface,
)

Outline = NDArray[np.float64]

# Class -> typical hue and patterns. Some objects look typical and the others look like anything, so that colour and
# texture help to tell the classes apart, but only shape settles it.
LOOKS: dict[str, tuple[float, tuple[str, ...]]] = {
    "disc": (0.02, ("plain", "marble")),
    "box": (0.09, ("grain", "stripes")),
    "triangle": (0.30, ("fractal", "plain")),
    "star": (0.14, ("plain", "dots")),
    "ring": (0.58, ("stripes", "plain")),
    "cross": (0.80, ("checks", "fractal")),
}
CLASSES = tuple(LOOKS)
VISIBLE = 0.3  # least share of an object that others may leave visible
INSIDE = 0.6  # least share of an object within the picture
LEAST_PIXELS = 9  # of a visible object
TRIALS = 12  # places to try for each object
SMALLEST = 32  # px, shorter side of a picture


@dataclass(frozen=True)
class Difficulty:
    """What makes scenes hard.

    Attributes:
        extents: least and greatest longest side of an object, in shorter sides of the picture; log-uniform, so small
            ones prevail.
        typical: share of objects with the look of their class.
        lumps: least and greatest number of pieces of clutter painted like objects but of no class.
    """

    extents: tuple[float, float] = (0.08, 0.5)
    typical: float = 0.5
    lumps: tuple[int, int] = (1, 4)


@dataclass(frozen=True)
class Placed:
    """One object of a scene: class index, and shape with its place."""

    label: int
    shape: Stamp


def make_scenes(
    folder: str | Path,
    *,
    images: int,
    size: int | tuple[int, int],
    seed: int,
    name: str = "train",
    classes: Sequence[str] = CLASSES,
    objects: tuple[int, int] = (2, 8),
    difficulty: Difficulty = Difficulty(),
) -> Path:
    """Write generated scenes and their annotations in COCO format; what exists under the same names is replaced.

    Pictures go to ``folder/images/<name>_00000.jpg`` and so on, annotations to
    ``folder/annotations/instances_<name>.json``. Masks hold exactly the visible pixels of each object, so no two
    overlap; boxes lie tight around them. An object is at least 30 % visible and 60 % inside the picture, and nothing of
    an object class is visible without an annotation. Picture i depends on the seed, i and the settings, not on
    ``images``; the same call writes the same bytes.

    Args:
        folder: where to write; made if absent.
        images: how many, >= 1.
        size: (height, width) px of every picture, or one number for both; >= 32.
        seed: >= 0.
        name: split name in the file names; splits with different names can share a folder.
        classes: which of CLASSES to show; the category ids are 1, 2, ... in this order.
        objects: least and greatest number of objects per picture, uniform; where a picture is full it gets fewer.
            (0, 0) makes pictures of clutter without annotations.
        difficulty: sizes and looks of objects, and clutter.

    Returns:
        The annotation file.

    Raises:
        ValueError: an argument is out of its range, or a class is unknown.
    """
    height, width = _checked_size(size)
    _check(images, seed, name, classes, objects)
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(images):
        picture, masks, labels = scene(seed, index, (height, width), tuple(classes), objects, difficulty)
        file_name = f"{name}_{index:05d}.jpg"
        _write_jpeg(folder / "images" / file_name, picture)
        records.append({"id": index + 1, "file_name": file_name, "height": height, "width": width})
        for mask, label in zip(masks, labels, strict=True):
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **_annotation(mask, label + 1)})
    categories = [{"id": row + 1, "name": word, "supercategory": "shape"} for row, word in enumerate(classes)]
    tree = {"images": records, "annotations": annotations, "categories": categories}
    path = folder / "annotations" / f"instances_{name}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(tree))
    os.replace(temporary, path)
    return path


def scene(
    seed: int,
    index: int,
    size: Size,
    classes: tuple[str, ...],
    objects: tuple[int, int],
    difficulty: Difficulty = Difficulty(),
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[int]]:
    """Scene ``index`` of a seed.

    Returns:
        The picture, uint8 [H, W, 3] RGB; the visible pixels of its objects, bool [m, H, W]; m indices into ``classes``.
    """
    rng = np.random.default_rng([seed, index])
    picture = background(rng, size)
    light = rng.uniform(0, 2 * math.pi)
    for _ in range(rng.integers(difficulty.lumps[0], difficulty.lumps[1] + 1)):
        _paint_lump(rng, picture, light)
    placed, owner = _arrange(rng, size, classes, objects, difficulty.extents)
    for thing in placed:
        texture = _object_surface(rng, classes[thing.label], thing.shape.alpha.shape, difficulty.typical)
        paint_stamp(rng, picture, thing.shape, texture, light)
    masks = owner == np.arange(len(placed))[:, None, None]
    return photograph(rng, picture), masks, [thing.label for thing in placed]


def _arrange(
    rng: np.random.Generator,
    size: Size,
    classes: tuple[str, ...],
    objects: tuple[int, int],
    shares: tuple[float, float],
) -> tuple[list[Placed], NDArray[np.int64]]:
    """Objects in painting order, and int64 [H, W]: which of them each pixel shows, -1 for none.

    A place is taken only if all objects stay visible enough, so nothing needs to be removed afterwards.
    """
    count = int(rng.integers(objects[0], objects[1] + 1))
    low, high = (math.log(share * min(size)) for share in shares)
    extents = np.exp(rng.uniform(low, high, count))
    # Large things tend to lie behind small ones, as in photographs; the factor leaves exceptions.
    extents = extents[np.argsort(-extents * rng.uniform(0.5, 1, count))]
    owner = np.full(size, -1)
    placed: list[Placed] = []
    areas: list[int] = []  # of the whole objects, px
    for extent in extents:
        label = int(rng.integers(len(classes)))
        shape = _object_shape(rng, classes[label], float(extent))
        area = int((shape.alpha >= 128).sum())
        for _ in range(TRIALS):
            tried = _somewhere(rng, shape, size)
            outer, inner = tried.windows(size)
            covered = tried.alpha[inner] >= 128
            if covered.sum() < max(INSIDE * area, LEAST_PIXELS):
                continue
            candidate = owner.copy()
            candidate[outer][covered] = len(placed)
            left = np.bincount(candidate[candidate >= 0], minlength=len(placed))
            if (left[: len(placed)] >= np.maximum(VISIBLE * np.array(areas), LEAST_PIXELS)).all():
                owner = candidate
                placed.append(Placed(label, tried))
                areas.append(area)
                break
    return placed, owner


def _somewhere(rng: np.random.Generator, shape: Stamp, size: Size) -> Stamp:
    """The shape at a uniformly random place, up to a fifth of its raster outside the picture."""
    (height, width), (rows, columns) = shape.alpha.shape, size
    top = rng.integers(-height // 5, max(rows - height + height // 5, 0) + 1)
    left = rng.integers(-width // 5, max(columns - width + width // 5, 0) + 1)
    return replace(shape, top=int(top), left=int(left))


def _object_shape(rng: np.random.Generator, name: str, extent: float) -> Stamp:
    """An object of a class, turned, stretched and sheared; the longest side of its box is about ``extent`` px."""
    turn, squeeze = rng.uniform(0, 2 * math.pi), rng.uniform(0.62, 1)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    shear = np.array([[1, rng.normal(0, 0.12)], [0, squeeze]])
    outlines = [outline @ (shear @ rotation) for outline in _outlines(rng, name)]
    scale = extent / np.ptp(np.concatenate(outlines), axis=0).max()
    return stamp([outline * scale for outline in outlines], rounding=extent * rng.uniform(0, 0.035))


def _outlines(rng: np.random.Generator, name: str) -> list[Outline]:
    """The outlines [n, 2] of a class about the origin; sides and proportions vary."""
    circle = _polygon(48)
    if name == "disc":
        return [circle]
    if name == "ring":
        return [circle, circle[::-1] * rng.uniform(0.45, 0.68)]
    if name == "box":
        return [_polygon(4) * (1, rng.uniform(0.55, 1))]
    if name == "triangle":
        return [_polygon(3) * (rng.uniform(0.8, 1.2), 1)]
    if name == "star":
        points = int(rng.integers(5, 8))
        return [_polygon(2 * points) * np.where(np.arange(2 * points) % 2, rng.uniform(0.38, 0.52), 1)[:, None]]
    assert name == "cross", name
    arm = rng.uniform(0.24, 0.4)
    corners = [(arm, arm), (arm, 1), (-arm, 1), (-arm, arm)]
    quarter = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return [np.concatenate([np.array(corners)[:3] @ np.linalg.matrix_power(quarter, turn) for turn in range(4)])]


def _polygon(corners: int) -> Outline:
    """A regular polygon on the unit circle; with four corners its sides are level."""
    angles = np.arange(corners) * (2 * math.pi / corners) + (math.pi / 4 if corners == 4 else 0)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _object_surface(rng: np.random.Generator, name: str, size: Size, typical: float) -> Field:
    """The texture of an object of a class."""
    hue, kinds = LOOKS[name]
    if rng.random() >= typical:
        hue, kinds = rng.random(), PATTERNS
    saturation, value = rng.beta(3, 2), rng.uniform(0.3, 0.95)
    first = colour(rng, hue, saturation, value)
    second = colour(rng, hue + rng.normal(0, 0.1), saturation * rng.uniform(0.5, 1), value * rng.uniform(0.35, 1))
    period = max(3.0, max(size) * rng.uniform(0.12, 0.4))
    return surface(rng, size, str(rng.choice(kinds)), period, (first, second))


def _paint_lump(rng: np.random.Generator, picture: Field, light: float) -> None:
    """Clutter painted like an object but of no class, so that paint alone does not give objects away."""
    size = picture.shape[0], picture.shape[1]
    extent = min(size) * math.exp(rng.uniform(math.log(0.08), math.log(0.4)))
    shape = _somewhere(rng, stamp([blob(rng, extent)], rounding=extent * 0.02), size)
    texture = random_surface(rng, (shape.alpha.shape[0], shape.alpha.shape[1]), extent / 3)
    paint_stamp(rng, picture, shape, texture, light)


def _annotation(mask: NDArray[np.bool_], category: int) -> dict[str, Any]:
    """The COCO fields of a visible mask [H, W] with at least one pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": category,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "segmentation": {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()},
        "iscrowd": 0,
    }


def _write_jpeg(path: Path, picture: NDArray[np.uint8]) -> None:
    done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert done, path
    path.write_bytes(data.tobytes())


def _checked_size(size: int | tuple[int, int]) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < SMALLEST:
        raise ValueError(f"size: want at least {SMALLEST} px on both sides, got {height} x {width}")
    return int(height), int(width)


def _check(images: int, seed: int, name: str, classes: Sequence[str], objects: tuple[int, int]) -> None:
    if images < 1:
        raise ValueError(f"images: want at least 1, got {images}")
    if seed < 0:
        raise ValueError(f"seed: want at least 0, got {seed}")
    if not name or Path(name).name != name:
        raise ValueError(f"name: want a word for use in file names, got {name!r}")
    unknown = [word for word in classes if word not in LOOKS]
    if unknown or not classes or len(set(classes)) < len(classes):
        raise ValueError(f"classes: want some of {', '.join(CLASSES)}, each once; got {tuple(classes)}")
    if not 0 <= objects[0] <= objects[1]:
        raise ValueError(f"objects: want 0 <= least <= greatest, got {tuple(objects)}")
