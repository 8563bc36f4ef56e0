"""SwiGLU and GeGLU with the projection after them, as one autograd node.

Saved is the packed projection [gate | up] alone. The backward pass computes act(gate) * up again, where autograd would
keep it for the down projection's weight gradient: N x F numbers, the widest activation of a layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.model import cpu_pointwise, reference
from elo_engine.model.ops import choice

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
        ctx: Any, gate_up_N2F: Tensor, down_DF: Tensor, bias_D: Tensor | None, activation: Activation
    ) -> Tensor:
        ctx.save_for_backward(gate_up_N2F, down_DF)
        ctx.activation = activation
        return F.linear(gated(gate_up_N2F, activation), down_DF, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out_ND,) = grads
        gate_up_N2F, down_DF = ctx.saved_tensors
        needs_gate_up, needs_down, needs_bias = ctx.needs_input_grad[:3]
        d_packed_N2F, d_down_DF, y_NF = None, None, None
        if needs_gate_up:
            d_y_NF = torch.mm(d_out_ND, down_DF)
            d_packed_N2F, y_NF = gated_backward(d_y_NF, gate_up_N2F, ctx.activation, needs_down)
        if needs_down:
            d_down_DF = torch.mm(d_out_ND.t(), gated(gate_up_N2F, ctx.activation) if y_NF is None else y_NF)
        return d_packed_N2F, d_down_DF, d_out_ND.sum(0) if needs_bias else None, None


def gated_linear(
    gate_up_N2F: Tensor, down_DF: Tensor, bias_D: Tensor | None = None, activation: Activation = "silu"
) -> Tensor:
    """linear(act(gate) * up) of the packed projection [gate | up] -> [N, D]; "gelu_tanh" is GeGLU as Gemma has it."""
    if choice.use_reference():
        product = reference.swiglu if activation == "silu" else reference.geglu
        return F.linear(product(gate_up_N2F), down_DF, bias_D)
    return _GatedLinear.apply(gate_up_N2F, down_DF, bias_D, activation)  # type: ignore[no-any-return]
