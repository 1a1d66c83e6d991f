"""Claims about labels: ids mapped, faults counted and named, nothing shifted; the stream of samples; folders; folds."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from aligndet.data.batch import collate
from aligndet.data.coco import find_images, load_coco
from aligndet.data.folder import list_images
from aligndet.data.labelled import EvaluationImages, LabelledImages
from aligndet.data.segmentation import run_lengths
from aligndet.data.splits import choose_labelled
from aligndet.data.stream import StepSampler, loader
from aligndet.data.synthetic import make_scenes


def coco(folder: Path, **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "images": [{"id": 40 + i, "file_name": f"{i}.png", "height": 60, "width": 90} for i in range(4)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "cup"}],
        "annotations": [
            annotation(1, 42, 18, [10, 20, 30, 15]),
            annotation(2, 40, 90, [1.5, 2.5, 20, 10]),
            annotation(3, 42, 3, [60, 30, 50, 50]),  # reaches over the border
            annotation(4, 42, 3, [0, 0, 90, 60], iscrowd=1),
        ],
    }
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "train").mkdir(exist_ok=True)
    for i in range(4):
        cv2.imwrite(str(folder / "train" / f"{i}.png"), np.full((60, 90, 3), 10 * i, np.uint8))
    path = folder / "annotations" / "instances_train.json"
    path.write_text(json.dumps(tree | changes))
    return path


def annotation(number: int, image: int, category: int, box: Any, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, **more}


def test_labels_boxes_and_rows_by_hand(tmp_path: Path) -> None:
    found = load_coco(coco(tmp_path))
    assert found.class_names == ("car", "dog", "cup")
    assert found.category_ids.tolist() == [3, 18, 90]
    assert found.offsets.tolist() == [0, 1, 1, 4, 4]
    assert found.labels.tolist() == [2, 1, 0, 0]
    assert found.boxes.tolist() == [[1.5, 2.5, 21.5, 12.5], [10, 20, 40, 35], [60, 30, 90, 60], [0, 0, 90, 60]]
    assert found.crowd.tolist() == [False, False, False, True]
    assert found.rows_of(2).tolist() == [1, 2]
    assert found.report == {}
    only = load_coco(coco(tmp_path), classes=("cup", "dog"))
    assert (only.class_names, only.labels.tolist()) == (("cup", "dog"), [0, 1])


def test_faulty_annotations_are_counted_and_named(tmp_path: Path) -> None:
    bad = [
        annotation(11, 99, 18, [1, 1, 5, 5]),
        annotation(12, 40, 77, [1, 1, 5, 5]),
        annotation(13, 40, 18, [1, 1, 0.5, 5]),
        annotation(14, 40, 18, [1, 1, -5, 5]),
        annotation(15, 40, 18, [float("nan"), 1, 5, 5]),
        annotation(16, 40, 18, [200, 1, 5, 5]),
        annotation(17, 40, 18, [1, 1, 5]),
        annotation(18, 40, 18, [1, 1, 5, 5], area=0),
        annotation(19, 40, 18, [89.9999999, 1, 5, 5]),  # what is left inside rounds to nothing
        annotation(20, 40, 18, None),
        annotation(21, 40, 18, [1, 1, 5, 5]),
    ]
    found = load_coco(coco(tmp_path, annotations=bad))
    assert found.boxes.tolist() == [[1, 1, 6, 6]]
    counts = {reason: len(lines) for reason, lines in found.report.items()}
    assert counts == {
        "image unknown": 1,
        "category unknown": 1,
        "a side is below 1 px": 2,
        "bbox is not finite": 1,
        "its area is not positive": 1,
        "box outside the image": 2,
        "bbox is not four numbers": 2,
    }
    assert "annotation 13 of 0.png" in found.report["a side is below 1 px"][0]
    assert len(found.report_lines()) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images is not there"),
        ({"annotations": [{"id": 1, "image_id": 40, "category_id": 3}]}, r"annotations\[0\] has no 'bbox'"),
        ({"images": [{"id": 1}]}, r"images\[0\] has no 'file_name'"),
        ({"images": [{"id": 1, "file_name": "../../etc/passwd"}]}, "leaves the image folder"),
        ({"images": [{"id": 1, "file_name": "/etc/passwd"}]}, "leaves the image folder"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, "image id 1 occurs twice"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}]}, "file name a occurs twice"),
        ({"images": ["a"]}, r"images\[0\] has no 'file_name'"),
        ({"images": [{"id": [1], "file_name": "a"}]}, r"images\[0\]\.id: want a whole number, got \[1\]"),
        ({"images": [{"id": 1, "file_name": 5}]}, r"images\[0\]\.file_name: want a file name, got 5"),
        ({"images": [{"id": 1, "file_name": "a", "height": -4, "width": 3}]}, r"images\[0\]\.height: want at least 0"),
        ({"annotations": [annotation(1, "4o", 3, [0, 0, 5, 5])]}, r"\[0\]\.image_id: want a whole number, got '4o'"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "category name a occurs twice"),
        ({"categories": []}, "no categories"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_coco(coco(tmp_path, **changes))


def test_unknown_classes_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no class 'dogs'; the nearest is 'dog'"):
        load_coco(coco(tmp_path), classes=("dogs",))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_coco(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"bad\.json: not JSON"):
        load_coco(tmp_path / "bad.json")


def test_image_folders_are_found_beside_the_annotations(tmp_path: Path) -> None:
    path = coco(tmp_path)
    names = load_coco(path).file_names
    assert find_images(path, None, names) == tmp_path / "train"
    assert find_images(path, tmp_path / "train", names) == tmp_path / "train"
    with pytest.raises(FileNotFoundError, match=r"0\.png is not in .*elsewhere"):
        find_images(path, tmp_path / "elsewhere", names)
    (tmp_path / "train").rename(tmp_path / "hidden")
    with pytest.raises(FileNotFoundError, match=r"0\.png is not in .*JPEGImages"):
        find_images(path, None, names)


def test_training_leaves_out_images_without_boxes_and_scales_the_rest(tmp_path: Path) -> None:
    data = LabelledImages(load_coco(coco(tmp_path)), tmp_path / "train", short_sides=(120,), long_side=500)
    assert (len(data), data.without_boxes) == (2, 2)
    flipped = set()
    for position in range(12):
        sample = data[(1, position)]
        assert sample.image_id == 42
        assert sample.image.shape == (3, 120, 180)
        left = sample.boxes[0, 0].item()
        flipped.add(left)
        assert sample.labels.tolist() == [1, 0], "the crowd is no target"
        assert sample.crowds is not None
        assert sample.crowds.tolist() == [[0, 0, 180, 120]]
    assert flipped == {20.0, 180.0 - 80.0}
    with pytest.raises(ValueError, match="none of the 1 images has a usable box"):
        LabelledImages(load_coco(coco(tmp_path)), tmp_path / "train", short_sides=(9,), long_side=9, rows=np.array([1]))


def test_a_wrong_size_in_the_file_is_an_error_of_that_image(tmp_path: Path) -> None:
    path = coco(tmp_path)
    cv2.imwrite(str(tmp_path / "train/0.png"), np.zeros((90, 60, 3), np.uint8))
    data = LabelledImages(load_coco(path), tmp_path / "train", short_sides=(30,), long_side=90)
    sample = data[(0, 0)]
    assert sample.image_id == 42
    assert "says 90 x 60 px, the file has 60 x 90" in sample.skipped[0]


def test_boxes_of_a_file_without_sizes_are_clipped_to_the_image_read(tmp_path: Path) -> None:
    images = [{"id": 40 + i, "file_name": f"{i}.png"} for i in range(4)]
    boxes = [annotation(1, 40, 18, [60, 30, 50, 50]), annotation(2, 40, 3, [95, 10, 20, 20])]
    found = load_coco(coco(tmp_path, images=images, annotations=boxes))
    assert found.boxes.tolist() == [[60, 30, 110, 80], [95, 10, 115, 30]]
    sample = EvaluationImages(found, tmp_path / "train", short_side=60, long_side=90)[0]
    assert sample.boxes.tolist() == [[60, 30, 90, 60]]
    assert sample.labels.tolist() == [1]


def test_evaluation_keeps_every_image_in_order(tmp_path: Path) -> None:
    path = coco(tmp_path)
    (tmp_path / "train/1.png").unlink()
    data = EvaluationImages(load_coco(path), tmp_path / "train", short_side=30, long_side=90)
    samples = [data[index] for index in range(4)]
    assert [sample.image_id for sample in samples] == [40, 41, 42, 43]
    assert [len(sample.skipped) for sample in samples] == [0, 1, 0, 0]
    assert samples[1].original_size == (60, 90)
    strict = EvaluationImages(load_coco(path), tmp_path / "train", short_side=30, long_side=90, on_error="fail")
    with pytest.raises(FileNotFoundError, match=r"1\.png: no such file"):
        strict[1]


def all_samples(**settings: Any) -> list[list[tuple[int, int]]]:
    return list(StepSampler(**settings))


def test_stream_has_no_duplicates_within_an_epoch_and_all_images() -> None:
    order = [item for step in all_samples(length=13, batch=4, steps=13) for item in step]
    assert [position for _, position in order] == list(range(52))
    epochs = [[index for index, _ in order[start : start + 13]] for start in range(0, 52, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "each epoch has an order of its own"
    assert len(all_samples(length=3, batch=7, steps=2)[0]) == 7, "a batch may be larger than the data"


def test_ranks_and_passes_share_the_samples_of_one_process() -> None:
    whole = all_samples(length=11, batch=12, steps=5, seed=3)
    for world, accumulate in ((2, 1), (3, 2), (1, 4)):
        parts = [
            all_samples(length=11, batch=12, steps=5, seed=3, rank=rank, world=world, accumulate=accumulate)
            for rank in range(world)
        ]
        for step, wanted in enumerate(whole):
            passes = range(step * accumulate, (step + 1) * accumulate)
            assert sorted(item for part in parts for number in passes for item in part[number]) == sorted(wanted)
    with pytest.raises(ValueError, match=r"optim\.batch: want a multiple of 5 ranks x 1"):
        StepSampler(11, batch=12, steps=5, world=5)


def test_stream_resumes_anywhere() -> None:
    whole = all_samples(length=11, batch=4, steps=9, accumulate=2)
    for start in (0, 1, 5, 9):
        assert all_samples(length=11, batch=4, steps=9, accumulate=2, start_step=start) == whole[2 * start :]


WIDE = np.random.default_rng(2).random(53) < 0.7


def test_steps_of_one_aspect_lose_no_image() -> None:
    """53 images in steps of 4: after e epochs each has come e times, but for at most 3 of a kind that wait."""
    settings = {"length": 53, "batch": 4, "seed": 3, "wide": WIDE}
    steps = all_samples(steps=200, **settings)
    assert [position for step in steps for _, position in step] == list(range(800))
    assert all(len({bool(WIDE[index]) for index, _ in step}) == 1 for step in steps)
    kinds = [bool(WIDE[step[0][0]]) for step in steps]
    assert 0 < sum(kinds) < len(kinds)
    assert kinds != sorted(kinds), "kinds alternate"
    for number in (14, 53, 106, 200):
        counts = np.bincount([index for step in steps[:number] for index, _ in step], minlength=53)
        # Of the epochs that have begun at most 3 images of each kind wait, and the last one is not over.
        assert counts.max() - counts.min() <= 2, number
    counts = np.bincount([index for step in steps for index, _ in step], minlength=53)
    assert counts.sum() == 800
    assert set(counts.tolist()) <= {14, 15, 16}
    orders = [tuple(index for index, _ in step) for step in steps]
    assert len(set(orders)) > 190, "no step comes twice"


def test_steps_of_one_aspect_resume_and_are_shared_by_ranks() -> None:
    settings = {"length": 53, "batch": 12, "steps": 40, "seed": 3, "wide": WIDE}
    whole = all_samples(**settings)
    for start in (0, 1, 7, 23, 40):
        assert all_samples(start_step=start, **settings) == whole[start:]
    for world, accumulate in ((2, 1), (3, 2), (1, 4)):
        parts = [all_samples(rank=rank, world=world, accumulate=accumulate, **settings) for rank in range(world)]
        for step, wanted in enumerate(whole):
            passes = range(step * accumulate, (step + 1) * accumulate)
            assert [item for number in passes for part in parts for item in part[number]] == wanted
    alike = {"length": 11, "batch": 4, "steps": 9}
    for wide in (np.ones(11, bool), np.zeros(11, bool)):
        assert all_samples(wide=wide, **alike) == all_samples(**alike), "one kind only: as without"
    assert len(all_samples(length=3, batch=7, steps=2, wide=np.array([True, False, True]))[0]) == 7


def test_what_is_wide_is_read_from_labels_or_else_from_headers(tmp_path: Path) -> None:
    path = coco(tmp_path)
    cv2.imwrite(str(tmp_path / "train/0.png"), np.zeros((90, 60, 3), np.uint8))
    sizes = [{"id": 40 + i, "file_name": f"{i}.png"} for i in range(4)]
    options: dict[str, Any] = {"short_sides": (30,), "long_side": 90}
    assert LabelledImages(load_coco(path), tmp_path / "train", **options).wide().tolist() == [True, True]
    path = coco(tmp_path, images=sizes)
    cv2.imwrite(str(tmp_path / "train/0.png"), np.zeros((90, 60, 3), np.uint8))
    data = LabelledImages(load_coco(path), tmp_path / "train", **options)
    assert data.wide().tolist() == [False, True]
    assert data.annotations.sizes.max() == 0, "what the labels say stays"


def test_worker_count_changes_nothing(tmp_path: Path) -> None:
    data = LabelledImages(load_coco(coco(tmp_path)), tmp_path / "train", short_sides=(20, 30, 40), long_side=90)

    def run(workers: int) -> list[torch.Tensor]:
        sampler = StepSampler(len(data), batch=3, steps=4, seed=5)
        return [batch.images for batch in loader(data, sampler, collate, workers, pin=False)]

    assert all(torch.equal(a, b) for a, b in zip(run(0), run(2), strict=True))


def test_folds_are_those_of_numpy_s_legacy_generator() -> None:
    # np.random.seed(1); np.random.permutation(10) begins 2 9 6 4 0
    assert choose_labelled(10, 5, 1).tolist() == [0, 2, 4, 6, 9]
    assert choose_labelled(10, 3, 1).tolist() == [2, 6, 9]
    assert set(choose_labelled(118_287, 1182, 2)) < set(choose_labelled(118_287, 5914, 2))
    with pytest.raises(ValueError, match=r"want 1 \.\. 10, got 11"):
        choose_labelled(10, 11, 1)


def test_folders_are_searched_deep_and_links_do_not_loop(tmp_path: Path) -> None:
    (tmp_path / "a b/ü").mkdir(parents=True)
    for name in ("z.JPG", "a b/x.png", "a b/ü/y.jpeg", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a b/loop").symlink_to(tmp_path)
    assert list_images(tmp_path) == ["a b/x.png", "a b/ü/y.jpeg", "z.JPG"]
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file ends in"):
        list_images(tmp_path / "empty")


@pytest.mark.parametrize("counts", [[0, 5400], "as text"])
def test_crowds_travel_with_their_image(tmp_path: Path, counts: Any) -> None:
    """Resized by 2, mirrored about 180 px, joined with an image without crowds; also where masks are asked for."""
    if counts == "as text":
        counts = rle.encode(np.ones((60, 90), dtype=np.uint8, order="F"))["counts"].decode()
    square = [[10, 20, 40, 20, 40, 35, 10, 35]]
    crowd = annotation(3, 42, 3, [10, 10, 30, 20], iscrowd=1, segmentation={"size": [60, 90], "counts": counts})
    objects = [annotation(n, image, 18, [10, 20, 30, 15], segmentation=square) for n, image in ((1, 40), (2, 42))]
    path = coco(tmp_path, annotations=[*objects, crowd])
    for masks in (False, True):
        annotations = load_coco(path, masks=masks)
        assert annotations.report == {}
        assert annotations.crowds_of(2).tolist() == [[10, 10, 40, 30]]
        assert annotations.crowds_of(1).shape == (0, 4)
        options: dict[str, Any] = {"short_sides": (120,), "long_side": 500, "flip_probability": 1.0}
        data = LabelledImages(annotations, tmp_path / "train", **options)
        targets = collate([data[(0, 0)], data[(1, 1)]]).to("cpu").targets
        assert targets.image.tolist() == [0, 1]
        assert targets.crowds is not None and targets.crowd_image is not None
        assert targets.crowds.tolist() == [[100, 20, 160, 60]]
        assert targets.crowd_image.tolist() == [1]
        assert (targets.masks is not None) == masks
        without = LabelledImages(annotations, tmp_path / "train", crowds=False, **options)
        assert collate([without[(1, 1)]]).targets.crowds is None


def test_masks_of_all_three_forms_agree(tmp_path: Path) -> None:
    square = np.zeros((40, 60), dtype=np.uint8, order="F")
    square[5:15, 10:30] = 1
    compressed = rle.encode(square)
    columns = square.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], columns, [1 - columns[-1]]]).astype(np.int8)))
    lengths = np.diff(np.concatenate([[0], edges])).tolist()
    forms: list[Any] = [
        [[10, 5, 30, 5, 30, 15, 10, 15]],
        {"size": [40, 60], "counts": lengths},
        {"size": [40, 60], "counts": compressed["counts"].decode()},
    ]
    for form in forms:
        counts, reason = run_lengths(form, (40, 60))
        assert reason == ""
        assert np.array_equal(rle.decode({"size": [40, 60], "counts": counts}), square)
    for form, message in [
        ([], "without a segmentation"),
        (None, "without a segmentation"),
        ([[1, 2, 3, 4]], "fewer than three points"),
        ({"size": [60, 40], "counts": lengths}, "another size"),
        ({"size": [40, 60], "counts": [2400]}, "empty"),
        ({"size": [40, 60]}, "no mask"),
        ("text", "no mask"),
        ([["a", 1, 2, 3, 4, 5]], "no mask"),
    ]:
        counts, reason = run_lengths(form, (40, 60))
        assert counts == b""
        assert message in reason
    assert "how large" in run_lengths(forms[0], (0, 0))[1]


def test_masks_stay_on_their_boxes_through_resizing_and_flipping(tmp_path: Path) -> None:
    path = make_scenes(tmp_path, images=3, size=96, seed=5, name="train")
    annotations = load_coco(path, masks=True)
    for flip_probability in (0.0, 1.0):
        dataset = LabelledImages(
            annotations, tmp_path / "images", short_sides=(150,), long_side=200, flip_probability=flip_probability
        )
        samples = [dataset[(index, index)] for index in range(len(dataset))]
        for sample in samples:
            assert sample.masks is not None
            assert sample.masks.shape == (len(sample.boxes), *sample.image.shape[1:])
            for mask, box in zip(sample.masks, sample.boxes, strict=True):
                rows, columns = mask.any(1).nonzero().squeeze(1), mask.any(0).nonzero().squeeze(1)
                hull = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                assert (hull - box).abs().max() < 1
        batch = collate(samples)
        assert batch.targets.masks is not None
        assert batch.targets.masks.shape == (len(batch.targets), *batch.images.shape[2:])
        assert batch.targets.masks.sum(dim=(1, 2)).min() > 0
    plain = load_coco(path)
    with pytest.raises(ValueError, match="read without masks"):
        plain.masks_of(np.array([0]), (96, 96))
