"""Claims about figures: lines lie where boxes are, files are pictures, empty input is ordinary."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from aligndet.plots import figures
from aligndet.structures import Detections
from tests.scenes import views_of


def test_lines_lie_on_the_borders_of_the_box() -> None:
    image = np.zeros((53, 71, 3), np.uint8)
    drawn = figures.draw_boxes(image, np.array([[10.2, 20.4, 40.4, 45.1]]), colours=[(7, 11, 13)], width=1)
    assert not image.any(), "the image itself stays as it was"
    rows, columns = drawn.any(axis=2).nonzero()
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (10, 20, 40, 45)
    assert drawn[20, 25].tolist() == [7, 11, 13]
    assert not drawn[30, 25].any()
    assert not figures.draw_boxes(image, np.zeros((0, 4))).any()
    with pytest.raises(ValueError, match="one for each of 1 boxes, got 2"):
        figures.draw_boxes(image, np.array([[1, 1, 5, 5]]), texts=["a", "b"])


def test_each_figure_is_written_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = np.full((40, 60, 3), 90, np.uint8)
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    one = Detections(torch.tensor([[5.0, 6.0, 30.0, 31.0]]), torch.tensor([0.7]), torch.tensor([1]))
    records = [{"step": step, "losses": {"box": 1 / step}} for step in range(1, 8)] + [{"note": "x"}]
    figures.proposals_figure(tmp_path / "p.png", [image, image], [np.zeros((0, 4)), np.array([[1, 2, 30, 20]])])
    figures.views_figure(tmp_path / "v.png", *views_of((3, 0)))
    figures.curves_figure(tmp_path / "c.png", {"with": records, "without": []}, ["box"])
    figures.detections_figure(tmp_path / "d.png", [(image, [one, nothing])], ["labels", "found"], ["cat", "dog"])
    for name in "pvcd":
        written = cv2.imread(str(tmp_path / f"{name}.png"))
        assert written is not None
        assert min(written.shape[:2]) > 200
        assert written.std() > 1
