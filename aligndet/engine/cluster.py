"""``aligndet cluster``: pseudo-classes for proposals: features of each box, their principal components, k-means.

Features and centres found so far stand beside the output (``FILE.features``, ``FILE.state``); the same command again
continues from there (the pass over a sample of images for the components is one piece). ``FILE.jsonl`` is the log.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aligndet.data.journal import changes
from aligndet.data.progress import Progress
from aligndet.data.proposals import ProposalFile, open_proposals, write_proposals
from aligndet.data.transforms import resize, resized_size
from aligndet.data.views import read_proposed
from aligndet.engine.distributed import device_for
from aligndet.models import build_backbone
from aligndet.models.backbones import BACKBONES, Backbone
from aligndet.models.pointwise import with_pointwise
from aligndet.ops.kmeans import assign_nearest, improve, principal_components, spread_centres
from aligndet.protocol import Detector, normalise, pooled_mean
from aligndet.weights import load_backbone

SAVE_EVERY = 50  # images between two notes of how far features have come
STRIDE = 32  # px, of the last map of every backbone
TOO_SMALL = 2.0  # cells; of smaller boxes clusters tell images apart rather than objects (docs/decisions.md)
SAMPLE = 100_000  # boxes that the first centres are chosen from


@dataclass(frozen=True)
class Settings:
    """All that the pseudo-classes depend on besides the proposals and the backbone's weights."""

    backbone: str
    width: float
    clusters: int
    dimensions: int
    short_side: int
    long_side: int
    fit_images: int
    iterations: int
    seed: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("backbone", "seed") and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')}: want a positive number, got {value}")
        if self.seed < 0:
            raise ValueError(f"--seed: want a number of at least 0, got {self.seed}")
        if self.short_side > self.long_side:
            raise ValueError(f"--long-side: want at least the short side {self.short_side}, got {self.long_side}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``aligndet cluster``."""
    parser.add_argument("--proposals", required=True, metavar="FILE", help="proposal file of `aligndet propose`")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder that its file names are relative to")
    parser.add_argument("--weights", required=True, metavar="FILE", help="of the backbone, labelled or self-supervised")
    parser.add_argument("--out", required=True, metavar="FILE", help="proposal file with pseudo-classes to write")
    parser.add_argument("--backbone", default="resnet50", choices=BACKBONES)
    parser.add_argument("--width", type=float, default=1.0, help="channel multiplier of the backbone (default 1)")
    parser.add_argument("--clusters", type=int, default=256, metavar="K", help="pseudo-classes (default 256)")
    parser.add_argument("--dimensions", type=int, default=256, metavar="D", help="principal components (default 256)")
    parser.add_argument(
        "--short-side", type=int, default=800, metavar="PX", help="of the images, as in pre-training (default 800)"
    )
    parser.add_argument("--long-side", type=int, default=1333, metavar="PX", help="upper bound (default 1333)")
    parser.add_argument(
        "--fit-images", type=int, default=2000, metavar="N", help="images the components come from (default 2000)"
    )
    parser.add_argument("--iterations", type=int, default=100, metavar="N", help="most steps of k-means (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--overwrite", action="store_true", help="replace FILE and unfinished work of other settings")


def run(args: argparse.Namespace) -> int:
    """Cluster the boxes of a proposal file; returns the exit code."""
    out = Path(args.out)
    settings = Settings(**{item.name: getattr(args, item.name) for item in fields(Settings)})
    if out.exists() and not args.overwrite:
        raise ValueError(f"{out}: exists already; add --overwrite to replace it")
    proposals = open_proposals(args.proposals)
    if len(proposals.boxes) < settings.clusters:
        raise ValueError(f"--clusters: want at most the {len(proposals.boxes)} boxes of {args.proposals}")
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"--images {args.images}: no such folder")
    device = device_for(args.device, "--device")
    network = build_backbone(args.backbone, width=args.width)
    load_backbone(nn.ModuleDict({"backbone": network}), args.weights)
    with_pointwise(network)
    network.eval().to(device).to(memory_format=torch.channels_last)
    extractor = Extractor(network, proposals, Path(args.images), settings)
    sources = {"proposals": _fingerprint(proposals), "weights": _checksum(network)}
    sources["images"] = str(Path(args.images).resolve())
    state = State(out, asdict(settings) | sources, args.overwrite)
    with Progress(out.with_name(out.name + ".jsonl"), "features") as progress, torch.no_grad():
        features = extract(extractor, state, progress)
        labels, cost, steps = cluster(features, settings, state, progress, device)
    parameters = proposals.parameters | {"clusters": settings.clusters, "clustering": asdict(settings)}
    boxes = [proposals.boxes_of(row) for row in range(len(proposals))]
    write_proposals(
        out, proposals.names, proposals.sizes, boxes, parameters, failures=proposals.failures, labels=labels
    )
    state.remove()
    used = np.bincount(labels, minlength=settings.clusters)
    print(
        f"{out}: {len(labels)} boxes in {settings.clusters} pseudo-classes of {used.min()} to {used.max()} boxes "
        f"(median {int(np.median(used))}); {steps} steps, mean squared distance {cost:.4g}; "
        f"{len(extractor.unread)} images could not be read"
    )
    side = median_side(proposals, settings)
    if side < TOO_SMALL:
        print(
            f"the median box is {side:.1f} cells of the features wide and high: its surroundings say more of its "
            "pseudo-class than it does; larger images help only where pre-training has them, too"
        )
    return 0


def median_side(proposals: ProposalFile, settings: Settings) -> float:
    """The square root of the median box's area, in cells of the backbone's last map."""
    sides = [np.zeros(0)]
    for row, (height, width) in enumerate(proposals.sizes.tolist()):
        boxes = proposals.boxes_of(row)
        scale = resized_size((height, width), settings.short_side, settings.long_side)[0] / height
        sides.append(np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])) * scale / STRIDE)
    return float(np.median(np.concatenate(sides)))


@dataclass
class Extractor:
    """Features of the boxes of an image: the mean of the backbone's last map over each box (RoIAlign, 7 x 7).

    Attributes:
        unread: a line for each image that could not be read or has another size than its boxes are for.
    """

    network: Backbone
    proposals: ProposalFile
    images: Path
    settings: Settings

    def __post_init__(self) -> None:
        self.unread: list[str] = []

    def __call__(self, row: int) -> Tensor | None:
        """float32 [m, C] of image ``row``; None where it is of no use, which ``unread`` then explains."""
        boxes = torch.from_numpy(self.proposals.boxes_of(row))
        device = next(self.network.parameters()).device
        try:
            image = torch.from_numpy(read_proposed(self.images, self.proposals, row)).permute(2, 0, 1)
        except (ValueError, FileNotFoundError) as error:
            self.unread.append(str(error))
            return None
        image, factors = resize(image, self.settings.short_side, self.settings.long_side)
        height, width = image.shape[1:]
        padded = torch.zeros(1, 3, height + -height % 32, width + -width % 32, dtype=torch.uint8)
        padded[0, :, :height, :width] = image
        pixels = normalise(
            padded.to(device), torch.tensor([[height, width]], device=device), Detector.pixel_mean, Detector.pixel_std
        )
        last = list(self.network(pixels))[-1]
        where = torch.zeros(len(boxes), dtype=torch.int64, device=device)
        return pooled_mean([last], (boxes * factors).to(device), where, padded.shape[2]).float()


class State:
    """What is known so far of an unfinished clustering, on disk beside the output.

    Attributes:
        values: "images" done, lines on those "unread", and "step" of k-means.
    """

    def __init__(self, out: Path, made_with: dict[str, Any], overwrite: bool) -> None:
        self.path, self.features = out.with_name(out.name + ".state"), out.with_name(out.name + ".features")
        self.values: dict[str, Any] = {"made_with": made_with, "images": 0, "step": 0}
        self.arrays: dict[str, np.ndarray] = {}
        if not self.path.exists():
            return
        content = np.load(io.BytesIO(self.path.read_bytes()), allow_pickle=False)
        values = json.loads(str(content["values"]))
        changed = changes(values["made_with"], made_with)
        if changed and not overwrite:
            raise ValueError(
                f"{self.path}: unfinished work made with other settings ({changed}); repeat the command with those to "
                "finish it, take another --out, or add --overwrite to discard it"
            )
        if not changed:
            self.values, self.arrays = values, {name: content[name] for name in content.files if name != "values"}

    def save(self, **values: Any) -> None:
        """Note ``values``; arrays among them are kept as such. A kill leaves the old note or the new one."""
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self.arrays[name] = value
            else:
                self.values[name] = value
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, values=np.array(json.dumps(self.values)), **self.arrays)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot write ({error.strerror})") from None

    def remove(self) -> None:
        """Delete everything: the result is written."""
        self.path.unlink(missing_ok=True)
        self.features.unlink(missing_ok=True)


def extract(extractor: Extractor, state: State, progress: Progress) -> np.ndarray:
    """Principal components of the features of all boxes: float16 [M, d] on disk, from where ``state`` left off."""
    proposals, settings = extractor.proposals, extractor.settings
    rows = np.flatnonzero(np.diff(proposals.offsets) > 0)
    if "components" not in state.arrays:
        chosen = np.random.default_rng(settings.seed).permutation(rows)[: settings.fit_images]
        progress.begin(len(chosen))
        parts = _counted((extractor(int(row)) for row in chosen), progress)
        first = next(parts, None)
        if first is None:
            raise ValueError(f"--images {extractor.images}: no image can be used; the first: {extractor.unread[0]}")
        parts = itertools.chain([first], parts)
        mean, components = principal_components(parts, settings.dimensions)
        state.save(mean=mean.cpu().numpy(), components=components.cpu().numpy(), images=0)
    device = next(extractor.network.parameters()).device
    mean, components = (torch.from_numpy(state.arrays[name]).to(device) for name in ("mean", "components"))
    shape = (len(proposals.boxes), components.shape[1])
    there = state.features.exists() and state.features.stat().st_size == 2 * shape[0] * shape[1]
    done = state.values["images"] if there else 0
    extractor.unread = list(state.values.get("unread", ())) if done else []
    features = np.memmap(state.features, np.float16, "r+" if there else "w+", shape=shape)
    progress.begin(len(rows) - done)
    for number in range(done, len(rows)):
        row = int(rows[number])
        found = extractor(row)
        values = 0 if found is None else ((found - mean) @ components).half().cpu().numpy()
        features[proposals.offsets[row] : proposals.offsets[row + 1]] = values  # 0: the mean of all boxes
        progress.advance()
        if (number + 1) % SAVE_EVERY == 0 or number + 1 == len(rows):
            features.flush()
            state.save(images=number + 1, unread=extractor.unread)
    for line in extractor.unread:
        progress.warn(f"no features, the pseudo-class of an average box: {line}")
    return features


def cluster(
    features: np.ndarray, settings: Settings, state: State, progress: Progress, device: torch.device
) -> tuple[np.ndarray, float, int]:
    """Pseudo-class of each row (int32 [M]), mean squared distance from the centres, and steps taken."""

    def rows(first: int, last: int) -> Tensor:
        return torch.from_numpy(np.asarray(features[first:last], dtype=np.float32)).to(device)

    number = len(features)
    if "centres" not in state.arrays:
        chosen = np.sort(np.random.default_rng(settings.seed).permutation(number)[:SAMPLE])
        sample = torch.from_numpy(np.asarray(features[chosen], dtype=np.float32)).to(device)
        first = spread_centres(sample, settings.clusters, torch.Generator().manual_seed(settings.seed))
        state.save(centres=first.cpu().numpy(), step=0, cost=float("inf"))
    centres = torch.from_numpy(state.arrays["centres"]).to(device)
    progress.title = "k-means"
    progress.begin(settings.iterations - state.values["step"])
    for step in range(state.values["step"], settings.iterations):
        if state.values.get("settled"):
            break
        centres, cost = improve(rows, number, centres)
        progress.log("k-means", step=step + 1, cost=cost)
        progress.advance()
        settled = bool(state.values["cost"] - cost <= 1e-6 * cost)
        state.save(centres=centres.cpu().numpy(), step=step + 1, cost=cost, settled=settled)
    labels, distances = assign_nearest(rows, number, centres)
    return labels.cpu().numpy().astype(np.int32), float(distances.double().mean()), state.values["step"]


def _counted(parts: Iterator[Tensor | None], progress: Progress) -> Iterator[Tensor]:
    for part in parts:
        progress.advance()
        if part is not None:
            yield part


def _fingerprint(proposals: ProposalFile) -> str:
    return f"{len(proposals)} images, {len(proposals.boxes)} boxes, {float(np.asarray(proposals.boxes).sum()):.6g}"


def _checksum(network: nn.Module) -> str:
    values: Sequence[Tensor] = list(network.state_dict().values())
    return f"{sum(float(value.double().abs().sum()) for value in values):.9g}"
