"""Every op in plain torch: the definition that each fast path is tested against, and the path where none exists.

Nothing here is tuned. Norms, rotary angles and the loss compute in fp32 for bf16 input, as the checkpoints' own
training code does, and in float64 for float64 input, so that gradcheck can judge them. Shapes: hidden_ND, q_NHE,
k_NKE, v_NKE, head_VD, labels_N (-100 = no loss); letters in `elo_engine.__init__`. The optimizer's definition is in
`reference_adamw.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(hidden_ND: Tensor, gamma_D: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * gamma; works on any leading shape.

    `unit_offset`: Gemma's checkpoints store gamma - 1, and their code multiplies by 1 + gamma in fp32.
    """
    wide_ND = _wide(hidden_ND)
    rstd_N1 = torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (wide_ND * rstd_N1 * (1.0 + _wide(gamma_D))).to(hidden_ND.dtype)
    return gamma_D * (wide_ND * rstd_N1).to(hidden_ND.dtype)


def add_rms_norm(
    hidden_ND: Tensor, update_ND: Tensor, gamma_D: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """The residual add and the norm of its result: -> hidden + update, rms_norm(hidden + update)."""
    sum_ND = hidden_ND + update_ND
    return sum_ND, rms_norm(sum_ND, gamma_D, eps, unit_offset=unit_offset)


def rms_norm_add(
    residual_ND: Tensor, update_ND: Tensor, gamma_D: Tensor, eps: float, *, unit_offset: bool = False
) -> Tensor:
    """The norm at the end of half a layer and the residual add after it: residual + rms_norm(update)."""
    return residual_ND + rms_norm(update_ND, gamma_D, eps, unit_offset=unit_offset)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) * up for the packed projection [gate | up] (Shazeer 2020) -> [N, F]."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def geglu(gate_up_N2F: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh approximation, as Gemma has it (Shazeer 2020) -> [N, F]."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return F.gelu(gate_NF, approximate="tanh") * up_NF


def rotary(heads_NHE: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of the checkpoints (Su et al. 2021).

    cos and sin of each token's angles, half a rotary width: [N, R]. The first 2R dimensions of a head turn, dimension i
    with i + R; what follows them (partial rotary) stays.
    """
    R = cos_NR.shape[-1]
    cos, sin = cos_NR[:, None].to(heads_NHE.dtype), sin_NR[:, None].to(heads_NHE.dtype)
    low, high, rest = heads_NHE[..., :R], heads_NHE[..., R : 2 * R], heads_NHE[..., 2 * R :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def attention(
    q_NHE: Tensor,
    k_NKE: Tensor,
    v_NKE: Tensor,
    segment_starts: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside each segment of the flat token axis, none across; grouped-query heads share a key head.

    Args:
        segment_starts: offsets of the segments in [0, N], N last.
        window: a query sees this many tokens, itself included; None: all of its segment before it.
        softcap: scores become softcap * tanh(score / softcap) before the softmax (Gemma 2).
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
    if softcap is not None:
        scores_HNN = softcap * torch.tanh(scores_HNN / softcap)
    scores_HNN = scores_HNN.masked_fill(~seen_NN, float("-inf"))
    weights_HNN = torch.softmax(_wide(scores_HNN), dim=-1).to(q_NHE.dtype)
    return torch.einsum("hnm,mhe->nhe", weights_HNN, v_NHE)


def linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, softcap: float | None = None, chunk: int = 1024
) -> Tensor:
    """Cross-entropy of each token in nats, fp32 [N], 0 where the label is -100; autograd does the rest.

    The logits of one chunk of rows exist at a time in the forward pass, all of them under autograd.
    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
    """
    losses = []
    for hidden_RD, labels_R in zip(hidden_ND.split(chunk), labels_N.split(chunk), strict=True):
        logits_RV = _wide(F.linear(hidden_RD, head_VD))
        if softcap is not None:
            logits_RV = softcap * torch.tanh(logits_RV / softcap)
        losses.append(F.cross_entropy(logits_RV, labels_R, ignore_index=IGNORED, reduction="none"))
    return torch.cat(losses) if losses else hidden_ND.new_zeros(0, dtype=torch.float32)
