"""What the planner says of the families' memory, against one traced step of this engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from family_cases import CASES, SHAPE
from planner_cases import case, measured_peak, only_what_is_made_here
from test_planner import MOST

from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import ArmName
from elo_engine.model.spec import LayerKind, ModelSpec, read_spec

SIZE = {
    "vocab_size": 4000, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
}  # fmt: skip


WIDE_HEADS = SIZE | {"vocab_size": 300, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 32}


def spec_of(name: str, size: dict[str, int] = SIZE) -> ModelSpec:
    from transformers import AutoConfig

    family, fields = CASES[name]
    return read_spec(AutoConfig.for_model(family, **{**SHAPE, **fields, **size}).to_dict())


@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    with only_what_is_made_here():
        yield


NAMES = ("mistral", "qwen2", "qwen3", "gemma2, untied, low caps", "gemma3", "phi3", "olmo2", "smollm3")
STEPS: list[tuple[ArmName, dict[str, Any]]] = [
    ("engine_full", {}), ("engine_full", {"recompute": "layer"}), ("engine_full", {"recompute": "selective"}),
    ("elo_pretrain", {}), ("engine_full", {"state": "8bit"}),
]  # fmt: skip


@pytest.mark.parametrize(("arm", "fields"), STEPS)
@pytest.mark.parametrize(("dtype", "T"), [("fp32", 16), ("fp32", 256), ("bf16", 16), ("bf16", 512)])
@pytest.mark.parametrize("name", NAMES)
def test_predicted_peak_is_the_traced_one(
    name: str, dtype: str, T: int, arm: ArmName, fields: dict[str, Any]
) -> None:
    setting = case(arm, spec_of(name), T, 1, dtype=dtype, **fields)
    assert 1.0 <= predict_memory(setting).peak_bytes / measured_peak(setting) <= MOST


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "olmo2"])
def test_what_a_family_adds_is_in_the_plan(name: str) -> None:
    """The check above would see that it is missing: post norms, head norms and soft-caps take memory."""
    from dataclasses import replace

    spec = spec_of(name)
    plain = replace(spec, norms="pre", head_norms=None, head_softcap=None)
    setting = case("elo_pretrain", spec, 256, 1)
    ratio = predict_memory(replace(setting, spec=plain)).peak_bytes / measured_peak(setting)
    assert not 1.0 <= ratio <= MOST


@pytest.mark.parametrize(("arm", "fields"), STEPS)
@pytest.mark.parametrize("name", ["mistral", "gemma2, untied, low caps", "gemma3, untied", "phi3"])
def test_what_a_window_or_a_cap_takes_in_bf16_is_in_the_plan(
    name: str, arm: ArmName, fields: dict[str, Any]
) -> None:
    """Heads so wide that attention in the last layer, with a window or a cap, is the peak: fp32 copies."""
    from dataclasses import replace

    spec = spec_of(name, WIDE_HEADS)
    setting = case(arm, spec, 512, 1, dtype="bf16", **fields)
    measured = measured_peak(setting)
    assert 1.0 <= predict_memory(setting).peak_bytes / measured <= MOST
    plain = replace(spec, softcap=None, kinds=(LayerKind(),), ropes=spec.ropes[:1])
    assert predict_memory(replace(setting, spec=plain)).peak_bytes < measured
