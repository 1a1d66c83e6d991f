"""Looks of the generated scenes: textures, backgrounds, shaded paint, and what a camera does to a picture.

Pictures in the making are float32 [H, W, 3] RGB in 0 .. 255; fields are float32 [H, W] in 0 .. 1. Every function
draws from the generator it is given and from nothing else, so a seed fixes the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Size = tuple[int, int]
PATTERNS = ("plain", "fractal", "stripes", "checks", "dots", "grain", "marble")
GROUNDS = ("plain", "fractal", "fractal", "stripes", "grain", "marble", "checks")


@dataclass(frozen=True)
class Stamp:
    """The shape of one thing on its own small raster, and where it lies.

    Attributes:
        alpha: uint8 [h, w] coverage, 255 = inside; the thing owns the pixels >= 128.
        top, left: px of the raster's corner in the picture; parts may lie outside.
    """

    alpha: NDArray[np.uint8]
    top: int = 0
    left: int = 0

    def windows(self, size: Size) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The part inside a picture of ``size``: slices into the picture, and into the raster."""
        height, width = self.alpha.shape
        y0, x0 = max(self.top, 0), max(self.left, 0)
        y1, x1 = max(min(self.top + height, size[0]), y0), max(min(self.left + width, size[1]), x0)
        inner = slice(y0 - self.top, y1 - self.top), slice(x0 - self.left, x1 - self.left)
        return (slice(y0, y1), slice(x0, x1)), inner


def noise(rng: np.random.Generator, size: Size, cells: float, octaves: int = 4) -> Field:
    """Fractal noise [H, W], mostly within 0 .. 1: ``cells`` bumps along the longer side in the coarsest octave."""
    total = np.zeros(size, np.float32)
    weight, sum_of_squares = 1.0, 0.0
    longest = max(size)
    for _ in range(octaves):
        grid = tuple(max(2, round(cells * side / longest)) + 1 for side in size)
        # Octaves finer than a pixel would only add white noise; the camera does that.
        if max(grid) > longest:
            break
        values = rng.random(grid, dtype=np.float32) - 0.5
        total += weight * cv2.resize(values, size[::-1], interpolation=cv2.INTER_CUBIC)
        sum_of_squares += weight**2
        cells, weight = cells * 2.1, weight * 0.55
    return np.clip(0.5 + total / max(sum_of_squares, 1e-6) ** 0.5, 0, 1)


def colour(rng: np.random.Generator, hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    """One RGB colour [3] in 0 .. 255 near the given hue, saturation and value, each in 0 .. 1 (hue wraps around)."""
    jitter = rng.normal(0, 1, 3)
    hsv = [
        (hue + 0.03 * jitter[0]) % 1 * 360,
        np.clip(saturation + 0.1 * jitter[1], 0, 1),
        np.clip(value + 0.1 * jitter[2], 0.08, 1),
    ]
    return cv2.cvtColor(np.array([[hsv]], np.float32), cv2.COLOR_HSV2RGB)[0, 0] * 255


def pattern(rng: np.random.Generator, size: Size, kind: str, period: float) -> Field:
    """A field [H, W] of one of PATTERNS at a random angle; ``period`` is the distance of its repeats, px."""
    longest = max(size)
    if kind == "plain":
        return 0.3 * noise(rng, size, 2, 2)
    if kind == "fractal":
        return noise(rng, size, max(2.0, longest / period), 4)
    angle = rng.uniform(0, math.pi)
    rows, columns = np.ogrid[: size[0], : size[1]]
    warp = period * rng.uniform(0, 0.5) if kind != "marble" else 2.5 * period
    bend = (noise(rng, size, 3, 2) - 0.5) * np.float32(warp)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    rate = np.float32(2 * math.pi / period)
    start = rng.uniform(0, period, 2).astype(np.float32)
    along = np.sin((columns * cos + rows * sin + bend + start[0]) * rate).astype(np.float32)
    if kind == "stripes":
        return 0.5 + 0.5 * np.tanh(along * np.float32(rng.uniform(1, 5)))
    if kind == "marble":
        return np.abs(along)
    if kind == "grain":
        # Wood: narrow bands of uneven strength.
        return np.clip((0.5 + 0.5 * along) * (0.3 + noise(rng, size, max(2.0, longest / period), 3)), 0, 1)
    across = np.sin((rows * cos - columns * sin + bend + start[1]) * rate).astype(np.float32)
    if kind == "checks":
        return 0.5 + 0.5 * np.tanh(4 * along * across)
    assert kind == "dots", kind
    return 0.5 + 0.5 * np.tanh(6 * (along * across - 0.3))


def surface(rng: np.random.Generator, size: Size, kind: str, period: float, colours: tuple[Field, Field]) -> Field:
    """A texture [H, W, 3] that runs from one colour to the other where the pattern does, with some fine mottling."""
    first, second = colours
    field = pattern(rng, size, kind, period)[..., None]
    mottled = 0.86 + 0.28 * noise(rng, size, max(size) / 7, 2)[..., None]
    return (first + (second - first) * field) * mottled


def random_surface(rng: np.random.Generator, size: Size, scale: float) -> Field:
    """A texture as found in rooms and gardens: any pattern, muted colours, repeats of about ``scale`` px."""
    hue, saturation, value = rng.random(), rng.beta(1.5, 2.5), rng.uniform(0.2, 0.85)
    first = colour(rng, hue, saturation, value)
    second = colour(rng, hue + rng.normal(0, 0.08), saturation, value + rng.choice((-1, 1)) * rng.uniform(0.1, 0.35))
    return surface(rng, size, str(rng.choice(GROUNDS)), scale * rng.uniform(0.4, 2), (first, second))


def background(rng: np.random.Generator, size: Size) -> Field:
    """A cluttered picture [H, W, 3] without objects: two to four textured regions, then irregular bits and strokes."""
    side = min(size)
    picture = random_surface(rng, size, side / 6)
    for _ in range(rng.integers(1, 4)):
        other = random_surface(rng, size, side / 6)
        sharpness = np.float32(rng.uniform(8, 60))
        region = 1 / (1 + np.exp(-sharpness * _division(rng, size)))
        picture += (other - picture) * region[..., None]
    drawn = np.clip(picture, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(6, 22)):
        paint = [float(c) for c in colour(rng, rng.random(), rng.beta(2, 2), rng.uniform(0.15, 0.9))]
        if rng.random() < 0.6:
            _bit(rng, drawn, paint)
        else:
            _stroke(rng, drawn, paint)
    return drawn.astype(np.float32) * (0.8 + 0.4 * noise(rng, size, 12, 4)[..., None])


def blob(rng: np.random.Generator, extent: float) -> NDArray[np.float64]:
    """The outline [n, 2] of an irregular lump, about ``extent`` px long: lobed and stretched, so never quite a disc."""
    angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    radius = np.ones_like(angles)
    for order in (2, 3, 4, 5):
        radius += rng.normal(0, 0.42 / order**0.5) * np.cos(order * angles + rng.uniform(0, 2 * math.pi))
    points = np.maximum(radius, 0.15)[:, None] * np.stack([np.cos(angles), rng.uniform(0.4, 0.8) * np.sin(angles)], 1)
    turn = rng.uniform(0, 2 * math.pi)
    points = points @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    return points * extent / np.ptp(points, axis=0).max()


def _division(rng: np.random.Generator, size: Size) -> Field:
    """A signed field [H, W]: positive on one side of a wavy border, a line (a wall, a horizon) or an island."""
    field = noise(rng, size, rng.uniform(2, 4), 3) - 0.5
    if rng.random() < 0.4:
        return field - np.float32(rng.uniform(-0.1, 0.25))
    rows, columns = np.ogrid[: size[0], : size[1]]
    angle = rng.choice((0.0, math.pi / 2)) + rng.normal(0, 0.25)
    line = (columns / size[1] - 0.5) * math.sin(angle) + (rows / size[0] - 0.5) * math.cos(angle)
    return (line + rng.uniform(-0.3, 0.3) + rng.uniform(0, 0.4) * field).astype(np.float32)


def _bit(rng: np.random.Generator, drawn: NDArray[np.uint8], paint: list[float]) -> None:
    size = drawn.shape[:2]
    extent = min(size) * math.exp(rng.uniform(math.log(0.02), math.log(0.2)))
    points = blob(rng, extent) + rng.uniform(0, 1, 2) * size[::-1]
    cv2.fillPoly(drawn, [_fixed_point(points)], paint, cv2.LINE_AA, 4)


def _stroke(rng: np.random.Generator, drawn: NDArray[np.uint8], paint: list[float]) -> None:
    size = drawn.shape[:2]
    steps = np.linspace(0, 1, 24)[:, None]
    a, b, c = rng.uniform(-0.1, 1.1, (3, 2)) * size[::-1]
    middle = a + (b - a) * rng.uniform(0.3, 0.7) + (c - a) * 0.3
    end = a + (b - a) * rng.uniform(0.2, 1)
    points = (1 - steps) ** 2 * a + 2 * steps * (1 - steps) * middle + steps**2 * end
    thickness = max(1, round(min(size) * math.exp(rng.uniform(math.log(0.004), math.log(0.03)))))
    cv2.polylines(drawn, [_fixed_point(points)], False, paint, thickness, cv2.LINE_AA, 4)


def _fixed_point(points: NDArray[np.float64]) -> NDArray[np.int32]:
    """Points in 1/16 px, for drawing functions with ``shift=4``."""
    return np.round(points * 16).astype(np.int32)


def stamp(outlines: list[NDArray[np.float64]], rounding: float = 0.0) -> Stamp:
    """The raster of a shape given by closed outlines [n, 2] (x, y) px; an outline within another one is a hole.

    Args:
        outlines: any position; the raster is cut to fit around them.
        rounding: px by which corners are rounded off.
    """
    points = np.concatenate(outlines)
    low, high = np.floor(points.min(0)) - 2, np.ceil(points.max(0)) + 3
    width, height = (high - low).astype(int)
    alpha = np.zeros((height, width), np.uint8)
    cv2.fillPoly(alpha, [_fixed_point(outline - low) for outline in outlines], 255, cv2.LINE_AA, 4)
    if rounding > 0.5:
        blurred = cv2.GaussianBlur(alpha, (0, 0), rounding).astype(np.float32)
        # Steep enough that the edge is again about one pixel wide.
        alpha = np.clip((blurred - 127.5) * (2.5 * rounding) + 127.5, 0, 255).astype(np.uint8)
    return Stamp(alpha)


def paint_stamp(rng: np.random.Generator, picture: Field, shape: Stamp, texture: Field, light: float) -> None:
    """Paint a textured, rounded-looking thing with a soft shadow into ``picture``, in place.

    Args:
        picture: float32 [H, W, 3], 0 .. 255.
        shape: what to paint and where.
        texture: float32 [h, w, 3] of the stamp's raster.
        light: angle in radians from where the light comes; shared by all things of a picture.
    """
    extent = max(shape.alpha.shape)
    ray = np.array([math.cos(light), math.sin(light)])
    _shadow(picture, shape, ray * extent * rng.uniform(0.02, 0.08), extent * 0.04, rng.uniform(0.1, 0.5))
    alpha = shape.alpha.astype(np.float32) / 255
    height = cv2.GaussianBlur(alpha, (0, 0), max(0.8, extent * rng.uniform(0.04, 0.14)))
    slope = ray[0] * cv2.Sobel(height, cv2.CV_32F, 1, 0) + ray[1] * cv2.Sobel(height, cv2.CV_32F, 0, 1)
    slope *= np.float32(-rng.uniform(0.1, 0.45) / max(float(np.abs(slope).max()), 1e-6))
    rows, columns = np.ogrid[-0.5 : 0.5 : shape.alpha.shape[0] * 1j, -0.5 : 0.5 : shape.alpha.shape[1] * 1j]
    tilt = np.float32(-rng.uniform(0, 0.5)) * (columns * ray[0] + rows * ray[1]).astype(np.float32)
    shaded = texture * np.clip(1 - slope + tilt, 0.25, 1.9)[..., None]
    outer, inner = shape.windows((picture.shape[0], picture.shape[1]))
    picture[outer] += (shaded[inner] - picture[outer]) * alpha[inner][..., None]


def _shadow(picture: Field, shape: Stamp, offset: NDArray[np.float64], blur: float, strength: float) -> None:
    """Darken what lies behind a thing, ``offset`` (x, y) px away from it."""
    margin = int(3 * blur) + 2
    padded = cv2.copyMakeBorder(shape.alpha, margin, margin, margin, margin, cv2.BORDER_CONSTANT)
    soft = cv2.GaussianBlur(padded, (0, 0), max(0.5, blur))
    cast = Stamp(soft, shape.top - margin + round(offset[1]), shape.left - margin + round(offset[0]))
    outer, inner = cast.windows((picture.shape[0], picture.shape[1]))
    picture[outer] *= 1 - np.float32(strength / 255) * soft[inner][..., None]


def photograph(rng: np.random.Generator, picture: Field) -> NDArray[np.uint8]:
    """What a camera makes of the picture: uint8 [H, W, 3] with uneven light, a tint, slight blur and sensor noise."""
    size = picture.shape[0], picture.shape[1]
    coarse = rng.uniform(0.72, 1.2, (3, 3)).astype(np.float32)
    light = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)[..., None]
    tint = rng.normal(1, 0.05, 3).astype(np.float32)
    contrast, level = np.float32(rng.uniform(0.75, 1.1)), np.float32(rng.uniform(-12, 25))
    exposed = picture * light * (tint * contrast) + level
    sharp = cv2.GaussianBlur(exposed, (0, 0), rng.uniform(0.35, 0.85))
    grain = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(2, 7))
    return np.clip(sharp + grain + 0.5, 0, 255).astype(np.uint8)
