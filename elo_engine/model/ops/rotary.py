"""Rotary embedding on the packed projection [q heads | k heads | v heads], with the q/k norm where a family has one.

Without a norm the heads turn where they lie, and the backward pass turns the gradient back. With one, the result is a
new matrix, because the backward pass needs what was normed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.model import cpu_pointwise, reference
from elo_engine.model.ops import choice

if TYPE_CHECKING:
    from elo_engine.model.layers import Rope


@dataclass(frozen=True)
class Heads:
    """How the packed projection [N, (H + 2K) E] is cut."""

    H: int
    K: int
    E: int

    def split(self, qkv_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q_NHE, k_NKE, v_NKE."""
        q_NHE, k_NKE, v_NKE = qkv_NC.view(-1, self.H + 2 * self.K, self.E).split((self.H, self.K, self.K), dim=1)
        return q_NHE, k_NKE, v_NKE

    def by_name(self) -> dict[str, int]:
        """As the kernels' launchers call them."""
        return {"q_heads": self.H, "k_heads": self.K, "head_width": self.E}


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm of every query and every key head over its width, before the rotation (Qwen3, Gemma 3)."""

    q_gamma_E: Tensor
    k_gamma_E: Tensor
    eps: float
    unit_offset: bool = False


def turn(qkv_NC: Tensor, heads: Heads, rope: Rope, inverse: bool) -> None:
    """Rotate query and key heads in place, or back."""
    if choice.use_triton(qkv_NC):
        from elo_engine.kernels import rotary as kernel

        tables = rope.cos_PR, rope.sin_PR, rope.positions_N
        kernel.rotary_forward(qkv_NC, *tables, **heads.by_name(), inverse=inverse)
        return
    sin_NR = -rope.sin_NR if inverse else rope.sin_NR
    cpu_pointwise.rotary_(qkv_NC.view(qkv_NC.shape[0], -1, heads.E), heads.H + heads.K, rope.cos_NR, sin_NR)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_NC: Tensor, heads: Heads, rope: Rope) -> Tensor:
        ctx.heads, ctx.rope = heads, rope
        ctx.mark_dirty(qkv_NC)
        turn(qkv_NC, heads, rope, inverse=False)
        return qkv_NC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # In place: `rotary_packed` hands out views alone, so autograd put this matrix together for this node alone.
        d_qkv_NC = grads[0].contiguous()
        turn(d_qkv_NC, ctx.heads, ctx.rope, inverse=True)
        return d_qkv_NC, None, None


class _RotaryNorm(torch.autograd.Function):
    """The Triton path; elsewhere the norm is an op of its own before the rotation."""

    @staticmethod
    def forward(
        ctx: Any, qkv_NC: Tensor, q_gamma_E: Tensor, k_gamma_E: Tensor, eps: float, unit_offset: bool, heads: Heads,
        rope: Rope,
    ) -> Tensor:  # fmt: skip
        from elo_engine.kernels import rotary_norm as kernel

        ctx.save_for_backward(qkv_NC, q_gamma_E, k_gamma_E)
        ctx.options = eps, unit_offset, heads, rope
        return kernel.rotary_norm_forward(  # type: ignore[no-any-return]
            qkv_NC, rope.cos_PR, rope.sin_PR, rope.positions_N, q_gamma_E, k_gamma_E, eps, **heads.by_name(),
            unit_offset=unit_offset,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from elo_engine.kernels import rotary_norm as kernel

        qkv_NC, q_gamma_E, k_gamma_E = ctx.saved_tensors
        eps, unit_offset, heads, rope = ctx.options
        d_qkv_NC, d_q_gamma_E, d_k_gamma_E = kernel.rotary_norm_backward(
            grads[0].contiguous(), qkv_NC, rope.cos_PR, rope.sin_PR, rope.positions_N, q_gamma_E, k_gamma_E, eps,
            **heads.by_name(), unit_offset=unit_offset, need_d_qkv=ctx.needs_input_grad[0],
            need_d_gamma=any(ctx.needs_input_grad[1:3]),
        )  # fmt: skip
        d_gammas = (
            None if d_gamma is None else d_gamma.to(gamma.dtype)
            for d_gamma, gamma in ((d_q_gamma_E, q_gamma_E), (d_k_gamma_E, k_gamma_E))
        )
        return d_qkv_NC, *d_gammas, None, None, None, None


def rotary_packed(
    qkv_NC: Tensor, heads: Heads, rope: Rope, norm: HeadNorm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, (H + 2K) E] -> rotated q_NHE and k_NKE, and v_NKE. Takes the input over: without a norm it is written in
    place.
    """
    if choice.use_reference():
        q_NHE, k_NKE, v_NKE = heads.split(qkv_NC)
        if norm is not None:
            q_NHE = reference.rms_norm(q_NHE, norm.q_gamma_E, norm.eps, unit_offset=norm.unit_offset)
            k_NKE = reference.rms_norm(k_NKE, norm.k_gamma_E, norm.eps, unit_offset=norm.unit_offset)
        tables = rope.cos_NR, rope.sin_NR
        return reference.rotary(q_NHE, *tables), reference.rotary(k_NKE, *tables), v_NKE
    if norm is None:
        return heads.split(_Rotary.apply(qkv_NC, heads, rope))
    if choice.use_triton(qkv_NC):
        options = norm.q_gamma_E, norm.k_gamma_E, norm.eps, norm.unit_offset
        return heads.split(_RotaryNorm.apply(qkv_NC, *options, heads, rope))
    from elo_engine.model.ops.rms_norm import rms_norm

    q_NHE, k_NKE, v_NKE = heads.split(qkv_NC)
    normed = [
        rms_norm(x.reshape(-1, heads.E), gamma_E, norm.eps, unit_offset=norm.unit_offset).view(len(x), -1)
        for x, gamma_E in ((q_NHE, norm.q_gamma_E), (k_NKE, norm.k_gamma_E))
    ]
    return heads.split(_Rotary.apply(torch.cat((*normed, v_NKE.flatten(1)), dim=1), heads, rope))
