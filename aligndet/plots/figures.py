"""Pictures of what happens: proposals, views, losses, detections."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from aligndet.structures import Batch, Detections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten colours that are told apart on photographs, RGB.
COLOURS = (
    (230, 57, 70), (29, 120, 200), (255, 183, 3), (42, 157, 80), (155, 93, 229),
    (251, 133, 0), (0, 187, 200), (241, 91, 181), (140, 200, 40), (120, 85, 60),
)  # fmt: skip
# Of the runs in a figure; the first is pale, what others are compared to.
LINES = ("#888888", "#d1495b", "#2a6f97", "#3a7d44", "#e9a23b", "#7b5aa6")


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    *,
    colours: Sequence[tuple[int, int, int]] = COLOURS,
    texts: Sequence[str] = (),
    width: int = 2,
) -> np.ndarray:
    """A copy of an image with boxes drawn on it.

    Args:
        image: uint8 [H, W, 3] RGB.
        boxes: float [m, 4] xyxy px.
        colours: one per box, repeated where there are fewer.
        texts: one per box, or none.
        width: of the lines, px.

    Raises:
        ValueError: neither no text nor one per box.
    """
    if len(texts) not in (0, len(boxes)):
        raise ValueError(f"texts: want none or one for each of {len(boxes)} boxes, got {len(texts)}")
    drawn = np.ascontiguousarray(image).copy()
    for index, box in enumerate(np.asarray(boxes).reshape(-1, 4)):
        colour = tuple(int(part) for part in colours[index % len(colours)])
        x0, y0, x1, y1 = (round(float(value)) for value in box)
        cv2.rectangle(drawn, (x0, y0), (x1 - 1, y1 - 1), colour, width)
        if texts:
            _label(drawn, texts[index], (x0, y0), colour)
    return drawn


def draw_masks(
    image: np.ndarray, masks: np.ndarray, *, colours: Sequence[tuple[int, int, int]] = COLOURS, share: float = 0.45
) -> np.ndarray:
    """A copy of an image with masks painted over it, the last one on top.

    Args:
        image: uint8 [H, W, 3] RGB.
        masks: bool [m, H, W].
        colours: one per mask, repeated where there are fewer.
        share: of the colour in the result, 0 .. 1.
    """
    drawn = image.astype(np.float32)
    for index, mask in enumerate(masks):
        drawn[mask] = (1 - share) * drawn[mask] + share * np.asarray(colours[index % len(colours)], np.float32)
    return drawn.round().astype(np.uint8)


def proposals_figure(path: str | Path, images: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> None:
    """A contact sheet of images with their proposals, as PNG."""
    columns = min(4, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure, axes = _grid(rows, columns)
    for axis, image, found in zip(axes, images, boxes, strict=False):
        larger, factor = _enlarged(image)
        axis.imshow(draw_boxes(larger, found * factor, width=1))
        axis.set_title(f"{len(found)} proposals", fontsize=9)
    _save(figure, path)


def views_figure(path: str | Path, view1: Batch, view2: Batch, count: int = 4) -> None:
    """The two views of the first images below each other; a box has one colour and number in both."""
    count = min(count, len(view1))
    figure, axes = _grid(2, max(1, count))
    for row, (title, view) in enumerate((("view 1, online", view1), ("view 2, momentum", view2))):
        for column in range(count):
            height, width = view.sizes[column].tolist()
            image = view.images[column, :, :height, :width].permute(1, 2, 0).numpy()
            chosen = view.targets.image == column
            ids = (view.targets.ids[chosen] & 0xFFFFFFFF).tolist()
            larger, factor = _enlarged(image)
            colours = [COLOURS[number % len(COLOURS)] for number in ids] or list(COLOURS)
            boxes = view.targets.boxes[chosen].numpy() * factor
            axis = axes[row * count + column]
            axis.imshow(draw_boxes(larger, boxes, colours=colours, texts=[str(number) for number in ids]))
            axis.set_title(f"{title}, {width} x {height} px", fontsize=9)
    _save(figure, path)


def curves_figure(
    path: str | Path,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    names: Sequence[str],
    exact: Sequence[str] = (),
) -> None:
    """Losses over steps, one panel per loss, one line per run: the logged values pale, their moving mean strong.

    Args:
        runs: title -> records of ``log.jsonl``.
        names: losses, keys of each record's "losses".
        exact: more keys, of what is drawn as it is and is no loss.
    """
    panels = [*names, *exact]
    figure = _figure(4.2 * len(panels), 3.4)
    for number, name in enumerate(panels):
        axis = figure.add_subplot(1, len(panels), number + 1)
        for colour, (title, records) in zip(itertools.cycle(LINES), runs.items(), strict=False):
            points = [(r["step"], r["losses"][name]) for r in records if name in r.get("losses", {})]
            if points:
                steps, values = np.array(points, dtype=float).T
                axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1, marker="." if name in exact else None)
                strong = values if name in exact else _smooth(values)
                axis.plot(steps, strong, color=colour, linewidth=2, label=title)
                axis.legend(frameon=False, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel(name if name in exact else f"{name} loss")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def detections_figure(
    path: str | Path,
    rows: Sequence[tuple[np.ndarray, Sequence[Detections]]],
    titles: Sequence[str],
    classes: Sequence[str],
) -> None:
    """Detections side by side: a row per image, a column per title; a class has one colour everywhere."""
    figure, axes = _grid(max(1, len(rows)), max(1, len(titles)))
    for number, (image, columns) in enumerate(rows):
        larger, factor = _enlarged(image)
        for column, (title, found) in enumerate(zip(titles, columns, strict=True)):
            labels = found.labels.tolist()
            colours = [COLOURS[label % len(COLOURS)] for label in labels] or list(COLOURS)
            pairs = zip(labels, found.scores.tolist(), strict=True)
            texts = [classes[label] + ("" if score == 1 else f" {score:.2f}") for label, score in pairs]
            axis = axes[number * len(titles) + column]
            axis.imshow(draw_boxes(larger, found.boxes.numpy() * factor, colours=colours, texts=texts))
            if number == 0:
                axis.set_title(title, fontsize=10)
    _save(figure, path)


def _label(image: np.ndarray, text: str, corner: tuple[int, int], colour: tuple[int, ...]) -> None:
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.4
    (width, height), base = cv2.getTextSize(text, font, size, 1)
    x, y = corner[0], max(corner[1], height + base)
    cv2.rectangle(image, (x, y - height - base), (x + width, y), colour, cv2.FILLED)
    cv2.putText(image, text, (x, y - base // 2), font, size, (255, 255, 255), 1, cv2.LINE_AA)


def _enlarged(image: np.ndarray, least: int = 320) -> tuple[np.ndarray, float]:
    """Small images enlarged, so that lines and words on them stay fine, and by how much."""
    factor = max(1.0, least / min(image.shape[:2]))
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), factor


def _smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def require() -> None:
    """Raise ValueError where matplotlib is missing; called before long work that ends in figures."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("figures need matplotlib: pip install 'aligndet[plots]'")


def _figure(width: float, height: float) -> Figure:
    require()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130)


def _grid(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = _figure(2.9 * columns, 2.9 * rows)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
    for axis in axes:
        axis.axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.1 / rows, wspace=0.04, hspace=0.12)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
