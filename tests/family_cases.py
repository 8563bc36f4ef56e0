"""Tiny checkpoints of every supported family, made by transformers. A new family needs a row here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizer_fixture import make_tokenizer

VOCABULARY = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "initializer_range": 0.15, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,  # else transformers gives that row no gradient
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# Of the tests' row of 40, 1 and 23 tokens the first document takes the long factors and the others the short ones.
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 3.0, 5.0, 9.0]}
_LONG = {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32}
_WINDOWS = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 2}
_GEMMA = {"query_pre_attn_scalar": 12, "sliding_window": 12, "hidden_activation": "gelu_pytorch_tanh"}
_FIRST_SLIDES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

# Name -> model_type and the fields that differ from SHAPE. First and last layer differ in kind where there are kinds.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3": ("llama", {"rope_scaling": LLAMA3}),
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", _WINDOWS),
    "qwen2, tied, no window": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", _WINDOWS),
    "qwen3, tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma2": ("gemma2", {**_GEMMA, "tie_word_embeddings": True}),
    "gemma2, untied, low caps": (
        "gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3_text", {**_GEMMA, "tie_word_embeddings": True, "layer_types": _FIRST_SLIDES}),
    "gemma3, untied": ("gemma3_text", {**_GEMMA, "layer_types": _FIRST_SLIDES[::-1], "final_logit_softcapping": 3.0}),
    "phi3": ("phi3", {"sliding_window": 12}),
    "phi3, tied, partial rotary": ("phi3", {"tie_word_embeddings": True, "partial_rotary_factor": 0.5}),
    "phi3, longrope": ("phi3", _LONG | {"sliding_window": 12}),
    "phi3, tied, longrope, partial rotary": (
        "phi3", _LONG | {"tie_word_embeddings": True, "head_dim": 8, "partial_rotary_factor": 0.75, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.2, 1.6], "long_factor": [1.0, 4.0, 9.0],
        }},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, tied, biases": ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True}),
    "smollm3, untied, windows": (
        "smollm3", {"no_rope_layers": [0, 1, 1, 1], "sliding_window": 12, "use_sliding_window": True,
                    "layer_types": _FIRST_SLIDES, "mlp_bias": True},
    ),
}  # fmt: skip


def make_family(
    folder: Path, case: str, *, shards: int = 1, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A checkpoint with tokenizer. Norms and biases are no ones and zeros, which would hide what is done with them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, fields = CASES[case]
    config = AutoConfig.for_model(family, **{**SHAPE, **fields, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape))
    total = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    model.save_pretrained(folder, max_shard_size="5GB" if shards == 1 else total // shards)
    make_tokenizer(folder, VOCABULARY)
    return folder


Make = Callable[..., Path]
