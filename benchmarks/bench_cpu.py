"""The CPU fast path against what a user of torch writes, at SmolLM2-135M's shapes.

pytest benchmarks/bench_cpu.py                  each candidate on its own, with pytest-benchmark's statistics
python benchmarks/bench_cpu.py [-r ROUNDS] [GROUP...]   candidates taking turns, so that a noisy machine is fair
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.model import cpu, cpu_native

N, D, V, H, K, E = 2048, 576, 49152, 9, 3, 64

Candidates = dict[str, Callable[[], object]]


def _eager_head(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Callable[[], object]:
    def run() -> None:
        hidden_ND.grad = head_VD.grad = None
        F.cross_entropy(F.linear(hidden_ND, head_VD).float(), labels_N, reduction="sum").backward()

    return run


def _on(path: str, run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with cpu_native.using(path):
            return run()

    return forced


def _paths() -> list[str]:
    return ["torch", "auto"] if cpu.HAS_CSRC else ["torch"]


def _head(trainable: bool) -> Candidates:
    torch.manual_seed(0)
    hidden_ND = torch.randn(N, D).requires_grad_()
    head_VD = (torch.randn(V, D) * 0.05).requires_grad_(trainable)
    labels_N = torch.randint(0, V, (N,))

    def ours() -> object:
        if trainable:
            return cpu.head_loss(hidden_ND, head_VD, labels_N, need_grads=True)
        return cpu.frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=True)

    return {"eager": _eager_head(hidden_ND, head_VD, labels_N)} | {path: _on(path, ours) for path in _paths()}


def _attention(length: int) -> Candidates:
    torch.manual_seed(0)
    q_NHE, k_NKE, v_NKE = (torch.randn(N, heads, E).requires_grad_() for heads in (H, K, K))
    d_out_NHE, starts = torch.randn(N, H, E), list(range(0, N + 1, length))

    def backward(out_NHE: Tensor) -> object:
        return torch.autograd.grad(out_NHE, (q_NHE, k_NKE, v_NKE), d_out_NHE)

    def sdpa() -> object:
        outputs = []
        for start, stop in pairwise(starts):
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_NHE, k_NKE, v_NKE))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return backward(torch.cat(outputs))

    def ours() -> object:
        return backward(cpu.attention(q_NHE, k_NKE, v_NKE, starts, E**-0.5))

    return {"sdpa": sdpa} | {path: _on(path, ours) for path in _paths()}


GROUPS: dict[str, Callable[[], Candidates]] = {
    "head-frozen": lambda: _head(trainable=False),
    "head-trainable": lambda: _head(trainable=True),
    "attention-64": lambda: _attention(64),
    "attention-512": lambda: _attention(512),
    "attention-2048": lambda: _attention(2048),
}
GEMM_FLOPS = {
    "head-frozen": 4 * N * D * V,
    "head-trainable": 6 * N * D * V,
    **{f"attention-{T}": 14 * N * (T + 1) // 2 * E * H for T in (64, 512, 2048)},
}


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in GROUPS for n in ("eager", "sdpa", "torch", "auto")])
def test_cpu(benchmark: Any, group: str, name: str) -> None:
    if (name == "eager") != group.startswith("head") and name in ("eager", "sdpa"):
        pytest.skip("not this group's baseline")
    candidates = GROUPS[group]()
    if name not in candidates:
        pytest.skip(f"no C++ extension: {cpu.CSRC_REASON}")
    benchmark.group = group
    benchmark.extra_info["gemm_flops"] = GEMM_FLOPS[group]
    benchmark.pedantic(candidates[name], rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("-r", "--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{cpu.instruction_set()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for group in options.groups:
        candidates = GROUPS[group]()
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(options.rounds + 1):  # the first turn warms up
            for name, run in candidates.items():
                begin = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - begin)
        base = statistics.median(next(iter(seconds.values())))
        for name, values in seconds.items():
            median = statistics.median(values)
            print(
                f"{group:15} {name:6} median {median * 1e3:8.1f} ms  fastest {min(values) * 1e3:8.1f} ms  "
                f"{GEMM_FLOPS[group] / median / 1e9:6.1f} GFLOP/s  {base / median:5.2f}x"
            )


if __name__ == "__main__":
    main()
