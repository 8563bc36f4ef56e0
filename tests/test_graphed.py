"""A step that is captured: what a CUDA graph would keep depends on no text, no document count and no number of the
host; when it is captured, repeated and given up. Without a card, on meta tensors, as tests/test_no_sync.py has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from planted_graphs import ScaleOfTheHost
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elo_engine.data.rows import RowBatch
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.ops.adamw_given import addresses_noted
from elo_engine.train import graphed
from elo_engine.train.graphed import EAGER_STEPS, GraphedEngine, Graphing
from elo_engine.train.loop import StepOutcome
from elo_engine.train.step_buffers import Room, StepBuffers

pytest.importorskip("triton")

from .test_no_sync import LLAMA, OLMO2, QWEN3, ROWS, T, launched, make, rows, sent  # noqa: F401 (fixtures)

CASES: dict[str, dict[str, Any]] = {
    "pretraining": {"config": LLAMA},
    "with a bridge": {"config": LLAMA, "bridge": True},
    "one micro-batch": {"config": LLAMA, "micro_batch": 4},
    "micro-batches of 3 and 1": {"config": LLAMA, "micro_batch": 3},
    "recomputed": {"config": LLAMA, "recompute": "layer"},
    "8-bit state": {"config": LLAMA, "state": "8bit"},
    "8-bit state, masters": {"config": LLAMA, "state": "8bit", "master": "32"},
    "no clipping": {"config": LLAMA, "clip": None},
    "norms of q and k": {"config": QWEN3},
    "norms behind": {"config": OLMO2},
    "untied head": {"config": LLAMA | {"tie_word_embeddings": False}},
    "8-bit head": {"config": LLAMA, "fp8": "head"},
    "whole model": {"config": LLAMA, "whole": True},
    "whole model, untied": {"config": LLAMA | {"tie_word_embeddings": False}, "whole": True},
    "whole model, one micro-batch": {"config": LLAMA, "whole": True, "micro_batch": 4},
    "whole model, recomputed, 8-bit state": {"config": LLAMA, "whole": True, "recompute": "layer", "state": "8bit"},
}
WHOLE: dict[str, Any] = {"whole": True}


class Trace(TorchDispatchMode):
    """Every operation with all that goes in and comes out: of tensors what a graph keeps of them, type, shape, strides
    and, of those that were there before, which one; of numbers themselves. Tensors of the host are as bad as numbers.
    """

    def __init__(self, there: dict[str, Tensor]) -> None:
        super().__init__()
        self._there = {tensor.untyped_storage()._cdata: name for name, tensor in there.items()}
        self.seen: list[tuple[Any, ...]] = []
        self.of_the_host: list[str] = []

    def describe(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        place = self._there.get(value.untyped_storage()._cdata, "made here"), value.storage_offset()
        return str(value.dtype), tuple(value.shape), value.stride(), place

    def launched(self, name: str, arguments: Any, options: Any) -> None:
        self.seen.append((name, *map(self.describe, arguments), *sorted((k, repr(v)) for k, v in options.items())))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.of_the_host += [str(func) for x in tensors if x.device.type == "cpu"]
        self.seen.append((str(func), *map(self.describe, tree_leaves((args, kwargs, out)))))
        return out


class Fake:
    """In place of CUDA: a capture runs through the body under a trace, as a capture does, which does nothing on meta
    tensors; what is repeated is noted.
    """

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails, self.done = fails, list[str]()
        self.traces: list[Trace] = []
        self.engine: GraphedEngine | None = None

    def eager(self, body: Callable[[], Any]) -> Any:
        self.done.append("eager")
        return body()

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        assert self.engine is not None
        number, engine = sum(text.startswith("capture") for text in self.done), self.engine
        self.done.append(f"capture {number}")
        if self.fails is not None:
            raise self.fails
        buffers = engine._buffers
        assert buffers is not None
        there = {"tokens": buffers._tokens_3N, "numbers": buffers._numbers, "result": engine._numbers_3}
        there |= {f"bounds {documents}": tensor for documents, tensor in buffers._offsets.items()}
        there |= {} if buffers.distinct_U is None else {"distinct ids": buffers.distinct_U}
        there |= {f"weight {i}": tensor for i, tensor in enumerate(w for state in states for w in state.weights)}
        there |= {f"leaf {i}": leaf.tensor for i, leaf in enumerate(engine.model.leaves)}
        there |= {f"frozen {name}": tensor for name, tensor in engine.model.frozen().items()}
        with addresses_noted(states), Trace(there | lasting(states)) as trace:
            running.append(trace)
            body()
            running.pop()
        self.traces.append(trace)
        return lambda: self.done.append(f"replay {number}")

    def let_go(self) -> None:
        self.done.append("let go")


def lasting(states: Sequence[AdamwState]) -> dict[str, Tensor]:
    """What AdamW's launches of a capture read and its graph has to find as it is."""
    found: dict[str, Any] = {}
    for i, state in enumerate(states):
        if state._noted is not None:  # of a step in parts
            found |= {f"table {i}": state._noted.table_SC, f"map {i}": state._noted.plan.map_B2}
            found |= {f"first sums {i}": state._noted.plan.bounds_S1}
        else:
            found |= {f"table {i}": state._plan.table_SC, f"map {i}": state._plan.map_B2}
        found[f"powers {i}"] = state.powers
    return {name: tensor for name, tensor in found.items() if tensor is not None}


running: list[Trace] = []


@pytest.fixture
def on_meta(launched: list[str], sent: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:  # noqa: F811
    """Launches are seen by the trace that runs; numbers that are sent to the host are counted."""
    from triton.runtime.jit import JITFunction

    before = JITFunction.run

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        if running:
            running[-1].launched(self.fn.__name__, arguments, options)

    monkeypatch.setattr(JITFunction, "run", run)
    found: list[int] = []

    class Sent(StepOutcome):
        def __init__(self, numbers_3: Tensor) -> None:
            found.append(numbers_3.numel())
            assert numbers_3.device.type == "meta"

    monkeypatch.setattr(graphed, "StepOutcome", Sent)
    running.clear()
    return found


def make_graphed(
    fake: Fake, said: list[str] | None = None, must: bool = False, kind: type[GraphedEngine] = GraphedEngine,
    **case: Any,
) -> GraphedEngine:  # fmt: skip
    plain = make(**case)
    say = (said if said is not None else []).append
    engine = kind(plain.model, plain.optimizer, plain._micro_batch, Graphing(fake, say, must))  # type: ignore[arg-type]
    fake.engine = engine
    return engine


def step(engine: GraphedEngine, batch: RowBatch, lr: float = 1e-3, *, first: bool = False, stop: bool = False) -> bool:
    made = engine.step(batch, batch.tokens_loss, lr, first=first, should_stop=lambda: stop)
    return made is not None


def warm(engine: GraphedEngine) -> None:
    for seed in range(EAGER_STEPS):
        step(engine, rows(seed, documents=1 + seed))


def captured_anew(engine: GraphedEngine, batch: RowBatch, lr: float) -> None:
    """As if another process had captured at this step."""
    assert engine._graphs is not None
    engine._graphs.clear()
    step(engine, batch, lr)


def few_labels(batch: RowBatch) -> RowBatch:
    """The same rows with fewer tokens that carry a loss."""
    labels = np.where(np.arange(T) % 3 == 0, batch.labels_BT, -100)
    return RowBatch(batch.ids_BT, labels, batch.positions_BT, batch.segment_starts, batch.languages)


def differences(fake: Fake) -> list[tuple[Any, Any]]:
    one, other = (trace.seen for trace in fake.traces)
    return [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]


@pytest.mark.parametrize("case", CASES)
def test_what_is_captured_depends_on_nothing_of_the_step(case: str, on_meta: list[int]) -> None:
    """Two captures, of other text, documents, tokens with a loss, learning rates and keys: the same operations and
    launches with the same numbers, on the same places; and nothing comes from the host or goes there.
    """
    fake = Fake()
    engine = make_graphed(fake, **CASES[case])
    warm(engine)
    captured_anew(engine, rows(10, documents=1), 1e-3)
    captured_anew(engine, few_labels(rows(11, documents=4)), 7e-4)
    assert differences(fake) == []
    trace = fake.traces[0]
    assert trace.of_the_host == []
    assert len(trace.seen) > 100 and sum("_kernel" in seen[0] for seen in trace.seen) > 20
    read = {x[3][0] for seen in trace.seen for x in seen[1:] if isinstance(x, tuple) and len(x) == 4}
    assert {"tokens", "numbers", "bounds 16", "result"} <= read, "the step is fed from the buffers"
    assert ("distinct ids" in read) == ("whole" in CASES[case])
    assert on_meta == [3] * (EAGER_STEPS + 2), "its numbers are sent once a step, outside of the graph"


class RateOfTheHost(GraphedEngine):
    def _make(self, room: Room, *, first: bool = False) -> None:
        self.optimizer.step_given = lambda given: self.optimizer._update(self.lr, 0)  # type: ignore[method-assign]
        super()._make(room, first=first)

    def step(self, rows: RowBatch, tokens_loss: int, lr: float, **rest: Any) -> StepOutcome | None:
        self.lr = lr
        return super().step(rows, tokens_loss, lr, **rest)


class KeyOfTheHost(GraphedEngine):
    def _make(self, room: Room, *, first: bool = False) -> None:
        self.optimizer.step_given = lambda given: self.optimizer._update(1e-3, self.optimizer.attempts)  # type: ignore[method-assign]
        super()._make(room, first=first)


class BoundsOfTheText(StepBuffers):
    def room(self, rows: RowBatch) -> Room:
        return Room(len(rows.segment_starts), T)


class LongestOfTheText(StepBuffers):
    def room(self, rows: RowBatch) -> Room:
        return Room(16, int(rows.positions_BT.max()) + 1)


class TokensOfTheHost(StepBuffers):
    def fill(self, rows: RowBatch, room: Room, given: Tensor, tokens_loss: int) -> None:
        super().fill(rows, room, given, tokens_loss)
        self.inverse = 1 / tokens_loss  # type: ignore[assignment]


class RowsOfTheText(StepBuffers):
    """As a launched step finds them: as many as there are."""

    def fill(self, rows: RowBatch, room: Room, given: Tensor, tokens_loss: int) -> None:
        super().fill(rows, room, given, tokens_loss)
        self.distinct_U = torch.zeros(len(np.unique(rows.ids_BT)), dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    ("kind", "buffers", "case"),
    [
        (RateOfTheHost, StepBuffers, {}), (KeyOfTheHost, StepBuffers, {"state": "8bit"}),
        (GraphedEngine, BoundsOfTheText, {}), (GraphedEngine, LongestOfTheText, {}),
        (GraphedEngine, TokensOfTheHost, {}), (ScaleOfTheHost, StepBuffers, WHOLE),
        (GraphedEngine, RowsOfTheText, WHOLE),
    ],
    ids=["learning rate", "key", "documents", "longest", "tokens with a loss", "scale", "rows of the embedding"],
)  # fmt: skip
def test_a_number_of_the_step_that_is_baked_in_would_be_seen(
    kind: type[GraphedEngine], buffers: type[StepBuffers], case: dict[str, Any], on_meta: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(graphed, "StepBuffers", buffers)
    fake = Fake()
    engine = make_graphed(fake, kind=kind, config=LLAMA, **case)
    warm(engine)
    captured_anew(engine, rows(10, documents=1), 1e-3)
    captured_anew(engine, few_labels(rows(11, documents=4)), 7e-4)
    assert differences(fake) != []


def test_a_table_that_is_sent_in_a_capture_would_be_seen(on_meta: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses of the gradients, whose copy would read memory of the host that is another's by then."""
    from elo_engine.kernels import adamw_plan

    monkeypatch.setattr(adamw_plan, "noting", lambda plan: adamw_plan.AdamwPlan(plan.sizes, plan.map_B2, plan.sums_P))
    fake = Fake()
    engine = make_graphed(fake, config=LLAMA)
    warm(engine)
    step(engine, rows(10))
    assert fake.traces[0].of_the_host != []


@pytest.mark.parametrize("plant", [lambda hidden: hidden.sum().item(), lambda hidden: hidden[hidden > 0]])
def test_a_wait_in_the_step_is_seen(plant: Any, on_meta: list[int]) -> None:
    engine = make_graphed(Fake(), config=LLAMA)
    engine.model.observers = {3: plant}
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(engine, rows(0))


def test_steps_are_eager_then_captured_once_for_each_room(on_meta: list[int]) -> None:
    fake, said = Fake(), list[str]()
    engine = make_graphed(fake, said, config=LLAMA)
    warm(engine)
    for seed, documents in enumerate((1, 3, 9, 1, 12)):  # two rows a micro-batch: 18 and 24 documents are past 16
        assert step(engine, rows(20 + seed, documents=documents))
    eager = ["eager"] * EAGER_STEPS
    assert fake.done == [*eager, "capture 0", "replay 0", "replay 0", "capture 1", "replay 1", "replay 0", "replay 1"]
    assert len(said) == 1 and "CUDA graphs from here on" in said[0] and "up to 16 documents" in said[0]
    assert engine.optimizer.attempts == EAGER_STEPS + 5


def test_an_8_bit_head_is_rounded_before_each_step_and_outside_it(on_meta: list[int]) -> None:
    fake = Fake()
    engine = make_graphed(fake, config=LLAMA, fp8="head")
    plain, rounded = engine.model.round_fp8, list[Any]()

    def noted(step: int) -> None:
        rounded.append((step, len(fake.done)))
        plain(step)

    engine.model.round_fp8 = noted  # type: ignore[method-assign]
    warm(engine)
    step(engine, rows(5))
    step(engine, rows(6))
    # before what was done then: three eager steps, a capture and its launch, a launch
    assert rounded == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 5)] and len(fake.done) == 6


def test_a_first_step_is_eager_whenever_it_comes(on_meta: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are looked at, which a graph's cannot be."""
    looked = list[Any]()
    monkeypatch.setattr(graphed, "check_first_gradients", lambda model, optimizer: looked.append(model))
    fake = Fake()
    engine = make_graphed(fake, config=LLAMA)
    warm(engine)
    step(engine, rows(5), first=True)
    step(engine, rows(6))
    assert fake.done[EAGER_STEPS:] == ["eager", "capture 0", "replay 0"] and looked == [engine.model]


def test_a_stop_is_asked_for_before_a_step_and_changes_nothing(on_meta: list[int]) -> None:
    fake = Fake()
    engine = make_graphed(fake, config=LLAMA)
    warm(engine)
    step(engine, rows(4))
    done, attempts = list(fake.done), engine.optimizer.attempts
    assert not step(engine, rows(5), stop=True)
    assert fake.done == done and engine.optimizer.attempts == attempts and len(on_meta) == EAGER_STEPS + 1


def test_graphs_are_let_go_of_and_captured_anew(on_meta: list[int]) -> None:
    """Before an evaluation: their memory serves nothing else. No eager step is made again, nothing is told twice."""
    fake, said = Fake(), list[str]()
    engine = make_graphed(fake, said, config=LLAMA)
    engine.let_go()  # there is nothing yet
    warm(engine)
    step(engine, rows(30))
    engine.let_go()
    assert all(gradient is None for _, gradient in engine.optimizer.gradients()), "they lie in that memory"
    step(engine, rows(31))
    assert fake.done[EAGER_STEPS:] == ["capture 0", "replay 0", "let go", "capture 1", "replay 1"] and len(said) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_nothing_grows_with_the_steps(whole: bool, on_meta: list[int]) -> None:
    """Buffers are made once for each room, and stay where they are."""
    engine = make_graphed(Fake(), config=LLAMA, whole=whole)
    warm(engine)
    step(engine, rows(9, documents=9))
    buffers = engine._buffers
    assert buffers is not None and (buffers.distinct_U is not None) == whole

    def places() -> set[int]:
        return {id(x) for x in (buffers._tokens_3N, buffers._numbers, buffers.distinct_U, *buffers._offsets.values())}

    before = places()
    for seed in range(4):
        step(engine, rows(seed, documents=1 + 3 * seed))
    assert places() == before
    assert sorted(buffers._offsets) == [16, 32] and buffers.shape == (ROWS, T)
