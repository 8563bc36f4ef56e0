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


@dataclass(frozen=True)
class Part:
    """One in-memory tensor: its key in a layer's weights and the checkpoint tensors stacked in it."""

    key: str
    names: tuple[str, ...]  # relative to the layer
    shapes: tuple[tuple[int, ...], ...]


def layer_prefix(index: int) -> str:
    """The common start of the names of a decoder layer."""
    return f"model.layers.{index}."


def layer_parts(spec: ModelSpec) -> tuple[Part, ...]:
    """The parts of one decoder layer, in the order of the forward pass; the same for every layer of a model."""
    D, F = spec.D, spec.F
    q, kv = spec.H * spec.E, spec.K * spec.E
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    mlp = ("mlp.gate_proj", "mlp.up_proj")
    parts = [
        Part("norm_attention", ("input_layernorm.weight",), ((D,),)),
        Part("qkv", tuple(f"{name}.weight" for name in attention), ((q, D), (kv, D), (kv, D))),
        Part("output", ("self_attn.o_proj.weight",), ((D, q),)),
        Part("norm_mlp", ("post_attention_layernorm.weight",), ((D,),)),
        Part("gate_up", tuple(f"{name}.weight" for name in mlp), ((F, D), (F, D))),
        Part("down", ("mlp.down_proj.weight",), ((D, F),)),
    ]
    if spec.attention_bias:
        parts.append(Part("qkv_bias", tuple(f"{name}.bias" for name in attention), ((q,), (kv,), (kv,))))
        parts.append(Part("output_bias", ("self_attn.o_proj.bias",), ((D,),)))
    if spec.mlp_bias:
        parts.append(Part("gate_up_bias", tuple(f"{name}.bias" for name in mlp), ((F,), (F,))))
        parts.append(Part("down_bias", ("mlp.down_proj.bias",), ((D,),)))
    return tuple(parts)


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
