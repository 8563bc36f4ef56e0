"""Every op's contest in one run, arms taking turns, with this run's own ceilings: `elo bench kernels`.

On a GPU the shapes are Llama-3.1-8B's, on a CPU SmolLM2-135M's. Under pytest-benchmark each arm runs alone
(`elo bench kernels --pytest`, or pytest with the files by name).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elo_engine.benchmarks.contest import Contest, ceilings, engine_dtype, here, measure, show
from elo_engine.errors import FailedError, UsageError

STEMS = ("linear_cross_entropy", "linear_fp8", "rms_norm", "rotary", "swiglu", "adamw", "attention")
LOADING = ("reader",)


def contests(stems: Sequence[str], device: str) -> list[Contest]:
    """The contests of these ops on a device, all by default.

    Raises:
        UsageError: no such op.
    """
    unknown = sorted(set(stems) - set(STEMS) - set(LOADING))
    if unknown:
        raise UsageError(f"no such op: {', '.join(unknown)}; there are {', '.join(STEMS)}")
    found: list[Contest] = []
    for stem in stems or STEMS:
        module = importlib.import_module(f"elo_engine.benchmarks.bench_{stem}")
        found += [contest for contest in module.CONTESTS if contest.device == device]
    return found


def measure_ops(stems: Sequence[str], rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the contests of this machine's device: a `kernels` result."""
    from elo_engine.measure.environment import device_name
    from elo_engine.model import ops

    device = here()
    chosen = contests(stems, device.type)
    how = ops.configure("auto", device)
    best = ceilings(device)
    matmul, copy = best["matmul_flop_per_s"] / 1e12, best["copy_bytes_per_s"] / 1e9
    say(f"{how}; matmul {matmul:.3f} TFLOP/s, copy {copy:.1f} GB/s")
    results = []
    for contest in chosen:
        results.append(measure(contest, device, best, rounds))
        say(show(results[-1]))
    return {
        "schema": 1, "theme": "kernels", "device": {"type": device.type, "name": device_name(device.type)},
        "dtype": "bf16" if "bfloat16" in str(engine_dtype(device)) else "fp32", "ceilings": best, "contests": results,
    }  # fmt: skip


def run_pytest(stems: Sequence[str], more: Sequence[str]) -> None:
    """The same contests under pytest-benchmark, every arm alone; `more` goes to pytest.

    Raises:
        UsageError: pytest-benchmark is not installed. FailedError: pytest says so.
    """
    for name in ("pytest", "pytest_benchmark"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"{name} is not installed; pip install 'elo-engine[bench]'")
    contests(stems, here().type)  # unknown names are refused before pytest starts
    files = [str(Path(__file__).with_name(f"bench_{stem}.py")) for stem in stems or STEMS]
    options = ["--import-mode=importlib", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    # a process of its own, and none of the settings of a pytest that may have started this one
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", *files, *options, *more], env=environment)
    if done.returncode:
        raise FailedError(f"pytest ended with status {done.returncode}")
