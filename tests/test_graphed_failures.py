"""Captures that fail: what is told, what is given back, and the training that goes on; on meta tensors, as in
tests/test_graphed.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from elo_engine.errors import FailedError
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.train.graphed import EAGER_STEPS, CudaCaptures

pytest.importorskip("triton")

from .test_graphed import Fake, make_graphed, on_meta, running, step, warm  # noqa: F401 (a fixture)
from .test_no_sync import LLAMA, launched, rows, sent  # noqa: F401 (fixtures)

# ruff: noqa: F811 (fixtures are parameters of their own name)


def test_a_capture_that_fails_is_told_and_the_step_is_made(on_meta: list[int]) -> None:
    fake, said = Fake(fails=RuntimeError("operation not permitted when stream is capturing")), list[str]()
    engine = make_graphed(fake, said, config=LLAMA)
    warm(engine)
    for seed in range(2):
        assert step(engine, rows(30 + seed))
    made = ["capture 0", "let go", "eager", "eager"]
    assert fake.done == ["eager"] * EAGER_STEPS + made, "its memory is given back, and it is not tried again"
    assert len(said) == 1 and "kernel by kernel" in said[0] and "not permitted" in said[0]
    assert engine.optimizer.attempts == EAGER_STEPS + 2


def test_a_capture_that_fails_half_way_holds_nothing_of_the_step(on_meta: list[int]) -> None:
    """When its memory is given back, the sum of the head's gradient is no more there than the others."""
    held: list[Any] = []

    class HalfWay(Fake):
        def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
            assert self.engine is not None
            self.engine.model.observers = {3: lambda hidden: hidden.sum().item()}
            try:
                return super().capture(body, states)
            finally:
                running.clear()
                held.append(self.engine.model._outer)
                self.engine.model.observers = {}

        def let_go(self) -> None:
            assert self.engine is not None
            held.append(self.engine.model._outer)
            held.extend(gradient for _, gradient in self.engine.optimizer.gradients())

    said: list[str] = []
    engine = make_graphed(HalfWay(), said, config=LLAMA, whole=True)
    warm(engine)
    assert step(engine, rows(30)) and "capturing them failed" in said[0]
    assert held[0] is not None and len(held) > 10 and all(one is None for one in held[1:])


def failed_while_ending() -> RuntimeError:
    """What torch raises where an error has invalidated the capture: one of its own, with the first one behind it."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("out of memory")
    return error


@pytest.mark.parametrize("must", [True, False])
def test_what_went_wrong_first_is_told(must: bool, on_meta: list[int]) -> None:
    said = list[str]()
    engine = make_graphed(Fake(fails=failed_while_ending()), said, must=must, config=LLAMA)
    warm(engine)
    if must:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            step(engine, rows(30))
    else:
        assert step(engine, rows(30)) and "failed (out of memory)" in said[0]


def test_a_capture_that_fails_where_it_must_not_is_an_error(on_meta: list[int]) -> None:
    engine = make_graphed(Fake(fails=RuntimeError("no")), must=True, config=LLAMA)
    warm(engine)
    with pytest.raises(FailedError, match=r"pretrain.graph: on, but the step cannot be captured: no; set"):
        step(engine, rows(30))


def test_memory_in_which_a_graph_may_still_compute_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of another kind, launched, finds the last replay under way."""
    done = list[str]()
    for name in ("synchronize", "graph_pool_handle", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: done.append(name))
    captures = CudaCaptures.__new__(CudaCaptures)
    vars(captures)["_stream"] = torch.Stream("cpu")
    captures.let_go()
    assert done == ["synchronize", "graph_pool_handle", "empty_cache"]
