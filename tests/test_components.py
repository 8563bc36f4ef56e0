"""Memory by component, measured: what is counted is the arithmetic of the shapes, on both sides of a comparison, and a
record whose parts do not add up is refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planner_cases import only_what_is_made_here
from test_compare import loss, memory, speedup
from test_speedup import MODEL, setting

from elo_engine.benchmarks import evidence, rounds, trainer_arms
from elo_engine.benchmarks.arm import run_engine
from elo_engine.benchmarks.conductor import Conductor
from elo_engine.benchmarks.loss import memory_of
from elo_engine.benchmarks.models import BenchModel
from elo_engine.benchmarks.schemas import check_result
from elo_engine.benchmarks.speedup import arm_memory
from elo_engine.benchmarks.tables import tables
from elo_engine.benchmarks.trainer_arms import run_trainer
from elo_engine.errors import FailedError
from elo_engine.measure.components import (
    HELD,
    REST,
    REST_OF_PROCESS,
    by_component,
    held_bytes,
    predicted_held,
    storages,
    tensors_in,
)
from elo_engine.measure.expected import StageMemory
from elo_engine.measure.memory_shapes import coded_bytes
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import ENGINE, ArmName, Setting
from elo_engine.model import decoder

CPU = torch.device("cpu")
TIED = BenchModel("tied", MODEL.config | {"tie_word_embeddings": True})
POWERS = 5 * 8  # the engine's powers of beta and step count, in fp64
STEP = 4  # torch's step count, an fp32 scalar for each tensor that learns


@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    """What other tests left is not searched for tensors by the traces here."""
    import peft
    import transformers

    assert peft.LoraConfig and transformers.Trainer
    with only_what_is_made_here():
        yield


@pytest.fixture(autouse=True)
def _undo_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching wraps functions of the decoder module for the life of a process."""
    monkeypatch.setattr(decoder, "decoder_layer", decoder.decoder_layer)
    monkeypatch.setattr(decoder, "layer_gradient", decoder.layer_gradient)


def run_arm(made: Setting, model: BenchModel = MODEL, commands: str = "step\nfinish\n") -> tuple[dict[str, int], int]:
    """-> bytes held, and the traced peak where a `trace` is among the commands; in this process."""
    replies, seen = io.StringIO(), evidence.Evidence()
    run = run_engine if made.arm in ENGINE else run_trainer
    run(made, model, 1e-3, CPU, Conductor(CPU, seen, replies, io.StringIO(commands)))
    peaks = [json.loads(line).get("tensor_peak_bytes", 0) for line in replies.getvalue().splitlines()]
    return seen.to_json()["held"], max(peaks)


# -- counting


def test_a_storage_counts_once_however_many_tensors_show_it() -> None:
    whole = torch.zeros(10, 4)
    shown = [whole, whole[3:], whole.t(), whole.detach(), None, torch.empty(0), torch.zeros(8, device="meta")]
    assert sum(storages(shown, CPU).values()) == 160
    assert sum(storages([whole[:1]], CPU).values()) == 160, "a view keeps all of its storage"
    assert sum(storages([whole, whole.clone()], CPU).values()) == 320


def test_tensors_are_found_wherever_an_optimizer_keeps_them() -> None:
    class State:
        def __init__(self) -> None:
            self.lists = [torch.zeros(1), (torch.zeros(2), None)]
            self.by_key = {torch.zeros(64): {"exp_avg": torch.zeros(3)}, "name": "text"}
            self.self = self

    weight = torch.zeros(8, requires_grad=True)
    weight.grad = torch.zeros(8)
    state = State()
    state.lists.append(weight)
    assert sorted(tensor.numel() for tensor in tensors_in(state)) == [1, 2, 3, 8], "neither keys nor gradients"
    found = held_bytes([weight], [weight.grad, None], state, CPU)
    assert found == {"weights": 32, "gradients": 32, "optimizer": 4 * (1 + 2 + 3)}


def test_a_wrapper_is_the_bytes_of_its_parts() -> None:
    """As torchao keeps 8-bit state; torch has such a wrapper of its own, of two tensors."""
    from torch.testing._internal.two_tensor import TwoTensor

    assert sum(storages([TwoTensor(torch.zeros(10), torch.zeros(10))], CPU).values()) == 80


# -- arms

ARMS: list[tuple[ArmName, dict[str, Any]]] = [
    ("engine_full", {}), ("engine_full", {"state": "8bit"}), ("engine_full", {"dtype": "bf16"}),
    ("engine_full", {"dtype": "bf16", "micro_batches": 1}), ("elo_pretrain", {}), ("transformers_full", {}),
    ("lora", {}), ("outer_unfrozen", {}), ("transformers_shallow", {}),
]  # fmt: skip


def arithmetic(made: Setting) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state, from the model's shapes."""
    spec, width = made.spec, made.width
    layer, outer = spec.layer_parameters, spec.parameters - spec.layers * spec.layer_parameters
    present = len(made.layers) if made.arm in ("elo_pretrain", "transformers_shallow") else spec.layers
    weights, learning = width * (outer + present * layer), evidence.expected_parameters(made)
    if made.arm in ENGINE:
        summed = 4 if made.micro_batches > 1 else width  # gradients of several micro-batches add up in fp32
        moments = 8 * learning if width == 4 else 12 * learning  # and fp32 masters of bf16
        if made.state == "8bit":
            qkv, gate_up = (spec.H + 2 * spec.K) * spec.E * spec.D, 2 * spec.F * spec.D
            leaves = [qkv, spec.H * spec.E * spec.D, gate_up, spec.F * spec.D, spec.D, spec.D] * spec.layers
            leaves += [spec.V * spec.D, spec.D] + ([] if spec.tied else [spec.V * spec.D])
            moments = sum(coded_bytes(size) for size in leaves)
        return {"weights": weights, "gradients": summed * learning, "optimizer": moments + POWERS}
    if made.arm == "lora":
        weights += 4 * learning
    tensors = {  # that learn: nine in a layer, of adapters two a projection, and embedding, norm and head
        "lora": 2 * 7 * spec.layers, "transformers_full": 9 * spec.layers + (2 if spec.tied else 3),
    }.get(made.arm, 9 * len(made.layers))  # fmt: skip
    return {"weights": weights, "gradients": 4 * learning, "optimizer": 8 * learning + STEP * tensors}


@pytest.mark.parametrize(("arm", "changes"), ARMS, ids=[f"{arm}{changes or ''}" for arm, changes in ARMS])
def test_what_an_arm_holds_is_the_arithmetic_and_the_plan(arm: ArmName, changes: dict[str, Any]) -> None:
    made = setting(arm, **changes)
    traced = not changes and arm in ("elo_pretrain", "transformers_full")  # a trace takes as long as ten steps
    held, peak = run_arm(made, commands="step\ntrace\nfinish\n" if traced else "step\nfinish\n")
    assert held == arithmetic(made)
    planned, plan = predicted_held(made), predict_memory(made)
    for name in ("weights", "gradients"):
        assert planned[name] == held[name]
    counts = held["optimizer"] - planned["optimizer"]  # of steps, which the plan leaves out
    assert counts == POWERS if made.arm in ENGINE else 0 < counts <= STEP * 2 * 7 * made.spec.layers
    assert planned["optimizer"] == pytest.approx(held["optimizer"], rel=0.01)
    assert [plan.components[name] for name in ("weights", "optimizer")] == [planned["weights"], planned["optimizer"]]
    if not traced:
        return
    found = by_component(made, plan.peak_bytes, held, peak, "tensors")
    assert sum(found["measured"].values()) == peak and sum(found["predicted"].values()) == plan.peak_bytes
    assert 0 < found["measured"][REST] < found["predicted"][REST], "the prediction has its slack there"


@pytest.mark.parametrize("arm", ["engine_full", "transformers_full"])
def test_a_tied_head_is_counted_once(arm: ArmName) -> None:
    made = setting(arm, spec=TIED.spec)
    held, _ = run_arm(made, TIED)
    assert held == arithmetic(made)
    apart = arithmetic(replace(made, spec=MODEL.spec))
    assert apart["weights"] - held["weights"] == 4 * made.spec.V * made.spec.D
    assert predicted_held(made)["weights"] == held["weights"] != predicted_held(replace(made, spec=MODEL.spec))


def off_the_plan(made: Setting, held: dict[str, int]) -> set[str]:
    """The parts of which more or less is held than predicted, by more than 1 %."""
    planned = predicted_held(made)
    return {name for name in HELD if abs(held[name] - planned[name]) > 0.01 * planned[name]}


def test_what_an_arm_holds_beside_its_plan_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer more that learns, moments of another type, a copy of the head: each in its own part."""
    made, honest = setting("transformers_shallow"), trainer_arms.build

    def planted(change: Callable[[Any], object]) -> set[str]:
        def build(*args: Any) -> Any:
            model = honest(*args)
            change(model)
            return model

        monkeypatch.setattr(trainer_arms, "build", build)
        return off_the_plan(made, run_arm(made)[0])

    assert planted(lambda model: model.lm_head.requires_grad_(True)) == {"gradients", "optimizer"}
    copied: Callable[[Any], object] = lambda model: model.register_parameter(  # noqa: E731
        "spare", torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    )
    assert planted(copied) == {"weights"}
    held, _ = run_arm(setting("elo_pretrain", state="8bit"))
    assert off_the_plan(setting("elo_pretrain"), held) == {"optimizer"}


def test_an_arms_result_has_both_sides_and_only_where_it_counted() -> None:
    made = setting("elo_pretrain")
    held = arithmetic(made)
    peak = sum(held.values()) + 1000
    last = {"peak_allocated_bytes": None, "peak_reserved_bytes": None, "host_peak_bytes": 10 * peak}
    taken = rounds.Taken(last=last | {"evidence": {"held": held}}, tensor_peak_bytes=peak)
    found = arm_memory(made, taken)
    assert found["components"]["peak"] == "tensors" and sum(found["components"]["measured"].values()) == peak
    untraced = arm_memory(made, replace(taken, tensor_peak_bytes=None))["components"]
    assert untraced["peak"] == "resident" and sum(untraced["measured"].values()) == 10 * peak
    assert [*untraced["measured"]] == [*HELD, REST_OF_PROCESS] and [*untraced["predicted"]] == [*HELD, REST]
    for nothing in ({}, last, last | {"evidence": {"held": {}}}):
        assert "components" not in arm_memory(made, rounds.Taken(last=nothing, tensor_peak_bytes=peak))


# -- a run


def test_a_run_keeps_its_memory_by_component_and_shows_it(
    run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Callable[..., tuple[int, str]]
) -> None:
    from elo_engine.model.spec import read_spec

    run_tree["evaluate"] = {"every": 0}
    status, shown = elo("run", write_config(run_tree))
    assert status == 0, shown
    run = Path(run_tree["output"])
    spec = read_spec(json.loads((Path(run_tree["model"]) / "config.json").read_text()))
    stages = json.loads((run / "results.json").read_text())["stages"]
    for stage, learning, absent in (
        ("pretrain", 2 * spec.layer_parameters, 2 * spec.layer_parameters), ("align", spec.parameters, 0)
    ):  # fmt: skip
        kept = stages[stage]["memory"]
        held = {
            "weights": 4 * (spec.parameters - absent), "gradients": 4 * learning, "optimizer": 8 * learning + POWERS,
        }  # fmt: skip
        measured, predicted = kept["components"]["measured"], kept["components"]["predicted"]
        rest = kept["measured_bytes"] - sum(held.values())
        what = REST if torch.cuda.is_available() else REST_OF_PROCESS
        assert measured == held | {what: rest}
        assert sum(predicted.values()) == kept["predicted_bytes"]
        assert [predicted[name] for name in HELD] == [*[held[name] for name in HELD[:2]], 8 * learning]
    report = (run / "report.md").read_text()
    head, _, table = report.partition("| stage | weights | gradients | optimizer | activations and workspaces |")
    assert "Memory by component, predicted / measured" in head and "is resident memory" in head
    rows = [line.split(" | ")[0] for line in table.splitlines()[2:4]]
    assert rows == ["| pretrain", "| align"] and table.count("(1.000)") >= 6
    (entry, _) = memory_of("ELO", stages)
    assert (entry["label"], entry["stage"]) == ("ELO", "pretrain")
    check_result(loss() | {"memory": memory_of("ELO", stages)}, "result.json")


def test_a_stage_that_made_no_step_here_has_no_parts() -> None:
    made = setting("elo_pretrain")
    memory_of_stage = StageMemory(predict_memory(made), 0, "cpu")
    assert "components" not in memory_of_stage.against(10**6, made, {})
    assert memory_of("full", {"align": {"memory": memory_of_stage.against(10**6)}, "pretrain": {"memory": None}}) == []


# -- records


def give_parts(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every object of a made-up result that has both peaks, which now has parts that add up to them."""
    if result["theme"] == "speedup":
        there = [arm["memory"] for arm in result["arms"].values() if "memory" in arm]
    else:
        there = [point for point in result["points"] if point["measured_bytes"]]
    for place in there:
        peaks = {"predicted": place["predicted_bytes"]}
        peaks["measured"] = place["measured_bytes"] if "measured_bytes" in place else place["tensor_peak_bytes"]
        sides = {side: {name: total // 5 for name in HELD} for side, total in peaks.items()}
        place["components"] = {"peak": "tensors"} | {
            side: parts | {REST: peaks[side] - sum(parts.values())} for side, parts in sides.items()
        }
    return there


@pytest.mark.parametrize("make", [lambda: speedup()[0], memory], ids=["speedup", "memory"])
def test_a_record_without_parts_reads_as_before_and_one_with_them_has_a_table_more(
    make: Callable[[], dict[str, Any]],
) -> None:
    result = make()
    before = tables(result)
    check_result(result, "result.json")
    assert "Memory by component" not in "".join(before)
    places = give_parts(result)
    check_result(result, "result.json")
    now = tables(result)
    (more,) = [block for block in now if block not in before]
    assert [block for block in now if block != more] == before
    assert more.startswith("Memory by component, predicted / measured") and "resident" not in more
    lines = more.splitlines()[2:]
    assert len(lines) == 2 + len(places) and len({line.count("|") for line in lines}) == 1
    for place in places:
        place["components"] = None
    check_result(result, "result.json")
    assert tables(result) == before


def test_the_table_says_what_a_resident_peak_has_in_it() -> None:
    result = loss()
    parts = {"weights": 2**20, "gradients": 2**20, "optimizer": 2**21}
    result["memory"] = [
        {"label": "ELO", "stage": "align", "predicted_bytes": 5 * 2**20, "measured_bytes": 3 * 2**20,
         "components": {"predicted": parts | {REST: 2**20}, "measured": parts | {REST_OF_PROCESS: -(2**20)},
                        "peak": "resident"}},
    ]  # fmt: skip
    check_result(result, "result.json")
    said = tables(result)[-1]
    assert "is resident memory" in said and "| ELO | align | 1.0 MiB / 1.0 MiB (1.000) |" in said
    assert "| 1.0 MiB / -1.0 MiB with the process |" in said
    result["memory"][0]["measured_bytes"] += 1
    with pytest.raises(FailedError, match=r"memory\.0\.components: the measured parts add up"):
        check_result(result, "result.json")


TAMPERED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda parts: parts["measured"].update(weights=parts["measured"]["weights"] - 1), "measured parts add up to"),
    (lambda parts: parts["predicted"].update(optimizer=0), "predicted parts add up to"),
    (lambda parts: parts["measured"].pop("gradients"), "measured has the parts"),
    (lambda parts: parts["measured"].update({REST_OF_PROCESS: parts["measured"].pop(REST)}), "measured has the parts"),
    (
        lambda parts: parts["measured"].update(
            {"weights": parts["measured"]["weights"] + 2 * parts["measured"][REST], REST: -parts["measured"][REST]}
        ),
        "less than nothing",
    ),
    (lambda parts: parts.update(peak="allocated"), "they are of allocated bytes"),
    (lambda parts: parts.update(peak="guessed"), "components.peak"),
]


@pytest.mark.parametrize(("change", "said"), TAMPERED, ids=[said for _, said in TAMPERED])
def test_a_tampered_count_is_refused(change: Callable[[dict[str, Any]], object], said: str) -> None:
    for result in (speedup()[0], memory()):
        places = give_parts(result)
        check_result(result, "result.json")
        change(places[1]["components"])
        with pytest.raises(FailedError, match=said):
            check_result(result, "result.json")
