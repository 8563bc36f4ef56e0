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
from elo_engine.model.spec_rope import LONGROPE_FACTORS

LayerWeights = dict[str, Tensor]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host to a device, without a wait."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


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
        return _sent(torch.tensor(self.segment_starts, dtype=torch.int32), self.positions_N.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(stop - start for start, stop in pairwise(self.segment_starts))


class PaddedPacking(Packing):
    """Bounds of documents of which the device alone knows: as many for every text, empty documents at the end.

    What variable-length attention is given has so the same shapes whatever the text. flash-attn 2, and the copy of it
    that is torch's varlen_attn, takes empty documents: each block of a grid of longest x documents x heads finds its
    document in the offsets and returns where it begins behind its end, before it has read or written anything
    (BlockInfo, in both passes), and the forward pass is not split by length but for single queries.

    Args:
        offsets_S1: int32, in [0, N], N as often as there are empty documents, and once more.
        longest: no document is longer. Blocks beyond a document's end cost their launch alone.
    """

    def __init__(self, offsets_S1: Tensor, positions_N: Tensor, longest: int) -> None:
        # as if they had been made when first asked for
        vars(self).update(positions_N=positions_N, offsets=offsets_S1, longest=longest)

    @property
    def segment_starts(self) -> list[int]:
        """The bounds that are there now, without the empty documents, for paths that need them on the host; a device is
        waited for.
        """
        starts: list[int] = self.offsets.unique_consecutive().tolist()
        return starts


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


@dataclass(frozen=True)
class _Frequencies:
    """Of one rotary embedding, fp32 [R], and the factor on cos and sin; `long_R` serves documents of more than `short`
    tokens.
    """

    inverse_R: Tensor
    factor: float
    long_R: Tensor | None = None
    short: int = 0

    def table(self, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [0, longest); with frequencies for long documents, if there may be one, below those
        of [0, short) for the others.
        """
        angles_PR = _angles(longest, self.inverse_R)
        if self.long_R is not None and longest > self.short:
            angles_PR = torch.cat((angles_PR[: self.short], _angles(longest, self.long_R)))
        return angles_PR.cos() * self.factor, angles_PR.sin() * self.factor

    def rows(self, packing: Packing) -> Tensor:
        """Which row of the table each token takes."""
        if self.long_R is None or packing.longest <= self.short:
            return packing.positions_N
        sizes_S = torch.tensor(packing.segment_starts).diff()
        first_N = torch.where(sizes_S > self.short, self.short, 0).repeat_interleave(sizes_S)
        return packing.positions_N + _sent(first_N, packing.positions_N.device)


def _angles(longest: int, inverse_R: Tensor) -> Tensor:
    return torch.arange(longest, dtype=torch.float32)[:, None] * inverse_R[None, :]


class RopeTable:
    """Angles for every position met so far, grown on demand; scaling as transformers initialises it (its own code is
    called, but for longrope, where that wants the family's own configuration).

    longrope: each document takes the factors that its own length asks for, as transformers takes them for the document
    by itself. Its choice for a batch, by the longest document in it, would make a document's gradient depend on those
    beside it.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._device, self._longest = device, 0
        self._frequencies = [_frequencies(spec, rope) for rope in spec.ropes]
        self._tables: list[tuple[Tensor, Tensor]] = []

    def gather(self, packing: Packing, longest: int) -> Ropes:
        """Tables for these positions; `longest` is one more than the largest of them, known without a device sync."""
        if self._longest < longest:
            tables = [frequencies.table(longest) for frequencies in self._frequencies]
            self._tables = [(_sent(cos_PR, self._device), _sent(sin_PR, self._device)) for cos_PR, sin_PR in tables]
            self._longest = longest
        return tuple(
            Rope(*table, frequencies.rows(packing))
            for table, frequencies in zip(self._tables, self._frequencies, strict=True)
        )


def _frequencies(spec: ModelSpec, rope: RopeSpec) -> _Frequencies:
    turning = int(spec.E * rope.share)
    plain_R = rope.theta ** (torch.arange(0, turning, 2, dtype=torch.int64).float() / turning)
    if rope.kind == "default":
        return _Frequencies(1.0 / plain_R, 1.0)
    if rope.kind == "longrope":
        short_R, long_R = (1.0 / (torch.tensor(rope.parameters[name]) * plain_R) for name in LONGROPE_FACTORS)
        return _Frequencies(short_R, _longrope_factor(spec, rope), long_R, rope.short)
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
    except Exception as error:  # whatever transformers finds wrong with it, by its own classes too
        raise FailedError(
            f"config.json: rotary scaling {shown(scaling)} is not complete for type {rope.kind!r}, or makes no sense: "
            f"{shown(error)}"
        ) from error
    if not bool(inverse_R.isfinite().all()) or not math.isfinite(factor):
        raise FailedError(f"config.json: rotary scaling {shown(scaling)} gives angles that are no numbers")
    return _Frequencies(inverse_R, float(factor))


def _longrope_factor(spec: ModelSpec, rope: RopeSpec) -> float:
    """On cos and sin (Ding et al. 2024, arXiv 2402.13753): of the length by which positions grew, unless given."""
    given = rope.parameters.get("attention_factor")
    if given is not None:
        return float(given)
    grown = rope.parameters.get("factor") or spec.max_positions / rope.short
    return 1.0 if grown <= 1.0 else math.sqrt(1.0 + math.log(grown) / math.log(rope.short))


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
    spec: ModelSpec, index: int, weights: LayerWeights, hidden_ND: Tensor, ropes: Ropes, packing: Packing,
    *, selective: bool = False, fp8: bool = False,
) -> Tensor:  # fmt: skip
    """One decoder layer: attention and gated MLP, each added to the residual stream. [N, D] -> [N, D]

    Where the hidden state that enters needs no gradient (the first layer above a frozen embedding), none is formed.

    Args:
        index: of the layer in the checkpoint, which says its kind.
        selective: the backward pass makes the gate and up projections again, 2F numbers a token that are not kept; the
            bits are the same.
        fp8: its projections multiply 8-bit operands.
    """
    if selective:
        sum_ND, update_ND = _mlp_again(spec, index, weights, hidden_ND, ropes, packing, fp8)
    else:
        sum_ND, gate_up_N2F = _until_down(spec, index, weights, hidden_ND, ropes, packing, fp8)
        update_ND = ops.gated_linear(gate_up_N2F, weights["down"], weights.get("down_bias"), spec.activation, fp8=fp8)
    return _add_norm_out(spec, sum_ND, weights.get("norm_mlp_out"), update_ND)


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
    fp8: bool = False,
) -> Tensor | None:
    """Run a layer again from its input, and its output's gradient back through it (Chen et al. 2016, arXiv 1604.06174).

    The weights' gradients arrive at their leaves; returned is the input's, None where it is not needed. Where no
    gradient needs the value of the last product, which a norm after it would, that is not run again (at Llama's ratios
    a quarter of the forward pass), and the first one of the MLP only where its gradient wants it, to be gone after.

    before: called between the two, when no gradient of a weight is there yet.
    """
    entered_ND = hidden_ND.detach().requires_grad_(need_d_hidden)
    gamma_D = weights.get("norm_mlp_out")
    with torch.enable_grad():
        if gamma_D is None:
            sum_ND, update_ND = _mlp_again(spec, index, weights, entered_ND, ropes, packing, fp8, run=False)
        else:
            sum_ND, gate_up_N2F = _until_down(spec, index, weights, entered_ND, ropes, packing, fp8)
            down, bias_D = weights["down"], weights.get("down_bias")
            update_ND = ops.gated_linear(gate_up_N2F, down, bias_D, spec.activation, fp8=fp8)
            update_ND = _norm_out(spec, gamma_D, update_ND)
    if before is not None:
        before()
    torch.autograd.backward((sum_ND, update_ND), (d_out_ND, d_out_ND))
    return entered_ND.grad


def _until_down(
    spec: ModelSpec, index: int, weights: LayerWeights, hidden_ND: Tensor, ropes: Ropes, packing: Packing, fp8: bool
) -> tuple[Tensor, Tensor]:
    """-> the residual stream after attention, and the packed gate and up projections."""
    residual_ND, update_ND = _until_mlp(spec, index, weights, hidden_ND, ropes, packing, fp8)
    gate_up, gate_up_bias = weights["gate_up"], weights.get("gate_up_bias")
    if update_ND is None:
        return residual_ND, ops.linear(residual_ND, gate_up, gate_up_bias, fp8=fp8)
    norm: dict[str, Any] = {"eps": spec.norm_eps, "unit_offset": spec.unit_offset, "fp8": fp8}
    return ops.add_norm_linear(residual_ND, update_ND, weights["norm_mlp"], gate_up, gate_up_bias, **norm)


def _mlp_again(
    spec: ModelSpec, index: int, weights: LayerWeights, hidden_ND: Tensor, ropes: Ropes, packing: Packing,
    fp8: bool, *, run: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> the residual stream after attention, and the MLP's output, of which nothing else is kept."""
    residual_ND, update_ND = _until_mlp(spec, index, weights, hidden_ND, ropes, packing, fp8)
    return ops.gated_mlp_again(
        residual_ND, update_ND, weights.get("norm_mlp"), weights["gate_up"], weights.get("gate_up_bias"),
        weights["down"], weights.get("down_bias"), spec.norm_eps,
        unit_offset=spec.unit_offset, activation=spec.activation, run=run, fp8=fp8,
    )  # fmt: skip


def _until_mlp(
    spec: ModelSpec, index: int, weights: LayerWeights, hidden_ND: Tensor, ropes: Ropes, packing: Packing, fp8: bool
) -> tuple[Tensor, Tensor | None]:
    """-> the residual stream, and what attention adds to it; None where it is added already and no norm follows."""
    kind = spec.kind(index)
    rope = None if kind.rope is None else ropes[kind.rope]
    norm: dict[str, Any] = {"eps": spec.norm_eps, "unit_offset": spec.unit_offset, "fp8": fp8}
    qkv, qkv_bias = weights["qkv"], weights.get("qkv_bias")
    if spec.norms == "post":
        qkv_NC = ops.linear(hidden_ND, qkv, qkv_bias, fp8=fp8)
    else:
        qkv_NC = ops.norm_linear(hidden_ND, weights["norm_attention"], qkv, qkv_bias, **norm)
    q_NHE, k_NKE, v_NKE = _heads(spec, weights, qkv_NC, rope)
    mixed_NHE = ops.attention(q_NHE, k_NKE, v_NKE, packing, spec.scale, kind.window, spec.softcap)
    update_ND = ops.linear(mixed_NHE.flatten(1), weights["output"], weights.get("output_bias"), fp8=fp8)
    gamma_D = weights.get("norm_attention_out")
    if spec.norms == "post":
        return _add_norm_out(spec, hidden_ND, gamma_D, update_ND), None
    # With norms at both ends the add is one pass with the norm after it, which saves more: it is so in the backward
    # pass as well.
    return hidden_ND, _norm_out(spec, gamma_D, update_ND)


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


def _add_norm_out(spec: ModelSpec, residual_ND: Tensor, gamma_D: Tensor | None, update_ND: Tensor) -> Tensor:
    """The residual stream after half a layer."""
    if gamma_D is None:
        return residual_ND + update_ND
    return ops.rms_norm_add(residual_ND, update_ND, gamma_D, spec.norm_eps, unit_offset=spec.unit_offset)
