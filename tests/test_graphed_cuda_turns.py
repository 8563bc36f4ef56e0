"""On a GPU: steps in turns that are CUDA graphs, of one kind or of both in one memory, against launched ones, bit for
bit. `pytest -s` prints the times. What is compared to the bit has nothing that is added up in the order of arrival, as
in test_graphed_cuda.py. On a CPU graph_turns.py runs what it can of this, with tapes for graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from turns_cases import NAMED, Case, captures_of, differing, gradients_left, graphs_of

from elo_engine.model import names
from elo_engine.model.spec import ModelSpec
from elo_engine.train.graphed import EAGER_STEPS, CudaCaptures

from . import test_graphed_cuda
from .test_graphed_cuda import SHORT, SPEC, gpu

__all__ = ["gpu"]  # which skips where there is none

DEVICE = torch.device("cuda")
T, MICRO_BATCH = test_graphed_cuda.T, 2
RATES = [1e-3 * (step + 1) / 24 for step in range(24)]  # four launched of either kind, then graphs of several rooms
SPOILT = 15  # a whole-model step
CASES: dict[str, dict[str, Any]] = {
    "fp32 state": {}, "8-bit state": {"state": "8bit"}, "8-bit state, masters": {"state": "8bit", "master": "32"},
    "untied": {"tied": False}, "no bridge": {"bridge": False}, "recomputed": {"recompute": "layer"},
    "one micro-batch": {"micro_batch": test_graphed_cuda.ROWS, "state": "8bit"},
}  # fmt: skip


def captures() -> Any:
    return CudaCaptures(DEVICE)


def step_rows(step: int) -> Any:
    return test_graphed_cuda.step_rows(step, SHORT)


def tensors(spec: ModelSpec) -> dict[str, Tensor]:
    """The same for each engine."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name, shape in names.expected_shapes(spec).items():
        weight = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.05, generator=generator)
        found[name] = weight.bfloat16().to(DEVICE)
    return found


def case_of(
    name: str, say: Callable[[str], None] = print, *, tied: bool = True, bridge: bool = True, recompute: str = "none",
    micro_batch: int = 0, **optimizer: Any,
) -> Case:  # fmt: skip
    """By its name, or with what differs from `fp32 state`."""
    if name:
        return case_of("", say, **CASES[name])
    return Case(
        replace(SPEC, tied=tied), tensors, DEVICE, (0, SPEC.layers - 1), T, micro_batch or MICRO_BATCH, step_rows,
        RATES, SPOILT, captures, {"weight_decay": 0.125, **optimizer}, {"weight_decay": 0.25}, bridge, recompute, say,
    )  # fmt: skip


def synchronize() -> None:
    torch.cuda.synchronize()


def reserved() -> int:
    """Bytes, without what the allocator keeps for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def allocations() -> int:
    torch.cuda.synchronize()
    found: int = torch.cuda.memory_stats()["allocation.all.allocated"]
    return found


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launch(case: Case, engine: Any, step: int) -> Any:
    """A step whose numbers nobody reads."""
    turn, rows = engine.turns.turn(step), case.step_rows(step)
    return turn.engine.step(rows, rows.tokens_loss, case.rates[step], first=False, should_stop=lambda: False)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [*((name, "both") for name in CASES), ("8-bit state", "shallow"), ("8-bit state", "whole"), ("no bridge", "whole")],
)
def test_turns_train_as_launched_ones(name: str, kinds: str) -> None:
    """Every loss, norm, weight, moment and sum of the bridge; a whole-model step is spoilt. What is compared repeats
    itself in two runs without graphs.
    """
    case = case_of(name)
    plain, again = case.engine(), case.engine()
    right = list(case.steps(plain))
    assert [[kind, made] for kind, _, _, made in right] == case.made
    assert list(case.steps(again)) == right and not differing(plain, again), "launched steps differ from run to run"
    engine = case.engine(NAMED[kinds], must=True)
    found = list(case.steps(engine))
    assert found == right, list(zip(found, right, strict=True))
    assert differing(plain, engine) == []
    assert [count > 0 for count in graphs_of(engine)] == list(NAMED[kinds]), "nothing was captured"


def test_memory_is_given_back_and_the_next_graphs_are_the_same() -> None:
    case = case_of("fp32 state")
    plain, engine = case.engine(), case.engine(NAMED["both"], must=True)
    right, found = list(case.steps(plain)), list[Any]()
    for first in range(0, len(RATES), 6):
        found += case.steps(engine, first, min(first + 6, len(RATES)))
        had, before = graphs_of(engine), reserved()
        engine.let_go()
        assert graphs_of(engine) == [0, 0] and (reserved() < before) == any(had)
        assert not any(had) or not gradients_left(engine)
    assert found == right and differing(plain, engine) == []


def test_graphs_in_turns_wait_for_nothing_and_ask_for_no_memory() -> None:
    """Where no bridge asks whether a step was made."""
    case = case_of("no bridge")
    engine = case.engine(NAMED["both"], must=True)
    for _ in range(2):  # then every room has its graph
        for step in range(len(RATES)):
            launch(case, engine, step)
    before, had = allocations(), graphs_of(engine)
    with no_waits():
        made = [launch(case, engine, step) for step in range(len(RATES))]
    assert graphs_of(engine) == had and allocations() == before
    assert all(outcome.updated for outcome in made)


def test_both_kinds_compute_in_one_memory() -> None:
    """What both hold is less than what each holds by itself. How much of the pool one kind cannot use of the other's is
    for the card to say, and printed.
    """
    taken = {}
    for kinds in ("shallow", "whole", "both"):
        case = case_of("fp32 state")
        engine = case.engine(NAMED[kinds], must=True)
        list(case.steps(engine))
        before = reserved()
        engine.let_go()
        taken[kinds] = before - reserved()
        del engine
    print(f"\nmemory of graphs in turns: { {kinds: f'{size / 2**20:.0f} MiB' for kinds, size in taken.items()} }")
    assert taken["both"] < taken["shallow"] + taken["whole"], taken


def test_a_whole_model_step_that_cannot_be_captured_ends_both_and_training_goes_on() -> None:
    """A planted wait, which torch refuses while it captures."""
    said: list[str] = []
    case = case_of("fp32 state", said.append)
    plain, engine = case.engine(), case.engine(NAMED["both"])
    make = engine.whole._make

    def waiting(*args: Any, **rest: Any) -> None:
        make(*args, **rest)
        engine.whole._numbers_3.sum().item()

    engine.whole._make = waiting
    assert list(case.steps(engine)) == list(case.steps(plain)) and differing(plain, engine) == []
    assert engine.shallow._graphs is None and engine.whole._graphs is None
    assert sum("kernel by kernel from here on" in text for text in said) == 2
    other = case.engine(NAMED["both"], must=True)  # the allocator is sound
    list(case.steps(other))
    assert differing(plain, other) == [] and captures_of(other) is not captures_of(engine)


def test_how_long_steps_in_turns_take() -> None:
    """A model this small waits for launches, so graphs must be faster; the table is for whoever has the card."""
    case, lines, medians = case_of("no bridge"), list[str](), dict[tuple[str, bool], float]()
    for name, kinds in (("launched", (False, False)), ("graphs", NAMED["both"])):
        engine, took = case.engine(kinds, must=True), {False: list[float](), True: list[float]()}
        for turn in range(4):
            for step in range(len(RATES)):
                synchronize()
                began = time.perf_counter()
                launch(case, engine, step)
                synchronize()
                if turn and step >= 2 * EAGER_STEPS:
                    took[step % 2 == 1].append(1e3 * (time.perf_counter() - began))
        for whole, each in took.items():
            medians[name, whole] = median(each)
            lines.append(f"{name}, {'whole-model' if whole else 'shallow'} steps: p50 {medians[name, whole]:.3f} ms")
    print("", *lines, sep="\n  ")
    for whole in (False, True):
        assert medians["graphs", whole] < medians["launched", whole], lines
