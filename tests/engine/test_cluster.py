"""``aligndet cluster`` as a user runs it: labels in the file, resumed after a kill, refused input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
import yaml

from aligndet import cli
from aligndet.data.proposals import open_proposals, write_proposals
from aligndet.data.synthetic import make_scenes
from aligndet.data.views import ViewPairs
from aligndet.engine import cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    make_scenes(folder, images=9, size=96, seed=3, name="train")
    proposals = ["propose", "--images", str(folder / "images"), "--out", str(folder / "p.npz"), "--mode", "single"]
    assert cli.main([*proposals, "--workers", "1", "--min-size", "6"]) == 0
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), folder / "r18.pth")
    return folder


def command(folder: Path, out: str, *more: str) -> list[str]:
    paths = ["--proposals", str(folder / "p.npz"), "--images", str(folder / "images"), "--out", str(folder / out)]
    model = ["--backbone", "resnet18", "--weights", str(folder / "r18.pth"), "--device", "cpu"]
    return ["cluster", *paths, *model, "--clusters", "7", "--dimensions", "5", "--short-side", "96", *more]


def test_boxes_are_measured_in_cells_of_the_features(tmp_path: Path) -> None:
    """Images of 100 x 200 px, enlarged six times by the short side and four times by the long one."""
    boxes = [np.array([[0, 0, 16, 64], [0, 0, 8, 8], [1, 1, 17, 17]], np.float32)]  # sides of 32, 8 and 16 px
    write_proposals(tmp_path / "p.npz", ["a.png"], np.array([[100, 200]]), boxes, {})
    size = {"backbone": "resnet18", "width": 1.0, "clusters": 2, "dimensions": 2, "fit_images": 1, "iterations": 1}
    for long_side, side in ((1333, 16 * 6 / 32), (800, 16 * 4 / 32)):
        settings = cluster.Settings(**size, short_side=600, long_side=long_side, seed=0)  # type: ignore[arg-type]
        assert cluster.median_side(open_proposals(tmp_path / "p.npz"), settings) == pytest.approx(side)


def test_boxes_get_the_class_of_their_nearest_centre(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(folder, "c.npz")) == 0
    said = capsys.readouterr().out
    assert "in 7 pseudo-classes" in said and "larger images help only where pre-training has them" in said
    plain, clustered = open_proposals(folder / "p.npz"), open_proposals(folder / "c.npz")
    assert plain.labels is None and plain.clusters is None
    assert clustered.clusters == 7 and clustered.labels is not None
    assert np.array_equal(clustered.boxes, plain.boxes) and clustered.names == plain.names
    assert set(clustered.labels.tolist()) <= set(range(7)) and len(set(clustered.labels.tolist())) > 3
    assert clustered.parameters["clustering"]["dimensions"] == 5
    assert clustered.parameters["mode"] == plain.parameters["mode"]
    assert not (folder / "c.npz.state").exists() and not (folder / "c.npz.features").exists()
    view, other = ViewPairs(folder / "images", clustered, short_sides=(96,), long_side=96, proposals_per_image=4)[
        (0, 1)
    ]
    assert torch.equal(view.labels, torch.from_numpy(clustered.labels_of(view.image_id))[view.ids])
    assert torch.equal(view.labels, other.labels)
    events = [json.loads(line)["event"] for line in (folder / "c.npz.jsonl").read_text().splitlines()]
    assert "k-means" in events


@pytest.mark.parametrize(("side", "warned"), [(64, False), (96, False), (144, False), (152, True), (32, True)])
def test_pseudo_classes_of_images_of_another_size_are_warned_of(
    folder: Path, tmp_path: Path, side: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained at 64 to 96 px: a factor of 1.5 below and above, 42.7 to 144 px, is let pass."""
    proposals = open_proposals(folder / "p.npz")
    boxes = [proposals.boxes_of(row) for row in range(len(proposals))]
    parameters = proposals.parameters | {"clusters": 2, "clustering": {"short_side": side}}
    labels = np.arange(len(proposals.boxes)) % 2
    write_proposals(tmp_path / "c.npz", proposals.names, proposals.sizes, boxes, parameters, labels=labels)
    config = {
        "run": str(tmp_path / "run"),
        "model": {"detector": "fcos", "backbone": "resnet18", "width": 0.25, "channels": 32},
        "data": {"images": str(folder / "images"), "proposals": str(tmp_path / "c.npz"), "workers": 0},
        "method": {"classification": 1.0},
        "optim": {"steps": 1, "batch": 2},
    }
    config["data"] |= {"short_side": [64, 96], "long_side": 96}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert cli.train(["--cfg", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().err
    assert (f"come from images of {side} px (short side), data.short_side has 64 .. 96" in said) is warned


def test_classes_are_those_of_the_nearest_centre_of_the_boxes_own_features(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features by torchvision's RoIAlign, image by image; centres as means of their boxes; distances by hand."""
    known: dict[str, np.ndarray] = {}
    original = cluster.principal_components

    def watched(parts: object, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
        mean, components = original(parts, dimensions)  # type: ignore[arg-type]
        known["mean"], known["components"] = mean.numpy(), components.numpy()
        return mean, components

    monkeypatch.setattr(cluster, "principal_components", watched)
    assert cli.main(command(folder, "n.npz")) == 0
    clustered = open_proposals(folder / "n.npz")
    network = torchvision.models.resnet18(weights=None)
    network.load_state_dict(torch.load(folder / "r18.pth", weights_only=True))
    body = torch.nn.Sequential(*list(network.eval().children())[:-2])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    rows = []
    for row, name in enumerate(clustered.names):
        pixels = torch.from_numpy(cv2.imread(str(folder / "images" / name))[:, :, ::-1].copy()).permute(2, 0, 1)
        with torch.no_grad():
            last = body(((pixels - mean) / std)[None])
            boxes = [torch.from_numpy(clustered.boxes_of(row))]
            cells = torchvision.ops.roi_align(last, boxes, 7, 1 / 32, sampling_ratio=0, aligned=True)
        rows.append((cells.mean(dim=(2, 3)).numpy() - known["mean"]) @ known["components"])
    features = np.concatenate(rows)
    labels = np.asarray(clustered.labels)
    centres = np.stack([features[labels == k].mean(axis=0) for k in range(7)])
    nearest = ((features[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels).mean() > 0.98


def test_folders_devices_and_sizes_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: str) -> str:
        with pytest.raises(SystemExit) as error:
            cli.main(command(folder, "bad.npz", *more))
        assert error.value.code == 2
        return capsys.readouterr().err

    assert "no such folder" in refused("--images", str(tmp_path / "nowhere"))
    assert "no image can be used" in refused("--images", str(tmp_path))
    assert "--seed: want" in refused("--seed", "-1")
    assert "--long-side: want at least" in refused("--short-side", "99", "--long-side", "98")
    if not torch.cuda.is_available():
        assert "--device: want cuda" in refused("--device", "cuda")
    shutil.copytree(folder / "images", tmp_path / "larger")
    for path in (tmp_path / "larger").rglob("*.*"):
        cv2.imwrite(str(path), np.zeros((48, 200, 3), np.uint8))
    assert "its proposals are for 96 x 96 px, the file has 200 x 48" in refused("--images", str(tmp_path / "larger"))


@pytest.mark.parametrize("moment", ["components", "features", "centres"])
def test_an_interrupted_run_ends_with_the_same_classes(
    folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{moment}.npz"
    assert cli.main(command(folder, f"whole_{out}")) == 0
    monkeypatch.setattr(cluster, "SAVE_EVERY", 2)
    calls = {"components": "principal_components", "features": "read_proposed", "centres": "improve"}[moment]
    original, count = getattr(cluster, calls), 0

    def killed(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count > {"components": 0, "features": 13, "centres": 2}[moment]:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(cluster, calls, killed)
    with pytest.raises(SystemExit):
        cli.main(command(folder, out))
    assert not (folder / out).exists()
    if moment != "components":
        assert (folder / f"{out}.state").exists()
    monkeypatch.setattr(cluster, calls, original)
    assert cli.main(command(folder, out)) == 0
    first, second = open_proposals(folder / out), open_proposals(folder / f"whole_{out}")
    assert first.labels is not None and second.labels is not None
    assert np.array_equal(first.labels, second.labels)


def test_unreadable_images_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    broken = sorted((tmp_path / "images").rglob("*.*"))[2]
    broken.write_bytes(b"no image")
    arguments = command(folder, "broken.npz")
    arguments[arguments.index("--images") + 1] = str(tmp_path / "images")
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "1 images could not be read" in said.out and broken.name in said.err


def test_images_that_were_unreadable_before_an_interruption_count(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    sorted((tmp_path / "images").rglob("*.*"))[0].write_bytes(b"no image")
    arguments = command(folder, "broken_twice.npz")
    arguments[arguments.index("--images") + 1] = str(tmp_path / "images")
    monkeypatch.setattr(cluster, "SAVE_EVERY", 2)
    original, count = cluster.read_proposed, 0

    def killed(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > 13:  # 9 for the components, then the broken one and three more
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(cluster, "read_proposed", killed)
    with pytest.raises(SystemExit):
        cli.main(arguments)
    monkeypatch.setattr(cluster, "read_proposed", original)
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert "1 images could not be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--clusters", "100000"), "--clusters: want at most the"),
        (("--clusters", "0"), "--clusters: want a positive number, got 0"),
        (("--weights", "none.pth"), "weights none.pth: no such file"),
        (("--proposals", "none.npz"), "no such file"),
    ],
)
def test_impossible_requests_are_one_line(
    folder: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(command(folder, "x.npz", *more))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_work_of_other_settings_is_not_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(cluster, "improve", killed)
        cli.main(command(folder, "mixed.npz"))
    with pytest.raises(SystemExit):
        cli.main(command(folder, "mixed.npz", "--seed", "5"))
    (folder / "others").mkdir()
    with pytest.raises(SystemExit):  # features of the images so far are not those of another folder
        cli.main(command(folder, "mixed.npz", "--images", str(folder / "others")))
    assert cli.main(command(folder, "mixed.npz", "--seed", "5", "--overwrite")) == 0
    with pytest.raises(SystemExit):
        cli.main(command(folder, "mixed.npz", "--seed", "5"))
