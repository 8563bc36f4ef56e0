"""Rounding to 8-bit floats, and the product of what was rounded.

Shapes: N rows, D columns. A row, or a whole matrix, is divided by a scale and rounded to nearest even: to e4m3 (three
bits of mantissa, up to 448 = 1.75 * 2^8) or e5m2 (two, up to 57344 = 1.75 * 2^15). The scale is the smallest power of
two that fits the largest number in (an option of torchao as well), so that dividing by it rounds nothing: only numbers
far below the largest lose bits, in e4m3 those below 2^-15 of it.

The products are torch._scaled_mm's: cuBLASLt's or CUTLASS's. On Ada and Hopper those multiply rows by rows; where a
product is over another dimension its operand is written the other way around. A matrix is rounded both ways in one
pass. Counted for bf16 rows of D: 2 D read twice, the second time from L2, and D written. A matrix: its largest number
is torch's norm (2 bytes an element), the rounding reads it again and writes 1 or 2. Not yet timed on a card.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_rows, check_vector

# The exponent of the largest number of each type; its mantissa is 1.75 in both.
EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
Layouts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
ALIGN = 16  # elements: inner dimensions and rows of results are multiples, as the libraries of products want them


@dataclass(frozen=True)
class QuantizeLaunch:
    """Launch numbers; both kernels are bound by memory. Not yet timed on a card.

    block_d: 2048 columns over num_warps: 8 (256 threads) are 8 bf16 values a thread, one 16-byte load.
    tile_n, tile_d: 128 x 64 elements a program: 128 bytes of a row of bf16 read at once, and 128 bytes of a row of the
        transposed matrix written at once; 32 elements a thread.
    """

    block_d: int = 2048
    num_warps: int = 8
    tile_n: int = 128
    tile_d: int = 64


LAUNCH = QuantizeLaunch()


@triton.jit
def _power_of_two(largest, EXPONENT: tl.constexpr):
    # The smallest power of two that brings `largest` below 1.75 * 2^EXPONENT, and its inverse, by the bits: adding
    # 0x1fffff carries into the exponent just where the mantissa is above 1.75. Neither overflows; what is not finite
    # makes NaN of all that it scales.
    bits = largest.to(tl.int32, bitcast=True)
    power = ((bits + 0x1FFFFF) >> 23) - 127 - EXPONENT
    power = tl.minimum(tl.maximum(power, -100), 120)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < float("inf"), scale, float("nan")), inverse


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    outliers_ptr,
    shift_ptr,
    stride_x_n,
    stride_q_n,
    D,
    J,
    EXPONENT: tl.constexpr,
    SHIFTED: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # Rows are counted in 64 bits: 20,000 rows of 128256 already pass 2^31 elements.
    row = tl.program_id(0).to(tl.int64)
    largest_D = tl.zeros([BLOCK_D], dtype=tl.float32)
    # A maximum passes NaN over; it would be seen as NaN in what is written, but infinity must not be passed over.
    for start in range(0, D, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        x_D = tl.load(x_ptr + row * stride_x_n + col_D, mask=col_D < D, other=0.0).to(tl.float32)
        if SHIFTED:
            x_D -= tl.load(shift_ptr + col_D, mask=col_D < D, other=0.0)
        largest_D = tl.maximum(largest_D, tl.abs(x_D))
    scale, inverse = _power_of_two(tl.max(largest_D, axis=0), EXPONENT)
    tl.store(scale_ptr + row, scale)
    for start in range(0, D, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        x_D = tl.load(x_ptr + row * stride_x_n + col_D, mask=col_D < D, other=0.0).to(tl.float32)
        if SHIFTED:
            x_D -= tl.load(shift_ptr + col_D, mask=col_D < D, other=0.0)
        tl.store(q_ptr + row * stride_q_n + col_D, (x_D * inverse).to(q_ptr.dtype.element_ty), mask=col_D < D)
    if BLOCK_J > 0:
        at_J = tl.arange(0, BLOCK_J)
        col_J = tl.load(outliers_ptr + at_J, mask=at_J < J, other=0)
        x_J = tl.load(x_ptr + row * stride_x_n + col_J, mask=at_J < J, other=0.0).to(tl.float32)
        if SHIFTED:
            x_J -= tl.load(shift_ptr + col_J, mask=at_J < J, other=0.0)
        scaled_J = x_J * inverse
        q_J = scaled_J.to(q_ptr.dtype.element_ty)
        rest_J = (scaled_J - q_J.to(tl.float32)).to(q_ptr.dtype.element_ty)
        behind_ptr = q_ptr + row * stride_q_n + D + at_J
        tl.store(behind_ptr, q_J if LEFT else rest_J, mask=at_J < J)
        tl.store(behind_ptr + J, rest_J if LEFT else q_J, mask=at_J < J)


@triton.jit
def _quantize_tensor_kernel(
    x_ptr,
    largest_ptr,
    q_ptr,
    transposed_ptr,
    scale_ptr,
    stride_x_n,
    stride_q_n,
    stride_transposed_d,
    N,
    D,
    EXPONENT: tl.constexpr,
    PLAIN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row_N = (tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)[:, None]
    col_D = (tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)).to(tl.int64)[None, :]
    inside = (row_N < N) & (col_D < D)
    scale, inverse = _power_of_two(tl.load(largest_ptr), EXPONENT)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_ptr, scale)
    x_ND = tl.load(x_ptr + row_N * stride_x_n + col_D, mask=inside, other=0.0).to(tl.float32)
    scaled_ND = x_ND * inverse
    if PLAIN:
        tl.store(q_ptr + row_N * stride_q_n + col_D, scaled_ND.to(q_ptr.dtype.element_ty), mask=inside)
    if TRANSPOSED:
        # Its rows are padded with zeros to their stride, over which a product may be taken.
        written = (row_N < stride_transposed_d) & (col_D < D)
        at = transposed_ptr + col_D * stride_transposed_d + row_N
        tl.store(at, scaled_ND.to(transposed_ptr.dtype.element_ty), mask=written)


@triton.jit
def _quantize_columns_kernel(
    x_ptr,
    shift_ptr,
    least_ptr,
    most_ptr,
    q_ptr,
    scale_ptr,
    stride_x_n,
    stride_q_d,
    N,
    D,
    EXPONENT: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row_N = (tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)).to(tl.int64)[:, None]
    col_D = (tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)).to(tl.int64)[None, :]
    inside, there = (row_N < N) & (col_D < D), col_D < D
    shift_D = tl.load(shift_ptr + col_D, mask=there, other=0.0)
    # Subtraction rounds in order, so the largest difference is that of the column's least or largest number.
    above_D = tl.load(most_ptr + col_D, mask=there, other=0.0) - shift_D
    below_D = shift_D - tl.load(least_ptr + col_D, mask=there, other=0.0)
    # A NaN is in both, and would be passed over by a maximum alone.
    scale_D, inverse_D = _power_of_two(tl.where(above_D > below_D, above_D, below_D), EXPONENT)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + col_D, scale_D, mask=there)
    x_ND = tl.load(x_ptr + row_N * stride_x_n + col_D, mask=inside, other=0.0).to(tl.float32)
    scaled_ND = (x_ND - shift_D) * inverse_D
    tl.store(q_ptr + col_D * stride_q_d + row_N, scaled_ND.to(q_ptr.dtype.element_ty), mask=inside)


def _round_up(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def quantize_rows(
    x_ND: torch.Tensor,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    out_NC: torch.Tensor | None = None,
    outliers_J: torch.Tensor | None = None,
    left: bool = True,
    shift_D: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row with a scale of its own.

    Args:
        x_ND: fp32 or bf16; rows contiguous, any row stride.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        out_NC: where to write the rows; contiguous rows, any row stride.
        outliers_J: int64, columns whose rest, what rounding left over, is rounded too and set behind the row. They are
            read once more, 2 J gathered and 2 J written a row.
        left: of a product's operands; behind a row are q and then the rest of those columns, in the right operand the
            rest and then q.
        shift_D: fp32, taken off every row first.

    Returns:
        q_NC in `dtype`, C = D or D + 2 J, and scale_N1 in fp32: x is about q * scale, off by at most 2^-4 of it in e4m3
        and 2^-3 in e5m2. A row with a number that is not finite has NaN there, or as its scale.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    check_rows("x_ND", x_ND)
    _check_type(dtype)
    (rows, width), device = x_ND.shape, x_ND.device
    chosen = 0 if outliers_J is None else len(outliers_J)
    shape = rows, width + 2 * chosen
    q_NC = torch.empty(shape, dtype=dtype, device=device) if out_NC is None else out_NC
    if q_NC.shape != shape or q_NC.dtype != dtype or (width > 1 and q_NC.stride(1) != 1):
        raise ValueError(f"out_NC: {tuple(q_NC.shape)} of {q_NC.dtype}; pass {shape} of {dtype}, rows contiguous")
    given = {"outliers_J": outliers_J, "shift_D": shift_D}
    check_device(x_ND=x_ND, out_NC=q_NC, **{name: tensor for name, tensor in given.items() if tensor is not None})
    scale_N1 = torch.empty((rows, 1), dtype=torch.float32, device=device)
    if rows:
        with torch.cuda.device_of(x_ND):
            _quantize_rows_kernel[(rows,)](
                x_ND, q_NC, scale_N1, outliers_J, shift_D, x_ND.stride(0), q_NC.stride(0), width, chosen,
                EXPONENT=EXPONENT[dtype], SHIFTED=shift_D is not None, LEFT=left, BLOCK_D=LAUNCH.block_d,
                BLOCK_J=triton.next_power_of_2(chosen) if chosen else 0, num_warps=LAUNCH.num_warps,
            )  # fmt: skip
    return q_NC, scale_N1


def quantize_tensor(
    x_ND: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, *, plain: bool = True, transposed: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Round a matrix with one scale, as it is, the other way around, or both.

    Args:
        x_ND: fp32 or bf16; rows contiguous, any row stride.
        plain, transposed: which to write; the other is None.

    Returns:
        q_ND [N, D]; q_DN [D, N rounded up to a multiple of 16], zeros in the last columns; the scale, fp32 of no
        dimension. NaN where x holds a number that is not finite.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    check_rows("x_ND", x_ND)
    _check_type(dtype)
    check_device(x_ND=x_ND)
    (rows, width), device = x_ND.shape, x_ND.device
    q_ND = torch.empty((rows, width), dtype=dtype, device=device) if plain else None
    q_DN = torch.empty((width, _round_up(rows)), dtype=dtype, device=device) if transposed else None
    scale = torch.ones((), dtype=torch.float32, device=device)
    if rows and (plain or transposed):
        largest = torch.linalg.vector_norm(x_ND, torch.inf).float()
        with torch.cuda.device_of(x_ND):
            _quantize_tensor_kernel[(triton.cdiv(_round_up(rows), LAUNCH.tile_n), triton.cdiv(width, LAUNCH.tile_d))](
                x_ND, largest, q_ND, q_DN, scale, x_ND.stride(0), width, _round_up(rows), rows, width,
                EXPONENT=EXPONENT[dtype], PLAIN=plain, TRANSPOSED=transposed, TILE_N=LAUNCH.tile_n,
                TILE_D=LAUNCH.tile_d, num_warps=LAUNCH.num_warps,
            )  # fmt: skip
    return q_ND, q_DN, scale


def quantize_both_layouts(
    head_VD: torch.Tensor,
    mean_D: torch.Tensor,
    outliers_J: torch.Tensor,
    extremes: tuple[torch.Tensor, torch.Tensor],
    *,
    out: Layouts | None = None,
) -> Layouts:
    """A head less `mean_D` (fp32) as e4m3 rows of the vocabulary, the right operand of the logits, and as e4m3 rows of
    the width, each row with its own scale.

    Args:
        outliers_J: as of `quantize_rows`; the rows of the vocabulary have them.
        extremes: the least and the largest number of each column of the head, fp32 [D] each, which do not change with
            `mean_D`: with them the columns need no pass that looks for the largest difference.
        out: what an earlier call with as many rows, columns and outliers returned, to be written over.

    Returns:
        rows_VC and scale_V1, C = D + 2 J; columns_DV and scale_D1; V rounded up to a multiple of 16 with zeros.

    Two launches that read the head and write a byte for each number: of 128256 x 4096 3.2 GB, 0.75 ms at 4.3 TB/s; not
    timed on a card.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    check_rows("head_VD", head_VD)
    vocabulary, width = head_VD.shape
    least_D, most_D = extremes
    for name, vector in (("mean_D", mean_D), ("least_D", least_D), ("most_D", most_D)):
        check_vector(name, vector, width)
    check_device(head_VD=head_VD, mean_D=mean_D, least_D=least_D, most_D=most_D)
    rows_VC, scale_V1, columns_DV, scale_D1 = _layouts(head_VD, len(outliers_J)) if out is None else out
    scale_V1[:vocabulary] = quantize_rows(
        head_VD, out_NC=rows_VC[:vocabulary], outliers_J=outliers_J, left=False, shift_D=mean_D
    )[1]
    with torch.cuda.device_of(head_VD):
        _quantize_columns_kernel[(triton.cdiv(vocabulary, LAUNCH.tile_n), triton.cdiv(width, LAUNCH.tile_d))](
            head_VD, mean_D, least_D, most_D, columns_DV, scale_D1, head_VD.stride(0), columns_DV.stride(0), vocabulary,
            width, EXPONENT=EXPONENT[torch.float8_e4m3fn], TILE_N=LAUNCH.tile_n, TILE_D=LAUNCH.tile_d,
            num_warps=LAUNCH.num_warps,
        )  # fmt: skip
    return rows_VC, scale_V1, columns_DV, scale_D1


def _layouts(head_VD: torch.Tensor, outliers: int) -> Layouts:
    """Places for a head: zeros, with scales of one, behind its V rows."""
    (vocabulary, width), device = head_VD.shape, head_VD.device
    padded = _round_up(vocabulary)
    # zeroed as bytes: not every torch fills 8-bit floats
    rows_VC, columns_DV = (
        torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        for shape in ((padded, width + 2 * outliers), (width, padded))
    )
    scale_V1, scale_D1 = (torch.ones((count, 1), dtype=torch.float32, device=device) for count in (padded, width))
    return rows_VC, scale_V1, columns_DV, scale_D1


def scaled_product(
    left_MK: tuple[torch.Tensor, torch.Tensor],
    right_NK: tuple[torch.Tensor, torch.Tensor],
    out_dtype: torch.dtype,
    bias_N: torch.Tensor | None = None,
    *,
    out_MN: torch.Tensor | None = None,
) -> torch.Tensor:
    """left @ right^T (+ bias) of 8-bit matrices, each with its scales: one, or one a row for both.

    Partial sums are moved to fp32 at intervals (`use_fast_accum` off): Hopper keeps some 14 bits within an instruction,
    and in its faster mode throughout, and the sums here have a vocabulary or a batch of terms. K and N are multiples of
    16.
    """
    (left, left_scale), (right, right_scale) = left_MK, right_NK
    operands = left, right.t(), left_scale, right_scale.t(), bias_N, None, out_dtype, False
    if out_MN is not None:
        return torch._scaled_mm(*operands, out=out_MN)
    return torch._scaled_mm(*operands)


def _check_type(dtype: torch.dtype) -> None:
    if dtype not in EXPONENT:
        raise ValueError(f"dtype: {dtype}; pass torch.float8_e4m3fn or torch.float8_e5m2")
