"""Detections for images in one call."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from aligndet.cli import main
from aligndet.models import build_detector
from aligndet.predict import predict
from aligndet.weights import export_detector, load_detector
from tests.scenes import small_detector


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in ((61, 97), (113, 53))]


def test_boxes_are_inside_each_image_and_files_give_the_same(tmp_path: Path) -> None:
    detector = small_detector(score_threshold=0.0).train()
    results = predict(detector, images(), 0.0, short_side=96, long_side=128)
    assert len(results) == 2
    for image, result in zip(images(), results, strict=True):
        height, width = image.shape[1:]
        assert len(result) > 0
        assert result.boxes.min() >= 0
        assert (result.boxes.max(dim=0).values <= torch.tensor([width, height, width, height])).all()
        assert (result.scores.diff() <= 0).all()
    assert detector.training
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, images(), strict=True):
        cv2.imwrite(str(path), np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1]))
    again = predict(detector, [str(paths[0]), paths[1]], 0.0, short_side=96, long_side=128)
    for one, two in zip(results, again, strict=True):
        assert torch.equal(one.boxes, two.boxes)


def test_the_threshold_drops_what_is_below_it() -> None:
    detector = small_detector(score_threshold=0.0)
    (everything,) = predict(detector, images()[:1], 0.0, short_side=96, long_side=128)
    threshold = everything.scores.median().item()
    (some,) = predict(detector, images()[:1], threshold, short_side=96, long_side=128)
    assert 0 < len(some) < len(everything)
    assert torch.equal(some.boxes, everything.boxes[everything.scores >= threshold])
    assert predict(detector, [], 0.0) == []


def test_bad_arguments_are_named_and_leave_the_mode(tmp_path: Path) -> None:
    detector = small_detector().train()
    with pytest.raises(ValueError, match=r"drops scores below 0\.05"):
        predict(detector, images(), 0.01)
    for single in (images()[0], "a.png", tmp_path):
        with pytest.raises(ValueError, match="want a list"):
            predict(detector, single)
    with pytest.raises(ValueError, match=r"want uint8 \[3, H, W\]"):
        predict(detector, [images()[0].float()])
    for thing, kind in ((None, "NoneType"), (images()[0].numpy(), "ndarray"), (["a.png"], "list")):
        with pytest.raises(ValueError, match=rf"images: want paths or uint8 tensors .*, got {kind}"):
            predict(detector, [thing])  # type: ignore[list-item]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        predict(detector, [broken])
    assert detector.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"short_side": -5}, "short_side, long_side: want at least 1 px, got -5, 1333"),
        ({"score_threshold": float("nan")}, r"score_threshold: want a number in 0 \.\. 1, got nan"),
    ],
)
def test_impossible_numbers_are_named(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predict(small_detector(), [], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mask_rcnn", "detr"])
def test_the_command_writes_coco_results_and_drawings(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    build = {"name": name, "backbone": "resnet18", "num_classes": 2, "width": 0.25, "channels": 32, "frozen_stages": 1}
    torch.save(export_detector(build_detector(**build), ["cat", "dog"], build), tmp_path / "model.pt")
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for path, image in zip((tmp_path / "one.png", tmp_path / "in" / "deep" / "two.png"), images(), strict=True):
        cv2.imwrite(str(path), np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1]))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    sides = ["--short-side", "96", "--long-side", "128", "--score-threshold", "0.06"]
    given = [str(tmp_path / "one.png"), str(tmp_path / "in")]
    assert (
        main(["predict", *given, "--weights", str(tmp_path / "model.pt"), "--out", str(tmp_path / "out"), *sides]) == 0
    )
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["one.png", "deep/two.png"]
    assert content["images"][0]["height"] == 61 and content["images"][0]["width"] == 97
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert len(content["annotations"]) > 0
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for number, record in enumerate(content["annotations"], 1):
        assert record["id"] == number and record["category_id"] in (1, 2) and record["score"] >= 0.06
        assert ("segmentation" in record) == (name == "mask_rcnn")
        if name == "mask_rcnn":
            assert record["segmentation"]["size"] == sizes[record["image_id"]]
    drawn = cv2.imread(str(tmp_path / "out" / "drawn" / "deep" / "two.png.png"))
    assert drawn.shape == (113, 53, 3)
    assert (drawn != cv2.imread(str(tmp_path / "in" / "deep" / "two.png"))).any()
    assert "short side of 96 px" in capsys.readouterr().out
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(content | {"config": {"data": {"eval_short_side": 64, "long_side": 112}}}, tmp_path / "of_a_run.pt")
    out = ["--weights", str(tmp_path / "of_a_run.pt"), "--out", str(tmp_path / "again"), "--score-threshold", "0.001"]
    assert main(["predict", str(tmp_path / "one.png"), *out]) == 0, "lower than the detector's own threshold"
    assert "short side of 64 px, the long one at most 112" in capsys.readouterr().out
    image = images()[:1]
    detector, _ = load_detector(tmp_path / "of_a_run.pt")
    for by_itself, told in (({}, {"short_side": 64, "long_side": 112}), ({"short_side": 48}, {"long_side": 112})):
        (one,), (other,) = predict(detector, image, **by_itself), predict(detector, image, **by_itself | told)
        assert torch.equal(one.boxes, other.boxes) and len(one.boxes) > 0, "the sizes of its run, where none are given"
    plain, _ = load_detector(tmp_path / "model.pt")
    assert (plain.short_side, plain.long_side) == (800, 1333)
    with pytest.raises(SystemExit) as stopped:
        broken = str(tmp_path / "in" / "broken.jpg")
        main(["predict", broken, "--weights", str(tmp_path / "model.pt"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2


def model_file(folder: Path) -> Path:
    """Weights of a small detector of one class."""
    build = {"name": "fcos", "backbone": "resnet18", "num_classes": 1, "width": 0.25, "channels": 32, "levels": 3}
    torch.save(export_detector(build_detector(**build), ["cat"], build), folder / "model.pt")
    return folder / "model.pt"


def predicted(folder: Path, *given: Path) -> list[str]:
    """The names in ``detections.json``; each image has a drawing of its size, and no other is there."""
    arguments = ["--weights", str(model_file(folder)), "--out", str(folder / "out"), "--short-side", "64"]
    assert main(["predict", *map(str, given), *arguments]) == 0
    images = json.loads((folder / "out/detections.json").read_text())["images"]
    drawn = {path.relative_to(folder / "out/drawn").as_posix() for path in (folder / "out/drawn").rglob("*.png")}
    assert drawn == {f"{image['file_name']}.png" for image in images}
    for image in images:
        pixels = cv2.imread(str(folder / "out/drawn" / f"{image['file_name']}.png"))
        assert pixels.shape[:2] == (image["height"], image["width"])
    return [image["file_name"] for image in images]


def test_what_is_done_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at the third of four images; a drawing that cannot be written and a torn last line lose nothing."""
    (tmp_path / "in").mkdir()
    for number in range(4):
        cv2.imwrite(str(tmp_path / f"in/{number}.png"), np.full((61 + number, 97, 3), 50 * number, np.uint8))
    (tmp_path / "out/drawn/1.png.png").mkdir(parents=True)
    weights = str(model_file(tmp_path))
    calls: list[int] = []

    def counted(*given: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*given, **options)  # type: ignore[arg-type]

    def run(out: str) -> object:
        command = ["predict", str(tmp_path / "in"), "--weights", weights, "--out", str(tmp_path / out)]
        main([*command, "--short-side", "64", "--score-threshold", "0"])
        return json.loads((tmp_path / out / "detections.json").read_text())

    whole = run("whole")
    monkeypatch.setattr("aligndet.engine.predictions.predict", counted)
    with pytest.raises(SystemExit) as stopped:
        run("out")
    assert stopped.value.code == 130 and "not drawn" in capsys.readouterr().err
    partial = tmp_path / "out/detections.json.partial"
    with open(partial, "a") as file:
        file.write('["2.png", {"size": [6')
    assert run("out") == whole and len(calls) == 5, "two before, two after"
    assert not partial.exists()
    lines = (tmp_path / "out/detections.json.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["stop", "end"]
    partial.write_text('{"other": "settings"}\n["0.png", null]\n')
    assert run("out") == whole and len(calls) == 9


def test_two_images_of_one_name_keep_apart(tmp_path: Path) -> None:
    """A/a.jpg is 61 px high, B/a.jpg 113: one drawing would have replaced the other."""
    for name, image in zip(("A/a.jpg", "B/a.jpg", "B/deep/b.jpg"), [*images(), images()[0]], strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    assert predicted(tmp_path, tmp_path / "A", tmp_path / "B") == ["A/a.jpg", "B/a.jpg", "deep/b.jpg"]
    shutil.rmtree(tmp_path / "out")
    files = [tmp_path / "B/a.jpg", tmp_path / "A/a.jpg", tmp_path / "B/deep/b.jpg"]
    assert predicted(tmp_path, *files) == ["B/a.jpg", "A/a.jpg", "b.jpg"]
    shutil.rmtree(tmp_path / "out")
    again = [tmp_path / "A", tmp_path / "A/a.jpg", tmp_path / "B/../A"]
    assert predicted(tmp_path, *again) == ["a.jpg"], "the same image is no second one"


def test_names_that_cannot_be_told_apart_and_missing_files_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x/A/a.jpg", "y/A/a.jpg", "z/a.jpg", "w/A/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((9, 9, 3), np.uint8))
    for given, says in [
        (("x/A", "y/A"), f"images {tmp_path}/y/A/a.jpg: the results would call it A/a.jpg like {tmp_path}/x/A/a.jpg"),
        (("x/A", "z", "w"), f"images {tmp_path}/w/A/a.jpg: the results would call it A/a.jpg like {tmp_path}/x/A"),
        (("missing.jpg",), f"images {tmp_path}/missing.jpg: no such file or folder"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["predict", *(str(tmp_path / name) for name in given), "--weights", "none", "--out", str(tmp_path)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and says in error
