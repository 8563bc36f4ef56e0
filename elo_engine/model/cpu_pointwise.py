"""Norm, SwiGLU and rotary on the CPU: written-out forward and backward passes with as few sweeps over memory as torch
allows.

autograd on the plain definitions saves every intermediate and sweeps memory once for each; here the backward passes
compute from the saved inputs. fp32 inside, the input's dtype outside. Shapes as in `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_forward(hidden_ND: Tensor, gamma_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> normed [N, D] and the reciprocal root mean square [N] in fp32."""
    wide_ND = hidden_ND.float()
    rstd_N = torch.linalg.vecdot(wide_ND, wide_ND).div_(hidden_ND.shape[-1]).add_(eps).rsqrt_()
    normed_ND = (wide_ND * rstd_N[:, None]).to(hidden_ND.dtype)
    return normed_ND.mul_(gamma_D), rstd_N


def rms_norm_backward(
    d_normed_ND: Tensor,
    hidden_ND: Tensor,
    gamma_D: Tensor,
    rstd_N: Tensor,
    *,
    need_d_hidden: bool = True,
    need_d_gamma: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """-> gradient of the input and of gamma (fp32); None where nobody needs it."""
    unit_ND = hidden_ND.float() * rstd_N[:, None]
    wide_ND = d_normed_ND.float()
    d_gamma_D = torch.linalg.vecdot(wide_ND, unit_ND, dim=0) if need_d_gamma else None
    if not need_d_hidden:
        return None, d_gamma_D
    d_unit_ND = wide_ND * gamma_D.float()
    inner_N = torch.linalg.vecdot(d_unit_ND, unit_ND).div_(hidden_ND.shape[-1])
    # d_x = rstd * (d_unit - unit * mean(d_unit * unit))
    d_unit_ND.sub_(unit_ND.mul_(inner_N[:, None])).mul_(rstd_N[:, None])
    return d_unit_ND.to(hidden_ND.dtype), d_gamma_D


def swiglu_forward(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) * up -> [N, F]."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_NF).mul_(up_NF)


def swiglu_backward(d_y_NF: Tensor, gate_up_N2F: Tensor) -> Tensor:
    """-> gradient of the packed projection [N, 2F]."""
    gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
    d_packed_N2F = torch.empty_like(gate_up_N2F)
    d_gate_NF, d_up_NF = d_packed_N2F.chunk(2, dim=-1)
    silu_NF = torch.nn.functional.silu(gate_NF)
    torch.mul(d_y_NF, silu_NF, out=d_up_NF)
    torch.mul(d_y_NF, up_NF, out=d_gate_NF)
    d_gate_NF.copy_(torch.ops.aten.silu_backward(d_gate_NF, gate_NF))
    return d_packed_N2F


def rotary_(qkv_NCE: Tensor, heads: int, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotate the first `heads` heads in place (half-split layout) and return the same tensor; -sin rotates back."""
    half = qkv_NCE.shape[-1] // 2
    low, high = qkv_NCE[:, :heads, :half], qkv_NCE[:, :heads, half:]
    cos, sin = cos_NE[:, None, :half].to(qkv_NCE.dtype), sin_NE[:, None, :half].to(qkv_NCE.dtype)
    turned = high * sin
    high.mul_(cos).addcmul_(low, sin)
    low.mul_(cos).sub_(turned)
    return qkv_NCE
