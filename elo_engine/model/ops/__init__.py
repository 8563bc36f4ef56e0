"""The one seam between the model and how its ops are computed.

Everything above calls these functions. Of the model only this package knows `reference` (plain torch, the
definitions), the CPU fast path (`cpu*.py`, C++ where it pays) and `elo_engine.kernels` (Triton); `choice.py` says
which of them serves a tensor. One file per op, of the same stem as its kernel, its tests and its benchmark, each with
its autograd.Function.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from elo_engine.model.ops.attention import attention
from elo_engine.model.ops.choice import configure, describe, use_reference
from elo_engine.model.ops.gated_mlp import gated_mlp_again
from elo_engine.model.ops.linear_cross_entropy import linear_cross_entropy, token_losses
from elo_engine.model.ops.rms_norm import add_norm_linear, add_rms_norm, norm_linear, rms_norm, rms_norm_add
from elo_engine.model.ops.rotary import HeadNorm, Heads, rotary_packed
from elo_engine.model.ops.swiglu import gated_linear

__all__ = [
    "HeadNorm",
    "Heads",
    "add_norm_linear",
    "add_rms_norm",
    "attention",
    "configure",
    "describe",
    "gated_linear",
    "gated_mlp_again",
    "linear",
    "linear_cross_entropy",
    "norm_linear",
    "rms_norm",
    "rms_norm_add",
    "rotary_packed",
    "token_losses",
    "use_reference",
]


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b; torch's GEMM on every device."""
    return F.linear(x_ND, weight_OD, bias_O)
