"""Rotary embedding (Su et al. 2021, arXiv 2104.09864), in place on the packed projection [q heads | k heads | v heads].

Shapes: N tokens, C = (H + 2K) E columns, H query and K key/value heads of width E. R is half the rotary width:
dimension i < R of a head turns with i + R (the half-split layout of the checkpoints), dimensions from 2R on stay
(partial rotary). In the kernels G counts the heads of a tile, and the dimensions that turn are two runs: low and high.
The tables cos and sin have one row of R fp32 values a position, and the kernel gathers the rows of its tokens itself,
because positions start again at each packed document. qkv is fp32 or bf16, the arithmetic fp32, with one rounding at
the store.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_like, check_rows, check_vector


@dataclass(frozen=True)
class RotaryLaunch:
    """Launch numbers; the ops are bound by memory, so they serve the loads. Not yet timed on a card.

    tile_elements: 2048. A program takes as many heads of one token as fill it (16 of E = 128), which share one row of
        cos and sin; four warps then have 16 values a thread, two 16-byte loads of bf16: 8 of low and 8 of high.
    max_warps: 4. The norm's backward then compiles to 80 to 128 registers on sm_80 to sm_120: four programs an SM.
    max_head_width: 2048, one head a tile; published heads are 64 to 512 wide.
    backward_programs: 512. The norm's backward programs walk over the tokens and each writes one row of gamma sums:
        four programs of four warps for each of the 128 SMs of a 4090, and about that for the 132 of an H200, all
        resident at once. A constant, not the card's SM count, so that the order of summation is every card's.
    """

    tile_elements: int = 2048
    max_warps: int = 4
    max_head_width: int = 2048
    backward_programs: int = 512

    def tile(self, heads: int, half: int, rest: int) -> tuple[dict[str, int], int]:
        """(block sizes, num_warps) for up to `heads` heads a token, of which 2 `half` + `rest` dimensions are read."""
        block_r = triton.next_power_of_2(half)
        block_s = triton.next_power_of_2(rest) if rest else 1
        width = triton.next_power_of_2(2 * block_r + (block_s if rest else 0))
        block_g = min(max(1, self.tile_elements // width), triton.next_power_of_2(heads))
        warps = min(self.max_warps, max(1, block_g * width // 512))
        return {"BLOCK_G": block_g, "BLOCK_R": block_r, "BLOCK_S": block_s}, warps


LAUNCH = RotaryLaunch()


@triton.jit
def angles(positions_ptr, token, cos_ptr, sin_ptr, stride_cos_p, stride_sin_p, P, R: tl.constexpr, col_R):
    """One token's row of both tables."""
    position = tl.load(positions_ptr + token).to(tl.int64)
    # A position outside the tables must not read foreign memory. It makes what turns NaN: the kernel cannot raise, and
    # a wrong angle would hide it.
    known = (position >= 0) & (position < P)
    row = tl.where(known, position, 0)
    poison = tl.where(known, 0.0, float("nan"))
    cos_R = tl.load(cos_ptr + row * stride_cos_p + col_R, mask=col_R < R, other=0.0) + poison
    sin_R = tl.load(sin_ptr + row * stride_sin_p + col_R, mask=col_R < R, other=0.0) + poison
    return cos_R[None, :], sin_R[None, :]


@triton.jit
def turn(low_GR, high_GR, cos_1R, sin_1R):
    return low_GR * cos_1R - high_GR * sin_1R, high_GR * cos_1R + low_GR * sin_1R


@triton.jit
def _rotary_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    stride_qkv_n,
    stride_cos_p,
    stride_sin_p,
    P,
    HEADS,
    E: tl.constexpr,
    R: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Tokens are counted in 64 bits: 350,000 of 6144 columns already pass 2^31 elements.
    token = tl.program_id(0).to(tl.int64)
    head_G = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    col_R = tl.arange(0, BLOCK_R)
    inside_GR = (head_G[:, None] < HEADS) & (col_R[None, :] < R)
    cos_1R, sin_1R = angles(positions_ptr, token, cos_ptr, sin_ptr, stride_cos_p, stride_sin_p, P, R, col_R)
    if INVERSE:
        sin_1R = -sin_1R
    # In place needs no barrier: only a tile of a single warp has fewer elements than threads, so no two warps read the
    # same element, and each is written only with what its reading gave.
    low_ptr_GR = qkv_ptr + token * stride_qkv_n + head_G[:, None] * E + col_R[None, :]
    low_GR = tl.load(low_ptr_GR, mask=inside_GR, other=0.0).to(tl.float32)
    high_GR = tl.load(low_ptr_GR + R, mask=inside_GR, other=0.0).to(tl.float32)
    low_GR, high_GR = turn(low_GR, high_GR, cos_1R, sin_1R)
    tl.store(low_ptr_GR, low_GR.to(qkv_ptr.dtype.element_ty), mask=inside_GR)
    tl.store(low_ptr_GR + R, high_GR.to(qkv_ptr.dtype.element_ty), mask=inside_GR)


def check_packed(
    qkv_NC: torch.Tensor,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    positions_N: torch.Tensor,
    q_heads: int,
    k_heads: int,
    head_width: int,
    **others: torch.Tensor,
) -> None:
    """What all launchers need of the packed matrix and of the tables; `others` share their device."""
    check_rows("qkv_NC", qkv_NC)
    rows, columns = qkv_NC.shape
    if min(q_heads, k_heads) < 1 or (q_heads + 2 * k_heads) * head_width != columns:
        raise ValueError(
            f"qkv_NC: {columns} columns, but {q_heads} query and twice {k_heads} key/value heads of {head_width} are"
            f" {(q_heads + 2 * k_heads) * head_width}; pass the packed projection [q | k | v] and its head numbers"
        )
    for table_name, table in (("cos_PR", cos_PR), ("sin_PR", sin_PR)):
        check_rows(table_name, table)
        if table.dtype != torch.float32:
            raise ValueError(f"{table_name}: dtype {table.dtype}; pass the angles' table in torch.float32")
    check_like("sin_PR", sin_PR, "cos_PR", cos_PR)
    if 2 * cos_PR.shape[1] > head_width:
        raise ValueError(
            f"cos_PR: {cos_PR.shape[1]} angles a position turn {2 * cos_PR.shape[1]} dimensions, but a head has"
            f" {head_width}; pass half the rotary width"
        )
    if rows and not len(cos_PR):
        raise ValueError("cos_PR: has no rows; pass one row of angles a position")
    if head_width > LAUNCH.max_head_width:
        raise ValueError(f"head_width: {head_width} exceeds {LAUNCH.max_head_width}, the widest tile")
    check_vector("positions_N", positions_N, rows)
    if positions_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"positions_N: dtype {positions_N.dtype}; convert the positions to torch.int64")
    check_device(qkv_NC=qkv_NC, cos_PR=cos_PR, sin_PR=sin_PR, positions_N=positions_N, **others)


def rotary_forward(
    qkv_NC: torch.Tensor,
    cos_PR: torch.Tensor,
    sin_PR: torch.Tensor,
    positions_N: torch.Tensor,
    *,
    q_heads: int,
    k_heads: int,
    head_width: int,
    inverse: bool = False,
) -> None:
    """Turn the q and k heads of `qkv_NC` IN PLACE: (low, high) -> (low cos - high sin, high cos + low sin).

    Args:
        qkv_NC: fp32 or bf16, [q heads | k heads | v heads]; rows contiguous, any row stride. The v heads and the
            dimensions from 2R on are neither read nor written.
        cos_PR, sin_PR: fp32, one row a position, R angles, 2R <= head_width; any row stride.
        positions_N: int64 or int32, the table row of each token. A position outside the table makes the dimensions that
            turn NaN in that token (no host synchronisation, so no exception).
        q_heads, k_heads, head_width: H, K, E.
        inverse: turn back, which is the gradient: d_qkv of the turned matrix becomes that of the matrix before.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    check_packed(qkv_NC, cos_PR, sin_PR, positions_N, q_heads, k_heads, head_width)
    rows, half = len(qkv_NC), cos_PR.shape[1]
    heads = q_heads + k_heads
    blocks, warps = LAUNCH.tile(heads, half, 0)
    if rows:
        with torch.cuda.device_of(qkv_NC):
            _rotary_kernel[(rows, triton.cdiv(heads, blocks["BLOCK_G"]))](
                qkv_NC,
                cos_PR,
                sin_PR,
                positions_N,
                qkv_NC.stride(0),
                cos_PR.stride(0),
                sin_PR.stride(0),
                len(cos_PR),
                heads,
                E=head_width,
                R=half,
                INVERSE=inverse,
                BLOCK_G=blocks["BLOCK_G"],
                BLOCK_R=blocks["BLOCK_R"],
                num_warps=warps,
            )
