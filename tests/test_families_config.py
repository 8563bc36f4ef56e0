"""What a configuration says of its family: read as transformers reads it, or refused by the field's name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, LONGROPE, SHAPE, make_family
from safetensors.torch import load_file, save_file

from elo_engine.checkpoint import open_checkpoint
from elo_engine.errors import FailedError, RefusedError
from elo_engine.model.families import FAMILIES, REFUSED
from elo_engine.model.full import load_full
from elo_engine.model.names import expected_shapes
from elo_engine.model.spec import LayerKind, read_spec


def config_of(case: str, **changes: Any) -> dict[str, Any]:
    from transformers import AutoConfig

    family, fields = CASES[case]
    found: dict[str, Any] = AutoConfig.for_model(family, **{**SHAPE, **fields}).to_dict()
    return found | changes


# As published on the hub, in the form of the time: without what transformers adds today.
GEMMA_2_2B = {
    "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "vocab_size": 256000, "attention_bias": False,
}  # fmt: skip
GEMMA_3_1B = {
    "model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
QWEN25_7B = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
PHI_4 = {
    "model_type": "phi3", "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 17920,
    "max_position_embeddings": 16384, "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 250000,
    "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 100352, "attention_bias": False,
}  # fmt: skip
_PHI = {
    "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "num_hidden_layers": 32, "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144, "attention_bias": False,
}  # fmt: skip
PHI_35_MINI = {
    **_PHI, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
}  # fmt: skip
PHI_4_MINI = {
    **_PHI, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "tie_word_embeddings": True,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
    "partial_rotary_factor": 0.75,
}  # fmt: skip
PUBLISHED = [
    (GEMMA_2_2B, 2_614_341_888), (GEMMA_3_1B, 999_885_952), (QWEN25_7B, 7_615_616_512), (QWEN3_8B, 8_190_735_360),
    (PHI_4, 14_659_507_200), (PHI_35_MINI, 3_821_079_552), (PHI_4_MINI, 3_836_021_760),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"), PUBLISHED, ids=[f"{c['model_type']} {n}" for c, n in PUBLISHED]
)
def test_published_configurations_give_the_published_parameter_counts(
    config: dict[str, Any], parameters: int
) -> None:
    assert read_spec(config).parameters == parameters


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_those_of_transformers(case: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, fields = CASES[case]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **fields}))
    spec = read_spec(config_of(case))
    assert spec.parameters == sum(weight.numel() for weight in model.parameters())
    assert expected_shapes(spec) == {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def test_published_windows_follow_the_layers_index() -> None:
    gemma2, gemma3 = read_spec(GEMMA_2_2B), read_spec(GEMMA_3_1B)
    assert [gemma2.kind(i).window for i in (0, 1, 24, 25)] == [4096, None, 4096, None]
    assert [i for i in range(26) if gemma3.kind(i).window is None] == [5, 11, 17, 23]
    assert gemma3.kind(0) == LayerKind(512, 1) and gemma3.kind(5) == LayerKind(None, 0)
    assert [rope.theta for rope in gemma3.ropes] == [1e6, 1e4]
    assert gemma2.tied and gemma3.tied, "transformers' default for them"
    assert read_spec(QWEN25_7B).windows == (), "switched off"


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "smollm3"])
def test_a_head_that_is_tied_by_default(case: str) -> None:
    """transformers 4 writes no tie_word_embeddings where it has the family's default."""
    written = {key: value for key, value in config_of(case).items() if key != "tie_word_embeddings"}
    assert read_spec(written).tied and read_spec(config_of(case, tie_word_embeddings=False)).tied is False
    assert not read_spec({k: v for k, v in config_of("qwen2").items() if k != "tie_word_embeddings"}).tied


def test_old_and_new_ways_to_say_the_same_of_the_layers() -> None:
    older = config_of("gemma3", layer_types=None, sliding_window_pattern=2)
    newer = config_of("gemma3", layer_types=["sliding_attention", "full_attention"] * 2)
    assert read_spec(older) == read_spec(newer)
    listed = config_of("smollm3", no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=None)
    counted = config_of("smollm3", no_rope_layers=None, no_rope_layer_interval=4)
    assert read_spec(listed) == read_spec(counted)
    assert [read_spec(listed).kind(i).rope for i in range(4)] == [0, 0, 0, None]
    flat = {k: v for k, v in config_of("gemma3").items() if k != "rope_parameters"}
    assert read_spec(flat | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}) == read_spec(config_of("gemma3"))


def _longrope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": None, "rope_scaling": LONGROPE | changes}


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama 3", {"rope_parameters": None, "rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
    ("llama 3", {"rope_parameters": None, "rope_scaling": [8.0]}, "rope_scaling"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "spiral"}}}, "spiral"),
    ("phi3, longrope", _longrope(short_factor=None), "short_factor is None.*longrope"),
    ("phi3, longrope", _longrope(long_factor=[1.0] * 3), "long_factor has 3 entries.*needs 4"),
    ("phi3, longrope", _longrope(long_factor=[1.0, 2.0, 3.0, -1.0]), "long_factor of longrope is -1.0"),
    ("phi3, longrope", _longrope(attention_factor="a"), "attention_factor"),
    ("phi3, longrope", {"original_max_position_embeddings": None}, "original_max_position_embeddings is None"),
    ("phi3, longrope", {"max_position_embeddings": None}, "max_position_embeddings is None"),
    ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("phi3", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias"),
    ("qwen2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("qwen3", {"head_dim": None}, "head_dim"),
    ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma3", {"layer_types": None, "sliding_window_pattern": None}, "sliding_window_pattern"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ("qwen2", {"layer_types": None, "max_window_layers": None}, "max_window_layers"),
    ("qwen3", {"sliding_window": 0}, "sliding_window"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("gemma2", {"hidden_activation": "relu"}, "hidden_activation"),
    ("olmo2", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
    ("llama 3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
    ("olmo2", {"rms_norm_eps": None}, "rms_norm_eps"),
    ("llama 3", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama 3", {"num_key_value_heads": -2}, "num_key_value_heads"),
]


@pytest.mark.parametrize(("case", "changes", "field"), REFUSALS, ids=[f"{c}: {f}" for c, _, f in REFUSALS])
def test_what_is_not_known_is_refused_by_the_fields_name(case: str, changes: dict[str, Any], field: str) -> None:
    read_spec(config_of(case))
    with pytest.raises(RefusedError, match=field):
        read_spec(config_of(case, **changes))


@pytest.mark.parametrize(("family", "kind"), [("qwen3_moe", "experts"), ("qwen3_next", "linear"), ("gemma3", "vision")])
def test_other_kinds_of_models_are_refused_by_what_they_are(family: str, kind: str) -> None:
    with pytest.raises(RefusedError, match=f"{family}.*{kind}"):
        read_spec(config_of("llama 3", model_type=family))
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.experts.0.up_proj.weight"])
def test_a_weight_that_the_configuration_does_not_tell_of_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """A checkpoint with biases and a configuration without: nothing may be left out of the maths in silence."""
    folder = make_family(tmp_path / "source", "llama 3")
    load = {"device": torch.device("cpu"), "dtype": torch.float32}
    spec = read_spec(open_checkpoint(folder).config)
    load_full(open_checkpoint(folder), spec, **load)  # type: ignore[arg-type]
    planted = tmp_path / "planted"
    shutil.copytree(folder, planted)
    weights = load_file(planted / "model.safetensors")
    full = f"model.layers.1.{name}"
    save_file({**weights, full: torch.zeros(48)}, planted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FailedError, match=full):
        load_full(open_checkpoint(planted), spec, **load)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [next(c for c in CASES if CASES[c][0] == family) for family in FAMILIES])
def test_plan_and_inspect_know_the_family(case: str, tmp_path: Path) -> None:
    from elo_engine.inspection import inspect_model

    folder = make_family(tmp_path, case, shards=2)
    found = inspect_model(str(folder))
    spec = read_spec(config_of(case))
    assert found["family"] == spec.family and found["parameters"] == spec.parameters
    assert found["bytes"]["total"] == 4 * spec.parameters and found["bytes"]["other"] == 0
