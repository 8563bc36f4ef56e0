"""Causal attention on the CPU: C++ in fp32, else torch's scaled_dot_product_attention by segment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.errors import UsageError
from elo_engine.model import cpu_native


@dataclass(frozen=True)
class AttentionChoice:
    """Where the C++ attention is taken, and why.

    Predicted at T = 512 and 2048 from 14 T^2 E / 2 FLOPs a head (forward 4, backward 10) at 120 GFLOP/s of the 190
    that two Zen 3 cores reach: 36 and 140 ms.
    Measured (torch 2.13, two cores, rounds taking turns, medians of 9 and 10 with both cores free, ms):
        T = 512: SDPA by segment 113, SDPA on equally long segments in one call 94, C++ 45
        T = 2048: SDPA 240, the twin 234, C++ 142
    On busy cores at T = 64: SDPA by segment 70, equal segments in one call 21.5, C++ 22: even there, and real
    documents are not equally long. So the C++ is taken for every length.
    Blocks on torch.bmm with heads folded were 1.1 times as fast as SDPA by segment at 512 and 0.8 times at 2048, at
    their best block size (64): not kept.
    """

    widest_head: int = 256  # a thread's scratch (5 blocks of 96 x width, 2 of 96 x 96) stays near 0.5 MiB


CHOICE = AttentionChoice()


class _Attention(torch.autograd.Function):
    """Saves the output and the log-sum-exp; the backward pass makes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int], scale: float
    ) -> Tensor:
        out_NHE, lse_HN = cpu_native.attention_forward(q_NHE, k_NKE, v_NKE, segment_starts, scale)
        ctx.save_for_backward(q_NHE, k_NKE, v_NKE, out_NHE, lse_HN)
        ctx.segment_starts, ctx.scale = segment_starts, scale
        return out_NHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_NHE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_NHE, k_NKE, v_NKE, out_NHE, lse_HN = ctx.saved_tensors
        grads = cpu_native.attention_backward(
            q_NHE, k_NKE, v_NKE, out_NHE, lse_HN, d_out_NHE.contiguous(), ctx.segment_starts, ctx.scale
        )
        return *grads, None, None


def attention(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int], scale: float) -> Tensor:
    """Causal attention inside each segment and none across; query head h reads kv head h // (H / K). -> [N, H, E]

    segment_starts: the segments' first tokens and then N, strictly growing from 0. Differentiable once.
    The C++ gives a segment's output and gradients the same bits whatever the other segments hold, and for any
    number of threads.

    Raises:
        UsageError: shapes or segment starts do not fit.
    """
    _check(q_NHE, k_NKE, v_NKE, segment_starts)
    if q_NHE.dtype == torch.float32 and q_NHE.shape[2] <= CHOICE.widest_head and cpu_native.has_attention():
        rows = [x if x[0].is_contiguous() and _spread(x) else x.contiguous() for x in (q_NHE, k_NKE, v_NKE)]
        return _Attention.apply(*rows, list(segment_starts), scale)  # type: ignore[no-any-return]
    return _by_segment(q_NHE, k_NKE, v_NKE, segment_starts, scale)


def _spread(rows: Tensor) -> bool:
    """Rows lie one after another, with or without gaps."""
    return rows.shape[0] < 2 or rows.stride(0) >= rows[0].numel()


def _by_segment(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int], scale: float) -> Tensor:
    """The twin. Equally long neighbours go in one call."""
    outputs = []
    H, E = q_NHE.shape[1:]
    run = 0
    lengths = [stop - start for start, stop in pairwise(segment_starts)]
    while run < len(lengths):
        stop = run
        while stop < len(lengths) and lengths[stop] == lengths[run]:
            stop += 1
        span = slice(segment_starts[run], segment_starts[stop])
        q, k, v = (x[span].unflatten(0, (stop - run, lengths[run])).transpose(1, 2) for x in (q_NHE, k_NKE, v_NKE))
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(mixed.transpose(1, 2).reshape(-1, H, E))
        run = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _check(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int]) -> None:
    shapes = f"q {tuple(q_NHE.shape)}, k {tuple(k_NKE.shape)}, v {tuple(v_NKE.shape)}"
    if q_NHE.ndim != 3 or k_NKE.ndim != 3 or k_NKE.shape != v_NKE.shape:
        raise UsageError(f"attention takes q [N, H, E] and k, v [N, K, E]; found {shapes}")
    N, H, E = q_NHE.shape
    K = k_NKE.shape[1]
    if k_NKE.shape[0] != N or k_NKE.shape[2] != E or K == 0 or H % K or N == 0 or E == 0:
        raise UsageError(f"attention needs the same N and E, none of them 0, and H a multiple of K; found {shapes}")
    if not q_NHE.dtype == k_NKE.dtype == v_NKE.dtype:
        raise UsageError(f"attention needs one dtype; found q {q_NHE.dtype}, k {k_NKE.dtype}, v {v_NKE.dtype}")
    grows = all(start < stop for start, stop in pairwise(segment_starts))
    if len(segment_starts) < 2 or segment_starts[0] != 0 or segment_starts[-1] != N or not grows:
        raise UsageError(f"segment starts must grow strictly from 0 to N = {N}; found {segment_starts[:8]}...")
