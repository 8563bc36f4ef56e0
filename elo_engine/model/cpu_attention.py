"""Causal attention on the CPU: C++ in fp32, and in bf16 where a window or a soft-cap is at work; else torch's
scaled_dot_product_attention by segment.

Both know a sliding window (Longformer, Beltagy et al. 2020) and a soft cap on the scores (Gemma 2).
"""

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

    In bf16 torch's call uses the matrix units of processors that have them, but knows neither a window nor a cap.
    Measured, forward and backward (torch 2.13, two cores with AMX, best of 4, ms): torch, then C++ on fp32 copies
        8 heads of 64, 2 of keys, T = 2048: 137, 152; four segments of 512: 105, 126
        8 heads of 128, 4 of keys, T = 2048, window 256: 413, 178
        8 heads of 256, 4 of keys, T = 1024, window 512, cap 50: 771, 181
    So the C++ is taken where there is a window or a cap. A key head at a time the copies would be smaller by the number
    of key heads, but the last two then take 443 and 467: not kept.
    """

    widest_head: int = 256  # a thread's scratch (5 blocks of 96 x width, 2 of 96 x 96) stays near 0.5 MiB
    twin_chunk: int = 512  # queries: a mask or a head's scores are 512 x (511 + window) at a time; not timed


CHOICE = AttentionChoice()


class _Attention(torch.autograd.Function):
    """Saves the output and the log-sum-exp; the backward pass makes the probabilities again. What is not fp32 is copied
    to it for the length of a call, and what comes back is rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int], scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        ctx.how = (segment_starts, scale, window, softcap)
        out_NHE, lse_HN = cpu_native.attention_forward(q_NHE.float(), k_NKE.float(), v_NKE.float(), *ctx.how)
        out_NHE = out_NHE.to(q_NHE.dtype)
        ctx.save_for_backward(q_NHE, k_NKE, v_NKE, out_NHE, lse_HN)
        return out_NHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_NHE: Tensor) -> tuple[Tensor | None, ...]:
        q_NHE, k_NKE, v_NKE, out_NHE, lse_HN = ctx.saved_tensors
        grads = cpu_native.attention_backward(
            q_NHE.float(), k_NKE.float(), v_NKE.float(), out_NHE.float(), lse_HN, d_out_NHE.contiguous().float(),
            *ctx.how,
        )  # fmt: skip
        return *(grad.to(q_NHE.dtype) for grad in grads), None, None, None, None


def attention(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    segment_starts: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside each segment and none across; query head h reads kv head h // (H / K).

    Differentiable once. With a window the work grows with N * window. The C++ gives a segment's output and gradients
    the same bits whatever the other segments hold, and for any number of threads. Inside a segment, what a query may
    not see has a weight of exactly 0; a NaN or an infinity fewer than 12 tokens (in the twin, a chunk) beyond what it
    sees can still reach it, as 0 * NaN.

    Args:
        q_NHE: queries [N, H, E].
        k_NKE, v_NKE: keys and values [N, K, E], H a multiple of K.
        segment_starts: the segments' first tokens and then N, strictly growing from 0.
        scale: factor of the scores.
        window: a query sees the last `window` tokens of its segment, itself included; None: all before it.
        softcap: scores become softcap * tanh(score / softcap) before the softmax; None: they stay.
    Returns:
        [N, H, E]
    Raises:
        UsageError: shapes, dtypes or segment starts do not fit, the window is below 1 or the softcap not above 0.
    """
    _check(q_NHE, k_NKE, v_NKE, segment_starts)
    _check_scores(window, softcap)
    if _in_cpp(q_NHE, segment_starts, window, softcap):
        rows = [x if x[0].is_contiguous() and _spread(x) else x.contiguous() for x in (q_NHE, k_NKE, v_NKE)]
        return _Attention.apply(*rows, list(segment_starts), scale, window, softcap)  # type: ignore[no-any-return]
    return attention_by_segment(q_NHE, k_NKE, v_NKE, segment_starts, scale, window, softcap)


def _in_cpp(q_NHE: Tensor, segment_starts: list[int], window: int | None, softcap: float | None) -> bool:
    if q_NHE.shape[2] > CHOICE.widest_head or not cpu_native.has_attention():
        return False
    longest = max(stop - start for start, stop in pairwise(segment_starts))
    limited = softcap is not None or (window is not None and window < longest)
    return q_NHE.dtype == torch.float32 or (q_NHE.dtype == torch.bfloat16 and limited)


def _spread(rows: Tensor) -> bool:
    """Rows lie one after another, with or without gaps."""
    return rows.shape[0] < 2 or rows.stride(0) >= rows[0].numel()


def attention_by_segment(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int], scale: float,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """The twin, in torch alone and on any device. Equally long neighbours go in one call."""
    outputs = []
    H, E = q_NHE.shape[1:]
    run = 0
    lengths = [stop - start for start, stop in pairwise(segment_starts)]
    while run < len(lengths):
        stop, T = run, lengths[run]
        while stop < len(lengths) and lengths[stop] == T:
            stop += 1
        span = slice(segment_starts[run], segment_starts[stop])
        q, k, v = (x[span].unflatten(0, (stop - run, T)).transpose(1, 2) for x in (q_NHE, k_NKE, v_NKE))
        whole = window is None or window >= T
        if softcap is None:
            k, v = _heads_for(q, k, v, masked=not whole)
        if softcap is None and whole:
            if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # no query of the segment sees what is added
                q, k, v = (F.pad(x, (0, 0, 0, few_lengths(T) - T)) if few_lengths(T) > T else x for x in (q, k, v))
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )[:, :, :T]
        else:
            mixed = _by_chunk(q, k, v, scale, min(window or T, T), softcap)
        outputs.append(mixed.transpose(1, 2).reshape(-1, H, E))
        run = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _by_chunk(
    q_SHTE: Tensor, k_SKTE: Tensor, v_SKTE: Tensor, scale: float, window: int, softcap: float | None
) -> Tensor:
    """S segments of T tokens: each chunk of queries against the keys that its windows reach. -> [S, H, T, E]"""
    outputs = []
    T = q_SHTE.shape[2]
    for first in range(0, T, CHOICE.twin_chunk):
        last, oldest = min(first + CHOICE.twin_chunk, T), max(0, first + 1 - window)
        q, k, v = q_SHTE[:, :, first:last], k_SKTE[:, :, oldest:last], v_SKTE[:, :, oldest:last]
        seen_TT = _seen(first, oldest, last, q.device, window)
        if softcap is None:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen_TT, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            out = _capped(q, k, v, seen_TT, scale, softcap)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def few_lengths(T: int) -> int:
    """To how many tokens a segment of T is padded in bf16 on a CPU: to a multiple of 64, up to 128 of 16.

    torch's backward pass compiles and keeps code for every length that it meets there: 1024 odd lengths up to 2048 took
    2.4 GB of a process, these 38 take 70 MB (torch 2.13, a Xeon with AMX), and are faster: text of 100 to 700 tokens a
    document took 1.3 to 1.9 times as long without.
    """
    step = 64 if T > 128 else 16
    return -(-T // step) * step


def _heads_for(q_SHTE: Tensor, k_SKTE: Tensor, v_SKTE: Tensor, *, masked: bool) -> tuple[Tensor, Tensor]:
    """Keys and values as a fused kernel of torch takes them: as they are, or once for every query head."""
    each = q_SHTE.shape[1] // k_SKTE.shape[1]
    if each == 1 or not _one_for_each_query(q_SHTE, masked=masked):
        return k_SKTE, v_SKTE
    return k_SKTE.repeat_interleave(each, dim=1), v_SKTE.repeat_interleave(each, dim=1)


def _one_for_each_query(q_SHTE: Tensor, *, masked: bool) -> bool:
    """On a GPU only flash attention, which is for 16 bits, heads of up to 256 and no mask, takes fewer heads of keys
    than of queries. Its memory-efficient attention does not, and torch would make all T x T scores without a word
    (pytorch#154363).
    """
    flash = q_SHTE.dtype in (torch.bfloat16, torch.float16) and q_SHTE.shape[3] <= 256 and not masked
    return q_SHTE.device.type != "cpu" and not flash


def _seen(first: int, oldest: int, last: int, device: torch.device, window: int) -> Tensor:
    """Which of the keys [oldest, last) each of the queries [first, last) sees."""
    behind_TT = torch.arange(first, last, device=device)[:, None] - torch.arange(oldest, last, device=device)
    return (behind_TT >= 0) & (behind_TT < window)


def _capped(q: Tensor, k: Tensor, v: Tensor, seen_TT: Tensor, scale: float, softcap: float) -> Tensor:
    """Explicit scores in fp32 (float64 for float64), for no fused call of torch knows the cap."""
    wide = torch.promote_types(q.dtype, torch.float32)
    K = k.shape[1]
    # The query heads of a kv head lie side by side as a dimension of their own.
    scores = q.to(wide).unflatten(1, (K, -1)) @ k.to(wide).unsqueeze(2).mT * scale
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen_TT, -torch.inf).softmax(dim=-1)
    return (weights @ v.to(wide).unsqueeze(2)).flatten(1, 2).to(q.dtype)


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


def _check_scores(window: int | None, softcap: float | None) -> None:
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise UsageError(f"window must be an int of at least 1, or None for the whole segment; found {window!r}")
    if softcap is None:
        return
    # fp32 holds these and their inverses
    if not isinstance(softcap, (float, int)) or isinstance(softcap, bool) or not 1e-30 <= softcap <= 1e30:
        raise UsageError(f"softcap must be a number above 0 (1e-30 to 1e30), or None for no cap; found {softcap!r}")
