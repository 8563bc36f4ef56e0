"""The norm, with the residual add before it or after it and the projection after it.

A decoder layer norms a hidden state only to multiply it with a weight, so `norm_linear` is one autograd node: it saves
the hidden state and one number a row, and makes the normed state again in the backward pass. Below the first trained
layer nothing needs the gradient of the hidden state. Autograd alone would still form it, because the norm's own weight
learns; here, with M = d_out^T x_hat (the product that makes d_weight, on the norm's output before gamma),
    d_weight = M diag(gamma)    d_gamma = column sums of (weight * M),
exact, and one product of the layer's largest input is never computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.model import cpu_pointwise, reference
from elo_engine.model.ops import choice
from elo_engine.model.ops.linear_fp8 import OutGradient, linear, out_product


def norm_forward(
    hidden_ND: Tensor, gamma_D: Tensor | None, eps: float, unit_offset: bool, update_ND: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> normed, rstd_N, and what was normed: hidden, or hidden + update."""
    if choice.use_triton(hidden_ND):
        from elo_engine.kernels import rms_norm as kernel

        normed_ND, rstd_N, sum_ND = kernel.rms_norm_forward(
            hidden_ND, gamma_D, eps, update_ND=update_ND, unit_offset=unit_offset
        )
        return normed_ND, rstd_N, hidden_ND if sum_ND is None else sum_ND
    sum_ND = hidden_ND if update_ND is None else hidden_ND + update_ND
    normed_ND, rstd_N = cpu_pointwise.rms_norm_forward(sum_ND, gamma_D, eps, unit_offset=unit_offset)
    return normed_ND, rstd_N, sum_ND


def norm_backward(
    d_normed_ND: Tensor,
    hidden_ND: Tensor,
    gamma_D: Tensor,
    rstd_N: Tensor,
    unit_offset: bool,
    needs: tuple[bool, bool],
    d_residual_ND: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """-> gradients of the hidden state and of gamma in their own types; `needs` says which."""
    if d_residual_ND is not None:
        d_residual_ND = d_residual_ND.contiguous()  # a sum's gradient arrives expanded
    needed: dict[str, Any] = {"need_d_gamma": needs[1], "unit_offset": unit_offset, "d_residual_ND": d_residual_ND}
    if not any(needs):
        return None, None
    if choice.use_triton(hidden_ND):
        from elo_engine.kernels import rms_norm as kernel

        d_hidden_ND, d_gamma_D = kernel.rms_norm_backward(
            d_normed_ND.contiguous(), hidden_ND, gamma_D, rstd_N, need_d_x=needs[0], **needed
        )
    else:
        d_hidden_ND, d_gamma_D = cpu_pointwise.rms_norm_backward(
            d_normed_ND.contiguous(), hidden_ND, gamma_D, rstd_N, need_d_hidden=needs[0], **needed
        )
    return d_hidden_ND, None if d_gamma_D is None else d_gamma_D.to(gamma_D.dtype)


class _RmsNorm(torch.autograd.Function):
    """Saves the input and one number a row; the normed input is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, gamma_D: Tensor, eps: float, unit_offset: bool) -> Tensor:
        normed_ND, rstd_N, _ = norm_forward(hidden_ND, gamma_D, eps, unit_offset)
        ctx.save_for_backward(hidden_ND, gamma_D, rstd_N)
        ctx.unit_offset = unit_offset
        return normed_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, gamma_D, rstd_N = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        return *norm_backward(grads[0], hidden_ND, gamma_D, rstd_N, ctx.unit_offset, needs), None, None


def rms_norm(hidden_ND: Tensor, gamma_D: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm over the last dimension; see `reference.rms_norm`."""
    if choice.use_reference():
        return reference.rms_norm(hidden_ND, gamma_D, eps, unit_offset=unit_offset)
    return _RmsNorm.apply(hidden_ND, gamma_D, eps, unit_offset)  # type: ignore[no-any-return]


class _RmsNormAdd(torch.autograd.Function):
    """residual + norm(update). Saves the update and one number a row."""

    @staticmethod
    def forward(
        ctx: Any, residual_ND: Tensor, update_ND: Tensor, gamma_D: Tensor, eps: float, unit_offset: bool
    ) -> Tensor:
        if choice.use_triton(update_ND):
            from elo_engine.kernels import rms_norm as kernel

            out_ND, rstd_N, _ = kernel.rms_norm_forward(
                update_ND, gamma_D, eps, residual_ND=residual_ND, unit_offset=unit_offset
            )
        else:
            out_ND, rstd_N = cpu_pointwise.rms_norm_forward(update_ND, gamma_D, eps, unit_offset=unit_offset)
            out_ND.add_(residual_ND)
        ctx.save_for_backward(update_ND, gamma_D, rstd_N)
        ctx.unit_offset = unit_offset
        return out_ND  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        update_ND, gamma_D, rstd_N = ctx.saved_tensors
        d_grads = norm_backward(grads[0], update_ND, gamma_D, rstd_N, ctx.unit_offset, ctx.needs_input_grad[1:3])
        return grads[0] if ctx.needs_input_grad[0] else None, *d_grads, None, None


def rms_norm_add(
    residual_ND: Tensor, update_ND: Tensor, gamma_D: Tensor, eps: float, *, unit_offset: bool = False
) -> Tensor:
    """The norm and the residual add after it: -> residual + rms_norm(update)."""
    if choice.use_reference():
        return reference.rms_norm_add(residual_ND, update_ND, gamma_D, eps, unit_offset=unit_offset)
    return _RmsNormAdd.apply(residual_ND, update_ND, gamma_D, eps, unit_offset)  # type: ignore[no-any-return]


class _AddRmsNorm(torch.autograd.Function):
    """Saves the sum and one number a row."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, update_ND: Tensor, gamma_D: Tensor, eps: float, unit_offset: bool
    ) -> tuple[Tensor, Tensor]:
        normed_ND, rstd_N, sum_ND = norm_forward(hidden_ND, gamma_D, eps, unit_offset, update_ND)
        ctx.save_for_backward(sum_ND, gamma_D, rstd_N)
        ctx.unit_offset = unit_offset
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(sum_ND)
        return sum_ND, normed_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sum_ND, gamma_D, rstd_N = ctx.saved_tensors
        needs_hidden, needs_update, needs_gamma = ctx.needs_input_grad[:3]
        needs = (needs_hidden or needs_update, needs_gamma)
        d_sum_ND, d_gamma_D = norm_backward(grads[1], sum_ND, gamma_D, rstd_N, ctx.unit_offset, needs, grads[0])
        return d_sum_ND if needs_hidden else None, d_sum_ND if needs_update else None, d_gamma_D, None, None


def add_rms_norm(
    hidden_ND: Tensor, update_ND: Tensor, gamma_D: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """The residual add and the norm of its result: -> hidden + update, rms_norm(hidden + update)."""
    if choice.use_reference():
        return reference.add_rms_norm(hidden_ND, update_ND, gamma_D, eps, unit_offset=unit_offset)
    return _AddRmsNorm.apply(hidden_ND, update_ND, gamma_D, eps, unit_offset)  # type: ignore[no-any-return]


class _NormLinear(torch.autograd.Function):
    """sum = hidden (+ update); out = norm(sum) weight^T (+ bias). Returns out and sum; saves sum, not norm(sum)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, update_ND: Tensor | None, gamma_D: Tensor, weight_OD: Tensor,
        bias_O: Tensor | None, eps: float, unit_offset: bool, fp8: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        normed_ND, rstd_N, sum_ND = norm_forward(hidden_ND, gamma_D, eps, unit_offset, update_ND)
        ctx.save_for_backward(sum_ND, gamma_D, weight_OD, rstd_N)
        ctx.options = eps, unit_offset, fp8
        ctx.set_materialize_grads(False)
        if update_ND is not None and not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(sum_ND)
        return out_product(normed_ND, weight_OD, bias_O, fp8), None if update_ND is None else sum_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out_NO, d_sum_ND = grads
        sum_ND, gamma_D, weight_OD, rstd_N = ctx.saved_tensors
        needs_hidden, needs_update, needs_gamma, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        if d_out_NO is None:
            return d_sum_ND if needs_hidden else None, d_sum_ND if needs_update else None, *[None] * 6
        eps, unit_offset, fp8 = ctx.options
        d_out = OutGradient(d_out_NO, fp8, (needs_hidden or needs_update, needs_gamma or needs_weight))
        d_hidden_ND, d_gamma_D, d_weight_OD = None, None, None
        if needs_hidden or needs_update:
            if needs_weight:
                normed_ND = norm_forward(sum_ND, gamma_D, eps, unit_offset)[0]
                d_weight_OD = d_out.by_input(normed_ND)
                del normed_ND
            d_normed_ND = d_out.by_weight(weight_OD)
            d_hidden_ND, d_gamma_D = norm_backward(
                d_normed_ND, sum_ND, gamma_D, rstd_N, unit_offset, (True, needs_gamma), d_sum_ND
            )
        elif needs_gamma or needs_weight:
            scaled_OD = _product(d_out, norm_forward(sum_ND, None, eps, False)[0])
            if needs_gamma:
                d_gamma_D = torch.linalg.vecdot(weight_OD.float(), scaled_OD.float(), dim=0).to(gamma_D.dtype)
            if needs_weight:
                d_weight_OD = scaled_OD.mul_(gamma_D.float() + 1.0 if unit_offset else gamma_D).to(weight_OD.dtype)
        d_bias_O = d_out_NO.sum(0) if needs_bias else None
        d_update_ND = d_hidden_ND if needs_update else None
        d_hidden_ND = d_hidden_ND if needs_hidden else None
        return d_hidden_ND, d_update_ND, d_gamma_D, d_weight_OD, d_bias_O, None, None, None


def _product(d_out: OutGradient, unit_ND: Tensor) -> Tensor:
    """d_out^T x_hat; in fp32 on a GPU, where the rounding to bf16 can wait until gamma is multiplied in."""
    wide = unit_ND.is_cuda and unit_ND.dtype == torch.bfloat16
    return d_out.by_input(unit_ND, torch.float32 if wide else None)


def norm_linear(
    hidden_ND: Tensor,
    gamma_D: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    eps: float,
    *,
    unit_offset: bool = False,
    fp8: bool = False,
) -> Tensor:
    """linear(rms_norm(hidden)) -> [N, O]; where the hidden state needs no gradient, none of it is formed."""
    if choice.use_reference():
        normed_ND = reference.rms_norm(hidden_ND, gamma_D, eps, unit_offset=unit_offset)
        return linear(normed_ND, weight_OD, bias_O, fp8=fp8)
    out_NO, _ = _NormLinear.apply(hidden_ND, None, gamma_D, weight_OD, bias_O, eps, unit_offset, fp8)
    return out_NO  # type: ignore[no-any-return]


def add_norm_linear(
    hidden_ND: Tensor, update_ND: Tensor, gamma_D: Tensor, weight_OD: Tensor, bias_O: Tensor | None, eps: float,
    *, unit_offset: bool = False, fp8: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual add, the norm of its result, and the projection: -> hidden + update, linear(rms_norm(that))."""
    if choice.use_reference():
        sum_ND, normed_ND = reference.add_rms_norm(hidden_ND, update_ND, gamma_D, eps, unit_offset=unit_offset)
        return sum_ND, linear(normed_ND, weight_OD, bias_O, fp8=fp8)
    out_NO, sum_ND = _NormLinear.apply(hidden_ND, update_ND, gamma_D, weight_OD, bias_O, eps, unit_offset, fp8)
    return sum_ND, out_NO
