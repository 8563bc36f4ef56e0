"""Where each weight lives in a checkpoint: the names of a family, as data.

In memory, weights that are multiplied with the same input are one matrix (`qkv`, `gate_up`): one GEMM instead of
three or two. A `Part` says which checkpoint tensors make it up, stacked in this order along dimension 0, so that
reading packs and writing unpacks by the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

from elo_engine.model.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYERS = "model.layers."


@dataclass(frozen=True)
class Part:
    """One in-memory tensor: its key in a layer's weights and the checkpoint tensors stacked in it."""

    key: str
    names: tuple[str, ...]  # relative to the layer
    shapes: tuple[tuple[int, ...], ...]


def layer_prefix(index: int) -> str:
    """The common start of the names of a decoder layer."""
    return f"{LAYERS}{index}."


def layer_parts(spec: ModelSpec) -> tuple[Part, ...]:
    """The parts of one decoder layer, in the order of the forward pass; the same for every layer of a model."""
    D, F = spec.D, spec.F
    q, kv = spec.H * spec.E, spec.K * spec.E
    attention, mlp = [f"self_attn.{name}_proj" for name in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
    heads, halves = [q, kv, kv], [F, F]
    if spec.fused:
        attention, mlp, heads, halves = ["self_attn.qkv_proj"], ["mlp.gate_up_proj"], [q + 2 * kv], [2 * F]
    before = spec.norms != "post"
    parts = [
        *_norm("norm_attention", "input_layernorm", D, before),
        Part("qkv", tuple(f"{name}.weight" for name in attention), tuple((size, D) for size in heads)),
        *_norm("norm_q", "self_attn.q_norm", spec.E if spec.head_norms == "head" else q, spec.head_norms is not None),
        *_norm("norm_k", "self_attn.k_norm", spec.E if spec.head_norms == "head" else kv, spec.head_norms is not None),
        Part("output", ("self_attn.o_proj.weight",), ((D, q),)),
        *_norm("norm_attention_out", "post_attention_layernorm", D, spec.norms != "pre"),
        *_norm("norm_mlp", _NORM_MLP[spec.norms], D, before),
        Part("gate_up", tuple(f"{name}.weight" for name in mlp), tuple((size, D) for size in halves)),
        Part("down", ("mlp.down_proj.weight",), ((D, F),)),
        *_norm("norm_mlp_out", "post_feedforward_layernorm", D, spec.norms != "pre"),
    ]
    if spec.qkv_bias:
        parts.append(Part("qkv_bias", tuple(f"{name}.bias" for name in attention), tuple((size,) for size in heads)))
    if spec.output_bias:
        parts.append(Part("output_bias", ("self_attn.o_proj.bias",), ((D,),)))
    if spec.mlp_bias:
        parts.append(Part("gate_up_bias", tuple(f"{name}.bias" for name in mlp), tuple((size,) for size in halves)))
        parts.append(Part("down_bias", ("mlp.down_proj.bias",), ((D,),)))
    return tuple(parts)


# What Llama calls post_attention_layernorm comes before the MLP; where a layer has norms at both ends, that name is the
# norm of the attention's output.
_NORM_MLP = {"pre": "post_attention_layernorm", "both": "pre_feedforward_layernorm", "post": ""}


def _norm(key: str, name: str, size: int, there: bool) -> list[Part]:
    return [Part(key, (f"{name}.weight",), ((size,),))] if there else []


def layer_names(spec: ModelSpec, index: int) -> list[str]:
    """Checkpoint names of every tensor of one decoder layer."""
    return [layer_prefix(index) + name for part in layer_parts(spec) for name in part.names]


def outer_names(spec: ModelSpec) -> list[str]:
    """Checkpoint names of what surrounds the layers: embedding, final norm, and the head unless it is tied."""
    return [EMBEDDING, FINAL_NORM] + ([] if spec.tied else [HEAD])


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this spec must hold, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.V, spec.D), FINAL_NORM: (spec.D,)}
    if not spec.tied:
        shapes[HEAD] = (spec.V, spec.D)
    for index in range(spec.layers):
        for part in layer_parts(spec):
            for name, shape in zip(part.names, part.shapes, strict=True):
                shapes[layer_prefix(index) + name] = shape
    return shapes
