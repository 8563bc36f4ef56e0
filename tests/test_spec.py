"""Specs and names as data, layer selection, and the FLOP counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import whole_rows
from torch.utils.flop_counter import FlopCounterMode

from elo_engine.checkpoint import open_checkpoint
from elo_engine.errors import RefusedError, UsageError
from elo_engine.measure.flops import full_step, ideal_speedup, shallow_step
from elo_engine.model import names, ops
from elo_engine.model.full import load_full
from elo_engine.model.shallow import load_shallow
from elo_engine.model.spec import choose_layers, read_spec

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
CPU = torch.device("cpu")


def test_published_shapes_give_the_published_parameter_counts() -> None:
    spec = read_spec(LLAMA_8B)
    assert spec.parameters == 8_030_261_248
    assert spec.E == 128 and spec.rope.theta == 500000.0 and spec.rope.kind == "llama3"
    names_and_shapes = names.expected_shapes(spec)
    assert len(names_and_shapes) == 291
    assert sum(torch.Size(shape).numel() for shape in names_and_shapes.values()) == spec.parameters


def test_rotary_settings_of_both_config_generations_are_read_alike() -> None:
    new = {k: v for k, v in LLAMA_8B.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA_8B["rope_scaling"], "rope_theta": 500000.0}  # type: ignore[dict-item]
    assert read_spec(new) == read_spec(LLAMA_8B)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_key_value_heads": 5}, "attention heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RefusedError, match=field):
        read_spec(LLAMA_8B | changes)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["first", "last"], (0, 31)),
        ([-1, 0, 0], (0, 31)),
        (["0-1", "30-31"], (0, 1, 30, 31)),
        (["-2", 5], (5, 30)),
    ],
)
def test_layers_are_chosen(wanted: list[int | str], expected: tuple[int, ...]) -> None:
    assert choose_layers(wanted, 32) == expected


@pytest.mark.parametrize("wanted", [[32], [-33], ["middle"], ["3:5"], ["0-40"], ["a-b"], [True]])
def test_layers_that_do_not_exist(wanted: list[int | str]) -> None:
    with pytest.raises(UsageError, match=r"detach\.layers"):
        choose_layers(wanted, 32)


def test_flops_of_the_8b_model_are_the_published_count() -> None:
    """52.5 and 5.14 GFLOP a token at 8192 and an ideal speedup of 5.3x, counted by hand from the shapes."""
    spec = read_spec(LLAMA_8B)
    assert full_step(spec, 8192).total / 1e9 == pytest.approx(52.5, rel=0.005)
    assert full_step(spec, 8192, recompute=True).total / 1e9 == pytest.approx(68.7, rel=0.01)
    shallow = shallow_step(spec, (0, spec.layers - 1), 8192)
    assert shallow.total / 1e9 == pytest.approx(5.14, rel=0.005)
    assert shallow.head / shallow.total == pytest.approx(0.41, abs=0.01)
    assert ideal_speedup(spec, (0, spec.layers - 1), 8192, 0.9) == pytest.approx(5.3, abs=0.05)


def test_flops_agree_with_torchs_counter(make_checkpoint: Callable[..., Path]) -> None:
    """With the references, whose ops torch's counter sees. It counts attention in full where we count what a causal
    query sees, and the references form dX below the first layer: both differences are taken out here, exactly.
    """
    folder = make_checkpoint(tied=False, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    index = open_checkpoint(folder)
    spec = read_spec(index.config)
    batch = whole_rows(torch.randint(0, 320, (1, 48)))
    T = 48
    full_attention = 2 * 2 * spec.H * spec.E * T * 3  # forward, and twice that backward; no recomputation here
    below_first = 2 * spec.D * spec.E * (spec.H + 2 * spec.K)
    ops.configure("reference", CPU)
    try:
        counted = []
        for load in (
            lambda: load_full(index, spec, device=CPU, dtype=torch.float32)[0],
            lambda: load_shallow(index, spec, (0, 3), device=CPU, dtype=torch.float32)[0],
        ):
            model = load()
            with FlopCounterMode(display=False) as counter:
                model.loss_sum(batch).backward()
            counted.append(counter.get_total_flops() / T)
    finally:
        ops.configure("auto", CPU)
    whole, shallow = full_step(spec, T), shallow_step(spec, (0, spec.layers - 1), T)
    assert counted[0] == pytest.approx(whole.linear + whole.head + spec.layers * full_attention, rel=0.01)
    assert counted[1] == pytest.approx(shallow.linear + shallow.head + below_first + 2 * full_attention, rel=0.01)
