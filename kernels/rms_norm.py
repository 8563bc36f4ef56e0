"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * gamma, row by row.

Shapes: N rows (tokens), D columns. x, y and their gradients are fp32 or bf16, all arithmetic is fp32, and each result
is rounded once, at its store. The residual add before the norm, and in the backward pass the residual stream's gradient
after it, are part of the same pass over the rows (as in Liger-Kernel's fused add and norm): each saves one reading and
one writing of N x D. What is switched off compiles to nothing.

The residual add after a norm (OLMo 2; Gemma 2 and 3 behind the MLP) is part of the forward pass, too; the backward pass
is the norm's own, for what reaches the residual is d_y itself. Predicted: the norm and an add of its own move 5 N D
elements (x, y; y, residual, sum), the one pass 3. In bf16 at D = 2304 and N = 8192 (Gemma 2 2B) that is 113 MB for 189,
or 24 us for 39 at an H200's 4.8 TB/s, twice a layer in OLMo 2 and once in Gemma's. Not timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_float, check_like, check_rows, check_vector


@dataclass(frozen=True)
class RmsNormLaunch:
    """Launch numbers, chosen from the compiled kernels' registers (README.md here), not yet timed on a card.

    elements_per_thread: 8, one 16-byte load of bf16 a tensor. The backward keeps x, d_y, gamma and the running d_gamma
        of a tile in registers, four fp32 values an element: 8 elements compile to 57 to 64 registers on sm_80 to
        sm_120, with the residual's gradient, too; 16 to 72 to 112, and then sm_80 already spills at D = 2048.
    tile_elements: 2048. A narrow row would leave most of a block idle, so a program takes several rows until eight
        warps have 8 elements a thread.
    max_warps: 16. Rows wider than 4096 give a thread more elements instead: 32 warps may use 64 registers each at most.
    max_width: 16384, where the backward has 32 elements a thread and spills 44 to 256 bytes; there is no spill up to
        8192, and no published decoder is wider than 16384.
    backward_programs: 256. The backward's programs walk over the rows and each writes one row of d_gamma sums: two for
        each of the 132 SMs of an H200 or the 128 of a 4090, all resident at once, and 256 x D fp32 is 2 % of what 8192
        rows move anyway. A constant, not the card's SM count, so that the order of summation is every card's.
    """

    elements_per_thread: int = 8
    tile_elements: int = 2048
    max_warps: int = 16
    max_width: int = 16384
    backward_programs: int = 256

    def tile(self, width: int) -> tuple[int, int, int]:
        """(BLOCK_N, BLOCK_D, num_warps) for rows of `width`.

        Raises:
            ValueError: rows wider than `max_width`.
        """
        if width > self.max_width:
            raise ValueError(
                f"rms_norm: rows of {width} exceed {self.max_width}, the widest that fits one block's"
                " registers; use elo_engine.model.reference.rms_norm"
            )
        block_d = triton.next_power_of_2(width)
        block_n = max(1, self.tile_elements // block_d)
        warps = block_n * block_d // (32 * self.elements_per_thread)
        return block_n, block_d, min(self.max_warps, warps)


LAUNCH = RmsNormLaunch()


@triton.jit
def _scale(gamma_ptr, col_D, D, UNIT_OFFSET: tl.constexpr):
    gamma_D = tl.load(gamma_ptr + col_D, mask=col_D < D, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        gamma_D = 1.0 + gamma_D
    return gamma_D


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,
    update_ptr,
    gamma_ptr,
    residual_ptr,
    y_ptr,
    rstd_ptr,
    sum_ptr,
    stride_x_n,
    stride_update_n,
    stride_residual_n,
    N,
    D,
    eps,
    HAS_UPDATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Rows are counted in 64 bits: 300,000 tokens of 8192 already pass 2^31 elements.
    row_N = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    col_D = tl.arange(0, BLOCK_D)
    inside_ND = (row_N[:, None] < N) & (col_D[None, :] < D)
    x_ND = tl.load(x_ptr + row_N[:, None] * stride_x_n + col_D[None, :], mask=inside_ND, other=0.0)
    x_ND = x_ND.to(tl.float32)
    if HAS_UPDATE:
        update_ptr_ND = update_ptr + row_N[:, None] * stride_update_n + col_D[None, :]
        x_ND += tl.load(update_ptr_ND, mask=inside_ND, other=0.0).to(tl.float32)
        # Rounded before the norm: the backward pass reads the stored sum and must see the rows normed here.
        sum_ND = x_ND.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row_N[:, None] * D + col_D[None, :], sum_ND, mask=inside_ND)
        x_ND = sum_ND.to(tl.float32)
    rstd_N = tl.rsqrt(tl.sum(x_ND * x_ND, axis=1) / D + eps)
    y_ND = x_ND * rstd_N[:, None]
    if HAS_GAMMA:
        y_ND *= _scale(gamma_ptr, col_D, D, UNIT_OFFSET)[None, :]
    if HAS_RESIDUAL:
        residual_ptr_ND = residual_ptr + row_N[:, None] * stride_residual_n + col_D[None, :]
        y_ND += tl.load(residual_ptr_ND, mask=inside_ND, other=0.0).to(tl.float32)
    tl.store(y_ptr + row_N[:, None] * D + col_D[None, :], y_ND.to(y_ptr.dtype.element_ty), mask=inside_ND)
    tl.store(rstd_ptr + row_N, rstd_N, mask=row_N < N)


@triton.jit
def _rms_norm_backward_kernel(
    d_y_ptr,
    x_ptr,
    gamma_ptr,
    rstd_ptr,
    d_residual_ptr,
    d_x_ptr,
    d_gamma_parts_ptr,
    stride_d_y_n,
    stride_x_n,
    stride_d_residual_n,
    N,
    D,
    NEED_D_X: tl.constexpr,
    NEED_D_GAMMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    col_D = tl.arange(0, BLOCK_D)
    if HAS_GAMMA:
        gamma_D = _scale(gamma_ptr, col_D, D, UNIT_OFFSET)
    # One sum per row of the tile, folded once at the end: folding in the loop would synchronise the block every time.
    d_gamma_ND = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for tile in range(program, tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        row_N = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside_ND = (row_N[:, None] < N) & (col_D[None, :] < D)
        x_ND = tl.load(x_ptr + row_N[:, None] * stride_x_n + col_D[None, :], mask=inside_ND, other=0.0)
        d_y_ND = tl.load(d_y_ptr + row_N[:, None] * stride_d_y_n + col_D[None, :], mask=inside_ND, other=0.0)
        d_y_ND = d_y_ND.to(tl.float32)
        rstd_N = tl.load(rstd_ptr + row_N, mask=row_N < N, other=0.0)
        x_hat_ND = x_ND.to(tl.float32) * rstd_N[:, None]
        if NEED_D_GAMMA:
            d_gamma_ND += d_y_ND * x_hat_ND
        if NEED_D_X:
            d_x_hat_ND = d_y_ND
            if HAS_GAMMA:
                d_x_hat_ND = d_y_ND * gamma_D[None, :]
            along_N = tl.sum(d_x_hat_ND * x_hat_ND, axis=1) / D
            d_x_ND = (d_x_hat_ND - x_hat_ND * along_N[:, None]) * rstd_N[:, None]
            if HAS_RESIDUAL:
                d_residual_ptr_ND = d_residual_ptr + row_N[:, None] * stride_d_residual_n + col_D[None, :]
                d_x_ND += tl.load(d_residual_ptr_ND, mask=inside_ND, other=0.0).to(tl.float32)
            d_x_ptr_ND = d_x_ptr + row_N[:, None] * D + col_D[None, :]
            tl.store(d_x_ptr_ND, d_x_ND.to(d_x_ptr.dtype.element_ty), mask=inside_ND)
    if NEED_D_GAMMA:
        part_ptr = d_gamma_parts_ptr + program.to(tl.int64) * D
        tl.store(part_ptr + col_D, tl.sum(d_gamma_ND, axis=0), mask=col_D < D)


def _check_gamma(gamma_D: torch.Tensor | None, width: int, tensors: dict[str, torch.Tensor]) -> None:
    """Check gamma, if there is one, and that all tensors are on one device."""
    if gamma_D is not None:
        check_float("gamma_D", gamma_D)
        check_vector("gamma_D", gamma_D, width)
        tensors = {**tensors, "gamma_D": gamma_D}
    check_device(**tensors)


def rms_norm_forward(
    x_ND: torch.Tensor,
    gamma_D: torch.Tensor | None,
    eps: float,
    *,
    update_ND: torch.Tensor | None = None,
    residual_ND: torch.Tensor | None = None,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y = s / sqrt(mean(s^2) + eps) * gamma (+ residual), row by row; s is x, or x + update rounded to their type.

    Args:
        x_ND: fp32 or bf16; rows contiguous, any row stride.
        gamma_D: fp32 or bf16, not necessarily the type of x. None: the normed rows as they are.
        eps: added to the mean square.
        update_ND: what is added to x first, shape and type of x, any row stride: the residual add.
        residual_ND: what is added to the normed rows, in fp32 before their rounding; shape and type of x, any row
            stride. Its gradient is that of y.
        unit_offset: multiply by 1 + gamma, a sum in fp32 (Gemma). Without gamma it changes nothing.

    Returns:
        y_ND in the type of x, contiguous; rstd_N = 1 / sqrt(mean(s^2) + eps) in fp32; and sum_ND = s in the type of x,
        contiguous, None without update. The backward needs rstd, and s as its x.

    Raises:
        ValueError: wrong shape, type, strides or device, or D > 16384.
    """
    check_rows("x_ND", x_ND)
    rows, width = x_ND.shape
    tensors = {"x_ND": x_ND}
    for name, other_ND in (("update_ND", update_ND), ("residual_ND", residual_ND)):
        if other_ND is not None:
            check_rows(name, other_ND)
            check_like(name, other_ND, "x_ND", x_ND)
            tensors[name] = other_ND
    _check_gamma(gamma_D, width, tensors)
    block_n, block_d, warps = LAUNCH.tile(width)
    y_ND = torch.empty((rows, width), dtype=x_ND.dtype, device=x_ND.device)
    rstd_N = torch.empty(rows, dtype=torch.float32, device=x_ND.device)
    sum_ND = None if update_ND is None else torch.empty_like(y_ND)
    if rows:
        with torch.cuda.device_of(x_ND):
            _rms_norm_forward_kernel[(triton.cdiv(rows, block_n),)](
                x_ND,
                update_ND,
                gamma_D,
                residual_ND,
                y_ND,
                rstd_N,
                sum_ND,
                x_ND.stride(0),
                0 if update_ND is None else update_ND.stride(0),
                0 if residual_ND is None else residual_ND.stride(0),
                rows,
                width,
                eps,
                HAS_UPDATE=update_ND is not None,
                HAS_RESIDUAL=residual_ND is not None,
                HAS_GAMMA=gamma_D is not None,
                UNIT_OFFSET=unit_offset and gamma_D is not None,
                BLOCK_N=block_n,
                BLOCK_D=block_d,
                num_warps=warps,
            )
    return y_ND, rstd_N, sum_ND


def rms_norm_backward(
    d_y_ND: torch.Tensor,
    x_ND: torch.Tensor,
    gamma_D: torch.Tensor | None,
    rstd_N: torch.Tensor,
    *,
    need_d_x: bool = True,
    need_d_gamma: bool = True,
    unit_offset: bool = False,
    d_residual_ND: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `rms_norm_forward`; what is not asked for is neither computed nor allocated.

    The frozen final norm needs only d_x, the norm below the first trained layer only d_gamma.

    Args:
        d_y_ND: gradient of y, shape and type of x; rows contiguous, any row stride.
        x_ND: the rows that were normed: the forward's x, or its sum where it had an update.
        gamma_D, unit_offset: as in the forward. rstd_N: its second result.
        need_d_x, need_d_gamma: which gradients to make.
        d_residual_ND: gradient that reaches x past the norm (the residual stream), shape and type of x, any row stride;
            added to d_x in fp32 before the one rounding. Not read where d_x is not asked for.

    Returns:
        d_x_ND in the type of x, which is the gradient of both terms of a sum, and d_gamma_D in fp32 whatever the type
        of gamma; None in place of one not asked for.
        d_gamma is summed in a fixed order, without atomics: equal inputs give equal bits on every run.

    Raises:
        ValueError: wrong shape, type, strides or device, D > 16384, neither gradient asked for, or that of no gamma.
    """
    if not (need_d_x or need_d_gamma):
        raise ValueError("rms_norm_backward: neither gradient is asked for; do not call it")
    if need_d_gamma and gamma_D is None:
        raise ValueError("gamma_D: None has no gradient; pass gamma, or need_d_gamma=False")
    check_rows("x_ND", x_ND)
    check_rows("d_y_ND", d_y_ND)
    check_like("d_y_ND", d_y_ND, "x_ND", x_ND)
    rows, width = x_ND.shape
    check_vector("rstd_N", rstd_N, rows)
    if rstd_N.dtype != torch.float32:
        raise ValueError(f"rstd_N: dtype {rstd_N.dtype}; pass the fp32 vector that rms_norm_forward returned")
    tensors = {"d_y_ND": d_y_ND, "x_ND": x_ND, "rstd_N": rstd_N}
    if d_residual_ND is not None:
        check_rows("d_residual_ND", d_residual_ND)
        check_like("d_residual_ND", d_residual_ND, "x_ND", x_ND)
        tensors["d_residual_ND"] = d_residual_ND
    _check_gamma(gamma_D, width, tensors)
    d_residual_ND = d_residual_ND if need_d_x else None
    block_n, block_d, warps = LAUNCH.tile(width)
    programs = min(LAUNCH.backward_programs, triton.cdiv(rows, block_n))
    device = x_ND.device
    d_x_ND = torch.empty((rows, width), dtype=x_ND.dtype, device=device) if need_d_x else None
    parts_PD = torch.empty((programs, width), dtype=torch.float32, device=device) if need_d_gamma else None
    if rows:
        with torch.cuda.device_of(x_ND):
            _rms_norm_backward_kernel[(programs,)](
                d_y_ND,
                x_ND,
                gamma_D if need_d_x else None,
                rstd_N,
                d_residual_ND,
                d_x_ND,
                parts_PD,
                d_y_ND.stride(0),
                x_ND.stride(0),
                0 if d_residual_ND is None else d_residual_ND.stride(0),
                rows,
                width,
                NEED_D_X=need_d_x,
                NEED_D_GAMMA=need_d_gamma,
                HAS_RESIDUAL=d_residual_ND is not None,
                HAS_GAMMA=need_d_x and gamma_D is not None,
                UNIT_OFFSET=need_d_x and unit_offset and gamma_D is not None,
                BLOCK_N=block_n,
                BLOCK_D=block_d,
                num_warps=warps,
            )
    return d_x_ND, None if parts_PD is None else parts_PD.sum(dim=0)
