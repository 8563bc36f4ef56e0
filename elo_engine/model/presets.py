"""Published shapes by name, as the `config.json` of each model has them, for plans and benchmarks without a checkpoint.

`llama-3.1-8b-mini` is no published model: it has the 8B's 32 layers and its ratios of MLP, head and key/value heads to
the width, at a sixteenth of the width. A row of 512 tokens is to it what one of 8192 is to the 8B: attention grows with
T D and the matrices with D^2, so the shares of head, layers and attention, and with them the ideal speedup, are the
same.
"""

from __future__ import annotations

from typing import Any

from elo_engine.errors import UsageError
from elo_engine.model.spec import ModelSpec, read_spec

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(
    layers: int, V: int, D: int, F: int, H: int, K: int, E: int, *, tied: bool = False, theta: float = 500000.0,
    eps: float = 1e-5, positions: int = 131072, scaling: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": D,
        "intermediate_size": F, "num_hidden_layers": layers, "num_attention_heads": H, "num_key_value_heads": K,
        "head_dim": E, "hidden_act": "silu", "rms_norm_eps": eps, "max_position_embeddings": positions,
        "tie_word_embeddings": tied, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "rope_theta": theta, "rope_scaling": scaling,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama(32, 128256, 4096, 14336, 32, 8, 128, scaling=_LLAMA3_ROPE),
    "llama-3.2-1b": _llama(16, 128256, 2048, 8192, 32, 8, 64, tied=True, scaling=_LLAMA3_ROPE | {"factor": 32.0}),
    "llama-3.2-3b": _llama(28, 128256, 3072, 8192, 24, 8, 128, tied=True, scaling=_LLAMA3_ROPE | {"factor": 32.0}),
    "smollm2-135m": _llama(30, 49152, 576, 1536, 9, 3, 64, tied=True, theta=100000.0, positions=8192),
    "smollm2-1.7b": _llama(24, 49152, 2048, 8192, 32, 32, 64, tied=True, theta=130000.0, positions=8192),
    "mistral-7b-v0.3": _llama(32, 32768, 4096, 14336, 32, 8, 128, theta=1000000.0, positions=32768)
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "llama-3.1-8b-mini": _llama(32, 8016, 256, 896, 8, 2, 32, positions=8192),
}


def preset_config(name: str) -> dict[str, Any]:
    """`config.json` of a preset.

    Raises:
        UsageError: no such preset; it names those there are.
    """
    if name not in PRESETS:
        raise UsageError(f"{name!r} is not one of the shapes known by name: {', '.join(PRESETS)}")
    return dict(PRESETS[name])


def preset_spec(name: str) -> ModelSpec:
    """The shapes of a preset."""
    return read_spec(preset_config(name))
