"""The decoder layer as a function, and what travels beside the hidden states: positions, rotary tables, document
bounds.

The shallow model, the whole model and every baseline in this engine call the same `decoder_layer`. Families differ by
the data in `spec` and `names`; a layer's weights are a dictionary with the keys of `names.layer_parts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elo_engine.errors import FailedError
from elo_engine.model import ops
from elo_engine.model.spec import ModelSpec, RopeSpec

LayerWeights = dict[str, Tensor]


@dataclass(frozen=True)
class Packing:
    """Where documents lie on the flat token axis of a micro-batch."""

    segment_starts: list[int]  # offsets in [0, N], N last; a row boundary is always one of them
    positions_N: Tensor  # int64, restarting at each segment


@dataclass(frozen=True)
class Rope:
    """Rotary tables gathered for the positions of one micro-batch, both halves alike: cos_NE, sin_NE in compute
    dtype.
    """

    cos_NE: Tensor
    sin_NE: Tensor


class RopeTable:
    """Angles for every position met so far, grown on demand; scaling as transformers initialises it (its own code is
    called).
    """

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._device = device
        self._inverse_E2, self._factor = _inverse_frequencies(spec)
        self._cos_PE = torch.empty(0, device=device)
        self._sin_PE = torch.empty(0, device=device)

    def gather(self, positions_N: Tensor, longest: int) -> Rope:
        """Tables for these positions; `longest` is one more than the largest of them, known without a device sync."""
        if self._cos_PE.shape[0] < longest:
            angles_PE2 = torch.arange(longest, dtype=torch.float32)[:, None] * self._inverse_E2[None, :]
            angles_PE = torch.cat((angles_PE2, angles_PE2), dim=-1)
            self._cos_PE = (angles_PE.cos() * self._factor).to(self._device, self._dtype)
            self._sin_PE = (angles_PE.sin() * self._factor).to(self._device, self._dtype)
        return Rope(self._cos_PE[positions_N], self._sin_PE[positions_N])


def _inverse_frequencies(spec: ModelSpec) -> tuple[Tensor, float]:
    """fp32 inverse frequencies [E/2] and the factor on cos and sin."""
    rope: RopeSpec = spec.rope
    if rope.kind == "default":
        exponents = torch.arange(0, spec.E, 2, dtype=torch.int64).float() / spec.E
        return 1.0 / (rope.theta**exponents), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.parameters}
    config: Any = LlamaConfig(
        hidden_size=spec.D,
        num_attention_heads=spec.H,
        head_dim=spec.E,
        max_position_embeddings=spec.max_positions,
        rope_theta=rope.theta,
        rope_scaling=scaling,
    )
    try:
        inverse_E2, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    except (KeyError, TypeError) as error:
        raise FailedError(
            f"config.json: rotary scaling {scaling} is not complete for type {rope.kind!r}: {error!r}"
        ) from error
    return inverse_E2, float(factor)


def decoder_layer(spec: ModelSpec, weights: LayerWeights, hidden_ND: Tensor, rope: Rope, packing: Packing) -> Tensor:
    """One pre-norm decoder layer: attention and SwiGLU MLP, each added to the residual stream. [N, D] -> [N, D]"""
    normed_ND = ops.rms_norm(hidden_ND, weights["norm_attention"], spec.norm_eps)
    qkv_NC = ops.linear(normed_ND, weights["qkv"], weights.get("qkv_bias"))
    q_NHE, k_NKE, v_NKE = ops.rotary_packed(qkv_NC, spec.H, spec.K, spec.E, rope.cos_NE, rope.sin_NE)
    mixed_NHE = ops.attention(q_NHE, k_NKE, v_NKE, packing.segment_starts, spec.E**-0.5, spec.window)
    hidden_ND = hidden_ND + ops.linear(mixed_NHE.flatten(1), weights["output"], weights.get("output_bias"))
    normed_ND = ops.rms_norm(hidden_ND, weights["norm_mlp"], spec.norm_eps)
    gate_up_N2F = ops.linear(normed_ND, weights["gate_up"], weights.get("gate_up_bias"))
    return hidden_ND + ops.linear(ops.swiglu(gate_up_N2F), weights["down"], weights.get("down_bias"))
