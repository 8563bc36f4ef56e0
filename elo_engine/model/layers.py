"""The decoder layer as a function, and what travels beside the hidden states: positions, rotary tables, document
bounds.

The shallow model, the whole model and every baseline in this engine call the same `decoder_layer`. Families differ by
the data in `spec` and `names`; a layer's weights are a dictionary with the keys of `names.layer_parts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elo_engine.errors import FailedError, shown
from elo_engine.model import ops
from elo_engine.model.spec import ModelSpec, RopeSpec

LayerWeights = dict[str, Tensor]


@dataclass(frozen=True)
class Packing:
    """Where documents lie on the flat token axis of a micro-batch."""

    segment_starts: list[int]  # offsets in [0, N], N last; a row boundary is always one of them
    positions_N: Tensor  # int64, restarting at each segment

    @cached_property
    def offsets(self) -> Tensor:
        """`segment_starts` as int32 where the positions are, as variable-length attention takes them; sent once,
        without a wait.
        """
        offsets_S = torch.tensor(self.segment_starts, dtype=torch.int32)
        if self.positions_N.is_cuda:
            offsets_S = offsets_S.pin_memory()
        return offsets_S.to(self.positions_N.device, non_blocking=True)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(stop - start for start, stop in pairwise(self.segment_starts))


@dataclass(frozen=True)
class Rope:
    """Rotary tables in fp32, a row a position, R = half the rotary width, and the positions of one micro-batch."""

    cos_PR: Tensor
    sin_PR: Tensor
    positions_N: Tensor

    @cached_property
    def cos_NR(self) -> Tensor:
        """The rows of the micro-batch's tokens, for paths that do not gather them themselves."""
        return self.cos_PR[self.positions_N]

    @cached_property
    def sin_NR(self) -> Tensor:
        """As `cos_NR`."""
        return self.sin_PR[self.positions_N]


Ropes = tuple[Rope, ...]  # of a micro-batch, one for each of `spec.ropes`


class RopeTable:
    """Angles for every position met so far, grown on demand; scaling as transformers initialises it (its own code is
    called).
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._device = device
        self._frequencies = [_inverse_frequencies(spec, rope) for rope in spec.ropes]
        empty = torch.empty(0, device=device)
        self._tables = [(empty, empty)] * len(spec.ropes)

    def gather(self, positions_N: Tensor, longest: int) -> Ropes:
        """Tables for these positions; `longest` is one more than the largest of them, known without a device sync."""
        if self._tables[0][0].shape[0] < longest:
            positions_P = torch.arange(longest, dtype=torch.float32)
            self._tables = []
            for inverse_R, factor in self._frequencies:
                angles_PR = positions_P[:, None] * inverse_R[None, :]
                cos_PR, sin_PR = angles_PR.cos() * factor, angles_PR.sin() * factor
                self._tables.append((cos_PR.to(self._device), sin_PR.to(self._device)))
        return tuple(Rope(cos_PR, sin_PR, positions_N) for cos_PR, sin_PR in self._tables)


def _inverse_frequencies(spec: ModelSpec, rope: RopeSpec) -> tuple[Tensor, float]:
    """fp32 inverse frequencies [R] and the factor on cos and sin."""
    if rope.kind == "default":
        turning = int(spec.E * rope.share)
        exponents = torch.arange(0, turning, 2, dtype=torch.int64).float() / turning
        return 1.0 / (rope.theta**exponents), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": rope.kind, "rope_theta": rope.theta, **rope.parameters}
    if rope.share != 1.0:
        scaling["partial_rotary_factor"] = rope.share
    try:
        config: Any = LlamaConfig(
            hidden_size=spec.H * spec.E,  # only the heads' width counts here, and D need be no multiple of their number
            num_attention_heads=spec.H,
            head_dim=spec.E,
            max_position_embeddings=spec.max_positions,
            rope_theta=rope.theta,
            rope_scaling=scaling,
            partial_rotary_factor=rope.share,
        )
        inverse_R, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise FailedError(
            f"config.json: rotary scaling {shown(scaling)} is not complete for type {rope.kind!r}, or makes no sense: "
            f"{shown(error)}"
        ) from error
    if not bool(inverse_R.isfinite().all()) or not math.isfinite(factor):
        raise FailedError(f"config.json: rotary scaling {shown(scaling)} gives angles that are no numbers")
    return inverse_R, float(factor)


def embedding_factor(spec: ModelSpec, dtype: torch.dtype) -> float | None:
    """What embedded tokens are multiplied with, rounded to their type as the checkpoints' own code does (Gemma); None:
    nothing.
    """
    return None if spec.embedding_scale is None else float(torch.tensor(spec.embedding_scale, dtype=dtype))


def scale_embedded(spec: ModelSpec, hidden_ND: Tensor) -> Tensor:
    """Embedded tokens -> what enters the first layer. Of a gradient by the one: the gradient by the other."""
    factor = embedding_factor(spec, hidden_ND.dtype)
    return hidden_ND if factor is None else hidden_ND * factor


def final_norm(spec: ModelSpec, hidden_ND: Tensor, norm_D: Tensor) -> Tensor:
    """The norm between the last layer and the head."""
    return ops.rms_norm(hidden_ND, norm_D, spec.norm_eps, unit_offset=spec.unit_offset)


def decoder_layer(
    spec: ModelSpec, index: int, weights: LayerWeights, hidden_ND: Tensor, ropes: Ropes, packing: Packing
) -> Tensor:
    """One decoder layer: attention and gated MLP, each added to the residual stream. [N, D] -> [N, D]

    Where the hidden state that enters needs no gradient (the first layer above a frozen embedding), none is formed.

    index: of the layer in the checkpoint, which says its kind.
    """
    sum_ND, gate_up_N2F = _until_down(spec, index, weights, hidden_ND, ropes, packing)
    update_ND = ops.gated_linear(gate_up_N2F, weights["down"], weights.get("down_bias"), spec.activation)
    return sum_ND + _norm_out(spec, weights.get("norm_mlp_out"), update_ND)


def layer_gradient(
    spec: ModelSpec,
    index: int,
    weights: LayerWeights,
    hidden_ND: Tensor,
    ropes: Ropes,
    packing: Packing,
    d_out_ND: Tensor,
    *,
    need_d_hidden: bool,
    before: Callable[[], None] | None = None,
) -> Tensor | None:
    """Run a layer again from its input, and its output's gradient back through it (Chen et al. 2016, arXiv 1604.06174).

    The weights' gradients arrive at their leaves; returned is the input's, None where it is not needed. The last
    product is not run again where no gradient needs its value, which a norm after it would: at Llama's ratios a quarter
    of the forward pass.

    before: called between the two, when no gradient of a weight is there yet.
    """
    entered_ND = hidden_ND.detach().requires_grad_(need_d_hidden)
    gamma_D = weights.get("norm_mlp_out")
    down = ops.gated_linear_unrun if gamma_D is None else ops.gated_linear
    with torch.enable_grad():
        sum_ND, gate_up_N2F = _until_down(spec, index, weights, entered_ND, ropes, packing)
        update_ND = down(gate_up_N2F, weights["down"], weights.get("down_bias"), spec.activation)
        update_ND = _norm_out(spec, gamma_D, update_ND)
    if before is not None:
        before()
    torch.autograd.backward((sum_ND, update_ND), (d_out_ND, d_out_ND))
    return entered_ND.grad


def _until_down(
    spec: ModelSpec, index: int, weights: LayerWeights, hidden_ND: Tensor, ropes: Ropes, packing: Packing
) -> tuple[Tensor, Tensor]:
    """-> the residual stream after attention, and the packed gate and up projections."""
    kind = spec.kind(index)
    rope = None if kind.rope is None else ropes[kind.rope]
    norm: dict[str, Any] = {"eps": spec.norm_eps, "unit_offset": spec.unit_offset}
    qkv, qkv_bias = weights["qkv"], weights.get("qkv_bias")
    if spec.norms == "post":
        qkv_NC = ops.linear(hidden_ND, qkv, qkv_bias)
    else:
        qkv_NC = ops.norm_linear(hidden_ND, weights["norm_attention"], qkv, qkv_bias, **norm)
    q_NHE, k_NKE, v_NKE = _heads(spec, weights, qkv_NC, rope)
    mixed_NHE = ops.attention(q_NHE, k_NKE, v_NKE, packing, spec.scale, kind.window, spec.softcap)
    update_ND = ops.linear(mixed_NHE.flatten(1), weights["output"], weights.get("output_bias"))
    update_ND = _norm_out(spec, weights.get("norm_attention_out"), update_ND)
    gate_up, gate_up_bias = weights["gate_up"], weights.get("gate_up_bias")
    if spec.norms == "post":
        sum_ND = hidden_ND + update_ND
        return sum_ND, ops.linear(sum_ND, gate_up, gate_up_bias)
    return ops.add_norm_linear(hidden_ND, update_ND, weights["norm_mlp"], gate_up, gate_up_bias, **norm)


def _heads(
    spec: ModelSpec, weights: LayerWeights, qkv_NC: Tensor, rope: Rope | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The packed projection -> q_NHE, k_NKE, v_NKE, normed and turned as the layer has it."""
    heads, norm = ops.Heads(spec.H, spec.K, spec.E), None
    if spec.head_norms == "head":
        norm = ops.HeadNorm(weights["norm_q"], weights["norm_k"], spec.norm_eps, spec.unit_offset)
    elif spec.head_norms == "all":
        q_NC, k_NC, v_NC = qkv_NC.split((spec.H * spec.E, spec.K * spec.E, spec.K * spec.E), dim=1)
        options: dict[str, Any] = {"eps": spec.norm_eps, "unit_offset": spec.unit_offset}
        q_NC = ops.rms_norm(q_NC.contiguous(), weights["norm_q"], **options)
        k_NC = ops.rms_norm(k_NC.contiguous(), weights["norm_k"], **options)
        qkv_NC = torch.cat((q_NC, k_NC, v_NC), dim=1)
    if rope is None:
        assert norm is None, "no family norms heads that do not turn"
        return heads.split(qkv_NC)
    return ops.rotary_packed(qkv_NC, heads, rope, norm)


def _norm_out(spec: ModelSpec, gamma_D: Tensor | None, update_ND: Tensor) -> Tensor:
    """The norm at the end of half a layer, where the family has one."""
    if gamma_D is None:
        return update_ND
    return ops.rms_norm(update_ND, gamma_D, spec.norm_eps, unit_offset=spec.unit_offset)
