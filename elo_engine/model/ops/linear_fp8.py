"""The products of a projection, forward and backward, in the operands' type or with both of them rounded to 8 bits.

The norm's, the activation's and the attention's projections differ in what they keep for the backward pass; what they
multiply is this: out = x W^T, d_x = d_out W, d_W = d_out^T x. In 8 bits every operand has one scale, of its own largest
number, taken anew for each product: no history that a resumed run would have to bring back. cuBLASLt on Ada and Hopper
multiplies only rows by rows, so the backward pass wants W, d_out and x the other way around, and the kernel that rounds
writes them so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.model import reference_fp8
from elo_engine.model.ops.quantize_fp8 import fp8_emulated
from elo_engine.model.reference_fp8 import E4M3, Format

# Of a gradient: e5m2 spans 2^30 from its largest number, e4m3 2^15 and has a bit more of each number. docs/fp8.md has
# the two measured against each other.
GRADIENT: Format = E4M3


def _rounded(x_ND: Tensor, kind: Format) -> Tensor:
    return reference_fp8.rounded_tensor(x_ND, kind)


def out_product(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None, fp8: bool) -> Tensor:
    """x W^T (+ b) -> [N, O]."""
    if not fp8:
        return F.linear(x_ND, weight_OD, bias_O)
    if fp8_emulated():
        return F.linear(_rounded(x_ND, E4M3), _rounded(weight_OD, E4M3), bias_O)
    from elo_engine.kernels import quantize_fp8 as kernel

    x, weight = (kernel.quantize_tensor(operand.contiguous(), E4M3.dtype) for operand in (x_ND, weight_OD))
    return kernel.scaled_product(x[::2], weight[::2], torch.bfloat16, bias_O)  # type: ignore[no-any-return]


class OutGradient:
    """d_out, from which the other two products are made: in 8 bits it is rounded once for both of them.

    Args:
        needs: of `by_weight` and of `by_input`, which will be asked for.
    """

    def __init__(self, d_out_NO: Tensor, fp8: bool, needs: tuple[bool, bool]) -> None:
        self._d_out_NO, self._fp8 = d_out_NO, fp8
        self._made: tuple[Tensor | None, Tensor | None, Tensor] | None = None  # as it is, the other way around, scale
        if not fp8 or not any(needs):
            return
        if fp8_emulated():
            self._d_out_NO = _rounded(d_out_NO, GRADIENT)
            return
        from elo_engine.kernels import quantize_fp8 as kernel

        self._made = kernel.quantize_tensor(
            d_out_NO.contiguous(), GRADIENT.dtype, plain=needs[0], transposed=needs[1]
        )

    def by_weight(self, weight_OD: Tensor) -> Tensor:
        """d_out W -> [N, D], the gradient of x."""
        if self._made is None:
            return torch.mm(self._d_out_NO, _rounded(weight_OD, E4M3) if self._fp8 else weight_OD)
        from elo_engine.kernels import quantize_fp8 as kernel

        weight = kernel.quantize_tensor(weight_OD, E4M3.dtype, plain=False, transposed=True)
        return kernel.scaled_product(self._made[::2], weight[1:], torch.bfloat16)  # type: ignore[no-any-return]

    def by_input(self, x_ND: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """d_out^T x -> [O, D], the gradient of W; `out_dtype`: fp32, where it is not the operands' own type."""
        if self._made is None:
            x_ND = _rounded(x_ND, E4M3) if self._fp8 else x_ND
            left_ON = self._d_out_NO.t()
            return torch.mm(left_ON, x_ND) if out_dtype is None else torch.mm(left_ON, x_ND, out_dtype=out_dtype)
        from elo_engine.kernels import quantize_fp8 as kernel

        x = kernel.quantize_tensor(x_ND.contiguous(), E4M3.dtype, plain=False, transposed=True)
        return kernel.scaled_product(self._made[1:], x[1:], out_dtype or torch.bfloat16)  # type: ignore[no-any-return]


class _LinearFp8(torch.autograd.Function):
    """A projection by itself. Saves its operands in bf16."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, weight_OD)
        return out_product(x_ND, weight_OD, bias_O, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_OD = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_out = OutGradient(grads[0], True, (needs_x, needs_weight))
        d_x_ND = d_out.by_weight(weight_OD) if needs_x else None
        d_weight_OD = d_out.by_input(x_ND) if needs_weight else None
        return d_x_ND, d_weight_OD, grads[0].sum(0) if needs_bias else None


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None, *, fp8: bool = False) -> Tensor:
    """x W^T + b; torch's GEMM on every device, or with `fp8` the product of 8-bit operands."""
    if fp8:
        return _LinearFp8.apply(x_ND, weight_OD, bias_O)  # type: ignore[no-any-return]
    return F.linear(x_ND, weight_OD, bias_O)
