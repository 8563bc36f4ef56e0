"""Every op's contest in one run, with this run's own ceilings, and the record.

    python benchmarks/bench_ops.py [--rounds 7] [--record FOLDER] [STEM ...]

Stems: linear_cross_entropy rms_norm rotary swiglu adamw attention. On a GPU the shapes are Llama-3.1-8B's, on a CPU
SmolLM2-135M's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch
from contest import Contest, ceilings, here, measure, show

from elo_engine.measure.environment import describe_environment
from elo_engine.model import ops

STEMS = ("linear_cross_entropy", "rms_norm", "rotary", "swiglu", "adamw", "attention")


def main() -> None:
    """Run the contests of this device, print their tables, keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stems", nargs="*", default=[], metavar="STEM")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", type=Path, help="folder to keep ops_DEVICE[_STEMS].json in")
    options = parser.parse_args()
    unknown = sorted(set(options.stems) - set(STEMS))
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(STEMS)}")
    device = here()
    how = ops.configure("auto", device)
    best = ceilings(device)
    print(
        f"{how}; matmul {best['matmul_flop_per_s'] / 1e12:.3f} TFLOP/s, copy {best['copy_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    environment, results, path = describe_environment(), [], None
    if options.record:
        options.record.mkdir(parents=True, exist_ok=True)
        path = options.record / f"ops_{'_'.join([device.type, *options.stems])}.json"
        if path.exists():
            sys.exit(f"{path} exists; records are never written over")
    for stem in options.stems or STEMS:
        contests: list[Contest] = importlib.import_module(f"bench_{stem}").CONTESTS
        for contest in contests:
            if contest.device != device.type:
                continue
            results.append(measure(contest, device, best, options.rounds))
            print(show(results[-1]), flush=True)
            if path is not None:  # after every contest: what was measured is kept whatever happens to the next
                record = {"kernels": how, "ceilings": best, "environment": environment, "contests": results}
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
