"""The loss of a frozen head with products of 8-bit operands; see `reference_fp8.linear_cross_entropy_fp8`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.model import reference_fp8
from elo_engine.model.ops.linear_cross_entropy import scaled
from elo_engine.model.ops.quantize_fp8 import Fp8Head


def _compute(
    hidden_ND: Tensor, head_VD: Tensor, head: Fp8Head, labels_N: Tensor, softcap: float | None, need: bool
) -> tuple[Tensor, Tensor | None]:
    if head.of_emulation is not None:
        return reference_fp8.linear_cross_entropy_fp8(
            hidden_ND, head_VD, *head.of_emulation, head.mean_D, head.outliers_J, labels_N, softcap=softcap,
            need_d_hidden=need,
        )  # fmt: skip
    from elo_engine.kernels import linear_cross_entropy_fp8 as kernel

    return kernel.linear_cross_entropy_fp8_forward(  # type: ignore[no-any-return]
        hidden_ND, head_VD, (head.rows_VC, head.rows_scale_V1), (head.columns_DV, head.columns_scale_D1), head.mean_D,
        head.outliers_J, labels_N, softcap=softcap, need_d_hidden=need,
    )  # fmt: skip


class _FrozenHeadFp8(torch.autograd.Function):
    """The losses of the tokens; the gradient of each row is its own loss's."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, head: Fp8Head, labels_N: Tensor, softcap: float | None, need: bool
    ) -> Tensor:
        losses_N, d_hidden_ND = _compute(hidden_ND, head_VD, head, labels_N, softcap, need)
        if d_hidden_ND is not None:
            ctx.save_for_backward(d_hidden_ND)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden_ND,) = ctx.saved_tensors
        return scaled(d_hidden_ND, grads[0][:, None]), None, None, None, None, None


def linear_cross_entropy_fp8(
    hidden_ND: Tensor, head_VD: Tensor, head: Fp8Head, labels_N: Tensor, *, softcap: float | None = None
) -> Tensor:
    """As `linear_cross_entropy` of a frozen head: the fp32 sum in nats over the tokens with a label.

    head: made of `head_VD`, whose bf16 rows serve the targets.
    """
    need = hidden_ND.requires_grad and torch.is_grad_enabled()
    losses_N = _FrozenHeadFp8.apply(hidden_ND.contiguous(), head_VD.detach(), head, labels_N, softcap, need)
    return losses_N.sum()  # type: ignore[no-any-return]
