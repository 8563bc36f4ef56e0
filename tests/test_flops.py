"""The FLOP counts of every arm against torch's own counter, to 1 %.

torch's counter sees neither the C++ kernels nor the CPU's fused attention nor an in-place addmm. So the engine runs on
its torch twins, which make the same products (`cpu_native.using("torch")`), and the latter two are counted by torch's
own formulas for their siblings. One exclusion is left: torch counts attention as if every query saw every token, so
here our attention is scaled from what a causal query sees to all T.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_parity import whole_rows
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from elo_engine.measure.flops import (
    TokenFlops,
    arm_flops,
    full_step,
    ideal_speedup,
    ideal_speedups,
    shallow_step,
    tokens_seen,
)
from elo_engine.measure.setting import ENGINE, SHALLOW, Setting
from elo_engine.model import cpu_native, names, ops
from elo_engine.model.decoder import Decoder
from elo_engine.model.presets import preset_config, preset_spec
from elo_engine.model.spec import LayerKind, ModelSpec, read_spec

CPU = torch.device("cpu")

# Small, and llama-3.1-8b-mini's ratios at a quarter of its width and length: its 32 layers, its shares of head, layers
# and attention.
SMALL = preset_config("llama-3.2-1b") | {
    "vocab_size": 700, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MINI = preset_config("llama-3.1-8b-mini") | {
    "vocab_size": 2004, "hidden_size": 64, "intermediate_size": 224, "head_dim": 8,
}  # fmt: skip
SHAPES = {"small": (SMALL, 96, 2), "mini": (MINI, 128, 1)}  # configuration, T, B

aten = torch.ops.aten


def _forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(d_out: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(d_out, q, k, v)


def _addmm(_: Any, left: Any, right: Any, **__: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


ALSO_COUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    aten.addmm_: _addmm,
}


def engine_loss(setting: Setting) -> torch.Tensor:
    shallow = setting.arm in SHALLOW
    layers = setting.layers if shallow else tuple(range(setting.spec.layers))
    tensors = {name: 0.02 * torch.randn(shape) for name, shape in names.expected_shapes(setting.spec).items()}
    model = Decoder(setting.spec, tensors, layers, train_outer=not shallow, recompute=setting.recompute)
    batch = whole_rows(torch.randint(0, setting.spec.V, (setting.micro_batch, setting.sequence_length)))
    # a label at every position: the engine leaves out the head's products of rows without one
    return model.loss_sum(replace(batch, labels_N=batch.ids_N))


def transformers_loss(setting: Setting, config: dict[str, Any]) -> torch.Tensor:
    from transformers import LlamaConfig, LlamaForCausalLM

    shallow = setting.arm in SHALLOW
    count = len(setting.layers) if shallow else setting.spec.layers
    model: Any = LlamaForCausalLM(LlamaConfig(**(config | {"num_hidden_layers": count, "use_cache": False}))).train()
    if shallow or setting.arm == "outer_unfrozen":
        model.requires_grad_(False)
        for number in range(count) if shallow else setting.layers:
            model.model.layers[number].requires_grad_(True)
    if setting.arm == "lora":
        from peft import LoraConfig, get_peft_model

        kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=setting.lora_rank, target_modules=kinds, task_type="CAUSAL_LM"))
    if setting.recompute == "layer":
        model.gradient_checkpointing_enable()  # what the Trainer calls
    ids_BT = torch.randint(0, setting.spec.V, (setting.micro_batch, setting.sequence_length))
    return model(input_ids=ids_BT, labels=ids_BT).loss  # type: ignore[no-any-return]


def counted(setting: Setting, config: dict[str, Any]) -> TokenFlops:
    """Per token; the head's part is in `linear`, for the counter knows no heads."""
    torch.manual_seed(0)
    counter = FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED)
    ops.configure("auto", CPU)
    with cpu_native.using("torch"), counter:
        (engine_loss(setting) if setting.arm in ENGINE else transformers_loss(setting, config)).backward()
    found = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in found.items() if "attention" in str(op))
    return TokenFlops((sum(found.values()) - attention) / setting.N, attention / setting.N, 0.0)


def seen_in_full(flops: TokenFlops, spec: ModelSpec, T: int) -> TokenFlops:
    return TokenFlops(flops.linear + flops.head, flops.attention * T / tokens_seen(spec, T), 0.0)


# As the arms are run; on the small shape also the other way round.
AS_RUN = [
    ("transformers_full", "layer"), ("engine_full", "layer"), ("lora", "layer"), ("outer_unfrozen", "layer"),
    ("elo_pretrain", "none"), ("elo_align", "none"), ("transformers_shallow", "none"),
]  # fmt: skip
CASES = [(*case, shape) for case in AS_RUN for shape in SHAPES]
OTHER = {"none": "layer", "layer": "none"}
CASES += [(arm, OTHER[recompute], "small") for arm, recompute in AS_RUN if arm != "transformers_shallow"]
CASES += [(arm, "selective", shape) for arm in ("elo_align", "elo_pretrain") for shape in SHAPES]


@pytest.mark.parametrize(("arm", "recompute", "shape"), CASES)
def test_executed_flops_are_what_torch_counts(arm: Any, recompute: Any, shape: str) -> None:
    config, T, B = SHAPES[shape]
    spec = read_spec(config)
    setting = Setting(arm, spec, (0, spec.layers - 1), T, B, dtype="fp32", recompute=recompute, device="cpu")
    expected, found = seen_in_full(arm_flops(setting).executed, spec, T), counted(setting, config)
    assert found.attention == pytest.approx(expected.attention, rel=1e-9), "attention"
    assert found.linear == pytest.approx(expected.linear, rel=1e-3), "products of layers and head"
    assert found.total == pytest.approx(expected.total, rel=0.01)


def test_the_bound_sees_each_of_the_differences_that_the_counts_make() -> None:
    """On the small shape every correction to the textbook's count is more than the bound on the products, 0.1 %."""
    spec = read_spec(SMALL)
    sizes = {"layers": (0, 3), "sequence_length": 96, "micro_batch": 2}
    whole = arm_flops(Setting("transformers_full", spec, recompute="layer", **sizes)).executed
    assert 2 * spec.D * spec.F * spec.layers > 0.01 * (whole.linear + whole.head)
    shallow = arm_flops(Setting("elo_pretrain", spec, **sizes)).executed
    below_first = 2 * spec.D * spec.E * (spec.H + 2 * spec.K)
    assert below_first > 0.01 * (shallow.linear + shallow.head)
    adapters = arm_flops(Setting("lora", spec, recompute="layer", **sizes)).executed
    assert 2 * 16 * spec.D * spec.layers > 0.001 * (adapters.linear + adapters.head)


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_backward_stops_at_the_lowest_layer_that_learns_unless_checkpointed(recompute: Any) -> None:
    spec = read_spec(SMALL)
    setting = Setting("outer_unfrozen", spec, (2,), 96, 2, dtype="fp32", recompute=recompute, device="cpu")
    expected, found = seen_in_full(arm_flops(setting).executed, spec, 96), counted(setting, SMALL)
    assert found.linear == pytest.approx(expected.linear, rel=1e-3)
    assert found.attention == pytest.approx(expected.attention, rel=1e-9)


def test_the_8b_model_at_8192_is_the_published_count() -> None:
    """GFLOP a token: 52.5 plain, 37.7 LoRA, 5.14 ELO; checkpointed 68.7 by the textbook, of which transformers and this
    engine leave out the down projections, 3.76.
    """
    spec = preset_spec("llama-3.1-8b")
    sizes: dict[str, Any] = {"layers": (0, 31), "sequence_length": 8192, "micro_batch": 1}

    def giga(arm: Any, kind: str = "executed", **more: Any) -> float:
        return float(getattr(arm_flops(Setting(arm, spec, **sizes, **more)), kind).total / 1e9)

    assert giga("transformers_full") == pytest.approx(52.5, rel=0.005)
    down = 2 * spec.D * spec.F * spec.layers / 1e9
    assert giga("engine_full", recompute="layer") + down == pytest.approx(68.7, rel=0.01)
    assert down == pytest.approx(3.76, rel=0.005)
    for arm in ("transformers_full", "liger_full", "elo_align"):
        assert giga(arm, recompute="layer") == giga("engine_full", recompute="layer")
    assert giga("lora") == pytest.approx(37.7, rel=0.005)
    assert giga("elo_pretrain") == pytest.approx(5.14, rel=0.005)
    for arm in ("transformers_full", "engine_full", "elo_align"):
        assert giga(arm, "model", recompute="layer") == full_step(spec, 8192).total / 1e9
    elo = arm_flops(Setting("elo_pretrain", spec, **sizes, recompute="layer")).model
    assert elo == shallow_step(spec, (0, spec.layers - 1), 8192)


def test_mini_is_the_8b_model_to_the_counts() -> None:
    """Shares of head, layers and attention, and with them the ideal speedup, at rows as many times shorter as it is
    narrower.
    """
    big, mini = preset_spec("llama-3.1-8b"), preset_spec("llama-3.1-8b-mini")
    T = 8192 * mini.D // big.D
    for count in (full_step, lambda spec, T: shallow_step(spec, (0, spec.layers - 1), T)):
        left, right = count(big, 8192), count(mini, T)
        for part in ("linear", "attention", "head"):
            assert getattr(left, part) / left.total == pytest.approx(getattr(right, part) / right.total, abs=0.002)
    of_mini = ideal_speedup(mini, (0, mini.layers - 1), T, 0.9)
    assert of_mini == pytest.approx(ideal_speedup(big, (0, big.layers - 1), 8192, 0.9), rel=0.005)


def test_ideal_speedups_are_of_what_is_executed() -> None:
    spec = preset_spec("llama-3.1-8b")
    elo = Setting("elo_pretrain", spec, (0, 31), 8192, 4)
    resident = Setting("elo_align", spec, (0, 31), 8192, 1)
    found = ideal_speedups(elo, resident, 0.9)
    assert found.over_plain == pytest.approx(ideal_speedup(spec, (0, spec.layers - 1), 8192, 0.9))
    checkpointed = arm_flops(replace(resident, arm="transformers_full", recompute="layer")).executed.total
    ours = 0.9 * arm_flops(elo).executed.total + 0.1 * arm_flops(resident).executed.total
    assert found.over_checkpointed == pytest.approx(checkpointed / ours) and found.over_checkpointed > found.over_plain
    slower = ideal_speedups(replace(elo, recompute="layer"), replace(resident, recompute="layer"), 0.9)
    assert slower.over_checkpointed < found.over_checkpointed


def test_a_window_bounds_what_a_query_sees() -> None:
    spec = replace(preset_spec("mistral-7b-v0.3"), kinds=(LayerKind(window=100),))
    assert tokens_seen(spec, 80) == 40.5 and tokens_seen(spec, 100) == 50.5
    by_hand = sum(min(query + 1, 100) for query in range(1000)) / 1000
    assert tokens_seen(spec, 1000) == pytest.approx(by_hand)
