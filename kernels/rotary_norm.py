"""RMSNorm of each q and k head (Qwen3; Gemma 3 with 1 + gamma) and the rotary embedding behind it, in one pass over the
packed projection [q heads | k heads | v heads].

Shapes as in rotary.py; a head is three runs here, low (R), high (R) and rest (S = E - 2R dimensions that do not turn).
Norm and turn are in fp32 with one rounding at the store, where two kernels would round twice. Not in place: the
backward needs what was normed, and from it computes the inverse root mean squares again, so that nothing else is saved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .arguments import check_float, check_like, check_rows, check_vector
from .rotary import LAUNCH, angles, check_packed, turn


@triton.jit
def _heads(H, K, BLOCK_G: tl.constexpr):
    """The heads of the program's group: tiles of q heads come first, then of k heads, then of v heads, none mixed."""
    group = tl.program_id(1)
    q_groups = tl.cdiv(H, BLOCK_G)
    k_groups = tl.cdiv(K, BLOCK_G)
    is_q = group < q_groups
    is_v = group >= q_groups + k_groups
    first_group = tl.where(is_q, 0, tl.where(is_v, q_groups + k_groups, q_groups))
    first_head = tl.where(is_q, 0, tl.where(is_v, H + K, H))
    head_G = (group - first_group) * BLOCK_G + tl.arange(0, BLOCK_G)
    return first_head + head_G, head_G < tl.where(is_q, H, K), is_q, is_v


@triton.jit
def _scale(q_gamma_ptr, k_gamma_ptr, is_q, col, inside, UNIT_OFFSET: tl.constexpr):
    """A run of the gamma of the program's heads, as a row."""
    if is_q:
        gamma = tl.load(q_gamma_ptr + col, mask=inside, other=0.0).to(tl.float32)
    else:
        gamma = tl.load(k_gamma_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        gamma = 1.0 + gamma
    return gamma[None, :]


@triton.jit
def _rotary_norm_forward_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_gamma_ptr,
    k_gamma_ptr,
    out_ptr,
    stride_qkv_n,
    stride_cos_p,
    stride_sin_p,
    stride_out_n,
    P,
    H,
    K,
    eps,
    E: tl.constexpr,
    R: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head_G, inside_G, is_q, is_v = _heads(H, K, BLOCK_G)
    col_R = tl.arange(0, BLOCK_R)
    col_S = 2 * R + tl.arange(0, BLOCK_S)
    inside_GR = inside_G[:, None] & (col_R[None, :] < R)
    inside_GS = inside_G[:, None] & (col_S[None, :] < E)
    in_ptr_GR = qkv_ptr + token * stride_qkv_n + head_G[:, None] * E + col_R[None, :]
    in_ptr_GS = qkv_ptr + token * stride_qkv_n + head_G[:, None] * E + col_S[None, :]
    out_ptr_GR = out_ptr + token * stride_out_n + head_G[:, None] * E + col_R[None, :]
    out_ptr_GS = out_ptr + token * stride_out_n + head_G[:, None] * E + col_S[None, :]
    low_GR = tl.load(in_ptr_GR, mask=inside_GR, other=0.0).to(tl.float32)
    high_GR = tl.load(in_ptr_GR + R, mask=inside_GR, other=0.0).to(tl.float32)
    if 2 * R < E:
        rest_GS = tl.load(in_ptr_GS, mask=inside_GS, other=0.0).to(tl.float32)
    if not is_v:
        square_G = tl.sum(low_GR * low_GR + high_GR * high_GR, axis=1)
        if 2 * R < E:
            square_G += tl.sum(rest_GS * rest_GS, axis=1)
        rstd_G1 = tl.rsqrt(square_G / E + eps)[:, None]
        cos_1R, sin_1R = angles(positions_ptr, token, cos_ptr, sin_ptr, stride_cos_p, stride_sin_p, P, R, col_R)
        low_GR *= rstd_G1 * _scale(q_gamma_ptr, k_gamma_ptr, is_q, col_R, col_R < R, UNIT_OFFSET)
        high_GR *= rstd_G1 * _scale(q_gamma_ptr, k_gamma_ptr, is_q, R + col_R, col_R < R, UNIT_OFFSET)
        low_GR, high_GR = turn(low_GR, high_GR, cos_1R, sin_1R)
        if 2 * R < E:
            rest_GS *= rstd_G1 * _scale(q_gamma_ptr, k_gamma_ptr, is_q, col_S, col_S < E, UNIT_OFFSET)
    tl.store(out_ptr_GR, low_GR.to(out_ptr.dtype.element_ty), mask=inside_GR)
    tl.store(out_ptr_GR + R, high_GR.to(out_ptr.dtype.element_ty), mask=inside_GR)
    if 2 * R < E:
        tl.store(out_ptr_GS, rest_GS.to(out_ptr.dtype.element_ty), mask=inside_GS)


@triton.jit
def _rotary_norm_backward_kernel(
    d_out_ptr,
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_gamma_ptr,
    k_gamma_ptr,
    d_qkv_ptr,
    d_gamma_parts_ptr,
    stride_d_out_n,
    stride_qkv_n,
    stride_cos_p,
    stride_sin_p,
    stride_d_qkv_n,
    N,
    P,
    H,
    K,
    eps,
    E: tl.constexpr,
    R: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    NEED_D_QKV: tl.constexpr,
    NEED_D_GAMMA: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    head_G, inside_G, is_q, is_v = _heads(H, K, BLOCK_G)
    col_R = tl.arange(0, BLOCK_R)
    col_S = 2 * R + tl.arange(0, BLOCK_S)
    inside_GR = inside_G[:, None] & (col_R[None, :] < R)
    inside_GS = inside_G[:, None] & (col_S[None, :] < E)
    at_GR = head_G[:, None] * E + col_R[None, :]
    at_GS = head_G[:, None] * E + col_S[None, :]
    # One sum per head of the tile, folded once at the end: folding in the loop would synchronise the block every time.
    d_gamma_low_GR = tl.zeros([BLOCK_G, BLOCK_R], dtype=tl.float32)
    d_gamma_high_GR = tl.zeros([BLOCK_G, BLOCK_R], dtype=tl.float32)
    d_gamma_rest_GS = tl.zeros([BLOCK_G, BLOCK_S], dtype=tl.float32)
    if NEED_D_QKV:
        gamma_low_1R = _scale(q_gamma_ptr, k_gamma_ptr, is_q, col_R, col_R < R, UNIT_OFFSET)
        gamma_high_1R = _scale(q_gamma_ptr, k_gamma_ptr, is_q, R + col_R, col_R < R, UNIT_OFFSET)
        if 2 * R < E:
            gamma_rest_1S = _scale(q_gamma_ptr, k_gamma_ptr, is_q, col_S, col_S < E, UNIT_OFFSET)
    for index in range(tl.program_id(0), N, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        d_out_row_ptr = d_out_ptr + token * stride_d_out_n
        d_low_GR = tl.load(d_out_row_ptr + at_GR, mask=inside_GR, other=0.0).to(tl.float32)
        d_high_GR = tl.load(d_out_row_ptr + at_GR + R, mask=inside_GR, other=0.0).to(tl.float32)
        if 2 * R < E:
            d_rest_GS = tl.load(d_out_row_ptr + at_GS, mask=inside_GS, other=0.0).to(tl.float32)
        if not is_v:
            row_ptr = qkv_ptr + token * stride_qkv_n
            low_GR = tl.load(row_ptr + at_GR, mask=inside_GR, other=0.0).to(tl.float32)
            high_GR = tl.load(row_ptr + at_GR + R, mask=inside_GR, other=0.0).to(tl.float32)
            square_G = tl.sum(low_GR * low_GR + high_GR * high_GR, axis=1)
            if 2 * R < E:
                rest_GS = tl.load(row_ptr + at_GS, mask=inside_GS, other=0.0).to(tl.float32)
                square_G += tl.sum(rest_GS * rest_GS, axis=1)
            rstd_G1 = tl.rsqrt(square_G / E + eps)[:, None]
            low_GR *= rstd_G1
            high_GR *= rstd_G1
            cos_1R, sin_1R = angles(positions_ptr, token, cos_ptr, sin_ptr, stride_cos_p, stride_sin_p, P, R, col_R)
            d_low_GR, d_high_GR = turn(d_low_GR, d_high_GR, cos_1R, -sin_1R)
            if NEED_D_GAMMA:
                d_gamma_low_GR += d_low_GR * low_GR
                d_gamma_high_GR += d_high_GR * high_GR
            if 2 * R < E:
                rest_GS *= rstd_G1
                if NEED_D_GAMMA:
                    d_gamma_rest_GS += d_rest_GS * rest_GS
            if NEED_D_QKV:
                d_low_GR *= gamma_low_1R
                d_high_GR *= gamma_high_1R
                along_G = tl.sum(d_low_GR * low_GR + d_high_GR * high_GR, axis=1)
                if 2 * R < E:
                    d_rest_GS *= gamma_rest_1S
                    along_G += tl.sum(d_rest_GS * rest_GS, axis=1)
                along_G1 = (along_G / E)[:, None]
                d_low_GR = (d_low_GR - low_GR * along_G1) * rstd_G1
                d_high_GR = (d_high_GR - high_GR * along_G1) * rstd_G1
                if 2 * R < E:
                    d_rest_GS = (d_rest_GS - rest_GS * along_G1) * rstd_G1
        if NEED_D_QKV:
            d_row_ptr = d_qkv_ptr + token * stride_d_qkv_n
            tl.store(d_row_ptr + at_GR, d_low_GR.to(d_qkv_ptr.dtype.element_ty), mask=inside_GR)
            tl.store(d_row_ptr + at_GR + R, d_high_GR.to(d_qkv_ptr.dtype.element_ty), mask=inside_GR)
            if 2 * R < E:
                tl.store(d_row_ptr + at_GS, d_rest_GS.to(d_qkv_ptr.dtype.element_ty), mask=inside_GS)
    if NEED_D_GAMMA and not is_v:
        groups = tl.cdiv(H, BLOCK_G) + tl.cdiv(K, BLOCK_G)
        part_ptr = d_gamma_parts_ptr + (tl.program_id(0) * groups + tl.program_id(1)) * E
        tl.store(part_ptr + col_R, tl.sum(d_gamma_low_GR, axis=0), mask=col_R < R)
        tl.store(part_ptr + R + col_R, tl.sum(d_gamma_high_GR, axis=0), mask=col_R < R)
        if 2 * R < E:
            tl.store(part_ptr + col_S, tl.sum(d_gamma_rest_GS, axis=0), mask=col_S < E)


def _check_gammas(q_gamma_E: torch.Tensor, k_gamma_E: torch.Tensor, head_width: int) -> None:
    for name, gamma_E in (("q_gamma_E", q_gamma_E), ("k_gamma_E", k_gamma_E)):
        check_float(name, gamma_E)
        check_vector(name, gamma_E, head_width)


def _norm_tile(q_heads: int, k_heads: int, head_width: int, half: int) -> tuple[dict[str, Any], int, int]:
    """(compile-time numbers and num_warps, groups of q heads, groups of k heads)."""
    blocks, warps = LAUNCH.tile(max(q_heads, k_heads), half, head_width - 2 * half)
    numbers = {"E": head_width, "R": half, **blocks, "num_warps": warps}
    return numbers, triton.cdiv(q_heads, blocks["BLOCK_G"]), triton.cdiv(k_heads, blocks["BLOCK_G"])


def rotary_norm_forward(
    qkv_NC: torch.Tensor,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    positions_N: torch.Tensor,
    q_gamma_E: torch.Tensor,
    k_gamma_E: torch.Tensor,
    eps: float,
    *,
    q_heads: int,
    k_heads: int,
    head_width: int,
    unit_offset: bool = False,
) -> torch.Tensor:
    """RMSNorm of each q and k head over its own E dimensions, then the turn of `rotary_forward`; v heads are copied.

    Args:
        qkv_NC, cos_PR, sin_PR, positions_N, q_heads, k_heads, head_width: as in `rotary_forward`, but qkv is only read.
        q_gamma_E, k_gamma_E: fp32 or bf16, one factor a dimension, shared by all q heads and by all k heads.
        eps: added to the mean square of a head.
        unit_offset: multiply by 1 + gamma, a sum in fp32 (Gemma 3).

    Returns:
        out_NC in the type of qkv, contiguous. The backward needs qkv, so it is not overwritten.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    _check_gammas(q_gamma_E, k_gamma_E, head_width)
    gammas = {"q_gamma_E": q_gamma_E, "k_gamma_E": k_gamma_E}
    check_packed(qkv_NC, cos_PR, sin_PR, positions_N, q_heads, k_heads, head_width, **gammas)
    numbers, q_groups, k_groups = _norm_tile(q_heads, k_heads, head_width, cos_PR.shape[1])
    out_NC = torch.empty(qkv_NC.shape, dtype=qkv_NC.dtype, device=qkv_NC.device)
    if len(qkv_NC):
        with torch.cuda.device_of(qkv_NC):
            _rotary_norm_forward_kernel[(len(qkv_NC), q_groups + 2 * k_groups)](
                qkv_NC,
                cos_PR,
                sin_PR,
                positions_N,
                q_gamma_E,
                k_gamma_E,
                out_NC,
                qkv_NC.stride(0),
                cos_PR.stride(0),
                sin_PR.stride(0),
                out_NC.stride(0),
                len(cos_PR),
                q_heads,
                k_heads,
                eps,
                UNIT_OFFSET=unit_offset,
                **numbers,
            )
    return out_NC


def rotary_norm_backward(
    d_out_NC: torch.Tensor,
    qkv_NC: torch.Tensor,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    positions_N: torch.Tensor,
    q_gamma_E: torch.Tensor,
    k_gamma_E: torch.Tensor,
    eps: float,
    *,
    q_heads: int,
    k_heads: int,
    head_width: int,
    unit_offset: bool = False,
    need_d_qkv: bool = True,
    need_d_gamma: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `rotary_norm_forward`; what is not asked for is neither computed nor allocated.

    Args:
        d_out_NC: gradient of out, shape and type of qkv; rows contiguous, any row stride.
        need_d_qkv, need_d_gamma: which gradients to make; both gammas' or neither's.
        All others: the forward's arguments. The inverse root mean squares are computed again from qkv.

    Returns:
        d_qkv_NC in the type of qkv, contiguous, and d_q_gamma_E and d_k_gamma_E in fp32 whatever the type of gamma;
        None in place of what is not asked for.
        The gammas' gradients are summed in a fixed order, without atomics: equal inputs give equal bits on every run.

    Raises:
        ValueError: wrong shape, type, strides or device, or nothing asked for.
    """
    if not (need_d_qkv or need_d_gamma):
        raise ValueError("rotary_norm_backward: no gradient is asked for; do not call it")
    check_rows("d_out_NC", d_out_NC)
    check_like("d_out_NC", d_out_NC, "qkv_NC", qkv_NC)
    _check_gammas(q_gamma_E, k_gamma_E, head_width)
    others = {"q_gamma_E": q_gamma_E, "k_gamma_E": k_gamma_E, "d_out_NC": d_out_NC}
    check_packed(qkv_NC, cos_PR, sin_PR, positions_N, q_heads, k_heads, head_width, **others)
    numbers, q_groups, k_groups = _norm_tile(q_heads, k_heads, head_width, cos_PR.shape[1])
    # The v heads' gradient is a copy, and no part of gamma's.
    groups = q_groups + (2 if need_d_qkv else 1) * k_groups
    programs = min(len(qkv_NC), max(1, LAUNCH.backward_programs // groups))
    device = qkv_NC.device
    d_qkv_NC = torch.empty(qkv_NC.shape, dtype=qkv_NC.dtype, device=device) if need_d_qkv else None
    parts_shape = (programs, q_groups + k_groups, head_width)
    parts_PGE = torch.empty(parts_shape, dtype=torch.float32, device=device) if need_d_gamma else None
    if len(qkv_NC):
        with torch.cuda.device_of(qkv_NC):
            _rotary_norm_backward_kernel[(programs, groups)](
                d_out_NC,
                qkv_NC,
                cos_PR,
                sin_PR,
                positions_N,
                q_gamma_E,
                k_gamma_E,
                d_qkv_NC,
                parts_PGE,
                d_out_NC.stride(0),
                qkv_NC.stride(0),
                cos_PR.stride(0),
                sin_PR.stride(0),
                0 if d_qkv_NC is None else d_qkv_NC.stride(0),
                len(qkv_NC),
                len(cos_PR),
                q_heads,
                k_heads,
                eps,
                UNIT_OFFSET=unit_offset,
                NEED_D_QKV=need_d_qkv,
                NEED_D_GAMMA=need_d_gamma,
                **numbers,
            )
    if parts_PGE is None:
        return d_qkv_NC, None, None
    return d_qkv_NC, parts_PGE[:, :q_groups].sum(dim=(0, 1)), parts_PGE[:, q_groups:].sum(dim=(0, 1))
