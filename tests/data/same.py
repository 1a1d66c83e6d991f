"""One small data set written in every format, by hand and without the package."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("cat", "dog", "owl")
HEIGHT, WIDTH = 64, 128  # px, powers of two: shares of them are exact
# By image: (class, x0, y0, x1, y1) px, half-open.
BOXES: dict[str, list[tuple[str, int, int, int, int]]] = {
    "a b.png": [("dog", 10, 20, 42, 36), ("cat", 0, 0, 128, 64)],
    "c.png": [],
    "ü.png": [("owl", 1, 2, 3, 5), ("dog", 100, 40, 128, 64), ("dog", 5, 5, 25, 25)],
}


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(BOXES):
        image = np.full((HEIGHT, WIDTH, 3), 40 * number, np.uint8)
        (folder / name).write_bytes(cv2.imencode(".png", image)[1].tobytes())


def write_coco(folder: Path) -> Path:
    write_images(folder / "train")
    images = [
        {"id": 7 * n, "file_name": name, "height": HEIGHT, "width": WIDTH} for n, name in enumerate(BOXES, start=1)
    ]
    ids = {"owl": 90, "dog": 18, "cat": 3}
    annotations = [
        {"image_id": 7 * n, "category_id": ids[label], "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for n, boxes in enumerate(BOXES.values(), start=1)
        for label, x0, y0, x1, y1 in boxes
    ]
    (folder / "annotations").mkdir()
    path = folder / "annotations" / "instances_train.json"
    categories = [{"id": number, "name": label} for label, number in ids.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def xml(name: str, objects: str, size: tuple[int, int] = (HEIGHT, WIDTH)) -> str:
    shape = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    return f"<annotation><folder>x</folder><filename>{name}</filename>{shape}{objects}</annotation>"


def xml_object(label: str, x0: float, y0: float, x1: float, y1: float, difficult: int = 0) -> str:
    """Corners as they stand in the file: inclusive, from 1."""
    sides = f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox>{part}</object>"


def write_voc(folder: Path) -> Path:
    write_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name, boxes in BOXES.items():
        objects = "".join(xml_object(label, x0 + 1, y0 + 1, x1, y1) for label, x0, y0, x1, y1 in boxes)
        path = folder / "Annotations" / f"{Path(name).stem}.xml"
        path.write_text(xml(name, objects), encoding="utf-8")
    path = folder / "ImageSets" / "Main" / "train.txt"
    path.write_text("".join(f"{Path(name).stem}\n" for name in BOXES), encoding="utf-8")
    return path


def write_yolo(folder: Path) -> Path:
    write_images(folder / "images" / "train")
    (folder / "labels" / "train").mkdir(parents=True)
    for name, boxes in BOXES.items():
        lines = [
            f"{CLASSES.index(label)} {(x0 + x1) / 2 / WIDTH} {(y0 + y1) / 2 / HEIGHT} "
            f"{(x1 - x0) / WIDTH} {(y1 - y0) / HEIGHT}"
            for label, x0, y0, x1, y1 in boxes
        ]
        if lines:  # an image without objects has no file
            (folder / "labels" / "train" / f"{Path(name).stem}.txt").write_text("\n".join(lines))
    path = folder / "data.yaml"
    path.write_text(
        json.dumps({"path": ".", "train": "images/train", "val": "images/train", "nc": 3, "names": list(CLASSES)})
    )
    return path


WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}
