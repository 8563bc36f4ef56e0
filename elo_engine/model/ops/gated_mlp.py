"""The whole MLP of a layer as one autograd node that keeps no activation of it: `recompute: selective`.

Saved is the residual stream after the add, which the node returns anyway. The backward pass norms it again, which the
gate and up projections' own gradient needs in any case, and makes [gate | up] again: one product of 4 D F operations a
token in place of 2 F numbers a token kept for every layer. Korthikanti et al. 2022 (arXiv 2205.05198) choose what to
run again by the bytes saved for the operations spent; there it is attention's scores, which flash attention keeps no
longer. The rest is the same operations in the same order as `norm_linear` and `gated_linear`: so are the bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.model.ops import choice
from elo_engine.model.ops.linear_fp8 import OutGradient, linear, out_product
from elo_engine.model.ops.rms_norm import add_norm_linear, norm_backward, norm_forward
from elo_engine.model.ops.swiglu import Activation, gated, gated_backward, gated_linear


class _GatedMlp(torch.autograd.Function):
    """sum = hidden (+ update); out = gated(norm(sum) gate_up^T) down^T. Returns out and sum; saves sum."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, update_ND: Tensor | None, gamma_D: Tensor | None, gate_up_2FD: Tensor,
        gate_up_bias_2F: Tensor | None, down_DF: Tensor, down_bias_D: Tensor | None, eps: float, unit_offset: bool,
        activation: Activation, run: bool, fp8: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        normed_ND, sum_ND = hidden_ND, hidden_ND
        if not run and update_ND is not None:
            sum_ND = hidden_ND + update_ND
        elif gamma_D is not None:
            normed_ND, _, sum_ND = norm_forward(hidden_ND, gamma_D, eps, unit_offset, update_ND)
        ctx.save_for_backward(sum_ND, gamma_D, gate_up_2FD, gate_up_bias_2F, down_DF)
        ctx.options = eps, unit_offset, activation, fp8
        ctx.set_materialize_grads(False)
        if update_ND is not None and not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(sum_ND)
        returned_ND = None if update_ND is None else sum_ND
        if not run:
            return sum_ND.new_empty(()).expand(sum_ND.shape), returned_ND
        gate_up_N2F = out_product(normed_ND, gate_up_2FD, gate_up_bias_2F, fp8)
        del normed_ND
        return out_product(gated(gate_up_N2F, activation), down_DF, down_bias_D, fp8), returned_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out_ND, d_sum_ND = grads
        sum_ND, gamma_D, gate_up_2FD, gate_up_bias_2F, down_DF = ctx.saved_tensors
        needs_hidden, needs_update, needs_gamma, needs_gate_up, needs_bias, needs_down, needs_down_bias = (
            ctx.needs_input_grad[:7]
        )
        if d_out_ND is None:
            return d_sum_ND if needs_hidden else None, d_sum_ND if needs_update else None, *[None] * 10
        eps, unit_offset, activation, fp8 = ctx.options
        normed_ND, rstd_N = sum_ND, sum_ND
        if gamma_D is not None:
            normed_ND, rstd_N, _ = norm_forward(sum_ND, gamma_D, eps, unit_offset)
        gate_up_N2F = out_product(normed_ND, gate_up_2FD, gate_up_bias_2F, fp8)
        d_out = OutGradient(d_out_ND, fp8, (True, needs_down))
        d_y_NF = d_out.by_weight(down_DF)
        # nobody else has [gate | up], so on a GPU its gradient takes its place
        d_packed_N2F, y_NF = gated_backward(d_y_NF, gate_up_N2F, activation, needs_down, in_place=True)
        del gate_up_N2F
        d_down_DF = None if y_NF is None else d_out.by_input(y_NF)
        del d_y_NF, y_NF, d_out
        d_packed = OutGradient(d_packed_N2F, fp8, (True, needs_gate_up))
        d_gate_up_2FD = d_packed.by_input(normed_ND) if needs_gate_up else None
        del normed_ND
        d_normed_ND = d_packed.by_weight(gate_up_2FD)
        del d_packed
        d_hidden_ND: Tensor | None = d_normed_ND
        d_gamma_D = None
        if gamma_D is not None:  # what is below learns: the weights of the same layer's attention
            d_hidden_ND, d_gamma_D = norm_backward(
                d_normed_ND, sum_ND, gamma_D, rstd_N, unit_offset, (True, needs_gamma), d_sum_ND
            )
        return (
            d_hidden_ND if needs_hidden else None,
            d_hidden_ND if needs_update else None,
            d_gamma_D,
            d_gate_up_2FD,
            d_packed_N2F.sum(0) if needs_bias else None,
            d_down_DF,
            d_out_ND.sum(0) if needs_down_bias else None,
            *[None] * 5,
        )


def gated_mlp_again(
    hidden_ND: Tensor, update_ND: Tensor | None, gamma_D: Tensor | None, gate_up_2FD: Tensor,
    gate_up_bias_2F: Tensor | None, down_DF: Tensor, down_bias_D: Tensor | None, eps: float,
    *, unit_offset: bool = False, activation: Activation = "silu", run: bool = True,
    fp8: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`add_norm_linear` and `gated_linear` after it, of which the backward pass makes the first product again.

    Args:
        update_ND, gamma_D: None where nothing is added, and where no norm stands before the MLP.
        run: False where the MLP's output is wanted for its gradient alone: its values are not computed and must not be
            read. For a layer that is run again in the backward pass.
        fp8: the products multiply 8-bit operands.

    Returns: hidden + update, and linear(act(gate) * up) of its norm, [N, D] both.
    """
    if choice.use_reference():
        from torch.utils.checkpoint import checkpoint

        def defined(hidden_ND: Tensor, update_ND: Tensor | None) -> tuple[Tensor, Tensor]:
            if gamma_D is None or update_ND is None:
                sum_ND, packed_N2F = hidden_ND, linear(hidden_ND, gate_up_2FD, gate_up_bias_2F, fp8=fp8)
            else:
                sum_ND, packed_N2F = add_norm_linear(
                    hidden_ND, update_ND, gamma_D, gate_up_2FD, gate_up_bias_2F, eps, unit_offset=unit_offset, fp8=fp8
                )
            return sum_ND, gated_linear(packed_N2F, down_DF, down_bias_D, activation, fp8=fp8)

        if not run:
            return defined(hidden_ND, update_ND)
        return checkpoint(  # type: ignore[no-any-return]
            defined, hidden_ND, update_ND, use_reentrant=False, preserve_rng_state=False
        )
    out_ND, sum_ND = _GatedMlp.apply(
        hidden_ND, update_ND, gamma_D, gate_up_2FD, gate_up_bias_2F, down_DF, down_bias_D, eps, unit_offset, activation,
        run, fp8,
    )  # fmt: skip
    return hidden_ND if sum_ND is None else sum_ND, out_ND
