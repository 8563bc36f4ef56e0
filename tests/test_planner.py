"""The memory planner against every byte that torch's CPU allocator hands out in a step: never under it, and at most 8 %
over it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from planner_cases import case, llama, measured_peak, only_what_is_made_here

from elo_engine.measure import (
    memory_attention,
    memory_engine,
    memory_engine_head,
    memory_shapes,
    memory_transformers_head,
)
from elo_engine.measure.ledger import COMPONENTS, Ledger
from elo_engine.measure.planner import MemoryPlan, fits, largest_micro_batch, predict_memory
from elo_engine.measure.setting import ARMS, ArmName, Setting
from elo_engine.model import cpu_attention, split_weights
from elo_engine.model.presets import preset_spec

MOST = 1.08
GIB = 1 << 30

# What weighs most in a step that holds all logits: activations, logits, or weights with their state.
SIZES: dict[str, tuple[Any, int, int]] = {
    "long rows": (llama(4, 300, 128, 352, 4, 2, tied=True), 512, 1),
    "logits": (llama(3, 8000, 128, 256, 2, 2, tied=False), 64, 4),
    "weights": (llama(4, 8000, 192, 512, 4, 2, tied=True), 32, 2),
}
STEPS: list[tuple[ArmName, dict[str, Any]]] = [
    ("engine_full", {}),
    ("engine_full", {"recompute": "layer", "state": "8bit"}),
    ("elo_align", {"recompute": "layer", "micro_batches": 2}),
    ("elo_align", {"recompute": "selective", "micro_batches": 2}),
    ("elo_pretrain", {"recompute": "selective", "state": "8bit"}),
    ("elo_pretrain", {"micro_batches": 2}),
    ("elo_pretrain", {"recompute": "layer", "state": "8bit"}),
    ("transformers_full", {"recompute": "layer"}),
    ("lora", {"recompute": "layer"}),
    ("outer_unfrozen", {"recompute": "layer", "micro_batches": 2}),
    ("transformers_shallow", {}),
]


@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    import peft
    import transformers

    assert peft.LoraConfig and transformers.LlamaForCausalLM  # imported now, so that the traces need not search them
    with only_what_is_made_here():
        yield


def named(arm: ArmName, fields: dict[str, Any]) -> str:
    return "-".join([arm, *(f"{key}={value}" for key, value in fields.items())])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("arm", "fields"), STEPS, ids=[named(*step) for step in STEPS])
def test_predicted_peak_is_the_traced_one(arm: ArmName, fields: dict[str, Any], size: str) -> None:
    setting = case(arm, *SIZES[size], **fields)
    plan, measured = predict_memory(setting), measured_peak(setting)
    assert measured <= plan.peak_bytes <= MOST * measured, f"{plan} is {plan.peak_bytes / measured:.4f} of {measured}"


def test_grid_reaches_what_it_should() -> None:
    plans = [predict_memory(case(arm, *size, **fields)) for arm, fields in STEPS for size in SIZES.values()]
    largest = {max(plan.components, key=plan.components.__getitem__) for plan in plans}
    assert {"weights", "activations", "loss workspace"} <= largest
    moments = {plan.moment for plan in plans}
    assert {"loss", "backward of the loss", "backward of the embedding"} <= moments
    assert any(moment.startswith("backward of layer") for moment in moments)


def test_without_checkpointing() -> None:
    for arm in ("transformers_full", "lora", "outer_unfrozen"):
        setting = case(arm, llama(3, 300, 64, 160, 4, 2, tied=False), 128, 2)
        assert 1.0 <= predict_memory(setting).peak_bytes / measured_peak(setting) <= MOST


def test_three_detached_layers_and_heads_of_another_width() -> None:
    spec = replace(llama(5, 500, 96, 160, 3, 1, tied=False), E=48)
    setting = case("elo_pretrain", spec, 256, 2, layers=(0, 1, 4))
    assert 1.0 <= predict_memory(setting).peak_bytes / measured_peak(setting) <= MOST


def test_width_that_the_head_in_c_does_not_take() -> None:
    setting = case("elo_pretrain", llama(2, 8000, 48, 64, 3, 1, tied=True), 64, 2)
    assert 1.0 <= predict_memory(setting).peak_bytes / measured_peak(setting) <= MOST


@pytest.mark.parametrize(
    ("arm", "fields"),
    [
        ("engine_full", {"recompute": "layer"}),
        ("elo_align", {"recompute": "selective"}),
        ("elo_pretrain", {"recompute": "selective", "micro_batches": 2}),
        ("engine_full", {"state": "8bit", "micro_batches": 2}),
        ("elo_pretrain", {"state": "8bit"}),
        ("elo_pretrain", {"state": "8bit", "master": "24"}),
        ("engine_full", {"state": "8bit", "master": "24", "recompute": "layer"}),
        ("engine_full", {"state": "8bit", "master": "32"}),
        ("transformers_full", {"recompute": "layer"}),
        ("lora", {"recompute": "layer"}),
    ],
)
def test_bf16(arm: ArmName, fields: dict[str, Any]) -> None:
    for spec, T in ((llama(3, 4000, 64, 160, 2, 1, tied=True), 16), (llama(3, 300, 64, 160, 2, 1, tied=False), 128)):
        setting = case(arm, spec, T, 1, dtype="bf16", **fields)
        assert 1.0 <= predict_memory(setting).peak_bytes / measured_peak(setting) <= MOST


def test_rows_are_padded_as_attention_pads_them() -> None:
    assert all(memory_attention.padded_tokens(T) == cpu_attention.few_lengths(T) for T in range(1, 9000))


@pytest.mark.parametrize(("T", "rows", "recompute"), [(130, 8, "none"), (130, 8, "layer"), (66, 8, "selective")])
def test_bf16_rows_that_are_padded(T: int, rows: int, recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on a CPU, to 80 tokens and to 192; what is not counted is missing."""
    spec = llama(4, 300, 128, 160, 8, 8, tied=True)
    setting = case("engine_full", spec, T, rows, dtype="bf16", recompute=recompute)
    measured = measured_peak(setting)
    assert 1.0 <= predict_memory(setting).peak_bytes / measured <= MOST
    monkeypatch.setattr(memory_engine, "padded_bytes", lambda setting, index: 0)
    assert predict_memory(setting).peak_bytes < measured


@pytest.mark.parametrize(("tied", "fields"), [(True, {"dtype": "bf16"}), (False, {}), (False, {"micro_batches": 4})])
def test_a_step_whose_peak_is_its_end(tied: bool, fields: dict[str, Any]) -> None:
    """Where the vocabulary outweighs the rest, the gradients of embedding and head are the peak while they are made."""
    spec = llama(2, 6000, 128, 128, 2, 1, tied=tied)
    setting = case("engine_full", spec, 16, 1, state="8bit", recompute="layer", **fields)
    plan = predict_memory(setting)
    assert plan.moment == "gradients of embedding and head"
    assert 1.0 <= plan.peak_bytes / measured_peak(setting) <= MOST


def test_another_step_than_the_planned_one_would_be_seen() -> None:
    setting = case("engine_full", *SIZES["long rows"], recompute="layer")
    measured = measured_peak(setting)
    assert predict_memory(replace(setting, recompute="none")).peak_bytes > MOST * measured
    assert predict_memory(replace(setting, micro_batch=2)).peak_bytes > MOST * measured
    assert predict_memory(replace(setting, state="8bit")).peak_bytes < measured


def test_plan_as_json() -> None:
    plan = predict_memory(case("elo_pretrain", *SIZES["logits"]))
    told = json.loads(json.dumps(plan.to_json()))
    assert tuple(told["components"]) == COMPONENTS
    assert told["peak_bytes"] == plan.peak_bytes == sum(plan.components.values())
    assert told["moment"] == plan.moment


def test_largest_micro_batch_is_the_last_that_fits() -> None:
    setting = case("elo_pretrain", *SIZES["long rows"])
    cap = predict_memory(replace(setting, micro_batch=11)).peak_bytes
    assert largest_micro_batch(setting, cap) == 11
    assert largest_micro_batch(setting, cap - 1) == 10
    assert fits(replace(setting, micro_batch=11), cap) and not fits(replace(setting, micro_batch=12), cap)
    weights = predict_memory(setting).components["weights"]
    assert largest_micro_batch(setting, weights) == 0


# -- what only a card could measure: what must hold of the prediction all the same


def gpu(arm: ArmName, **fields: Any) -> Setting:
    fields = {"recompute": "none" if arm in ("elo_pretrain", "transformers_shallow") else "layer"} | fields
    return Setting(arm, preset_spec("llama-3.1-8b"), (0, 31), 8192, 1, **fields)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_has_a_plan_on_a_gpu(arm: ArmName) -> None:
    plan = predict_memory(gpu(arm))
    assert isinstance(plan, MemoryPlan) and all(count >= 0 for count in plan.components.values())
    assert plan.components["slack"] > 64 << 20


def test_components_of_the_8b_are_what_its_shapes_say() -> None:
    spec = preset_spec("llama-3.1-8b")
    full = predict_memory(gpu("engine_full")).components
    assert full["weights"] == 2 * spec.parameters
    assert full["optimizer"] == pytest.approx(2 * spec.parameters * (1 + 4 / 256), rel=1e-2)
    # at the peak, the step's end, the head's is cast while all others but the embedding's are there in bf16: its sum in
    # fp32, as much as the two in bf16, and the embedding's rows of 8192 ids
    assert full["gradients"] == 2 * spec.parameters + 2 * spec.V * spec.D + 4 * 8192 * spec.D
    shallow = predict_memory(gpu("elo_pretrain")).components
    assert shallow["weights"] == 2 * (2 * spec.layer_parameters + 2 * spec.V * spec.D + spec.D)
    masters = predict_memory(gpu("elo_pretrain", state="fp32")).components["optimizer"]
    assert masters == pytest.approx(12 * 2 * spec.layer_parameters, rel=1e-2)
    # all logits three times in fp32: log-softmax and two gradients
    assert predict_memory(gpu("lora")).components["loss workspace"] == 3 * 4 * 8192 * spec.V
    # the Trainer has bitsandbytes keep the embedding's moments in fp32
    codes, trainer = full["optimizer"], predict_memory(gpu("transformers_full")).components["optimizer"]
    assert trainer - codes == pytest.approx((8 - 2 * (1 + 4 / 256)) * spec.V * spec.D, rel=2e-2)


def test_levers_lower_the_peak() -> None:
    def peak(arm: ArmName, **fields: Any) -> float:
        return predict_memory(gpu(arm, **fields)).peak_bytes / GIB

    assert peak("engine_full") < peak("engine_full", recompute="none") - 5
    assert peak("engine_full") < peak("engine_full", state="fp32") - 50
    assert peak("liger_full") < peak("transformers_full") == peak("transformers_full_kept")
    assert peak("elo_pretrain") < 0.25 * peak("lora")
    assert peak("elo_pretrain", micro_batches=2) > peak("elo_pretrain")


def test_rows_of_the_embedding_are_as_many_as_the_step_can_have() -> None:
    """Of every micro-batch, not only of those that the ledger goes through; and no more than the vocabulary has."""

    def gradients(micro_batches: int) -> int:
        return predict_memory(gpu("engine_full", micro_batches=micro_batches)).components["gradients"]

    spec = preset_spec("llama-3.1-8b")
    assert gradients(8) - gradients(3) == 5 * 8192 * 4 * spec.D
    assert gradients(100) - gradients(3) == (spec.V - 3 * 8192) * 4 * spec.D


def test_sizes_taken_from_the_code_that_allocates() -> None:
    from elo_engine.model.cpu_head import TILES

    told = (memory_engine_head._ROWS, memory_engine_head._COLS, memory_engine_head._MOST_COLS)
    assert told == (TILES.rows, TILES.cols, TILES.most_cols)
    assert TILES.chunk_bytes == memory_engine_head._CHUNK_BYTES
    assert memory_shapes.SPLIT_CHUNK == split_weights.CHUNK
    pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")
    from elo_engine.kernels import adamw_plan
    from elo_engine.kernels.linear_cross_entropy import LAUNCH

    tiles = adamw_plan.LAUNCH.tile, adamw_plan.LAUNCH.tiles_per_sum
    assert tiles == (memory_shapes.ADAMW_TILE, memory_shapes.TILES_PER_SUM)
    for N, V, width in ((8192, 128256, 2), (32768, 128256, 2), (8192, 49152, 2), (100, 300, 4), (5000, 50257, 2)):
        assert memory_engine_head.gpu_chunk(N, V, width) == LAUNCH.chunk(N, V, width)


def test_rows_of_a_liger_chunk() -> None:
    # by hand: 8192 rows over ceil(128256 / 4096) = 32 are 256; 8192 over ceil(128256 / 2048) = 63 are 131, so 256
    assert memory_transformers_head.liger_chunk(8192, 128256, 4096) == 256
    assert memory_transformers_head.liger_chunk(8192, 128256, 2048) == 256
    assert memory_transformers_head.liger_chunk(10, 8, 64) == 10


def test_ledger_keeps_its_highest_moment_and_refuses_double_frees() -> None:
    ledger = Ledger()
    weights = ledger.add("weights", 10)
    ledger.moment = "middle"
    with ledger.during("activations", 5):
        ledger.spike("gradients", 3)
    ledger.moment = "end"
    ledger.spike("activations", 7)
    assert (ledger.peak_bytes, ledger.peak_moment, ledger.live_bytes) == (18, "middle", 10)
    assert ledger.at_peak == dict.fromkeys(COMPONENTS, 0) | {"weights": 10, "activations": 5, "gradients": 3}
    ledger.drop(weights)
    with pytest.raises(AssertionError, match="freed twice"):
        ledger.drop(weights)
