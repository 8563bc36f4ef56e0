"""The head's loss. The gradients are made in the forward pass, while a piece of the logits is at hand; a frozen head
gets no gradient work and no gradient memory. With a frozen head the losses are differentiable token by token; with
one that learns, their sum is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elo_engine.errors import UsageError
from elo_engine.model import chunked_head, cpu, reference
from elo_engine.model.ops import choice


def _compute(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, softcap: float | None, need_d_hidden: bool, need_d_head: bool,
    d_head_sum_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """-> losses_N in fp32, d_hidden_ND, d_head_VD in fp32, the gradients of the SUM of the losses, None unless
    needed; d_head is added to `d_head_sum_VD` where there is one.
    """
    if choice.use_triton(hidden_ND):
        from elo_engine.kernels import linear_cross_entropy as kernel

        return kernel.linear_cross_entropy_forward(  # type: ignore[no-any-return]
            hidden_ND, head_VD, labels_N, softcap=softcap, need_d_hidden=need_d_hidden, need_d_head=need_d_head,
            d_head_out_VD=d_head_sum_VD,
        )  # fmt: skip
    if choice.use_cpu(hidden_ND) and softcap is None:
        if need_d_head:
            return cpu.head_loss(
                hidden_ND.contiguous(), head_VD, labels_N, need_grads=True, d_head_out_VD=d_head_sum_VD
            )
        return *cpu.frozen_head_loss(hidden_ND.contiguous(), head_VD, labels_N, need_d_hidden=need_d_hidden), None
    return chunked_head.head_loss(
        hidden_ND, head_VD, labels_N, softcap=softcap, need_d_hidden=need_d_hidden, need_d_head=need_d_head,
        d_head_out_VD=d_head_sum_VD,
    )  # fmt: skip


class _FrozenHead(torch.autograd.Function):
    """The losses of the tokens. The gradient of each row is its own loss's, so any weighting of the losses scales
    rows.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, softcap: float | None, need: bool,
        d_head_sum_VD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        adds = d_head_sum_VD is not None
        losses_N, d_hidden_ND, _ = _compute(hidden_ND, head_VD, labels_N, softcap, need, adds, d_head_sum_VD)
        if d_hidden_ND is not None:
            ctx.save_for_backward(d_hidden_ND)
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden_ND,) = ctx.saved_tensors
        return scaled(d_hidden_ND, grads[0][:, None]), None, None, None, None, None


class _LearningHead(torch.autograd.Function):
    """The sum of the losses."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, softcap: float | None) -> Tensor:
        losses_N, d_hidden_ND, d_head_VD = _compute(hidden_ND, head_VD, labels_N, softcap, True, True)
        ctx.save_for_backward(d_hidden_ND, d_head_VD)
        ctx.head_dtype = head_VD.dtype
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden_ND, d_head_VD = ctx.saved_tensors
        # in place: this buffer, V x D in fp32, belongs to this node alone and it runs once
        d_head_VD = d_head_VD.mul_(grads[0]).to(ctx.head_dtype)
        return scaled(d_hidden_ND, grads[0].view(1, 1)), d_head_VD, None, None


def scaled(d_hidden_ND: Tensor, by: Tensor) -> Tensor:
    """The product in fp32, rounded once: a bf16 factor, one over the step's tokens, would itself be off by 2^-9."""
    return torch.mul(d_hidden_ND, by, out=torch.empty_like(d_hidden_ND))


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    softcap: float | None = None,
    per_token: bool = False,
    d_head_sum_VD: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of linear(hidden, head) in nats: the fp32 sum over the tokens with a label (-100: none), or the
    loss of each token, fp32 [N], 0 where there is no label.

    Args:
        softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2).
        per_token: the losses one by one; differentiable where the head is frozen.
        d_head_sum_VD: fp32; the gradient of the SUM of the losses by the head is added to it in the forward pass, and
            to autograd the head is frozen: one buffer of V x D for all micro-batches of a step.

    Raises:
        UsageError: losses one by one of a head that learns: its gradient is made before the losses' weights are
        known.
    """
    learns = head_VD.requires_grad and torch.is_grad_enabled() and d_head_sum_VD is None
    if learns and per_token:
        raise UsageError(
            "linear_cross_entropy: the head learns, and its gradient is made together with the losses, before "
            "any weighting "
            "of them is known; take the sum, or token_losses without gradients, or detach the head"
        )
    if choice.use_reference():
        assert d_head_sum_VD is None, "the definition's gradient is autograd's"
        losses_N = reference.linear_cross_entropy(hidden_ND, head_VD, labels_N, softcap=softcap)
    elif learns:
        return _LearningHead.apply(hidden_ND, head_VD, labels_N, softcap)  # type: ignore[no-any-return]
    else:
        # asked here, because inside a Function autograd's switch cannot be seen
        need = hidden_ND.requires_grad and torch.is_grad_enabled()
        losses_N = _FrozenHead.apply(hidden_ND, head_VD.detach(), labels_N, softcap, need, d_head_sum_VD)
    return losses_N if per_token else losses_N.sum()


@torch.no_grad()
def token_losses(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Per-token cross-entropy in nats (fp32 [N], 0 where ignored), for evaluation; no gradient, no full logits."""
    return linear_cross_entropy(hidden_ND, head_VD, labels_N, softcap=softcap, per_token=True)
