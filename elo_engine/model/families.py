"""The supported families: what each row says is all that the engine knows of a family.

`spec.read_spec` reads a `config.json` by its family's row, and `names.layer_parts` makes the checkpoint's names of the
spec that results. `docs/families.md` tells how to add a row. Read from the modelling code of transformers 5.23, the
oracle of tests/test_families.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Norms = Literal["pre", "post", "both"]  # where a layer has them: before its halves, after them, or at both ends
HeadNorms = Literal["head", "all"]  # of queries and keys: each head by itself, or all heads of a token at once
Windows = Literal["none", "all", "by layer", "odd ones full"]


@dataclass(frozen=True)
class Family:
    """What all models of a family share, and which of the configuration's fields it reads.

    Attributes:
        what: for people. biases: of which projections config.json may switch on a bias, by field name.
        qkv_bias: queries, keys and values always have one. needs: fields without which the maths are not known, beyond
        those of every family. defaults: what transformers takes for a field that the file leaves out.
        windows: which layers see a window of `sliding_window` tokens where the file does not say so by layer_types.
        rotary_off: the field that names the layers without rotary embedding. local_rope: layers with a window turn by a
        base of their own. partial_rotary: only the first part of a head may turn. rope_names: what older files call a
        type of rotary scaling.
    """

    what: str
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Norms = "pre"
    unit_offset: bool = False
    head_norms: HeadNorms | None = None
    fused: bool = False
    biases: frozenset[str] = frozenset()
    qkv_bias: bool = False
    windows: Windows = "none"
    rotary_off: str | None = None
    local_rope: bool = False
    partial_rotary: bool = False
    rope_names: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))
    softcaps: bool = False
    scaled_embedding: bool = False
    needs: tuple[str, ...] = ()
    defaults: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_TIED = MappingProxyType({"tie_word_embeddings": True})  # which transformers 4 leaves out of the file where it is so
_BOTH = frozenset({"attention_bias", "mlp_bias"})
_ATTENTION = frozenset({"attention_bias"})
_GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh", "norms": "both", "unit_offset": True, "biases": _ATTENTION, "softcaps": True,
    "scaled_embedding": True, "needs": ("head_dim", "query_pre_attn_scalar", "sliding_window"),
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, 3, 3.1, 3.2, SmolLM2 and others with this architecture", biases=_BOTH),
    "mistral": Family("Mistral 7B", windows="all"),
    "qwen2": Family("Qwen2, Qwen2.5", qkv_bias=True, windows="by layer"),
    "qwen3": Family("Qwen3, dense", biases=_ATTENTION, head_norms="head", windows="by layer", needs=("head_dim",)),
    "gemma2": Family("Gemma 2", **_GEMMA, windows="odd ones full", defaults=_TIED),
    "gemma3_text": Family(
        "Gemma 3, text", **_GEMMA, head_norms="head", windows="by layer", local_rope=True,
        defaults=_TIED,
    ),
    "phi3": Family(
        "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini", fused=True, windows="all", partial_rotary=True,
        rope_names=MappingProxyType({"su": "longrope", "yarn": "longrope"}),
    ),
    "olmo2": Family("OLMo 2", norms="post", head_norms="all", biases=_ATTENTION),
    "smollm3": Family("SmolLM3", biases=_BOTH, windows="by layer", rotary_off="no_rope_layers", defaults=_TIED),
}  # fmt: skip

_MOE, _LINEAR = "a mixture of experts", "a hybrid with linear attention or state-space layers"
_VISION = "a model with a vision tower; its text model alone, saved with its own config.json, may be supported"
REFUSED = {
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "granitemoe", "phimoe",
         "llama4", "llama4_text", "glm4_moe", "ernie4_5_moe", "dbrx", "hunyuan_v1_moe", "minimax"), _MOE,
    ),
    **dict.fromkeys(
        ("qwen3_next", "jamba", "mamba", "mamba2", "falcon_mamba", "falcon_h1", "zamba", "zamba2", "bamba", "rwkv",
         "recurrent_gemma", "granitemoehybrid", "nemotron_h", "lfm2", "kimi_linear", "olmo_hybrid", "qwen3_5",
         "qwen3_5_text"), _LINEAR,
    ),
    **dict.fromkeys(
        ("gemma3", "gemma3n", "mllama", "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3",
         "pixtral", "paligemma", "idefics3", "smolvlm", "phi3_v", "phi4_multimodal"), _VISION,
    ),
}  # fmt: skip
