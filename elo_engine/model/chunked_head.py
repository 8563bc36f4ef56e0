"""The head's loss and its gradients in chunks of rows, in torch's own operations on any device.

The way of computing where no faster one exists: soft-capped logits on the CPU, and CUDA without Triton. Gradients are
made in the forward pass, one chunk of logits is alive, and what is not needed is not made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
CHUNK_ROWS = 1024  # 1024 x 128256 fp32 logits are 0.5 GB
CAPPED_BYTES = 128 << 20  # of fp32 logits in a chunk under a soft-cap, whose derivative is kept beside them


@torch.no_grad()
def head_loss(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, softcap: float | None = None, need_d_hidden: bool,
    need_d_head: bool, d_head_out_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """-> losses_N (fp32, 0 where the label is -100), and the gradients of their sum by the hidden states (their
    dtype) and by the head (fp32, added to `d_head_out_VD` where given), each None unless needed.
    """
    losses_N = torch.zeros(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
    d_hidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if need_d_hidden else None
    d_head_VD = d_head_out_VD if need_d_head else None
    if need_d_head and d_head_VD is None:
        d_head_VD = torch.zeros(head_VD.shape, dtype=torch.float32, device=head_VD.device)
    size = chunk_rows(len(head_VD)) if softcap is not None else CHUNK_ROWS
    for start in range(0, len(labels_N), size):
        rows = slice(start, start + size)
        operands = hidden_ND[rows], head_VD, labels_N[rows], softcap
        losses_N[rows], d_logits_RV = _chunk(*operands, need_gradient=d_hidden_ND is not None or d_head_VD is not None)
        if d_logits_RV is None:
            continue
        if d_hidden_ND is not None:
            d_hidden_ND[rows] = torch.mm(d_logits_RV, head_VD)
        if d_head_VD is not None:
            d_head_VD += torch.mm(d_logits_RV.t(), hidden_ND[rows])
        del d_logits_RV
    return losses_N, d_hidden_ND, d_head_VD


def chunk_rows(V: int) -> int:
    """Rows of a chunk of soft-capped logits, of which three are alive at a time."""
    return max(1, min(CHUNK_ROWS, CAPPED_BYTES // (4 * V)))


def _chunk(
    hidden_RD: Tensor, head_VD: Tensor, labels_R: Tensor, softcap: float | None, *, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses, and the gradient of their sum by the logits in the head's type. What they were made of ends here."""
    logits_RV = F.linear(hidden_RD, head_VD).float()
    slope_RV = None
    if softcap is not None:
        logits_RV.div_(softcap).tanh_()
        slope_RV = 1.0 - logits_RV.square() if need_gradient else None
        logits_RV.mul_(softcap)
    losses_R = F.cross_entropy(logits_RV, labels_R, ignore_index=IGNORED, reduction="none")
    if not need_gradient:
        return losses_R, None
    d_logits_RV = _softmax_minus_target(logits_RV, labels_R)
    if slope_RV is not None:
        d_logits_RV.mul_(slope_RV)
    return losses_R, d_logits_RV.to(head_VD.dtype)


def _softmax_minus_target(logits_RV: Tensor, labels_R: Tensor) -> Tensor:
    """Gradient of the summed loss with respect to the logits; rows without a label get 0. No wait for the device."""
    probabilities_RV = torch.softmax(logits_RV, dim=-1)
    kept_R = labels_R != IGNORED
    target_R1 = labels_R.clamp_min(0)[:, None]
    probabilities_RV.scatter_add_(1, target_R1, torch.full_like(target_R1, -1.0, dtype=probabilities_RV.dtype))
    return probabilities_RV.mul_(kept_R[:, None])
