"""Micro-benchmarks as contests: several ways of computing one thing, taking turns in one process.

A contest names its arms without building them, so that pytest-benchmark can run each alone (`pytest
benchmarks/bench_X.py`) and `elo bench kernels` can let them take turns (a noisy machine is then equally unfair to all)
and write a record. The floor is counted, not measured: operations over the matmul rate and bytes over the copy
bandwidth of the same run, the larger one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HEAD_START = 4_000_000  # cycles, 2 ms: the host queues the launches meanwhile, so that its own work is not timed
Run = Callable[[], object]


class Missing(Exception):
    """An arm cannot run here; the message says what it needs."""


@dataclass(frozen=True)
class Contest:
    """Ways of computing one thing.

    Attributes:
        make: device -> inputs, made once and shared by all arms.
        arms: name -> inputs -> what one turn runs; the first is what a user of torch would write, `engine` is this
        project.
        flops, bytes: what the result needs at least: operations of matrix products, bytes read and written once.
        device: "cpu" or "cuda", whose shapes these are.
    """

    name: str
    shape: str
    make: Callable[[torch.device], Any]
    arms: dict[str, Callable[[Any], Run]]
    flops: float = 0.0
    bytes: float = 0.0
    device: str = "cpu"


def here() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def engine_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on the CPU, as the engine itself chooses without bf16 units."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with its default settings, as a user would."""
    return torch.compile(function)  # type: ignore[no-any-return]


def forward_backward(function: Callable[..., Tensor], leaves: list[Tensor], d_out: Tensor | None) -> Run:
    """One turn: the op and the gradients of `leaves`; d_out None: the op returns the loss."""

    def run() -> object:
        return torch.autograd.grad(function(*leaves), leaves, d_out)

    return run


def _seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def ceilings(device: torch.device, rounds: int = 5) -> dict[str, float]:
    """This run's own best: FLOP/s of a large product in the engine's dtype, bytes/s of a large copy (read + write)."""
    n = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(n, n, device=device, dtype=engine_dtype(device)) for _ in range(2))
    source = torch.randn((1 << 30) // 4 if device.type == "cuda" else (1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    product = min(_seconds(lambda: torch.mm(left, right), device) for _ in range(rounds + 1))
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(rounds + 1))
    return {"matmul_flop_per_s": 2 * n**3 / product, "copy_bytes_per_s": 2 * source.nbytes / copy}


def _peak(run: Run, device: torch.device) -> int | None:
    """Bytes that a turn takes beyond its inputs, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(contest: Contest, device: torch.device, best: dict[str, float], rounds: int) -> dict[str, Any]:
    """One warm-up each, then `rounds` turns in shuffled order. An arm that cannot run is a row that says why."""
    torch.compiler.reset()  # a shape of another contest must not make this one's compilation dynamic
    inputs = contest.make(device)
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, build in contest.arms.items():
        try:
            runs[name] = build(inputs)
            runs[name]()
            rows[name] = {"peak_bytes": _peak(runs[name], device)}
        except Exception as error:
            if name == "engine":
                raise
            runs.pop(name, None)  # a peer that is not installed, has changed, or runs out of memory: a row that says so
            rows[name] = {"skipped": f"{type(error).__name__}: {error}".splitlines()[0]}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(sorted(runs), len(runs)):
            seconds[name].append(_seconds(runs[name], device))
    floor_s = max(contest.flops / best["matmul_flop_per_s"], contest.bytes / best["copy_bytes_per_s"])
    for name, values in seconds.items():
        median = statistics.median(values)
        rows[name] |= {
            "median_ms": median * 1e3, "p20_ms": _quantile(values, 0.2) * 1e3, "p80_ms": _quantile(values, 0.8) * 1e3,
            "floor_share": floor_s / median, "raw_ms": [round(value * 1e3, 4) for value in values],
        }  # fmt: skip
    return {
        "contest": contest.name, "shape": contest.shape, "flops": contest.flops, "bytes": contest.bytes,
        "floor_ms": floor_s * 1e3, "rounds": rounds, "arms": rows,
    }  # fmt: skip


def show(result: dict[str, Any]) -> str:
    """A contest's table, one line an arm."""
    lines = [f"{result['contest']} ({result['shape']}), floor {result['floor_ms']:.3f} ms"]
    engine = result["arms"].get("engine", {}).get("median_ms")
    for name, row in result["arms"].items():
        if "skipped" in row:
            lines.append(f"  {name:14} not run: {row['skipped']}")
            continue
        peak = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 2**30:6.2f} GiB"
        against = f"  {row['median_ms'] / engine:5.2f}x engine" if engine else ""
        spread = f"({row['p20_ms']:.3f} to {row['p80_ms']:.3f})"
        lines.append(
            f"  {name:14} {row['median_ms']:10.3f} ms {spread:24} {100 * row['floor_share']:5.1f} % of "
            f"floor{against}{peak}"
        )
    return "\n".join(lines)


def pytest_benchmark(contests: list[Contest]) -> Callable[..., None]:
    """The test function that runs each arm of each contest of this device under pytest-benchmark."""
    import pytest

    wanted = [contest for contest in contests if contest.device == here().type]
    cases = [pytest.param(contest, arm, id=f"{contest.name}-{arm}") for contest in wanted for arm in contest.arms]

    @pytest.mark.parametrize(("contest", "arm"), cases)
    def test(benchmark: Any, contest: Contest, arm: str) -> None:
        device = here()
        try:
            run = contest.arms[arm](contest.make(device))
            run()
        except Missing as error:
            pytest.skip(str(error))
        benchmark.group = contest.name
        benchmark.extra_info.update(flops=contest.flops, bytes=contest.bytes, shape=contest.shape)

        def turn() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(turn, rounds=5, warmup_rounds=1)

    return test
