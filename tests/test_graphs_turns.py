"""Whether steps in turns are graphs, of either kind: what is chosen, what is given up, refused and counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elo_engine import graphs
from elo_engine.config import load_config
from elo_engine.errors import RefusedError, UsageError
from elo_engine.levers import stage_setting
from elo_engine.measure.cards import find_card
from elo_engine.measure.machine import Room
from elo_engine.measure.memory_shapes import step_buffer_bytes
from elo_engine.measure.planner import predict_memory, shallow_of, sums_bytes
from elo_engine.measure.setting import Setting, ShallowTurns
from elo_engine.model.bridge import GapStatistics
from elo_engine.plan import Subject, Target, make_plan
from elo_engine.plan_refusals import STAGES, refusals
from elo_engine.plan_text import describe_plan
from elo_engine.train.graphed import Graphing

from .test_graphs import EIGHT, SPEC, Model, config, planned  # noqa: F401 (a fixture)

# ruff: noqa: F811 (fixtures are parameters of their own name)

TURNS = "align.when=interleaved", "align.micro_batch=1", "align.recompute=none"


def card_of(size: int) -> Target:
    return replace(Target.card(find_card("h200")), room=Room(size, "a card between"))


def test_in_turns_the_plan_counts_what_shallow_graphs_keep(config: Path) -> None:
    """Beside a whole-model step there is all that shallow steps computed in."""
    with_graphs, without = (planned(config, "h200", *TURNS, f"pretrain.graph={how}") for how in ("on", "off"))
    for plan, used in ((with_graphs, True), (without, False)):
        assert plan["pretrain"]["graph"]["used"] is used and plan["align"]["engine"]["name"] == "resident"
        assert not plan["refusals"] and not plan["align"]["graph"]["used"]
    kept, one, other = (plan[stage]["memory"]["components"] for plan, stage in (
        (with_graphs, "pretrain"), (with_graphs, "align"), (without, "align")))  # fmt: skip
    for name in ("gradients", "activations", "loss workspace"):
        assert one[name] == other[name] + kept[name] and kept[name] > 0
    assert [one[name] for name in ("weights", "optimizer")] == [other[name] for name in ("weights", "optimizer")]


def test_in_turns_graphs_are_given_up_before_anything_else_is(config: Path) -> None:
    """Where there is no room for what they keep: with `auto`. With `on` it does not fit, and `off` is a lever."""
    needs = [planned(config, "h200", *TURNS, f"pretrain.graph={how}")["align"]["device_bytes"] for how in ("on", "off")]
    between = card_of((needs[0] + needs[1]) // 2)
    for how, engine in (("auto", "auto"), ("auto", "resident"), ("on", "resident")):
        loaded = load_config(config, [*EIGHT, *TURNS, f"pretrain.graph={how}", f"align.engine={engine}"])
        plan = make_plan(loaded, Subject.preset("llama-3.1-8b"), between)
        assert plan["align"]["engine"]["name"] == "resident"
        graph = plan["pretrain"]["graph"]
        if how == "auto":
            assert (graph["used"], graph["why_not"], graph["refusal"]) == (False, graphs.NO_ROOM, None)
            assert not plan["refusals"] and plan["align"]["device_bytes"] == needs[1]
        else:
            assert graph["used"] and plan["align"]["device_bytes"] == needs[0]
            assert len(plan["refusals"]) == 1
            levers = {one["override"]: one["saves_bytes"] for one in plan["align"]["advice"]["levers"]}
            assert levers["pretrain.graph=off"] == needs[0] - needs[1]


def test_in_turns_with_a_streamed_model_there_are_none(config: Path) -> None:
    told = planned(config, "rtx4090", *TURNS, "pretrain.graph=auto")
    assert told["align"]["engine"]["name"] == "streamed" and not told["pretrain"]["graph"]["used"]
    assert told["pretrain"]["graph"]["why_not"] == graphs.BESIDE_STREAMED and not told["refusals"]
    refused = planned(config, "rtx4090", *TURNS, "pretrain.graph=on")
    assert not refusals(refused, "pretrain"), "which no run in turns comes to"
    (text,) = refusals(refused, "align")
    assert refused["refusals"] == [text]
    assert text.startswith("pretrain.graph: on, but a streamed") and "does not fit" in text
    with pytest.raises(UsageError, match=r"pretrain.graph: on, but a streamed.*; set pretrain.graph: off"):
        planned(config, "rtx4090", *TURNS, "pretrain.graph=on", "align.engine=streamed")


def kinds(shallow: str, whole: str) -> tuple[str, ...]:
    return *TURNS, f"pretrain.graph={shallow}", f"align.graph={whole}"


OFF_ON = [(shallow, whole) for shallow in ("off", "on") for whole in ("off", "on")]


@pytest.mark.parametrize("bridge", ["none", "linear"])
def test_graphs_of_both_kinds_have_one_memory(bridge: str, config: Path) -> None:
    """Of one kind alone they keep theirs beside launched steps of the other; together they take no more than launched
    steps do, but for the buffers of both, and the sums of a bridge, which then stay.
    """
    made = {pair: planned(config, "h200", *kinds(*pair), f"detach.bridge={bridge}") for pair in OFF_ON}
    for (shallow, whole), plan in made.items():
        assert plan["pretrain"]["graph"]["used"] is (shallow == "on")
        assert plan["align"]["graph"]["used"] is (whole == "on") and not plan["refusals"]
    need = {pair: plan["align"]["memory"]["peak_bytes"] for pair, plan in made.items()}
    loaded = load_config(config, [*EIGHT, *kinds("on", "on"), f"detach.bridge={bridge}"])
    both = [stage_setting(loaded, stage, SPEC, "cuda", "bf16") for stage in STAGES]
    buffers = sum(step_buffer_bytes(setting) for setting in both)
    assert (sums_bytes(both[1]) > 0) == (bridge == "linear")
    assert 0 < need["on", "on"] - need["off", "off"] <= buffers + 4 * 128 * 15 * SPEC.H * SPEC.E
    assert max(need["off", "off"], need["on", "on"]) < min(need["on", "off"], need["off", "on"])
    for name in ("gradients", "loss workspace"):
        launched = made["off", "off"]
        kept = launched["align"]["memory"]["components"][name] + launched["pretrain"]["memory"]["components"][name]
        assert made["off", "on"]["align"]["memory"]["components"][name] == kept, "beside a launched shallow step"
    assert made["off", "on"]["align"]["memory"]["moment"].startswith("shallow step")


@pytest.mark.parametrize("rows", [1, 16])
def test_a_bridge_is_fitted_beside_what_graphs_hold(rows: int) -> None:
    """Of whole-model steps (1) or of shallow ones (16), whichever is more: launched steps have let go of theirs."""
    turns = ShallowTurns((0, 31), micro_batch=rows, micro_batches=32 // rows, recompute="none", bridges=1, graph=True)
    setting = Setting(
        "elo_align", SPEC, tuple(range(32)), 8192, 1, 32, state="8bit", turns=turns, graph=True, recompute="layer"
    )
    both = predict_memory(setting)
    none = predict_memory(replace(setting, graph=False, turns=replace(turns, graph=False)))
    assert {both.moment.startswith("shallow"), none.moment.startswith("shallow")} == {rows == 16}
    more = step_buffer_bytes(setting) + step_buffer_bytes(shallow_of(setting, turns))
    if rows == 16:  # which whole-model steps count either way
        more += sums_bytes(setting) + 8 * 8 * SPEC.D**2
    found = both.components["activations"] - none.components["activations"]
    sent = 2**21  # a launched step has a micro-batch of the same tokens, and ids, in place of the buffers
    assert more - sent <= found <= more + 4 * 128 * 15 * SPEC.H * SPEC.E


def test_the_sums_of_a_bridge_are_what_is_counted(config: Path) -> None:
    loaded = load_config(config, [*EIGHT, *TURNS, "detach.bridge=linear"])
    setting = stage_setting(loaded, "align", SPEC, "cuda", "bf16")
    assert setting.turns is not None and setting.turns.bridges == 1
    held = sum(total.nbytes for total in GapStatistics(SPEC.D, torch.device("meta")).state().values())
    assert held == pytest.approx(sums_bytes(setting), rel=1e-3)


@pytest.mark.parametrize(
    ("how", "used"),
    [
        (("auto", "auto"), (False, False)), (("off", "auto"), (False, False)), (("auto", "off"), (False, False)),
        (("on", "auto"), (True, True)), (("auto", "on"), (True, True)), (("on", "on"), (True, True)),
    ],
)  # fmt: skip
def test_what_may_go_goes_where_that_helps(how: tuple[str, str], used: tuple[bool, bool], config: Path) -> None:
    """Without those of one kind the others' memory is none for its steps: then nothing is given up, and what does not
    fit is said.
    """
    wanted = ["off" if one == "off" else "on" for one in how]
    needs = [planned(config, "h200", *kinds(*pair))["align"]["device_bytes"] for pair in (wanted, ("off", "off"))]
    between = card_of((needs[0] + needs[1]) // 2)
    loaded = load_config(config, [*EIGHT, *kinds(*how), "align.engine=resident"])
    plan = make_plan(loaded, Subject.preset("llama-3.1-8b"), between)
    assert (plan["pretrain"]["graph"]["used"], plan["align"]["graph"]["used"]) == used
    assert plan["align"]["device_bytes"] == needs[not any(used)] and bool(plan["refusals"]) is any(used)
    for stage, one in zip(("pretrain", "align"), how, strict=True):
        if one == "auto" and not any(used):
            assert plan[stage]["graph"]["why_not"] == graphs.NO_ROOM and plan[stage]["graph"]["refusal"] is None


def test_graphs_of_whole_model_steps_are_a_lever(config: Path) -> None:
    needs = [planned(config, "h200", *kinds("off", how))["align"]["device_bytes"] for how in ("on", "off")]
    loaded = load_config(config, [*EIGHT, *kinds("off", "on"), "align.engine=resident"])
    plan = make_plan(loaded, Subject.preset("llama-3.1-8b"), card_of((needs[0] + needs[1]) // 2))
    assert len(plan["refusals"]) == 1 and plan["align"]["graph"]["used"]
    levers = {one["override"]: one["saves_bytes"] for one in plan["align"]["advice"]["levers"]}
    assert levers["align.graph=off"] == needs[0] - needs[1]


def test_the_plan_says_which_steps_are_graphs(config: Path) -> None:
    lines = "\n".join(describe_plan(planned(config, "h200", *kinds("on", "on"))))
    assert "pretrain's steps are CUDA graphs, fed from 6." in lines
    assert "align's steps are CUDA graphs, fed from 7." in lines
    lines = "\n".join(describe_plan(planned(config, "h200", *kinds("on", "off"))))
    assert "align's steps are launched kernel by kernel: align.graph: off" in lines


@pytest.mark.parametrize("shallow", ["off", "on"])
def test_whole_model_steps_that_must_be_graphs_are_refused_where_the_model_streams(shallow: str, config: Path) -> None:
    refused = planned(config, "rtx4090", *kinds(shallow, "on"))
    assert refused["align"]["engine"]["name"] == "streamed" and not refusals(refused, "pretrain")
    (text,) = refusals(refused, "align")
    assert refused["refusals"] == [text] and text.startswith(f"align.graph: on, but {graphs.LAYER_BY_LAYER}, and the")
    auto = planned(config, "rtx4090", *kinds("auto", "auto"))
    assert not auto["refusals"] and auto["align"]["graph"]["why_not"] == graphs.LAYER_BY_LAYER
    with pytest.raises(UsageError, match=r"align.graph: on, but the streamed engine.*; set align.graph: off"):
        planned(config, "rtx4090", *kinds("off", "on"), "align.engine=streamed")


class InTurns:
    """What a run would make of steps in turns, with this room for graphs of either kind."""

    def __init__(self, config: Path, monkeypatch: pytest.MonkeyPatch, **how: str) -> None:
        self.given, self.said = list[Any](), list[str]()
        self._path, self._monkeypatch = config, monkeypatch
        self._wanted = [f"{stage}.graph={one}" for stage, one in how.items()]

    def load(self, *room: bool) -> tuple[Graphing | None, Graphing | None]:
        from elo_engine import align

        patch = self._monkeypatch.setattr
        patch(align, "InterleavedEngine", lambda *args, how, **rest: self.given.append(how))
        patch(align, "load_full", lambda *args, **rest: (model, None))
        patch(align, "log_model", lambda *args: None)
        patch(graphs, "CudaCaptures", lambda device: SimpleNamespace())
        model: Any = Model()
        model.trainable = model.frozen = dict
        run: Any = SimpleNamespace(
            config=load_config(self._path, [*EIGHT, *TURNS, *self._wanted]), say=self.said.append,
            beating=lambda *rest: None,
        )  # fmt: skip
        source: Any = SimpleNamespace(spec=SPEC, device=Model.device, dtype=Model.dtype, layers=(0, 31))
        setting = SimpleNamespace(turns=SimpleNamespace(graph=room[0]), graph=room[1])
        fitted: Any = SimpleNamespace(bridges={}, statistics={})
        choice: Any = SimpleNamespace(engine="resident", streaming=None, setting=setting)
        align._load(run, source, None, choice, fitted)  # type: ignore[arg-type]
        found: tuple[Graphing | None, Graphing | None] = self.given[-1]
        return found


@pytest.mark.parametrize(("how", "room"), [("auto", True), ("auto", False), ("on", True), ("off", True)])
def test_in_turns_the_engine_follows_the_choice(
    how: str, room: bool, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "why_not_here", lambda model: None)
    for number, stage in enumerate(("pretrain", "align")):
        case = InTurns(config, monkeypatch, **{stage: how})
        found = case.load(room, room)
        assert found[1 - number] is None
        if how == "off" or not room:
            assert found[number] is None and any(graphs.NO_ROOM in text for text in case.said) is not room
        else:
            made = found[number]
            assert made is not None and made.key == f"{stage}.graph" and made.must is (how == "on")
            made.say("so")
            assert len(case.said) == 2 and case.said[1] == f"{stage}: so"


def test_both_kinds_are_captured_by_one(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one stream, in one memory, of which each knows the other's."""
    monkeypatch.setattr(graphs, "why_not_here", lambda model: None)
    case = InTurns(config, monkeypatch, pretrain="auto", align="on")
    shallow, whole = case.load(True, True)
    assert shallow is not None and whole is not None
    assert shallow.captures is whole.captures and shallow.engines is whole.engines
    assert (shallow.must, shallow.key, whole.must, whole.key) == (False, "pretrain.graph", True, "align.graph")
    for one, stage in ((shallow, "pretrain"), (whole, "align")):
        one.say("so")
        assert case.said[-1] == f"{stage}: so"


def test_what_a_machine_lacks_is_refused_for_whole_model_steps_in_turns(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "why_not_here", lambda model: "it lacks something")
    with pytest.raises(RefusedError, match=r"align.graph: on, but it lacks something; set align.graph: off, or auto"):
        InTurns(config, monkeypatch, align="on").load(True, True)
