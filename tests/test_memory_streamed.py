"""The streamed engine's memory: predicted against every byte that torch's CPU allocator hands out, and the proof that
neither depth nor the model's size decides what is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from planner_cases import CPU, Rows, case, llama, only_what_is_made_here

from elo_engine.checkpoint import writer
from elo_engine.config import OptimizerConfig, StageConfig
from elo_engine.measure import expected, planner
from elo_engine.measure.flops import arm_flops
from elo_engine.measure.ledger import Ledger
from elo_engine.measure.memory_streamed import run_step, standing_bytes
from elo_engine.measure.memory_units import Units, host_parts, inputs_bytes, store_bytes
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import Setting, Streaming
from elo_engine.measure.tensor_trace import traced_tensor_bytes
from elo_engine.model import ops
from elo_engine.model.presets import preset_spec
from elo_engine.stream.engine import StreamedEngine, open_streamed
from elo_engine.stream.hidden import HostHidden

MOST = 1.08
HOST = Streaming(inputs="host")


@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    with only_what_is_made_here():
        yield


def streamed(*args: Any, **fields: Any) -> Setting:
    return case("elo_align_streamed", *args, recompute="layer", **fields)


def engine_of(setting: Setting) -> StreamedEngine:
    """The engine that the setting describes, with random weights."""
    ops.configure("auto", CPU)
    section = StageConfig(
        tokens=10**9, tokens_per_step=setting.tokens_per_step, micro_batch=setting.micro_batch,
        optimizer=OptimizerConfig(lr=1e-4, state=setting.state, master=setting.master),
    )  # fmt: skip
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    engine = open_streamed(setting.spec, dtype, section, CPU, setting.streaming, setting.sequence_length)
    generator = torch.Generator().manual_seed(0)
    for views in engine.store.views:
        for key, weight in views["weights"].items():
            weight.copy_(torch.randn(weight.shape, generator=generator).mul_(0.02) + ("norm" in key))
            views["state"].get(f"master {key}", weight).copy_(weight)
    return engine


def one_step(engine: StreamedEngine, setting: Setting, number: int, poll: Callable[[], bool] = lambda: False) -> None:
    rows = Rows(setting).rows(number, setting.micro_batch * setting.micro_batches)
    outcome = engine.step(rows, setting.tokens_per_step, 1e-4, first=number == 0, should_stop=poll)
    assert outcome is not None and outcome.updated


def measured_peak(setting: Setting) -> int:
    """Bytes of tensors at the highest moment of the second step, which makes the updates of the first."""
    engine = engine_of(setting)
    one_step(engine, setting, 0)
    with traced_tensor_bytes() as trace:
        one_step(engine, setting, 1)
    return trace.peak_bytes


SIZES: dict[str, tuple[Any, int, int]] = {
    "rows": (llama(4, 300, 128, 352, 4, 2, tied=True), 256, 1),
    "logits": (llama(4, 4000, 128, 256, 2, 2, tied=False), 64, 2),
    "tied logits": (llama(4, 4000, 128, 256, 2, 2, tied=True), 64, 2),
    "weights": (llama(8, 300, 128, 352, 4, 2, tied=False), 32, 1),
}
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("rows", {}),
    ("rows", {"micro_batches": 3, "streaming": HOST}),
    ("rows", {"dtype": "bf16", "state": "8bit", "micro_batches": 2}),
    ("logits", {"micro_batches": 2, "state": "8bit"}),
    ("logits", {"micro_batches": 5, "state": "8bit", "streaming": Streaming(update="at_once")}),
    ("logits", {"dtype": "bf16", "micro_batches": 2}),
    ("logits", {"dtype": "bf16", "state": "8bit", "micro_batches": 2, "streaming": Streaming(update="at_once")}),
    ("tied logits", {"micro_batches": 3, "streaming": HOST}),
    ("tied logits", {"dtype": "bf16", "state": "8bit"}),
    ("tied logits", {"dtype": "bf16", "micro_batches": 2, "streaming": Streaming("memory", "host", "at_once")}),
    ("weights", {"micro_batches": 2, "state": "8bit"}),
    ("weights", {"dtype": "bf16", "state": "8bit"}),
    ("weights", {"dtype": "bf16", "state": "8bit", "master": "24"}),
    ("logits", {"dtype": "bf16", "state": "8bit", "master": "24", "micro_batches": 2}),
    ("weights", {"dtype": "bf16", "state": "8bit", "master": "32"}),
    ("weights", {"dtype": "bf16", "micro_batches": 3, "streaming": HOST}),
    ("weights", {"dtype": "bf16", "micro_batches": 2, "streaming": Streaming(update="at_once")}),
]


def named(value: Any) -> str:
    if isinstance(value, str):
        return value
    said = {key: one for key, one in value.items() if key != "streaming"}
    said |= vars(value["streaming"]) if "streaming" in value else {}
    return "-".join(f"{key}={one}" for key, one in said.items()) or "fp32"


@pytest.mark.parametrize(("size", "fields"), STEPS, ids=named)
def test_predicted_peak_is_the_traced_one(size: str, fields: dict[str, Any]) -> None:
    setting = streamed(*SIZES[size], **fields)
    plan, measured = predict_memory(setting), measured_peak(setting)
    assert measured <= plan.peak_bytes <= MOST * measured, f"{plan} is {plan.peak_bytes / measured:.4f} of {measured}"


def test_the_grid_reaches_what_it_should() -> None:
    moments = {predict_memory(streamed(*SIZES[size], **fields)).moment for size, fields in STEPS}
    for part in ("backward of layer", "gradients of layer", "update of", "loss", "gradients of the"):
        assert any(moment.startswith(part) for moment in moments), (part, moments)


def test_another_step_than_the_planned_one_would_be_seen() -> None:
    setting = streamed(*SIZES["rows"], micro_batches=2)
    measured = measured_peak(setting)
    for wrong in ({"micro_batches": 3}, {"streaming": HOST}, {"state": "8bit"}, {"dtype": "bf16"}):
        planned = predict_memory(replace(setting, **wrong)).peak_bytes
        assert not measured <= planned <= MOST * measured, wrong


# -- the proof: whatever the depth, at most three layers' weights and one layer's gradients


@pytest.mark.parametrize("fields", [{}, {"dtype": "bf16", "state": "8bit", "micro_batches": 2}], ids=named)
def test_depth_takes_no_memory_of_the_device(fields: dict[str, Any]) -> None:
    """Weights of two layers, the state and the waiting gradient of one, the gradients of one: the trace has no byte
    more than those and a small share for everything else, at 4, 8 and 16 layers.
    """
    found = {}
    for layers in (4, 8, 16):
        setting = streamed(llama(layers, 32, 192, 512, 2, 1, tied=False), 8, 1, streaming=HOST, **fields)
        layer = Units.of(setting).layer
        gradients = layer.weights
        if setting.dtype == "bf16":  # or fp32 sums, and of one leaf what arrives of the next micro-batch, widened
            gradients = 4 * layer.elements + 6 * max(layer.sizes)
        found[layers] = peak = measured_peak(setting)
        counted = 2 * layer.weights + layer.state + layer.weights + gradients
        assert counted <= peak <= 1.06 * counted, layers
    assert max(found.values()) - min(found.values()) < 4096, found  # a norm a leaf


def test_gradients_are_of_one_layer_at_any_time() -> None:
    """Seen between all micro-batches of a step, by the storages themselves."""
    setting = streamed(*SIZES["weights"], micro_batches=3)
    engine, most, layers_seen = engine_of(setting), 0, set()
    layer = Units.of(setting).layer

    def poll() -> bool:
        nonlocal most
        found = {}
        for number, slot in enumerate(engine.device_units._slots):
            grads = [grad for grad in slot.grads.as_they_came() if grad is not None]
            grads += [leaf.grad for leaf in slot.leaves.values() if leaf.grad is not None]
            found |= {grad.untyped_storage().data_ptr(): grad.nbytes for grad in grads}
            layers_seen.update([number] if grads else [])
        most = max(most, sum(found.values()))
        return False

    for number in range(2):
        one_step(engine, setting, number, poll)
    assert most == 4 * layer.elements and layers_seen == {0, 1}


# -- the host


@pytest.mark.parametrize("update", ["lazy", "at_once"])
@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_host_holds_what_is_counted(tied: bool, dtype: Any, state: Any, update: Any) -> None:
    spec = llama(3, 301, 48, 80, 3, 1, tied=tied)
    setting = streamed(
        spec, 16, 2, micro_batches=2, dtype=dtype, state=state, streaming=Streaming("memory", "host", update)
    )
    engine = engine_of(setting)
    units = Units.of(setting).all(spec.layers)
    assert [unit.weights for unit in units] == [unit.weights.nbytes for unit in engine.store.units]
    assert [unit.state for unit in units] == [unit.state.nbytes for unit in engine.store.units]
    assert store_bytes(setting) == engine.store.nbytes
    assert isinstance(engine.hidden, HostHidden) and inputs_bytes(setting) == engine.hidden._host.nbytes
    parts = expected.host_by_part(replace(setting, device="cuda"), predict_memory(setting))
    assert parts.items() >= host_parts(setting).items()
    on_disk = replace(setting, device="cuda", streaming=Streaming("disk", "host", update))
    assert expected.store_disk_bytes(on_disk) == engine.store.nbytes + inputs_bytes(setting)
    assert expected.host_bytes(on_disk, predict_memory(on_disk)) == parts["reading"] + parts["snapshot"]
    assert expected.snapshot_bytes(setting) == pytest.approx(engine.optimizer.snapshot_bytes, rel=0.02)  # whole groups


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_snapshot_is_written_from_where_the_model_lies(dtype: Any, state: Any) -> None:
    setting = streamed(llama(3, 300, 64, 160, 2, 1, tied=False), 16, 1, dtype=dtype, state=state)
    engine = engine_of(setting)
    one_step(engine, setting, 0)
    for tensors in (engine.optimizer.weights(), engine.optimizer.moments()):
        stored = writer._separate(tensors)
        assert all(stored[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    for device in ("cpu", "cuda"):
        assert expected.snapshot_host_bytes(replace(setting, device=device)) == 0  # type: ignore[arg-type]


# -- what only a card could measure: what must hold of the prediction all the same


def gpu(layers: int = 32, **fields: Any) -> Setting:
    spec = replace(preset_spec("llama-3.1-8b"), layers=layers)
    return Setting("elo_align_streamed", spec, (0, layers - 1), 4096, 1, 8, **fields)


@pytest.mark.parametrize("update", ["lazy", "at_once"])
@pytest.mark.parametrize("inputs", ["device", "host"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_but_the_room_for_layers_outlives_a_step(
    tied: bool, dtype: Any, device: Any, inputs: Any, update: Any
) -> None:
    spec = llama(4, 300, 64, 160, 2, 1, tied=tied)
    for micro_batches in (1, 2, 7):
        fields = {"dtype": dtype, "micro_batches": micro_batches, "streaming": Streaming("memory", inputs, update)}
        setting, ledger = replace(streamed(spec, 32, 1, **fields), device=device), Ledger()
        run_step(setting, ledger)
        assert ledger.live_bytes == standing_bytes(setting)


class LiveLedger(Ledger):
    def held(self) -> dict[str, int]:
        return {name: self._live[name] for name in ("weights", "gradients", "optimizer")}


@pytest.mark.parametrize("fields", [{}, {"dtype": "bf16"}, {"state": "8bit"}], ids=named)
def test_what_stays_is_what_the_engine_says_it_holds(fields: dict[str, Any]) -> None:
    setting, ledger = streamed(*SIZES["weights"], **fields), LiveLedger()
    planner.run_step(setting, ledger)
    assert ledger.held() == engine_of(setting).held()


def test_a_card_holds_the_same_at_any_depth() -> None:
    on_host = [predict_memory(gpu(layers, streaming=HOST)).peak_bytes for layers in (4, 32, 128)]
    assert len(set(on_host)) == 1
    few, many = (predict_memory(gpu(layers)).components["activations"] for layers in (8, 16))
    assert many - few == 8 * 8 * 4096 * 4096 * 2  # layers, rows, T, D, bf16
    assert on_host[0] < 8e9 < predict_memory(gpu()).peak_bytes


def test_the_8b_on_the_host() -> None:
    lazy, at_once = host_parts(gpu()), host_parts(gpu(streaming=Streaming(update="at_once")))
    spec = preset_spec("llama-3.1-8b")
    assert lazy["weights"] == lazy["waiting gradients"] == 2 * spec.parameters
    assert lazy["optimizer state"] == pytest.approx(2 * spec.parameters * (1 + 4 / 256), rel=1e-4)
    assert at_once == lazy | {"waiting gradients": 0}


def test_every_layer_is_run_again_but_for_its_last_product() -> None:
    setting = gpu()
    again = replace(setting, arm="elo_align", recompute="layer")
    assert arm_flops(setting) == arm_flops(again)
    assert arm_flops(setting).executed.total > arm_flops(replace(again, recompute="none")).executed.total
