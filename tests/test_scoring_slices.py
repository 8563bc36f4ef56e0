"""Evaluation between steps whose vocabulary comes in slices: the whole vocabulary's losses, in a slice's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from planner_cases import only_what_is_made_here
from stream_cases import CPU, SPEC, Case, step_rows

from elo_engine.measure.tensor_trace import traced_tensor_bytes
from elo_engine.train.loop import to_batch


@pytest.fixture(scope="module", autouse=True)
def _bounded_search() -> Iterator[None]:
    with only_what_is_made_here():
        yield


def scored(engine: Any, numbers: range, shares: list[float] | None = None) -> torch.Tensor:
    batches = [to_batch(step_rows(number, engine.spec), CPU) for number in numbers]
    return torch.cat(engine.scorer.losses_of(batches, (shares if shares is not None else []).append))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_losses_are_those_of_the_whole_vocabulary(tied: bool) -> None:
    case = Case(replace(SPEC, tied=tied))
    whole, sliced = case.streamed(), case.streamed(vocabulary="sliced")
    for step in range(3):  # updates wait, and are made before the pass
        before: list[float] = []
        mine, theirs = scored(sliced, range(60, 63), before), scored(whole, range(60, 63))
        assert len(sliced.device_units.waiting) == 0 and torch.allclose(mine, theirs, rtol=2e-5, atol=2e-5)
        assert (mine == 0).equal(theirs == 0) and before == sorted(before) and before[-1] == pytest.approx(1, abs=0.02)
        case.steps(whole, step, step + 1), case.steps(sliced, step, step + 1)
    assert not torch.allclose(scored(sliced, range(60, 63)), mine, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_larger_vocabulary_takes_no_more_of_the_device(tied: bool) -> None:
    peaks = []
    for V in (3000, 24_000):
        case = Case(replace(SPEC, V=V, tied=tied))
        engine = case.streamed(vocabulary="sliced")
        case.steps(engine, 0, 1)
        with traced_tensor_bytes() as trace:
            scored(engine, range(60, 62))
        peaks.append(trace.peak_bytes)
    assert peaks[1] < 1.05 * peaks[0], peaks
