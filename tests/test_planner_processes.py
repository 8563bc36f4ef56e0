"""The memory planner against what one process of two really allocates in a step, on a CPU: gradients of copies of a
model that are summed, and a model that is spread by `fully_shard`. And what `elo plan` and a run make of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import ELO, Forked
from plan_fixture import unmade_run
from planner_process import CASES, GLOO_BYTES, STEPS
from test_distributed import ROOT, environment, port
from test_families_plan import spec_of
from test_planner import MOST

from elo_engine.measure import memory_engine, memory_sharded
from elo_engine.measure.expected import Rate, host_by_part, stage_seconds
from elo_engine.measure.ledger import Ledger
from elo_engine.measure.memory_gradients import Gradients
from elo_engine.measure.memory_sharded import ShardedStep, layer_shapes, units
from elo_engine.measure.planner import predict_memory
from elo_engine.measure.setting import Processes, Setting
from elo_engine.model import names
from elo_engine.model.presets import preset_spec
from elo_engine.train import gradients, world

Elo = Callable[..., tuple[int, str]]
GIB = 1 << 30
SPREAD = next(setting for setting in CASES if setting.sharded and setting.recompute == "none" and setting.width == 4)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, forked: Forked) -> list[dict[str, Any]]:
    """What each of two processes measured."""
    out = tmp_path_factory.mktemp("ranks")
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    program = (ROOT / "tests" / "planner_process.py").read_text(encoding="utf-8")
    done = forked.ranks(2, program, out, port=port(), environment=environment(PYTHONPATH=path))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions for collectives that copy nothing, as those that were measured."""
    monkeypatch.setattr(memory_sharded, "gloo_copy", lambda setting, count: 0)


@pytest.mark.parametrize("number", range(len(STEPS)), ids=[f"{arm} {fields}" for arm, _, fields in STEPS])
def test_predicted_peak_is_the_traced_one(number: int, told: list[dict[str, Any]], in_place: None) -> None:
    plan = predict_memory(CASES[number])
    for one in told:
        measured = one["peaks"][number]
        assert measured <= plan.peak_bytes <= MOST * measured, f"{plan} is {plan.peak_bytes / measured:.4f} of it"


def test_what_gloo_copies_is_a_whole(told: list[dict[str, Any]]) -> None:
    counted = memory_sharded.gloo_copy(SPREAD, GLOO_BYTES)
    for one in told:
        assert all(counted <= found <= counted + 4096 for found in one["copied"]), one["copied"]
    assert memory_sharded.gloo_copy(replace(SPREAD, device="cuda"), GLOO_BYTES) == 0


def undivided_moments(step: ShardedStep) -> None:
    standing(step)
    step.ledger.add("optimizer", 8 * (step.layer.whole - step.layer.share) * step.spec.layers)


def no_prefetch(step: ShardedStep, unit: Any) -> Any:
    here = collect(step, unit)
    if step.ledger.moment.startswith("backward of layer"):
        step.ledger.drop(here)
        return step.ledger.add("weights", 0)
    return here


standing, collect = ShardedStep.standing, ShardedStep.collect


@pytest.mark.parametrize(
    ("name", "planted", "over"),
    [("standing", undivided_moments, True), ("collect", no_prefetch, False), ("share_out", None, True)],
)
def test_a_planted_error_is_seen(
    name: str, planted: Any, over: bool, told: list[dict[str, Any]], in_place: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments that are not divided, the layer below not gathered ahead, gradients that stay whole."""

    def kept_whole(step: ShardedStep, number: int, unit: Any, found: Any) -> None:
        step._summed = step.ledger.add("gradients", 4 * unit.whole)

    monkeypatch.setattr(ShardedStep, name, planted or kept_whole)
    wrong = 0
    for number, setting in enumerate(CASES):
        if setting.sharded:
            measured, peak = told[0]["peaks"][number], predict_memory(setting).peak_bytes
            wrong += peak > MOST * measured if over else peak < measured
    assert wrong


def test_bf16_gradients_that_are_not_widened_would_be_seen(
    told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_they_come(ledger: Ledger, *, widens: bool, copies: bool, at_once: bool) -> Gradients:
        return Gradients(ledger, widens=widens, copies=copies)

    monkeypatch.setattr(memory_engine, "Gradients", as_they_come)
    wrong = [
        setting.arm for number, setting in enumerate(CASES)
        if not setting.sharded and predict_memory(setting).peak_bytes < told[0]["peaks"][number]
    ]  # fmt: skip
    assert {"elo_pretrain", "engine_full"} <= set(wrong)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "phi3", "olmo2"])
def test_shapes_are_those_of_the_model(family: str) -> None:
    spec = spec_of(family)
    held = [(sum(shape[0] for shape in part.shapes), *part.shapes[0][1:], 1)[:2] for part in names.layer_parts(spec)]
    assert sorted(layer_shapes(spec)) == sorted(held)


def spread(count: int, **fields: Any) -> Setting:
    return Setting(
        "elo_align", preset_spec("llama-3.1-8b"), (0, 31), 4096, 1, 8, state="fp32", recompute="layer",
        processes=Processes(count, count), sharded=True, **fields,
    )  # fmt: skip


def test_components_of_the_8b_by_hand() -> None:
    setting = spread(8)
    spec, components = setting.spec, predict_memory(setting).components
    V_D, layer = spec.V * spec.D, spec.layer_parameters
    assert components["optimizer"] == pytest.approx(8 * spec.parameters / 8, rel=5e-3)
    # at the loss: masters, embedding and head gathered, and the last layer as it was collected
    assert components["weights"] == pytest.approx(4 * spec.parameters / 8 + 2 * (2 * V_D + layer), rel=1e-3)
    assert components["gradients"] == pytest.approx(4 * spec.parameters / 8 + 4 * V_D, rel=1e-3)
    unit, around = units(replace(setting, processes=Processes(7, 7)))
    assert unit.whole > layer and unit.whole - layer < 7 * 7 * max(spec.D, spec.F), "rows are padded, no more"
    assert around.whole >= 2 * V_D + spec.D


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_table_of_the_documentation(count: int) -> None:
    lines = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| {count} | sharded |"))
    setting = replace(spread(count), micro_batches=64 // count)
    plans = [predict_memory(replace(setting, recompute=again)) for again in ("none", "layer")]  # type: ignore[arg-type]
    peaks = [f"{plan.peak_bytes / 1e9:.1f}" for plan in plans]
    parts = [f"{plans[0].components[name] / 1e9:.1f}" for name in ("weights", "gradients", "optimizer")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:6] == parts and cells[8:10] == peaks


def test_a_host_is_of_all_its_processes() -> None:
    def parts(count: int, on_host: int, **fields: Any) -> dict[str, int]:
        setting = replace(spread(count, **fields), processes=Processes(count, on_host))
        return host_by_part(setting, predict_memory(setting))

    one, eight = parts(8, 1), parts(8, 8)
    assert eight["reading"] == 8 * one["reading"]
    assert eight["snapshot"] == one["snapshot"] == pytest.approx(12 * 8.03e9, rel=1e-3), "one process collects it"
    one, two = parts(2, 1, device="cpu"), parts(2, 2, device="cpu")
    assert two["steps of other processes"] > 8 * 8.03e9 / 2 and "steps of other processes" not in one


def test_processes_are_counted_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "size", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert world.counted() == Processes(16, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert world.counted() == Processes(16, 8)


def test_time_is_of_the_share_of_a_process() -> None:
    rate = Rate(1e15, 0.4, "planted")
    seconds = [stage_seconds(replace(spread(count), micro_batches=64 // count), 10, rate) for count in (2, 8)]
    assert seconds[0] == 4 * seconds[1]


def test_a_hook_does_not_keep_a_leaf_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    import torch

    monkeypatch.setattr(world, "size", lambda: 2)
    leaf = torch.ones(2, requires_grad=True)
    made = gradients.Gradients([SimpleNamespace(tensor=leaf, names=("a",))])  # type: ignore[list-item]
    there = weakref.ref(leaf)
    del made, leaf
    gc.collect()
    assert there() is None


# -- elo plan


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return unmade_run(
        tmp_path, "pretrain: {micro_batch: 4}\nalign: {recompute: auto, tokens_per_step: 65536}\n"
    )


def test_plan_of_several_processes(config: Path, elo: Elo) -> None:
    def planned(count: int, *more: str) -> dict[str, Any]:
        shapes = ("--shapes", "llama-3.1-8b", "--gpu", "80GB", "--processes", count)
        status, shown = elo("plan", config, *shapes, *more, "--json")
        found, _ = json.JSONDecoder().raw_decode(shown)
        return {"status": status, **found}

    one, two, eight = planned(1), planned(2), planned(8)
    assert [found["align"]["engine"]["name"] for found in (one, two, eight)] == ["streamed", "sharded", "sharded"]
    assert two["align"]["fits"] and eight["align"]["memory"]["peak_bytes"] < two["align"]["memory"]["peak_bytes"]
    assert one["pretrain"]["micro_batches"] == 8 * eight["pretrain"]["micro_batches"]
    state = [found["pretrain"]["memory"]["components"]["optimizer"] for found in (one, eight)]
    assert state[0] == state[1], "of pretraining each has all"
    again = [found["chosen"]["align.recompute"]["value"] for found in (one, two, eight)]
    assert again == ["layer", "layer", "none"]
    assert one["pretrain"]["seconds"] is None, "nothing is known of this card but its memory"
    rows = planned(8, "align.micro_batch=auto", "align.tokens_per_step=131072")["chosen"]["align.micro_batch"]
    assert rows["value"] == 2 and "all rows of a step" in rows["why"], "each has two of the sixteen"
    wanted = planned(2, "align.engine=resident")
    assert wanted["status"] == 3 and "align.engine=auto" in wanted["refusals"][0], "the lever is to spread it"
    small = planned(2, "align.graph=on", "device=cuda")
    assert small["status"] == 3 and "align.graph: on, but several processes" in small["refusals"][0]
    status, shown = elo("plan", config, "--shapes", "llama-3.1-8b", "--gpu", "80GB", "--processes", 8)
    assert status == 0 and "8 processes: memory of the device is of one of them" in shown.replace("\n", " ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("align.engine=streamed", "align.engine: streamed is for one process, and there are 3"),
        ("align.when=interleaved", "align.when: interleaved is for one process, and there are 3"),
        ("align.optimizer.state=8bit", "align.optimizer.state: 8bit is for whole leaves"),
        ("data.sequence_length=2048", "pretrain: 128 rows a step do not divide by 3 processes"),
    ],
)
def test_a_plan_refuses_what_the_run_refuses(config: Path, elo: Elo, override: str, message: str) -> None:
    rows = () if "sequence" in override else ("pretrain.tokens_per_step=49152", "align.tokens_per_step=49152")
    command = ("plan", config, *rows, override, "--shapes", "llama-3.1-8b", "--gpu", "80GB")
    status, shown = elo(*command, "--processes", 3)
    assert status == 2 and message in " ".join(shown.split())
    assert elo(*command)[0] == 0


# -- a run


def test_a_process_that_has_too_little_memory_stops_all(
    run_tree: dict[str, Any], write_config: Callable[..., Path], forked: Forked
) -> None:
    planted = (
        "import os; from elo_engine import plan; from elo_engine.measure.machine import Room\n"
        "if os.environ['RANK'] == '1': plan.device_room = lambda device: Room(1 << 20, 'planted')\n"
    )
    done = forked.ranks(2, planted + ELO, "align", write_config(run_tree), port=port(), environment=environment())
    assert done.returncode == 3 and "align does not fit" in done.stderr and "planted" in done.stderr


REFUSING = """
import sys
from pathlib import Path
from elo_engine import plan
from elo_engine.errors import EloError
from elo_engine.train import world
with world.joined("cpu"):
    try:
        plan._refuse_together("planted" if world.rank() == int(sys.argv[2]) else None)
        said = "nothing"
    except EloError as error:
        said = f"{type(error).__name__}: {error}"
    (Path(sys.argv[1]) / f"{world.rank()}.txt").write_text(said)
"""


@pytest.mark.parametrize(
    ("refuses", "expected"),
    [
        (0, ["RefusedError: planted", "Elsewhere: planted"]),
        (1, ["RefusedError: the share of another process", "RefusedError: planted"]),
        (2, ["nothing", "nothing"]),
    ],
)
def test_all_refuse_where_one_does(refuses: int, expected: list[str], tmp_path: Path, forked: Forked) -> None:
    done = forked.ranks(2, REFUSING, tmp_path, refuses, port=port(), environment=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert all(told.startswith(text) for told, text in zip(said, expected, strict=True)), said
