"""Whole-model steps among shallow ones, graphs against launched: what `elo bench card` times as one step, as far as it
goes without a card.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from elo_engine.benchmarks import card_table, first_step, graph_turns, in_turns
from elo_engine.benchmarks.models import BenchModel
from elo_engine.errors import FailedError
from elo_engine.measure.setting import Setting
from elo_engine.model import ops
from elo_engine.model.presets import preset_config

from .test_card_parts import CPU, Outcome


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Three shallow steps of three rows, and a whole-model one of one."""
    model = BenchModel("small", preset_config("llama-3.1-8b-mini") | {"num_hidden_layers": 3, "hidden_size": 64})
    for module in (first_step, in_turns):
        monkeypatch.setattr(module, "open_model", lambda name: model)
    return graph_turns.Case("small in turns", "small", 32, 3, 1, in_turns=True).setting(CPU)


def test_steps_in_turns_are_each_kinds_own_and_read_as_in_training(small: Setting) -> None:
    asked: list[tuple[str, int, bool]] = []
    made: list[Outcome] = []

    def kind(name: str) -> Any:
        def step(rows: Any, tokens_loss: int, lr: float, *, first: bool, should_stop: Any) -> Outcome:
            assert all(outcome.read for outcome in made[:-1]) and tokens_loss == rows.ids_BT.size
            assert not made or made[-1].read is (len(made) % 4 == 0), "one step is on its way at most"
            asked.append((name, int(rows.ids_BT[0, 0]), first))
            made.append(Outcome(float(tokens_loss)))
            return made[-1]

        return SimpleNamespace(step=step)

    rows = graph_turns.document_rows(small, 0)
    rows.ids_BT[:] = np.arange(10)[:, None]
    step = in_turns.steps_in_turns(SimpleNamespace(shallow=kind("shallow"), whole=kind("whole")), small)
    first = step(rows, True)
    assert first.updated  # what moves a bridge has read it by then
    second = step(rows, False)
    own = [("shallow", 0), ("shallow", 3), ("shallow", 6), ("whole", 9)]
    assert asked == [(*one, number in (0, 3)) for number, one in enumerate(own)] + [(*one, False) for one in own]
    assert second.loss_sum == 4.0, "a position's of each step"


@pytest.mark.parametrize("late", ["none", "shallow", "whole"])
def test_a_kind_that_reads_another_steps_rows_is_seen(late: str, small: Setting) -> None:
    """Of four steps one is the whole model's, and of ten rows."""
    batches = graph_turns.rows_of_turn(small)

    def engine(late: str) -> graph_turns.Steps:
        given: list[list[int]] = [[0] * 4]

        def step(rows: Any, first: bool) -> Any:
            ends = [0, 3, 6, 9, 10]
            given.append([rows.part(*ends[i : i + 2]).tokens_loss for i in range(4)])
            lags = [late == "shallow"] * 3 + [late == "whole"]
            outcomes = [Outcome(11.3 * given[-1 - lag][i]) for i, lag in enumerate(lags)]
            return in_turns.InTurns(outcomes, [32 * rows for rows in in_turns.rows_each(small)])

        return step

    made = {"launched": engine("none"), "graph": engine(late)}
    if late == "none":
        assert len(graph_turns.take_turns(made, batches, CPU, 0.0)) == 2
    else:
        with pytest.raises(FailedError, match="not the same training"):
            graph_turns.take_turns(made, batches, CPU, 0.0)


def test_engines_in_turns_train_and_move_the_bridge(small: Setting) -> None:
    """Launched, as a CPU has them; two such engines are the same training."""
    ops.configure("auto", CPU)
    engines = [in_turns.engine_in_turns(small, "small", CPU) for _ in range(2)]
    before = [tensor.clone() for tensor in engines[0].shallow.model.bridge_tensors]
    assert len(before) == 2
    made = {name: in_turns.steps_in_turns(one, small) for name, one in zip("ab", engines, strict=True)}
    took = graph_turns.take_turns(made, graph_turns.rows_of_turn(small)[-3:], CPU, 0.0)
    assert [len(seconds) for seconds in took.values()] == [3, 3]
    after = engines[0].shallow.model.bridge_tensors
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert engines[0].optimizer.of("pretrain").attempts == 4 * 3 * (2 + graph_turns.FEWEST_TURNS)
    graphs = graph_turns.with_graphs(small)
    assert graphs.graph and graphs.turns is not None and graphs.turns.graph and not small.graph


def test_a_kind_of_which_nothing_was_captured_fails() -> None:
    one, none = SimpleNamespace(_graphs={1: 1}), SimpleNamespace(_graphs={})
    graph_turns.must_be_captured([one, one])("graph")
    graph_turns.must_be_captured([one, none])("launched")
    with pytest.raises(FailedError, match="of a kind was captured"):
        graph_turns.must_be_captured([one, none])("graph")


def test_every_case_has_its_rows_in_the_table() -> None:
    asked = {one.figure for one in card_table.asked(["graph"], None, "h200")}
    figures = ("launched over graph", "graph, p90/p50", "launched, p90/p50")
    assert asked == {f"{case.name}, {figure}" for case in graph_turns.CASES for figure in figures}
