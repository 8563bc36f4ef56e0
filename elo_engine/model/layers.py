"""The decoder layer as a function, and what travels beside the hidden states: positions, rotary tables, document
bounds.

The shallow model, the whole model and every baseline in this engine call the same `decoder_layer`. Families differ by
the data in `spec` and `names`; a layer's weights are a dictionary with the keys of `names.layer_parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
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


class RopeTable:
    """Angles for every position met so far, grown on demand; scaling as transformers initialises it (its own code is
    called).
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._device = device
        self._inverse_R, self._factor = _inverse_frequencies(spec)
        self._cos_PR = torch.empty(0, device=device)
        self._sin_PR = torch.empty(0, device=device)

    def gather(self, positions_N: Tensor, longest: int) -> Rope:
        """Tables for these positions; `longest` is one more than the largest of them, known without a device sync."""
        if self._cos_PR.shape[0] < longest:
            angles_PR = torch.arange(longest, dtype=torch.float32)[:, None] * self._inverse_R[None, :]
            self._cos_PR = (angles_PR.cos() * self._factor).to(self._device)
            self._sin_PR = (angles_PR.sin() * self._factor).to(self._device)
        return Rope(self._cos_PR, self._sin_PR, positions_N)


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
        inverse_R, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    except (KeyError, TypeError) as error:
        raise FailedError(
            f"config.json: rotary scaling {scaling} is not complete for type {rope.kind!r}: {error!r}"
        ) from error
    return inverse_R, float(factor)


def decoder_layer(spec: ModelSpec, weights: LayerWeights, hidden_ND: Tensor, rope: Rope, packing: Packing) -> Tensor:
    """One pre-norm decoder layer: attention and SwiGLU MLP, each added to the residual stream. [N, D] -> [N, D]

    Where the hidden state that enters needs no gradient (the first layer above a frozen embedding), none is formed.
    """
    sum_ND, gate_up_N2F = _until_down(spec, weights, hidden_ND, rope, packing)
    return sum_ND + ops.gated_linear(gate_up_N2F, weights["down"], weights.get("down_bias"))


def layer_gradient(
    spec: ModelSpec,
    weights: LayerWeights,
    hidden_ND: Tensor,
    rope: Rope,
    packing: Packing,
    d_out_ND: Tensor,
    *,
    need_d_hidden: bool,
    before: Callable[[], None] | None = None,
) -> Tensor | None:
    """Run a layer again from its input, and its output's gradient back through it (Chen et al. 2016, arXiv 1604.06174).

    The weights' gradients arrive at their leaves; returned is the input's, None where it is not needed. The last
    product is not run again, no gradient needing its value: at Llama's ratios a quarter of the forward pass.

    before: called between the two, when no gradient of a weight is there yet.
    """
    entered_ND = hidden_ND.detach().requires_grad_(need_d_hidden)
    with torch.enable_grad():
        sum_ND, gate_up_N2F = _until_down(spec, weights, entered_ND, rope, packing)
        update_ND = ops.gated_linear_unrun(gate_up_N2F, weights["down"], weights.get("down_bias"))
    if before is not None:
        before()
    torch.autograd.backward((sum_ND, update_ND), (d_out_ND, d_out_ND))
    return entered_ND.grad


def _until_down(
    spec: ModelSpec, weights: LayerWeights, hidden_ND: Tensor, rope: Rope, packing: Packing
) -> tuple[Tensor, Tensor]:
    """-> the residual stream after attention, and the packed gate and up projections."""
    heads = ops.Heads(spec.H, spec.K, spec.E)
    qkv_NC = ops.norm_linear(
        hidden_ND, weights["norm_attention"], weights["qkv"], weights.get("qkv_bias"), spec.norm_eps
    )
    q_NHE, k_NKE, v_NKE = ops.rotary_packed(qkv_NC, heads, rope)
    mixed_NHE = ops.attention(q_NHE, k_NKE, v_NKE, packing, spec.E**-0.5, spec.window)
    update_ND = ops.linear(mixed_NHE.flatten(1), weights["output"], weights.get("output_bias"))
    return ops.add_norm_linear(
        hidden_ND, update_ND, weights["norm_mlp"], weights["gate_up"], weights.get("gate_up_bias"), spec.norm_eps
    )
