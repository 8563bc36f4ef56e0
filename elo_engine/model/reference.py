"""Every op in plain torch: the definition that each fast path is tested against, and the path where none exists.

Nothing here is tuned. Norms and the loss compute in fp32 whatever the dtype, as the checkpoints' own training code
does. Shapes: hidden_ND, q_NHE, k_NKE, v_NKE, head_VD, labels_N (-100 = no loss); letters in `elo_engine.__init__`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def rms_norm(hidden_ND: Tensor, gamma_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * gamma."""
    wide_ND = hidden_ND.float()
    rstd_N1 = torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + eps)
    return gamma_D * (wide_ND * rstd_N1).to(hidden_ND.dtype)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) * up for the packed projection [gate | up] (Shazeer 2020) -> [N, F]."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def rotary(heads_NHE: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of the checkpoints (Su et al. 2021)."""
    half = heads_NHE.shape[-1] // 2
    rotated_NHE = torch.cat((-heads_NHE[..., half:], heads_NHE[..., :half]), dim=-1)
    return heads_NHE * cos_NE[:, None, :] + rotated_NHE * sin_NE[:, None, :]


def attention(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    segment_starts: list[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention inside each segment of the flat token axis, none across; grouped-query heads share a key head.

    Args:
        segment_starts: offsets of the segments in [0, N], N last.
        window: a query sees this many tokens, itself included; None: all of its segment before it.
    Returns:
        [N, H, E]
    """
    N, H = q_NHE.shape[:2]
    group = H // k_NKE.shape[1]
    segment_N = torch.zeros(N, dtype=torch.long, device=q_NHE.device)
    segment_N[torch.tensor(segment_starts[1:-1], dtype=torch.long, device=q_NHE.device)] = 1
    segment_N = segment_N.cumsum(0)
    position_N = torch.arange(N, device=q_NHE.device)
    seen_NN = (segment_N[:, None] == segment_N[None, :]) & (position_N[:, None] >= position_N[None, :])
    if window is not None:
        seen_NN &= position_N[:, None] - position_N[None, :] < window
    k_NHE, v_NHE = k_NKE.repeat_interleave(group, 1), v_NKE.repeat_interleave(group, 1)
    scores_HNN = torch.einsum("nhe,mhe->hnm", q_NHE, k_NHE) * scale
    scores_HNN = scores_HNN.masked_fill(~seen_NN, float("-inf"))
    weights_HNN = torch.softmax(scores_HNN.float(), dim=-1).to(q_NHE.dtype)
    return torch.einsum("hnm,mhe->nhe", weights_HNN, v_NHE)


def head_losses(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Per-token cross-entropy in nats, fp32 [N], 0 where the label is ignored. Materialises the logits."""
    logits_NV = F.linear(hidden_ND, head_VD).float()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="none")


def frozen_head_chunks(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, need_d_hidden: bool, chunk: int = 1024
) -> tuple[Tensor, Tensor | None]:
    """Loss of a head that does not learn, in chunks of rows: dX in the forward pass, no dW, never all logits at once.

    Returns:
        losses_N in fp32, and the gradient [N, D] of their sum (None unless asked for).
    """
    losses_N = torch.zeros(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    d_hidden_ND = torch.empty_like(hidden_ND) if need_d_hidden else None
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        wide_NV, labels = F.linear(hidden_ND[rows], head_VD).float(), labels_N[rows]
        losses_N[rows] = F.cross_entropy(wide_NV, labels, ignore_index=IGNORED, reduction="none")
        if d_hidden_ND is not None:
            d_logits_NV = _softmax_minus_target(wide_NV, labels).to(head_VD.dtype)
            d_hidden_ND[rows] = torch.mm(d_logits_NV, head_VD)
    return losses_N, d_hidden_ND


def head_chunks(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a head that learns, in chunks of rows; returns losses_N, d_hidden_ND and d_head_VD (fp32) of their sum.
    """
    losses_N = torch.zeros(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    d_hidden_ND = torch.empty_like(hidden_ND)
    d_head_VD = torch.zeros(head_VD.shape, dtype=torch.float32, device=head_VD.device)
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        wide_NV, labels = F.linear(hidden_ND[rows], head_VD).float(), labels_N[rows]
        losses_N[rows] = F.cross_entropy(wide_NV, labels, ignore_index=IGNORED, reduction="none")
        d_logits_NV = _softmax_minus_target(wide_NV, labels).to(head_VD.dtype)
        d_hidden_ND[rows] = torch.mm(d_logits_NV, head_VD)
        d_head_VD += torch.mm(d_logits_NV.t(), hidden_ND[rows])
    return losses_N, d_hidden_ND, d_head_VD


def _softmax_minus_target(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Gradient of the summed loss with respect to the logits; rows without a label get 0."""
    probabilities_NV = torch.softmax(logits_NV, dim=-1)
    kept_N = labels_N != IGNORED
    rows = kept_N.nonzero().squeeze(1)
    probabilities_NV[rows, labels_N[rows]] -= 1.0
    return probabilities_NV.mul_(kept_N[:, None])
