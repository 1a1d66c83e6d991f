"""Mutated config and label files in numbers: how many are read, how many refused in one line, how many do otherwise.

The mutations are those of ``tests/fuzz.py``, one process, seeded: half configs, the rest COCO, VOC and YOLO. Ends with
exit code 1 where a file raised another error, took longer than a second or had an unknown key that was accepted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from environment import environment

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.fuzz import Fuzzer  # noqa: E402


def main() -> int:
    """Run, print, write results/hostile.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="files (default 10000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), args.seed)
        fuzzer.run(args.count)
    result = {
        "count": args.count,
        "seed": args.seed,
        "outcomes": fuzzer.tried,
        "configs_with_unknown_key": fuzzer.unknown_keys,
        "strange": len(fuzzer.strangers),
        "slowest_s": round(fuzzer.slowest, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment(),
    }
    for kind, outcomes in fuzzer.tried.items():
        print(f"{kind:8} {outcomes['read']:6} read {outcomes['refused']:6} refused")
    print(f"{fuzzer.unknown_keys} configs with an unknown key, none accepted unless named below")
    print(
        f"{len(fuzzer.strangers)} strange outcomes, slowest file {fuzzer.slowest:.3f} s, {result['seconds']} s in all"
    )
    print("\n".join(fuzzer.strangers[:20]))
    (ROOT / "benchmarks/results/hostile.json").write_text(json.dumps(result, indent=1) + "\n")
    return 1 if fuzzer.strangers else 0


if __name__ == "__main__":
    sys.exit(main())
