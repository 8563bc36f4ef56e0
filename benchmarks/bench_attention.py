"""Causal attention by document, forward and backward. 14 E H (T + 1) / 2 FLOPs a token of a document of T tokens.

Predicted in fp32 on two AVX2 cores at 120 GFLOP/s for 2048 tokens, 9 heads of 64: 36 ms at 512, 140 ms at 2048.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.benchmarks.contest import Contest, Run, engine_dtype, pytest_benchmark
from elo_engine.model import cpu_native, ops
from elo_engine.model.layers import Packing


def _inputs(N: int, T: int, H: int, K: int, E: int) -> Callable[[torch.device], Any]:
    def make(device: torch.device) -> Any:
        torch.manual_seed(0)
        dtype = engine_dtype(device)
        leaves = [torch.randn(N, heads, E, device=device).to(dtype).requires_grad_() for heads in (H, K, K)]
        positions_N = torch.arange(T, device=device).repeat(N // T)
        return leaves, torch.randn(N, H, E, device=device).to(dtype), Packing(list(range(0, N + 1, T)), positions_N)

    return make


def _sdpa(window: int | None) -> Callable[[Any], Run]:
    def build(inputs: Any) -> Run:
        leaves, d_out_NHE, packing = inputs

        def function(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
            outputs = []
            for start, stop in pairwise(packing.segment_starts):
                q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (q_NHE, k_NKE, v_NKE))
                mask = None
                if window is not None:
                    age = torch.arange(stop - start, device=q.device)
                    age = age[:, None] - age[None]
                    mask = (age >= 0) & (age < window)
                out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
                outputs.append(out[0].transpose(0, 1))
            return torch.cat(outputs)

        return lambda: torch.autograd.grad(function(*leaves), leaves, d_out_NHE)

    return build


def _batched(inputs: Any) -> Run:
    """One call for all documents, where they are equally long: real ones are not."""
    leaves, d_out_NHE, packing = inputs

    def function(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (-1, packing.longest)).transpose(1, 2) for x in (q_NHE, k_NKE, v_NKE))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return lambda: torch.autograd.grad(function(*leaves), leaves, d_out_NHE)


def _engine(window: int | None, path: str = "auto") -> Callable[[Any], Run]:
    def build(inputs: Any) -> Run:
        leaves, d_out_NHE, packing = inputs
        scale = d_out_NHE.shape[-1] ** -0.5

        def run() -> object:
            with cpu_native.using(path):
                return torch.autograd.grad(ops.attention(*leaves, packing, scale, window), leaves, d_out_NHE)

        return run

    return build


def _contest(N: int, T: int, heads: tuple[int, int, int], device: str, window: int | None = None) -> Contest:
    H, K, E = heads
    arms = {"torch": _sdpa(window)}
    if window is None and T < N:
        arms["torch, one call"] = _batched
    if device == "cpu":
        arms["twin"] = _engine(window, "torch")
    arms["engine"] = _engine(window)
    seen = (T + 1) / 2 if window is None else (window * (window + 1) / 2 + (T - window) * window) / T
    name = f"attention, documents of {T}" + ("" if window is None else f", window {window}")
    size = 2 if device == "cuda" else 4
    least = size * N * E * (5 * H + 6 * K)
    shape = f"N {N}, H {H}, K {K}, E {E}"
    return Contest(name, shape, _inputs(N, T, *heads), arms, 14 * N * seen * E * H, least, device)


CONTESTS = [
    *[_contest(2048, T, (9, 3, 64), "cpu") for T in (64, 512, 2048)],
    _contest(2048, 2048, (9, 3, 64), "cpu", window=256),
    *[_contest(16384, T, (32, 8, 128), "cuda") for T in (1024, 8192)],
]

test_attention = pytest_benchmark(CONTESTS)
