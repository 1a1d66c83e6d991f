"""What a proposal file holds, at a glance: statistics as JSON, and a contact sheet of some of its images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from aligndet.data.folder import place_of
from aligndet.data.proposals import ProposalFile
from aligndet.data.transforms import read_image

TILE, COLUMNS, ROWS = 320, 6, 4  # px per side, tiles
GAP = 4  # px between tiles
PER_TILE = 40  # boxes drawn at most, of all sizes
RATIO_EDGES = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0]  # sqrt(box area) / sqrt(image area)
ASPECT_EDGES = [0.0, 1 / 3, 1 / 2, 2 / 3, 1.0, 1.5, 2.0, 3.0, float("inf")]  # width / height


def write_report(file: ProposalFile, root: str | Path) -> tuple[Path, Path]:
    """Write ``FILE.report.json`` and ``FILE.report.png`` beside a proposal file of the images below ``root``.

    Returns:
        The two paths.

    Raises:
        ValueError: they cannot be written, or an image of the sheet cannot be read any more.
    """
    json_path = file.path.with_name(file.path.name + ".report.json")
    png_path = file.path.with_name(file.path.name + ".report.png")
    sheet = contact_sheet(file, Path(root))
    try:
        json_path.write_text(json.dumps(statistics(file), indent=1) + "\n", encoding="utf-8")
        png_path.write_bytes(cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes())
    except OSError as error:
        raise ValueError(f"{json_path}: cannot write ({error.strerror})") from None
    return json_path, png_path


def statistics(file: ProposalFile) -> dict[str, Any]:
    """Counts per image, and how sizes and shapes of the boxes are distributed.

    ``size_ratio`` and ``aspect`` are histograms: ``counts[i]`` boxes from ``edges[i]`` to below ``edges[i + 1]``; the
    last edge of ``aspect`` is unbounded, and null in the JSON. ``sheet`` names the images of the contact sheet.
    """
    counts = np.diff(file.offsets)
    boxes = np.asarray(file.boxes, dtype=np.float64)
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).T
    image_areas = np.repeat(file.sizes.astype(np.float64).prod(axis=1), counts)
    return {
        "images": len(file),
        "boxes": len(boxes),
        "without_boxes": int((counts == 0).sum()),
        "failures": file.failures,
        "per_image": {"mean": round(float(counts.mean()), 2) if len(counts) else None} | _quantiles(counts),
        "side_px": _quantiles(np.sqrt(widths * heights)),
        "size_ratio": _histogram(np.sqrt(widths * heights / image_areas), RATIO_EDGES),
        "aspect": _histogram(widths / heights, ASPECT_EDGES),
        "sheet": [file.names[row] for row in sheet_rows(file)],
        "parameters": file.parameters,
        "versions": file.versions,
    }


def contact_sheet(file: ProposalFile, root: Path) -> np.ndarray:
    """Up to 24 images at even steps through the file with up to 40 of their boxes: uint8 [H, W, 3] RGB.

    From red for the smallest boxes over green to blue for the largest; the large ones are drawn first. The number on
    each image is that of all its boxes. A file without images gives one empty row.
    """
    tiles = [_tile(read_image(place_of(root, file.names[row])), file.boxes_of(row)) for row in sheet_rows(file)]
    lines = [tiles[first : first + COLUMNS] for first in range(0, len(tiles), COLUMNS)] or [[]]
    strips = []
    for line in lines:
        height = max((tile.shape[0] for tile in line), default=TILE) + GAP
        strip = np.full((height, COLUMNS * TILE, 3), 255, np.uint8)
        for place, tile in enumerate(line):
            left = place * TILE + (TILE - tile.shape[1]) // 2
            strip[: tile.shape[0], left : left + tile.shape[1]] = tile
        strips.append(strip)
    return np.concatenate(strips)


def sheet_rows(file: ProposalFile) -> list[int]:
    """The rows of a file that are on its contact sheet, line by line."""
    rows: list[int] = np.unique(np.linspace(0, len(file) - 1, min(COLUMNS * ROWS, len(file))).astype(int)).tolist()
    return rows


def _tile(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """An image shrunk into a tile, with its boxes and their number."""
    scale = (TILE - GAP) / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    tile = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    drawn = boxes[np.linspace(0, len(boxes) - 1, min(PER_TILE, len(boxes))).astype(int)]
    for x0, y0, x1, y1 in (drawn * scale).tolist():
        share = min(1.0, math.sqrt((x1 - x0) * (y1 - y0) / (size[0] * size[1])) / RATIO_EDGES[-2])
        hue = np.array([[[round(120 * share), 255, 255]]], np.uint8)  # of 180
        colour = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
        cv2.rectangle(tile, (round(x0), round(y0)), (round(x1) - 1, round(y1) - 1), colour, 1)
    (width, height), _ = cv2.getTextSize(str(len(boxes)), cv2.FONT_HERSHEY_SIMPLEX, 0.45, 1)
    cv2.rectangle(tile, (0, 0), (width + 5, height + 6), (0, 0, 0), -1)
    cv2.putText(tile, str(len(boxes)), (3, height + 3), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1)
    return tile


def _quantiles(values: np.ndarray) -> dict[str, float | None]:
    shares = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: round(float(np.quantile(values, q)), 2) if len(values) else None for name, q in shares.items()}


def _histogram(values: np.ndarray, edges: list[float]) -> dict[str, list[Any]]:
    place = np.searchsorted(edges[1:-1], values, side="right")
    counts = np.bincount(place, minlength=len(edges) - 1)
    return {"edges": [edge if np.isfinite(edge) else None for edge in edges], "counts": counts.tolist()}
