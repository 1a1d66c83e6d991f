"""Proposals of other programs: boxes written by hand arrive, in order and with their labels, and go back exactly."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from aligndet import cli
from aligndet.data.proposals import ProposalFile, open_proposals, write_proposals
from aligndet.data.recall import evaluate_proposals
from aligndet.data.report import contact_sheet
from aligndet.data.views import ViewPairs, read_proposed

HEIGHT, WIDTH = 64, 96
# xywh as the files state them; areas 600, 1200, 50. The third reaches over the right border by 5 px.
XYWH = [[10, 20, 30, 20], [0, 0, 40, 30], [91, 50, 10, 10]]
XYXY = [[0, 0, 40, 30], [10, 20, 40, 40], [91, 50, 96, 60]]  # clipped, largest first


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / name), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    return folder


def coco(path: Path, categories: list[str], boxes: list[dict[str, Any]], sized: bool = True) -> Path:
    """Images 7 (with the boxes) and 3 (without); category ids 5, 6, ..."""
    size = {"width": WIDTH, "height": HEIGHT} if sized else {}
    tree = {
        "images": [{"id": 7, "file_name": "a.png"} | size, {"id": 3, "file_name": "b/c.png"} | size],
        "annotations": [{"id": n, "image_id": 7, "iscrowd": 0, "category_id": 5} | box for n, box in enumerate(boxes)],
        "categories": [{"id": 5 + n, "name": name} for n, name in enumerate(categories)],
    }
    path.write_text(json.dumps(tree))
    return path


def convert(source: Path, out: Path, *options: str) -> None:
    target = "reference" if out.suffix == ".json" else "npz"
    assert cli.main(["convert-proposals", *options, "--to", target, str(source), str(out)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert-proposals", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1, error
    return error


def imported(source: Path, *options: str) -> ProposalFile:
    out = source.with_name("imported.npz")
    convert(source, out, *options, "--overwrite")
    return open_proposals(out)


def same(one: ProposalFile, two: ProposalFile) -> None:
    assert one.names == two.names and one.clusters == two.clusters
    for name in ("sizes", "offsets", "boxes"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert (one.labels is None) == (two.labels is None)
    if one.labels is not None:
        assert np.array_equal(one.labels, two.labels)


@pytest.mark.parametrize("sized", [True, False])
def test_reference_layout_by_hand(tmp_path: Path, sized: bool) -> None:
    source = coco(tmp_path / "p.json", ["selective_search"], [{"bbox": box, "area": 9} for box in XYWH], sized)
    folder = images(tmp_path / "photos", "a.png", "b/c.png")
    file = imported(source, "--from", "reference", *([] if sized else ["--images", str(folder)]))
    assert file.names == ("a.png", "b/c.png") and file.labels is None
    assert file.sizes.tolist() == [[HEIGHT, WIDTH]] * 2
    assert file.boxes_of(0).tolist() == XYXY and len(file.boxes_of(1)) == 0
    assert file.parameters == {"mode": "reference", "source": "p.json"}


def test_pseudo_classes_follow_their_boxes_and_their_names(tmp_path: Path) -> None:
    # Ids 5, 6, 7 are cluster_3, cluster_1, cluster_2: the number in the name counts.
    boxes = [{"bbox": box, "category_id": 5 + n} for n, box in enumerate(XYWH)]
    file = imported(coco(tmp_path / "p.json", ["cluster_3", "cluster_1", "cluster_2"], boxes), "--from", "reference")
    assert file.clusters == 3
    assert file.labels_of(0).tolist() == [0, 2, 1]  # XYXY: second, first, third of XYWH
    convert(tmp_path / "imported.npz", tmp_path / "back.json", "--from", "npz")
    tree = json.loads((tmp_path / "back.json").read_text())
    assert tree["categories"] == [{"id": n, "name": f"cluster_{n}"} for n in (1, 2, 3)]
    assert sorted((record["id"], record["category_id"]) for record in tree["annotations"]) == [(1, 1), (2, 3), (3, 2)]
    same(file, imported(tmp_path / "back.json", "--from", "reference"))


def test_export_by_hand(tmp_path: Path) -> None:
    source = coco(tmp_path / "p.json", ["selective_search"], [{"bbox": box} for box in XYWH])
    convert(source, tmp_path / "out.json", "--from", "reference")
    boxes = [([0, 0, 40, 30], 1200), ([10, 20, 30, 20], 600), ([91, 50, 5, 10], 50)]
    tree = json.loads((tmp_path / "out.json").read_text())
    tree["annotations"].sort(key=lambda record: record["id"])
    assert tree == {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 3, "file_name": "b/c.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {"id": n, "image_id": 7, "category_id": 1, "bbox": box, "area": area, "iscrowd": 0}
            for n, (box, area) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "selective_search"}],
    }


def test_the_first_boxes_of_an_exported_image_are_not_its_largest(tmp_path: Path) -> None:
    """The authors' RetinaNet and DETR read the first 50 boxes of an image only, and our files are sorted by area."""
    boxes = [np.stack([[0, 0, 400 - 2 * n, 400 - 2 * n] for n in range(100)]).astype(np.float32)] * 2
    write_proposals(tmp_path / "p.npz", ["a.png", "b.png"], [(500, 500)] * 2, boxes, {})
    for name in ("one.json", "two.json"):
        convert(tmp_path / "p.npz", tmp_path / name, "--from", "npz")
    records = json.loads((tmp_path / "one.json").read_text())["annotations"]
    assert [record["image_id"] for record in records] == [1] * 100 + [2] * 100
    first, second = ([record["bbox"][2] for record in records[start : start + 50]] for start in (0, 100))
    assert first != second
    for sides in (first, second):
        assert abs(sum(side > 301 for side in sides) - 25) <= 8, "half of them are of the larger half"
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize("clusters", [None, 11])
def test_round_trip_through_the_reference_layout_is_exact(tmp_path: Path, clusters: int | None) -> None:
    rng = np.random.default_rng(3)
    boxes = []
    for count in (17, 0, 5):
        start = rng.uniform(0, 500, (count, 2))
        box = np.concatenate([start, start + rng.uniform(1.5, 400, (count, 2))], axis=1).astype(np.float32)
        areas = (box[:, 2:].astype(np.float64) - box[:, :2]).prod(axis=1)
        boxes.append(box[np.argsort(-areas)])
    labels = None if clusters is None else rng.integers(0, clusters, 22)
    parameters = {} if clusters is None else {"clusters": clusters}
    ours = tmp_path / "ours.npz"
    names, sizes = ["a.png", "ü b.png", "c/d.png"], [(907, 911), (64, 64), (919, 929)]
    write_proposals(ours, names, sizes, boxes, parameters, labels=labels, failures={"x.png": "broken"})
    convert(ours, tmp_path / "reference.json", "--from", "npz")
    same(open_proposals(ours), imported(tmp_path / "reference.json", "--from", "reference"))
    convert(tmp_path / "reference.json", tmp_path / "again.json", "--from", "reference")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "reference.json").read_bytes()
    convert(ours, tmp_path / "copy.npz", "--from", "npz")
    same(open_proposals(ours), open_proposals(tmp_path / "copy.npz"))
    assert open_proposals(tmp_path / "copy.npz").failures == {"x.png": "broken"}


def test_soco_finds_images_by_basename(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "photos", "a.png", "b/c.png", "b/twice.png", "d/twice.png")
    source = tmp_path / "soco.json"
    source.write_text(json.dumps({"c.png": XYWH, "a.png": [], "d/twice.png": [[1, 2, 3, 4]]}))
    file = imported(source, "--from", "soco", "--images", str(folder))
    assert file.names == ("b/c.png", "a.png", "d/twice.png")
    assert file.boxes_of(0).tolist() == XYXY and file.boxes_of(2).tolist() == [[1, 2, 4, 6]]
    options = ["--from", "soco", "--to", "npz", str(source), str(tmp_path / "o.npz")]
    assert "--images has to name" in refused(capsys, *options)
    for tree, words in (
        ({"twice.png": XYWH}, "'twice.png' could be b/twice.png or d/twice.png"),
        ({"e.png": XYWH}, "'e.png' is not there in"),
        ({"c.png": XYWH, "b/c.png": XYWH}, "b/c.png occurs twice"),
        ([1], "want SoCo's json"),
    ):
        source.write_text(json.dumps(tree))
        assert words in refused(capsys, *options, "--images", str(folder))


def test_plain_npz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = images(tmp_path / "photos", "a.png", "b/c.png")
    source = tmp_path / "plain.npz"
    arrays = {
        "names": np.array(["b/c.png", "a.png"]),
        "offsets": np.array([0, 1, 3]),
        "boxes": np.array([[10, 20, 40, 40], [1, 1, 3, 3], [2, 2, 9, 9]], np.float64),
    }
    np.savez_compressed(source, **arrays)
    file = imported(source, "--from", "npz", "--images", str(folder))
    assert file.boxes_of(0).tolist() == [[10, 20, 40, 40]]
    assert file.boxes_of(1).tolist() == [[2, 2, 9, 9], [1, 1, 3, 3]]
    options = ["--from", "npz", "--to", "npz", str(source), str(tmp_path / "o.npz")]
    assert "does not say how large 'b/c.png' is; --images" in refused(capsys, *options)
    np.savez(source, **arrays, sizes=np.array([[50, 60], [70, 80]]))
    assert imported(source, "--from", "npz").sizes.tolist() == [[50, 60], [70, 80]]
    for change, words in (
        ({"offsets": np.array([0, 1, 2])}, "ascending from 0 to 3"),
        ({"boxes": np.zeros((3, 5))}, "boxes: want [3, 4]"),
        ({"names": np.array(["a.png", "a.png"])}, "a.png occurs twice"),
        ({"names": np.array(["a.png", "../b.png"])}, "'../b.png' leaves the image folder"),
        ({"names": np.array(["a.png", None])}, "allow_pickle"),
    ):
        np.savez(source, **(arrays | change))
        assert words in refused(capsys, *options, "--images", str(folder))


def test_labels_as_proposals_leave_out_crowds_and_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"bbox": box, "category_id": 5 + n % 2} for n, box in enumerate(XYWH)]
    faults = [
        {"bbox": [1, 1, 50, 50], "iscrowd": 1},
        {"bbox": [float("nan"), 1, 5, 5]},
        {"bbox": [200, 1, 5, 5]},
        {"bbox": [5, 5, -3, 5]},
        {"bbox": [5, 5, 0, 5]},
        {"bbox": [5, 5, 5]},
        {"bbox": [5, 5, 5, 5], "image_id": 99},
    ]
    source = coco(tmp_path / "labels.json", ["cat", "dog"], [*good, *faults])
    file = imported(source, "--from", "coco")
    assert file.boxes_of(0).tolist() == XYXY and file.labels is None
    text = capsys.readouterr().out
    for words in (
        "3 boxes in 2 images",
        "1 boxes left out, crowd region",
        "1 boxes left out, bbox is not finite",
        "1 boxes left out, box outside the image",
        "2 boxes left out, a side is below 1 px",
        "1 boxes left out, bbox is not four numbers",
        "1 boxes left out, image unknown",
    ):
        assert words in text, words
    out = str(tmp_path / "o.npz")
    assert "category selective_search alone" in refused(capsys, "--from", "reference", "--to", "npz", str(source), out)
    coco(source, ["cat"], faults)
    assert "no box is left" in refused(capsys, "--from", "coco", "--to", "npz", str(source), out)


def results(path: Path) -> Path:
    rows = [(0.2, [0, 0, 50, 50]), (0.9, [1, 1, 5, 5]), (0.5, [2, 2, 20, 20]), (0.5, [3, 3, 30, 30])]
    records = [{"image_id": 7, "bbox": box, "score": score, "category_id": 1} for score, box in rows]
    records.append({"image_id": 7, "bbox": [0, 0, float("nan"), 9], "score": 1.0, "category_id": 1})
    records.append({"image_id": 3, "bbox": [4, 4, 8, 8], "score": 0.4, "category_id": 1})
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ([], [50, 30, 20, 5], [8]),
        (["--limit", "1"], [5], [8]),
        (["--limit", "2"], [20, 5], [8]),  # of two that score 0.5 the earlier; the one that is no box takes no place
        (["--min-score", "0.5"], [30, 20, 5], []),
        (["--min-score", "0.3", "--limit", "3"], [30, 20, 5], [8]),
    ],
)
def test_results_by_score(tmp_path: Path, options: list[str], first: list[int], second: list[int]) -> None:
    labels = coco(tmp_path / "labels.json", ["cat"], [])
    source = results(tmp_path / "results.json")
    file = imported(source, "--from", "results", "--annotations", str(labels), *options)
    widths = [(file.boxes_of(row)[:, 2] - file.boxes_of(row)[:, 0]).tolist() for row in (0, 1)]
    assert file.names == ("a.png", "b/c.png") and widths == [first, second]


def test_image_ids_of_results_may_be_written_with_a_point(tmp_path: Path) -> None:
    labels, source = coco(tmp_path / "labels.json", ["cat"], []), results(tmp_path / "results.json")
    whole = imported(source, "--from", "results", "--annotations", str(labels))
    rows = [row | {"image_id": float(row["image_id"])} for row in json.loads(source.read_text())]
    other = tmp_path / "points.json"
    other.write_text(json.dumps(rows))
    file = imported(other, "--from", "results", "--annotations", str(labels))
    assert file.names == whole.names
    assert all(np.array_equal(file.boxes_of(row), whole.boxes_of(row)) for row in range(len(whole.names)))


def test_results_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, source = coco(tmp_path / "labels.json", ["cat"], []), results(tmp_path / "results.json")
    options = ["--from", "results", "--to", "npz", str(source), str(tmp_path / "o.npz")]
    assert "--annotations has to name" in refused(capsys, *options)
    options += ["--annotations", str(labels)]
    assert "--limit: want at least 1, got 0" in refused(capsys, *options, "--limit", "0")
    assert "--min-score: want a finite number" in refused(capsys, *options, "--min-score", "nan")
    for record, words in (
        ({"image_id": 7, "score": 1}, "result 0 has no 'bbox'"),
        ({"image_id": 7, "bbox": [1, 1, 5, 5], "score": "high"}, "result 0: score: want a finite number, got 'high'"),
        ({"image_id": 99, "bbox": [1, 1, 5, 5], "score": 1}, "no box is left of it: .*image unknown"),
    ):
        source.write_text(json.dumps([record]))
        error = refused(capsys, *options)
        assert all(word in error for word in words.split(".*")), error
    source.write_text("{}")
    assert "want a list of results, got dict" in refused(capsys, *options)


@pytest.mark.parametrize("option", [["--limit", "3"], ["--min-score", "0.1"], ["--annotations", "x.json"]])
def test_options_of_results_are_refused_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    error = refused(capsys, "--from", "coco", "--to", "npz", "in.json", str(tmp_path / "o.npz"), *option)
    assert f"{option[0]} is for results of a detector; coco has no use for it" in error


def test_files_that_are_not_there_or_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.json", tmp_path / "o.npz"
    for kind in ("npz", "coco", "reference"):
        assert "no such file" in refused(capsys, "--from", kind, "--to", "npz", str(source), str(out))
    source.write_text("{")
    assert "not JSON" in refused(capsys, "--from", "coco", "--to", "npz", str(source), str(out))
    assert "not an npz file" in refused(capsys, "--from", "npz", "--to", "npz", str(source), str(out))
    coco(source, ["cat"], [{"bbox": XYWH[0]}], sized=False)
    options = ["--from", "coco", "--to", "npz", str(source), str(out)]
    folder = images(tmp_path / "photos", "a.png")
    assert "c.png: no such file" in refused(capsys, *options, "--images", str(folder))
    (folder / "b").mkdir()
    (folder / "b" / "c.png").write_bytes(b"no image")
    assert "c.png: cannot be read" in refused(capsys, *options, "--images", str(folder))
    out.write_bytes(b"precious")
    assert "exists" in refused(capsys, *options, "--images", str(folder))
    assert out.read_bytes() == b"precious" and not list(tmp_path.glob("*.tmp"))


def test_names_written_on_windows(tmp_path: Path) -> None:
    r"""A label file with b\c.png: imported boxes are found at b/c.png by pre-training, the sheet and the evaluation."""
    folder = images(tmp_path / "photos", "a.png", "b/c.png")
    boxes = [{"bbox": box, "image_id": image} for box in XYWH[:2] for image in (7, 3)]
    labels = coco(tmp_path / "labels.json", ["cat"], boxes)
    slashes = imported(labels, "--from", "coco")
    labels.write_text(labels.read_text().replace("b/c", "b\\\\c"))
    assert json.loads(labels.read_text())["images"][1]["file_name"] == "b\\c.png"
    file = imported(labels, "--from", "coco")
    pairs = ViewPairs(folder, file, short_sides=(64,), long_side=999, flip_probability=0.0, colour=False)
    assert [pairs[index, 0][0].boxes.tolist() for index in (0, 1)] == [XYXY[:2], XYXY[:2]]
    assert read_proposed(folder, file, 1).shape == (HEIGHT, WIDTH, 3)
    assert contact_sheet(file, folder).shape == contact_sheet(slashes, folder).shape
    for proposals in (file, slashes):
        result = evaluate_proposals(proposals, labels)
        assert (result["images"], result["objects"], result["recall50"]) == (2, 4, 1.0)
    soco = tmp_path / "soco.json"
    soco.write_text(json.dumps({"a.png": XYWH[:1], "b\\c.png": XYWH[:2]}))
    assert imported(soco, "--from", "soco", "--images", str(folder)).names == ("a.png", "b/c.png")


def test_boxes_of_another_program_are_judged_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """propose evaluates and reports an imported file, and does not advise to overwrite it with a search."""
    folder = images(tmp_path / "photos", "a.png", "b/c.png")
    labels = coco(tmp_path / "labels.json", ["cat"], [{"bbox": box} for box in XYWH[:2]])
    file = imported(labels, "--from", "coco")
    before = file.path.read_bytes()
    for options in (["--images", str(folder)], []):
        capsys.readouterr()
        assert cli.main(["propose", *options, "--out", str(file.path), "--evaluate", str(labels)]) == 0
        row = capsys.readouterr().out.splitlines()[-1].split()
        assert row[0] == "coco" and row[-5] == "100.0", row
    assert cli.main(["propose", "--images", str(folder), "--out", str(file.path), "--report"]) == 0
    assert file.path.with_name("imported.npz.report.png").is_file()
    for options, words in (
        (["--images", str(folder)], "boxes of another program (labels.json); take another --out"),
        (["--report"], "want --images DIR"),
        ([], "want --images DIR"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["propose", *options, "--out", str(file.path)])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert file.path.read_bytes() == before


def test_pre_training_reads_an_imported_file(tmp_path: Path) -> None:
    folder = images(tmp_path / "photos", "a.png", "b/c.png")
    boxes = [{"bbox": box, "category_id": 5 + n} for n, box in enumerate(XYWH)]
    names = ["cluster_1", "cluster_2", "cluster_3"]
    file = imported(coco(tmp_path / "p.json", names, boxes), "--from", "reference")
    pairs = ViewPairs(folder, file, short_sides=(128,), long_side=999, flip_probability=0.0, colour=False)
    assert len(pairs) == 1 and pairs.without_proposals == 1
    for view in pairs[0, 0]:
        assert view.image.shape == (3, 128, 192)  # twice the size
        assert view.boxes.tolist() == [[2 * side for side in box] for box in XYXY]
        assert view.labels.tolist() == [1, 0, 2]
