"""Norm, gated activations and rotary on the CPU: written-out forward and backward passes with as few sweeps over memory
as torch allows.

autograd on the plain definitions saves every intermediate and sweeps memory once for each; here the backward passes
compute from the saved inputs. fp32 inside, the input's dtype outside. Shapes as in `reference`. Plain torch operations
throughout, so a GPU without Triton can run them too.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_forward(
    hidden_ND: Tensor, gamma_D: Tensor | None, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """-> normed [N, D] and the reciprocal root mean square [N] in fp32; without gamma the normed rows alone."""
    wide_ND = hidden_ND.float()
    rstd_N = torch.linalg.vecdot(wide_ND, wide_ND).div_(hidden_ND.shape[-1]).add_(eps).rsqrt_()
    normed_ND = wide_ND * rstd_N[:, None]
    if unit_offset and gamma_D is not None:  # in fp32: 1 + gamma in bf16 would lose gamma's low bits
        return normed_ND.mul_(gamma_D.float() + 1.0).to(hidden_ND.dtype), rstd_N
    normed_ND = normed_ND.to(hidden_ND.dtype)
    return normed_ND if gamma_D is None else normed_ND.mul_(gamma_D), rstd_N


def rms_norm_backward(
    d_normed_ND: Tensor,
    hidden_ND: Tensor,
    gamma_D: Tensor,
    rstd_N: Tensor,
    *,
    need_d_hidden: bool = True,
    need_d_gamma: bool = True,
    unit_offset: bool = False,
    d_residual_ND: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """-> gradient of the input (plus `d_residual_ND`, what reaches it past the norm) and of gamma in fp32; None where
    nobody needs it.
    """
    unit_ND = hidden_ND.float() * rstd_N[:, None]
    wide_ND = d_normed_ND.float()
    d_gamma_D = torch.linalg.vecdot(wide_ND, unit_ND, dim=0) if need_d_gamma else None
    if not need_d_hidden:
        return None, d_gamma_D
    d_unit_ND = wide_ND * (gamma_D.float() + 1.0 if unit_offset else gamma_D.float())
    inner_N = torch.linalg.vecdot(d_unit_ND, unit_ND).div_(hidden_ND.shape[-1])
    # d_x = rstd * (d_unit - unit * mean(d_unit * unit))
    d_unit_ND.sub_(unit_ND.mul_(inner_N[:, None])).mul_(rstd_N[:, None])
    if d_residual_ND is not None:
        d_unit_ND.add_(d_residual_ND)
    return d_unit_ND.to(hidden_ND.dtype), d_gamma_D


Activation = Literal["silu", "gelu_tanh"]


def _activate(gate_NF: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate_NF) if activation == "silu" else F.gelu(gate_NF, approximate="tanh")


def gated_forward(gate_up_N2F: Tensor, activation: Activation = "silu") -> Tensor:
    """act(gate) * up -> [N, F]."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return _activate(gate_NF, activation).mul_(up_NF)


def gated_backward(
    d_y_NF: Tensor, gate_up_N2F: Tensor, activation: Activation = "silu", *, need_y: bool = False
) -> tuple[Tensor, Tensor | None]:
    """-> gradient of the packed projection [N, 2F], and act(gate) * up again where it is needed."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    d_packed_N2F = torch.empty_like(gate_up_N2F)
    d_gate_NF, d_up_NF = d_packed_N2F.chunk(2, dim=-1)
    active_NF = _activate(gate_NF, activation)
    torch.mul(d_y_NF, active_NF, out=d_up_NF)
    d_active_NF = torch.mul(d_y_NF, up_NF, out=d_gate_NF)
    if activation == "silu":
        d_gate_NF.copy_(torch.ops.aten.silu_backward(d_active_NF, gate_NF))
    else:
        d_gate_NF.copy_(torch.ops.aten.gelu_backward(d_active_NF, gate_NF, approximate="tanh"))
    return d_packed_N2F, active_NF.mul_(up_NF) if need_y else None


def rotary_(qkv_NCE: Tensor, heads: int, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Rotate the first `heads` heads in place (half-split layout, the first 2R dimensions of each) and return the same
    tensor; -sin rotates back.
    """
    R = cos_NR.shape[-1]
    low, high = qkv_NCE[:, :heads, :R], qkv_NCE[:, :heads, R : 2 * R]
    cos, sin = cos_NR[:, None].to(qkv_NCE.dtype), sin_NR[:, None].to(qkv_NCE.dtype)
    turned = high * sin
    high.mul_(cos).addcmul_(low, sin)
    low.mul_(cos).sub_(turned)
    return qkv_NCE
