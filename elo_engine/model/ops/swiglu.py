"""SwiGLU and GeGLU with the projection after them, as one autograd node.

Saved is the packed projection [gate | up] alone. The backward pass computes act(gate) * up again, where autograd would
keep it for the down projection's weight gradient: N x F numbers, the widest activation of a layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.model import cpu_pointwise, reference
from elo_engine.model.ops import choice
from elo_engine.model.ops.linear_fp8 import OutGradient, linear, out_product

Activation = Literal["silu", "gelu_tanh"]


def gated(gate_up_N2F: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up -> [N, F]."""
    if choice.use_triton(gate_up_N2F):
        from elo_engine.kernels import swiglu as kernel

        launch = kernel.swiglu_forward if activation == "silu" else kernel.geglu_forward
        return launch(*gate_up_N2F.chunk(2, dim=-1))  # type: ignore[no-any-return]
    return cpu_pointwise.gated_forward(gate_up_N2F, activation)


def gated_backward(
    d_y_NF: Tensor, gate_up_N2F: Tensor, activation: Activation, need_y: bool, *, in_place: bool = False
) -> tuple[Tensor, Tensor | None]:
    """-> gradient of the packed projection, and act(gate) * up where asked for; `d_y_NF` may be written over, and with
    `in_place` the packed projection itself.
    """
    if choice.use_triton(gate_up_N2F):
        from elo_engine.kernels import swiglu as kernel

        d_packed_N2F = gate_up_N2F if in_place else torch.empty_like(gate_up_N2F)
        launch = kernel.swiglu_backward if activation == "silu" else kernel.geglu_backward
        y_NF = d_y_NF if need_y else None
        launch(d_y_NF, *gate_up_N2F.chunk(2, dim=-1), out=d_packed_N2F.chunk(2, dim=-1), y_out=y_NF)
        return d_packed_N2F, y_NF
    return cpu_pointwise.gated_backward(d_y_NF, gate_up_N2F, activation, need_y=need_y)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_up_N2F: Tensor, down_DF: Tensor, bias_D: Tensor | None, activation: Activation, fp8: bool
    ) -> Tensor:
        ctx.save_for_backward(gate_up_N2F, down_DF)
        ctx.activation, ctx.fp8 = activation, fp8
        return out_product(gated(gate_up_N2F, activation), down_DF, bias_D, fp8)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out_ND,) = grads
        gate_up_N2F, down_DF = ctx.saved_tensors
        needs_gate_up, needs_down, needs_bias = ctx.needs_input_grad[:3]
        d_packed_N2F, d_down_DF, y_NF = None, None, None
        d_out = OutGradient(d_out_ND, ctx.fp8, (needs_gate_up, needs_down))
        if needs_gate_up:
            d_y_NF = d_out.by_weight(down_DF)
            d_packed_N2F, y_NF = gated_backward(d_y_NF, gate_up_N2F, ctx.activation, needs_down)
        if needs_down:
            d_down_DF = d_out.by_input(gated(gate_up_N2F, ctx.activation) if y_NF is None else y_NF)
        return d_packed_N2F, d_down_DF, d_out_ND.sum(0) if needs_bias else None, None, None


def gated_linear(
    gate_up_N2F: Tensor, down_DF: Tensor, bias_D: Tensor | None = None, activation: Activation = "silu",
    *, fp8: bool = False,
) -> Tensor:  # fmt: skip
    """linear(act(gate) * up) of the packed projection [gate | up] -> [N, D]; "gelu_tanh" is GeGLU as Gemma has it."""
    if choice.use_reference():
        product = reference.swiglu if activation == "silu" else reference.geglu
        return linear(product(gate_up_N2F), down_DF, bias_D, fp8=fp8)
    return _GatedLinear.apply(gate_up_N2F, down_DF, bias_D, activation, fp8)  # type: ignore[no-any-return]
