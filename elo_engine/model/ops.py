"""The one seam between the model and how its ops are computed.

Everything above calls these functions; only this module knows `reference` (plain torch), `cpu` (the CPU fast path,
C++ where it pays) and `elo_engine.kernels` (Triton). `configure("reference")` forces the definitions, `"fused"` the
fast paths and fails where one is missing, `"auto"` takes what is there and `describe()` says what and why.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.errors import RefusedError
from elo_engine.model import cpu, cpu_pointwise, reference
from elo_engine.model.cpu_pointwise import rotary_

Mode = Literal["auto", "reference", "fused"]
_mode: Mode = "auto"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def configure(mode: Mode, device: torch.device) -> str:
    """Choose how ops are computed from here on, for this process; returns one line saying what and why.

    Raises:
        RefusedError: `fused` is forced and a fast path is missing on this device.
    """
    global _mode
    if mode == "fused" and device.type == "cuda" and not _HAS_TRITON:
        raise RefusedError(
            "kernels: fused needs triton on a GPU and it is not installed; pip install triton, or kernels: auto"
        )
    if mode == "fused" and device.type == "cpu" and not cpu.HAS_CSRC:
        raise RefusedError(
            f"kernels: fused needs the C++ extension on a CPU and it is missing ({cpu.CSRC_REASON}); "
            "install a C++17 compiler and reinstall, or use kernels: auto"
        )
    _mode = mode
    return describe(device)


def describe(device: torch.device) -> str:
    """Which path computes the ops on a device, and why, in one line."""
    if _mode == "reference":
        return "kernels: plain torch references (forced)"
    if device.type == "cuda":
        return "kernels: Triton" if _HAS_TRITON else "kernels: plain torch references (triton is not installed)"
    if cpu.HAS_CSRC:
        return "kernels: CPU fast path with C++ extension"
    return f"kernels: CPU fast path in torch alone ({cpu.CSRC_REASON})"


def _triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and _HAS_TRITON and _mode != "reference"


def _cpu(tensor: Tensor) -> bool:
    return not tensor.is_cuda and _mode != "reference"


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b; torch's GEMM on every device."""
    return F.linear(x_ND, weight_OD, bias_O)


class _RmsNorm(torch.autograd.Function):
    """Saves the input and one number a row; the normed input is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, gamma_D: Tensor, eps: float) -> Tensor:
        y_ND: Tensor
        if _triton(hidden_ND):
            from elo_engine.kernels import rms_norm as kernel

            y_ND, rstd_N = kernel.rms_norm_forward(hidden_ND, gamma_D, eps)
        else:
            y_ND, rstd_N = cpu_pointwise.rms_norm_forward(hidden_ND, gamma_D, eps)
        ctx.save_for_backward(hidden_ND, gamma_D, rstd_N)
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_ND, gamma_D, rstd_N = ctx.saved_tensors
        if _triton(hidden_ND):
            from elo_engine.kernels import rms_norm as kernel

            d_hidden_ND, d_gamma_D = kernel.rms_norm_backward(
                grads[0],
                hidden_ND,
                gamma_D,
                rstd_N,
                need_d_x=ctx.needs_input_grad[0],
                need_d_gamma=ctx.needs_input_grad[1],
            )
        else:
            d_hidden_ND, d_gamma_D = cpu_pointwise.rms_norm_backward(
                grads[0].contiguous(),
                hidden_ND,
                gamma_D,
                rstd_N,
                need_d_hidden=ctx.needs_input_grad[0],
                need_d_gamma=ctx.needs_input_grad[1],
            )
        d_gamma = None if d_gamma_D is None else d_gamma_D.to(gamma_D.dtype)
        return (d_hidden_ND if ctx.needs_input_grad[0] else None), d_gamma, None


def rms_norm(hidden_ND: Tensor, gamma_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension; see `reference.rms_norm`."""
    if _triton(hidden_ND) or _cpu(hidden_ND):
        return _RmsNorm.apply(hidden_ND, gamma_D, eps)  # type: ignore[no-any-return]
    return reference.rms_norm(hidden_ND, gamma_D, eps)


class _Swiglu(torch.autograd.Function):
    """Saves the packed projection alone; silu is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        if _triton(gate_up_N2F):
            from elo_engine.kernels import swiglu as kernel

            gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
            return kernel.swiglu_forward(gate_NF, up_NF)  # type: ignore[no-any-return]
        return cpu_pointwise.swiglu_forward(gate_up_N2F)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up_N2F,) = ctx.saved_tensors
        if _triton(gate_up_N2F):
            from elo_engine.kernels import swiglu as kernel

            gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
            d_packed_N2F = torch.empty_like(gate_up_N2F)
            d_gate_NF, d_up_NF = d_packed_N2F.chunk(2, dim=-1)
            kernel.swiglu_backward(grads[0], gate_NF, up_NF, out=(d_gate_NF, d_up_NF))
            return d_packed_N2F
        return cpu_pointwise.swiglu_backward(grads[0].contiguous(), gate_up_N2F)


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) * up of the packed projection [gate | up] -> [N, F]."""
    if _triton(gate_up_N2F) or _cpu(gate_up_N2F):
        return _Swiglu.apply(gate_up_N2F)  # type: ignore[no-any-return]
    return reference.swiglu(gate_up_N2F)


class _RotaryPacked(torch.autograd.Function):
    """Rotates the query and key heads of the packed projection where they lie; the backward rotates the other way."""

    @staticmethod
    def forward(ctx: Any, qkv_NC: Tensor, heads: int, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NE, sin_NE)
        ctx.heads = heads
        ctx.mark_dirty(qkv_NC)
        rotary_(qkv_NC.view(qkv_NC.shape[0], -1, cos_NE.shape[1]), heads, cos_NE, sin_NE)
        return qkv_NC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos_NE, sin_NE = ctx.saved_tensors
        d_qkv_NC = grads[0].contiguous().clone()  # the gradient that arrives is not ours to write into
        rotary_(d_qkv_NC.view(d_qkv_NC.shape[0], -1, cos_NE.shape[1]), ctx.heads, cos_NE, -sin_NE)
        return d_qkv_NC, None, None, None


def rotary_packed(
    qkv_NC: Tensor, H: int, K: int, E: int, cos_NE: Tensor, sin_NE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, (H + 2K) E] -> rotated q_NHE, rotated k_NKE, v_NKE. Takes the input over: it is written in place."""
    heads = (H, K, K)
    if _mode == "reference":
        q_NHE, k_NKE, v_NKE = qkv_NC.view(-1, H + 2 * K, E).split(heads, dim=1)
        return reference.rotary(q_NHE, cos_NE, sin_NE), reference.rotary(k_NKE, cos_NE, sin_NE), v_NKE
    turned_NC = _RotaryPacked.apply(qkv_NC, H + K, cos_NE, sin_NE)
    q_NHE, k_NKE, v_NKE = turned_NC.view(-1, H + 2 * K, E).split(heads, dim=1)
    return q_NHE, k_NKE, v_NKE


def attention(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int], scale: float, window: int | None = None
) -> Tensor:
    """Causal attention inside each segment, none across; see `reference.attention`. -> [N, H, E]"""
    if _mode == "reference":
        return reference.attention(q_NHE, k_NKE, v_NKE, segment_starts, scale, window)
    if q_NHE.is_cuda or window is not None:
        return _sdpa_by_segment(q_NHE, k_NKE, v_NKE, segment_starts, scale, window)
    return cpu.attention(q_NHE, k_NKE, v_NKE, segment_starts, scale)


def _sdpa_by_segment(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int], scale: float, window: int | None
) -> Tensor:
    """torch's scaled_dot_product_attention on runs of equally long segments: the masks stay causal, so flash kernels
    serve.
    """
    outputs: list[Tensor] = []
    H, E = q_NHE.shape[1:]
    run = 0
    lengths = [stop - start for start, stop in pairwise(segment_starts)]
    while run < len(lengths):
        stop = run
        while stop < len(lengths) and lengths[stop] == lengths[run]:
            stop += 1
        span, length = slice(segment_starts[run], segment_starts[stop]), lengths[run]
        q, k, v = (x[span].unflatten(0, (stop - run, length)).transpose(1, 2) for x in (q_NHE, k_NKE, v_NKE))
        mask = None
        if window is not None and window < length:
            age = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)[None, :]
            mask = (age >= 0) & (age < window)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(mixed.transpose(1, 2).reshape(-1, H, E))
        run = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _FrozenHeadLoss(torch.autograd.Function):
    """Sum of the losses; the gradient of the hidden states is made in the forward pass, that of the head never."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
        need = ctx.needs_input_grad[0]
        losses_N, d_hidden_ND = _frozen_head(hidden_ND, head_VD, labels_N, need)
        if d_hidden_ND is not None:
            ctx.save_for_backward(d_hidden_ND)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (d_hidden_ND,) = ctx.saved_tensors
        return d_hidden_ND * grads[0].to(d_hidden_ND.dtype), None, None


def _frozen_head(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    if _cpu(hidden_ND):
        return cpu.frozen_head_loss(hidden_ND.contiguous(), head_VD, labels_N, need_d_hidden=need)
    if _triton(hidden_ND):
        return _frozen_head_triton(hidden_ND, head_VD, labels_N, need)
    return reference.frozen_head_chunks(hidden_ND, head_VD, labels_N, need_d_hidden=need)


def _frozen_head_triton(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, need: bool, chunk: int = 4096
) -> tuple[Tensor, Tensor | None]:
    """GEMM -> one kernel that turns logits into loss and gradient in place -> GEMM; one chunk of logits alive."""
    from elo_engine.kernels import cross_entropy as kernel

    losses_N = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
    d_hidden_ND = torch.empty_like(hidden_ND) if need else None
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits_NV = F.linear(hidden_ND[rows], head_VD)
        losses_N[rows] = kernel.cross_entropy_forward(logits_NV, labels_N[rows], need_d_logits=need)
        if d_hidden_ND is not None:
            torch.mm(logits_NV, head_VD, out=d_hidden_ND[rows])
    return losses_N, d_hidden_ND


class _HeadLoss(torch.autograd.Function):
    """Sum of the losses of a head that learns; both gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
        if _cpu(hidden_ND):
            losses_N, d_hidden_ND, d_head_VD = cpu.head_loss(hidden_ND.contiguous(), head_VD, labels_N, need_grads=True)
        else:
            losses_N, d_hidden_ND, d_head_VD = reference.head_chunks(hidden_ND, head_VD, labels_N)
        ctx.save_for_backward(d_hidden_ND, d_head_VD)
        ctx.head_dtype = head_VD.dtype
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden_ND, d_head_VD = ctx.saved_tensors
        # in place: these two buffers belong to this node alone and it runs once
        return d_hidden_ND.mul_(grads[0].to(d_hidden_ND.dtype)), d_head_VD.mul_(grads[0]).to(ctx.head_dtype), None


def head_loss_sum(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum of the cross-entropies in nats (fp32 scalar) over the tokens with a label; a frozen head gets no gradient
    work.
    """
    if head_VD.requires_grad and torch.is_grad_enabled():
        return _HeadLoss.apply(hidden_ND, head_VD, labels_N)  # type: ignore[no-any-return]
    return _FrozenHeadLoss.apply(hidden_ND, head_VD, labels_N)  # type: ignore[no-any-return]


@torch.no_grad()
def head_losses(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Per-token cross-entropy in nats (fp32 [N], 0 where ignored), for evaluation; no gradient, no full logits."""
    return _frozen_head(hidden_ND, head_VD, labels_N, False)[0]
