"""A COCO file read piece by piece gives what it gives parsed whole, errors included."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aligndet.data import coco, coco_stream
from aligndet.data.annotations import Annotations
from aligndet.data.coco import load_coco

IMAGES = [
    {"id": 5, "file_name": "a ü\\n.jpg", "height": 60, "width": 90, "note": [[], {}]},
    {"id": 2, "file_name": "b"},
]
CATEGORIES = [{"id": 3, "name": 'the "categories" of {'}, {"id": 1, "name": "ö"}]
BOXES = [
    {"id": n, "image_id": 5 - 3 * (n % 2), "category_id": 1 + 2 * (n % 2), "bbox": [n, 1.5, 2e1, 1], "iscrowd": n == 3}
    for n in range(9)
]
KEYS: dict[str, Any] = {"info": {"annotations": []}, "images": IMAGES, "annotations": BOXES, "categories": CATEGORIES}


def as_text(*names: str, **changes: Any) -> str:
    return json.dumps({name: (KEYS | changes)[name] for name in names}, ensure_ascii=False, indent=len(names) % 3)


USUAL = as_text("info", "images", "annotations", "categories")
TEXTS = {
    "usual": USUAL,
    "categories first": as_text("categories", "info", "images", "annotations"),
    "annotations first": as_text("annotations", "images", "categories"),
    "info last": as_text("images", "annotations", "categories", "info"),
    "info last, which has categories": as_text("images", "annotations", "categories", "info", info={"categories": [1]}),
    "ids as texts": USUAL.replace('"id": 5', '"id": "5"').replace('"image_id": 5', '"image_id": "5"'),
    "names as ids": USUAL.replace('id": 5', 'id": "x"').replace('id": 2', 'id": "a"'),
    "names as some ids": USUAL.replace('id": 5', 'id": "x"'),
    "nothing in it": as_text("images", "annotations", "categories", annotations=[]),
    "blanks": " \n" + USUAL.replace(":", " :\r\n\t") + "\n ",
    "twice": USUAL[:-1] + ', "images": []}',
    "categories twice": USUAL[:-1] + ', "categories": [{"id": 9, "name": "x"}]}',
    "no annotations": as_text("images", "categories", "info"),
    "no categories": as_text("images", "annotations", "info"),
    "no images": as_text("annotations", "categories", "info"),
    "a number for a list": as_text("images", "annotations", "categories", annotations=12),
    "annotations that are none": as_text("images", "annotations", "categories", annotations=[1, None, "a", [2]]),
    "a nan": USUAL.replace("20.0", "NaN"),
    "a long number": USUAL.replace("20.0", "9" * 5000, 1),
    "deep": as_text("images", "annotations", "categories").replace("1.5", "[" * 5000 + "]" * 5000, 1),
    "cut": USUAL[: len(USUAL) // 2],
    "cut at the end": USUAL[:-1],
    "more behind": USUAL + "x",
    "a comma too many": USUAL.replace("}]", "},]"),
    "a list": "[1]",
    "a number": "12",
    "empty": "",
}


def outcome(path: Path) -> Any:
    try:
        return load_coco(path)
    except ValueError as error:
        return str(error)


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other), (one, other)
    if not isinstance(one, Annotations):
        assert one == other
        return
    for name in ("image_ids", "sizes", "offsets", "boxes", "labels", "crowd", "category_ids"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), name
    assert list(one.file_names) == list(other.file_names)
    assert (one.class_names, one.report) == (other.class_names, other.report)


@pytest.mark.parametrize("name", list(TEXTS))
def test_it_reads_what_parsing_the_whole_file_reads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(TEXTS[name].encode())
    with monkeypatch.context() as patch:
        patch.setattr(coco, "stream_coco", refuse)
        whole = outcome(path)
    for chunk in (7, 64, 1 << 20) if len(TEXTS[name]) < 3000 else (500, 1 << 20):
        with monkeypatch.context() as patch:
            patch.setattr(coco_stream, "CHUNK", chunk)
            assert_same(outcome(path), whole)


def refuse(path: Path) -> None:
    raise coco_stream.UnusualError


def test_the_usual_file_is_not_parsed_whole_and_mutated_ones_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    for name in ("usual", "categories first", "info last", "blanks"):
        path.write_bytes(TEXTS[name].encode())
        with monkeypatch.context() as patch:
            patch.setattr(coco, "read_coco", refuse)
            assert len(load_coco(path).boxes) == 9, name
    draw = random.Random(3)
    monkeypatch.setattr(coco_stream, "CHUNK", 50)
    for _ in range(200):
        place = draw.randrange(len(USUAL))
        changed = USUAL[:place] + draw.choice('{}[],:"0 -e\\') + USUAL[place + draw.randrange(2) :]
        path.write_bytes(changed.encode())
        with monkeypatch.context() as patch:
            patch.setattr(coco, "stream_coco", refuse)
            whole = outcome(path)
        assert_same(outcome(path), whole)
    path.write_bytes("{'images': 'ü'}".encode("latin-1"))
    assert "not JSON" in outcome(path)
