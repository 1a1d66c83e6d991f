"""Time and memory of the box-contrastive loss, beside the form that handles one box at a time.

2048 queries and 2048 keys of width 256 in 100 boxes, forward and backward, one thread by default. The per-box form sets
the m keys and k negatives of a box beside each of its n queries, [n, m + k, D], and keeps that for the backward pass;
negatives are all queries and keys of other boxes (method section 8, item 17).

Every form has a process of its own, which first runs it at a small size. "peak" is how far the resident memory of that
process rose in one pass above where it stood before, "saved" what autograd kept between forward and backward, each
storage counted once; the time is the median of further passes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import environment
from torch import Tensor

from aligndet.losses import box_contrastive_loss

CANDIDATES, WIDTH, BOXES, TEMPERATURE = 2048, 256, 100, 0.5
MIB = 2**20
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def per_box(query: Tensor, query_ids: Tensor, key: Tensor, key_ids: Tensor) -> Tensor:
    """The same loss, box by box, with similarities from explicit pairs of vectors."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    costs = []
    for box in query_ids[query_ids >= 0].unique():
        own, positive = query[query_ids == box], key[key_ids == box]
        if len(positive) == 0:
            continue
        negative = torch.cat([query[query_ids != box].detach(), key[key_ids != box]])
        beside = torch.cat([positive, negative]).repeat(len(own), 1, 1)  # [n, m + k, D]
        similarity = (own[:, None] * beside).sum(dim=2) / TEMPERATURE
        rejection = similarity[:, len(positive) :].logsumexp(dim=1, keepdim=True)
        costs.append(F.softplus(rejection - similarity[:, : len(positive)]).mean())
    return torch.stack(costs).mean()


# Form -> passes for the time: the slow one takes many seconds each.
FORMS: dict[str, tuple[Loss, int]] = {
    "per box": (per_box, 1),
    "aligndet": (partial(box_contrastive_loss, temperature=TEMPERATURE), 9),
    "aligndet, chunk 256": (partial(box_contrastive_loss, temperature=TEMPERATURE, chunk=256), 9),
}


def case(candidates: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(candidates, WIDTH, generator=generator) for _ in range(2))
    query_ids, key_ids = (torch.randint(0, BOXES, (candidates,), generator=generator) for _ in range(2))
    return query.requires_grad_(), query_ids, key, key_ids


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes there were; not ru_maxrss, which a process takes over from the one that started it."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def measure(form: Loss, rounds: int) -> dict[str, float]:
    form(*case(2 * BOXES)).backward()  # loads and allocates what is needed once
    inputs = case(CANDIDATES)
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    before = resident()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = form(*inputs)
    saved = sum(storages.values())  # before chunks, computed again in the backward pass, would be counted
    loss.backward()
    peak = peak_resident() - before
    gradient = inputs[0].grad
    assert gradient is not None
    row = {
        "loss": loss.item(),
        "gradient_norm": gradient.norm().item(),
        "peak_mib": peak / MIB,
        "saved_mib": saved / MIB,
    }
    del loss
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        form(*inputs).backward()
        seconds.append(time.perf_counter() - began)
    return row | {"seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, help="measure this form only and print JSON")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.form:
        print(json.dumps(measure(*FORMS[args.form])))
        return
    results = {}
    print(f"{'form':20} {'seconds':>8} {'peak MiB':>9} {'saved MiB':>9} {'loss':>9}")
    for form in FORMS:
        command = [sys.executable, __file__, "--form", form, "--threads", str(args.threads)]
        results[form] = row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(f"{form:20} {row['seconds']:8.3f} {row['peak_mib']:9.1f} {row['saved_mib']:9.1f} {row['loss']:9.6f}")
    ratios = {
        form: {name: results["per box"][name] / row[name] for name in ("seconds", "peak_mib", "saved_mib")}
        for form, row in results.items()
        if form != "per box"
    }
    for form, ratio in ratios.items():
        seconds, peak, saved = ratio.values()
        print(f"{form}: {seconds:.0f} x faster than per box, {peak:.0f} x less peak memory, {saved:.0f} x less saved")
    setting = {"queries": CANDIDATES, "keys": CANDIDATES, "width": WIDTH, "boxes": BOXES, "threads": args.threads}
    record = {"setting": setting, "forms": results, "per_box_over": ratios, "environment": environment()}
    path = Path(__file__).parent / "results/contrastive.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
