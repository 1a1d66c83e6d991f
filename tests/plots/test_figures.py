"""Claims about figures: lines lie where boxes are, files are pictures, empty input is ordinary."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from aligndet.cli import main
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


def run_of(folder: Path, losses: list[dict[str, float]], precisions: dict[int, float]) -> str:
    folder.mkdir()
    records = [{"step": step, "losses": values} for step, values in enumerate(losses, start=1)]
    records += [{"step": step, "metrics": {"AP": value}} for step, value in precisions.items()]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "log.jsonl").write_text(text + '{"step": 9, "los')  # torn by a kill
    return str(folder)


def test_the_command_draws_every_loss_and_the_precision_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[tuple[object, ...]] = []
    draw = figures.curves_figure

    def noted(*given: object) -> None:
        drawn.append(given)
        draw(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(figures, "curves_figure", noted)
    first = run_of(tmp_path / "one", [{"box": 2.0, "contrast": 7.0}, {"box": 1.0, "contrast": 6.0}], {})
    second = run_of(tmp_path / "two", [{"box": 3.0, "score": 0.5}], {1: 0.25})
    out = str(tmp_path / "c.png")
    assert main(["plot", first, second, "--out", out]) == 0
    _, runs, names, exact = drawn[0]
    assert list(runs) == ["one", "two"] and (names, exact) == (["box", "contrast", "score"], ("AP",))
    assert runs["two"][-1] == {"step": 1, "losses": {"AP": 25.0}}
    assert cv2.imread(out).shape[1] > 4 * cv2.imread(out).shape[0] * 0.9, "four panels side by side"
    assert "2 runs, box, contrast, score, AP" in capsys.readouterr().out
    assert main(["plot", first, "--out", out, "--losses", "contrast"]) == 0
    assert drawn[1][2:] == (["contrast"], ())
    (tmp_path / "one/metrics.json").write_text('{"AP": 0.5}')  # of the end of the run
    assert main(["plot", first, "--out", out]) == 0
    assert drawn[2][1]["one"][-1] == {"step": 2, "losses": {"AP": 50.0}}  # type: ignore[index]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["none"], "run none: no such file or folder"),
        (["{}/empty"], "no log.jsonl in it"),
        (["{}/quiet"], "want logged losses, got none"),
        (["{}/one", "--losses", "bax"], "--losses: want some of box, got bax"),
    ],
)
def test_the_command_names_what_is_missing(
    given: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "empty").mkdir()
    run_of(tmp_path / "quiet", [], {})
    run_of(tmp_path / "one", [{"box": 1.0}], {})
    for out, words in (("c.png", says), ("c.pdf", "c.pdf: want a name that ends in .png")):
        with pytest.raises(SystemExit) as stopped:
            main(["plot", *(text.format(tmp_path) for text in given), "--out", str(tmp_path / out)])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
