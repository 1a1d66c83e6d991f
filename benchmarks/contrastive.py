"""Time and memory of the box-contrastive loss beside the form that loops over boxes.

2048 x 2048 candidates of width 256 in 100 boxes, forward and backward. The other form gathers for each box, once for
every key, that key and all negatives as one array (keys, 1 + negatives, D), as the reference does; it is written here
from that description. Each side runs in a process of its own; memory is the rise of the peak resident size over the
size before the loss, and, beside it, the bytes that autograd keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import environment
from torch import Tensor

from aligndet.losses import box_contrastive_loss

CANDIDATES, WIDTH, BOXES, TEMPERATURE = 2048, 256, 100, 0.5


def per_box_loss(query: Tensor, query_ids: Tensor, key: Tensor, key_ids: Tensor) -> Tensor:
    """The same value, one box after another, negatives copied for every query of the box."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    losses = []
    for box in query_ids.unique():
        own, keys = query[query_ids == box], key[key_ids == box]
        negatives = torch.cat([query[query_ids != box].detach(), key[key_ids != box]])
        copies = torch.cat([keys[:, None], negatives.expand(len(keys), -1, -1)], dim=1)  # [k, 1 + negatives, D]
        logits = torch.einsum("nd,kcd->nkc", own, copies) / TEMPERATURE
        truth = torch.zeros(len(own) * len(keys), dtype=torch.int64)
        losses.append(F.cross_entropy(logits.flatten(0, 1), truth))
    return torch.stack(losses).mean()


def whole_loss(query: Tensor, query_ids: Tensor, key: Tensor, key_ids: Tensor) -> Tensor:
    return box_contrastive_loss(query, query_ids, key, key_ids, temperature=TEMPERATURE)


def chunked_loss(query: Tensor, query_ids: Tensor, key: Tensor, key_ids: Tensor) -> Tensor:
    return box_contrastive_loss(query, query_ids, key, key_ids, temperature=TEMPERATURE, chunk=256)


SIDES = {"aligndet": whole_loss, "aligndet, chunk 256": chunked_loss, "per box": per_box_loss}


def measure(side: str, candidates: int) -> dict[str, float]:
    """Loss, seconds of forward and backward, GiB above the start, GiB kept between the two."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    query = torch.randn(candidates, WIDTH, requires_grad=True)
    key = torch.randn(candidates, WIDTH)
    query_ids, key_ids = torch.randint(0, BOXES, (2, candidates))
    SIDES[side](query[:64], query_ids[:64], key[:64], key_ids[:64]).backward()  # loads what is loaded once
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = SIDES[side](query, query_ids, key, key_ids)
    loss.backward()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loss": loss.item(),
        "seconds": seconds,
        "peak_gib": (peak - before) / 2**20,
        "kept_gib": sum(kept.values()) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help="measure one form in this process and print JSON")
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.candidates)))
        return
    results = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--side", side, "--candidates", str(args.candidates)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[side] = json.loads(output)
    for name, row in results.items():
        print(f"{name:20} {row['seconds']:7.2f} s  {row['peak_gib']:7.3f} GiB peak  {row['kept_gib']:7.3f} GiB kept")
    ratio = results["per box"]["peak_gib"] / results["aligndet"]["peak_gib"]
    print(f"memory ratio {ratio:.0f}")
    record = {
        "candidates": args.candidates,
        "width": WIDTH,
        "boxes": BOXES,
        "memory_ratio": ratio,
        "results": results,
        "environment": environment(),
    }
    (Path(__file__).parent / "results/contrastive.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
