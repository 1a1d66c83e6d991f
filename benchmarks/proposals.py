"""Seconds and boxes per image of selective search: three modes, three sizes, one thread, decoding not counted.

python benchmarks/proposals.py --images DIR [--number 6]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
from environment import environment

from aligndet.data.folder import list_images
from aligndet.data.selective_search import MODES, filter_proposals, selective_search
from aligndet.data.transforms import read_image

SIZES = (256, 400, 640)


def measure(images: list[np.ndarray], mode: str, size: int) -> dict[str, float | str]:
    """One row of the table: means over the images, and how many are left without a box."""
    seconds, raw, kept = [], [], []
    for image in images:
        began = time.perf_counter()
        found = selective_search(image, mode=mode, size=size)
        proposals = filter_proposals(found, image.shape[:2])
        seconds.append(time.perf_counter() - began)
        raw.append(len(found))
        kept.append(len(proposals))
    return {
        "mode": mode,
        "size": size,
        "seconds": round(statistics.mean(seconds), 4),
        "raw": round(statistics.mean(raw), 1),
        "kept": round(statistics.mean(kept), 1),
        "kept_median": statistics.median(kept),
        "kept_min": min(kept),
        "kept_max": max(kept),
        "images_without": kept.count(0),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder")
    parser.add_argument("--number", type=int, default=6, help="images, taken at even steps (default 6)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "proposals.json"))
    args = parser.parse_args()
    cv2.setNumThreads(1)
    names = list_images(args.images)
    names = [names[row] for row in np.linspace(0, len(names) - 1, min(args.number, len(names))).astype(int)]
    images = [read_image(Path(args.images) / name) for name in names]
    selective_search(images[0], size=SIZES[0])  # the first call loads tables
    print("mode     size  s/image     raw    kept  least  most  without")
    rows = []
    for mode in MODES:
        for size in SIZES:
            row = measure(images, mode, size)
            rows.append(row)
            print(
                f"{mode:8} {size:4} {row['seconds']:8.3f} {row['raw']:7.1f} {row['kept']:7.1f} "
                f"{row['kept_min']:6} {row['kept_max']:5} {row['images_without']:8}"
            )
    result = {"images": names, "sizes": [list(image.shape[:2]) for image in images], "rows": rows}
    Path(args.out).write_text(
        json.dumps(result | {"environment": environment() | {"opencv_threads": 1}}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
