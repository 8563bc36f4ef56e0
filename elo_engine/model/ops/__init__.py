"""The one seam between the model and how its ops are computed.

Everything above calls these functions. Of the model only this package knows `reference` (plain torch, the
definitions), the CPU fast path (`cpu*.py`, C++ where it pays) and `elo_engine.kernels` (Triton); `choice.py` says
which of them serves a tensor. One file per op, of the same stem as its kernel, its tests and its benchmark, each with
its autograd.Function.
"""

from __future__ import annotations

from elo_engine.model.ops.attention import attention, why_not_padded
from elo_engine.model.ops.choice import configure, describe, use_reference
from elo_engine.model.ops.gated_mlp import gated_mlp_again
from elo_engine.model.ops.linear_cross_entropy import linear_cross_entropy, token_losses
from elo_engine.model.ops.linear_cross_entropy_fp8 import linear_cross_entropy_fp8
from elo_engine.model.ops.linear_fp8 import linear
from elo_engine.model.ops.quantize_fp8 import Fp8, Fp8Head, describe_fp8, fp8_emulated, require_fp8
from elo_engine.model.ops.rms_norm import add_norm_linear, add_rms_norm, norm_linear, rms_norm, rms_norm_add
from elo_engine.model.ops.rotary import HeadNorm, Heads, rotary_packed
from elo_engine.model.ops.swiglu import gated_linear

__all__ = [
    "Fp8",
    "Fp8Head",
    "HeadNorm",
    "Heads",
    "add_norm_linear",
    "add_rms_norm",
    "attention",
    "configure",
    "describe",
    "describe_fp8",
    "fp8_emulated",
    "gated_linear",
    "gated_mlp_again",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_fp8",
    "norm_linear",
    "require_fp8",
    "rms_norm",
    "rms_norm_add",
    "rotary_packed",
    "token_losses",
    "use_reference",
    "why_not_padded",
]
