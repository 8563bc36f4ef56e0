"""Shallow and whole-model steps in turns, both as graphs: that a whole-model step as it is captured depends on nothing
of the step, that nothing which lasts lies in the graphs' memory, and when graphs are made and let go of. On meta
tensors, as in tests/test_graphed.py; that they train as launched steps is in tests/test_graph_tape.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from elo_engine.config import make_config
from elo_engine.data.rows import RowBatch
from elo_engine.errors import FailedError
from elo_engine.measure.memory_shapes import step_buffer_bytes
from elo_engine.measure.planner import predict_memory, shallow_of, sums_bytes
from elo_engine.measure.setting import Setting, ShallowTurns
from elo_engine.model.bridge import Bridge, Collector, GapStatistics
from elo_engine.model.decoder import Decoder
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.reference_adamw import step_key
from elo_engine.model.spec import read_spec
from elo_engine.train import graphed, interleaved
from elo_engine.train.graphed import EAGER_STEPS, Graphing
from elo_engine.train.interleaved import InterleavedEngine
from elo_engine.train.loop import StepOutcome

pytest.importorskip("triton")

from .test_graphed import Fake, Trace, differences, few_labels, on_meta  # noqa: F401 (a fixture)
from .test_no_sync import LLAMA, ROWS, T, _empty, launched, rows, sent  # noqa: F401 (fixtures)

# ruff: noqa: F811 (fixtures are parameters of their own name)

META = torch.device("meta")
GAP = (0, 3)
UNTIED = LLAMA | {"tie_word_embeddings": False}
CASES: dict[str, dict[str, Any]] = {
    "as it is": {}, "no bridge": {"bridge": False}, "8-bit state": {"state": "8bit"},
    "8-bit state, masters": {"state": "8bit", "master": "32"}, "untied head": {"config": UNTIED},
    "one micro-batch, no clipping": {"micro_batch": 4, "clip": None}, "recomputed": {"recompute": "layer"},
}  # fmt: skip


class Turns(Fake):
    """In place of CUDA, for both kinds."""

    both: InterleavedEngine

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        whole: Any = self.both.whole
        self.engine = whole if len(states) == 2 else self.both.shallow
        self.done.append("whole" if len(states) == 2 else "shallow")
        return super().capture(body, states)


class Kinds:
    """An engine, what was done, and what was said and moved."""

    def __init__(
        self, config: dict[str, Any] = LLAMA, micro_batch: int = 2, recompute: str = "none", bridge: bool = True,
        must: tuple[bool, bool] = (False, False), fails: Exception | None = None, **optimizer: Any,
    ) -> None:  # fmt: skip
        stage = {"tokens": 8 * ROWS * T, "tokens_per_step": ROWS * T, "micro_batch": micro_batch}
        stage |= {"recompute": recompute, "optimizer": optimizer}
        run = make_config(
            {
                "model": "x", "output": "y", "data": {"shards": {"ja": "z"}, "sequence_length": T},
                "detach": {"layers": [0, 3], "bridge": "linear", "bridge_tokens": 8 * T},
                "pretrain": stage, "align": stage | {"when": "interleaved"},
            }
        )
        spec = read_spec(config)
        model = Decoder(spec, _empty(spec, torch.bfloat16), (0, 1, 2, 3), train_outer=True, recompute=recompute)  # type: ignore[arg-type]
        bridges, statistics = {}, {}
        if bridge:
            bridges[GAP] = Bridge(torch.empty(spec.D, spec.D, device=META), torch.empty(spec.D, device=META))
            statistics[GAP] = GapStatistics(spec.D, META)
        self.fake, self.said, self.moved = Turns(fails), list[str](), list[Any]()
        shallow = Graphing(self.fake, lambda text: self.said.append(f"shallow: {text}"), must[0])
        whole = shallow.beside(lambda text: self.said.append(f"whole: {text}"), must[1], "align.graph")
        engine: Any = InterleavedEngine(
            model, (0, 3), run, bridges=bridges, statistics=statistics, how=(shallow, whole)
        )
        self.engine = self.fake.both = engine
        if bridge:
            engine.whole._bridge.move = self.moved.append  # which solves equations

    def step(self, kind: str, batch: RowBatch, lr: float = 1e-3) -> None:
        engine = getattr(self.engine, kind)
        assert engine.step(batch, batch.tokens_loss, lr, first=False, should_stop=lambda: False) is not None

    def warm(self, *kinds: str) -> None:
        for kind in kinds:
            for seed in range(EAGER_STEPS):
                self.step(kind, rows(seed, documents=1 + seed))

    def captured_twice(self, kind: str) -> None:
        """As if two processes had captured at different steps."""
        getattr(self.engine, "shallow" if kind == "whole" else "whole")._eager_left = 0
        self.warm(kind)
        for batch, lr in ((rows(10, documents=1), 1e-3), (few_labels(rows(11, documents=4)), 7e-4)):
            getattr(self.engine, kind)._graphs.clear()
            self.step(kind, batch, lr)


@pytest.fixture
def waits(on_meta: list[int], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What is told of steps that are asked whether they were made: asking waits for the device."""
    answers: list[bool] = []

    class Sent(StepOutcome):
        def __init__(self, numbers_3: Tensor) -> None:
            on_meta.append(numbers_3.numel())

        @property
        def updated(self) -> bool:
            answers.append(True)
            return True

    monkeypatch.setattr(graphed, "StepOutcome", Sent)
    return answers


def places(trace: Trace, kernel: str, argument: int) -> list[str]:
    """Where a tensor lies that is given to a kernel, launch by launch."""
    return [seen[1 + argument][3][0] for seen in trace.seen if seen[0] == kernel]


@pytest.mark.parametrize("kind", ["whole", "shallow"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_captured_depends_on_nothing_of_the_step(case: str, kind: str, waits: list[bool]) -> None:
    """Two captures, of other text, documents, labels, rates, keys: the same operations, launches, numbers and places,
    nothing of the host's; and of what AdamW finds by address nothing lies in the graphs' memory.
    """
    if kind == "shallow" and "bridge" in CASES[case]:
        pytest.skip("a step of tests/test_graphed.py")
    made = Kinds(**CASES[case])
    made.captured_twice(kind)
    assert differences(made.fake) == []
    trace = made.fake.traces[0]
    assert trace.of_the_host == [] and len(trace.seen) > 100
    read = {x[3][0] for seen in trace.seen for x in seen[1:] if isinstance(x, tuple) and len(x) == 4}
    assert {"tokens", "numbers", "bounds 16", "result"} <= read and ("distinct ids" in read) == (kind == "whole")
    update = "_update_8bit_kernel" if "state" in CASES[case] else "_update_fp32_kernel"
    groups = ["0", "1"] if kind == "whole" else ["0"]
    for kernel in ("_sum_of_squares_kernel", update):
        for argument, what in enumerate(("table", "map")):
            assert places(trace, kernel, argument) == [f"{what} {group}" for group in groups]
    assert places(trace, "_control_kernel", 1) == [f"powers {group}" for group in groups]
    given = [seen[4][3] for seen in trace.seen if seen[0] in ("_control_kernel", update)]
    assert given == [("numbers", 0)] * len(groups) * 2, "rate, decay and key are the step's own"
    assert len(waits) == len(made.moved) == (EAGER_STEPS + 2 if kind == "whole" and made.moved else 0)


def test_a_step_is_waited_for_only_where_a_bridge_moves(waits: list[bool]) -> None:
    """Once, as after a launched one."""
    for bridge in (True, False):
        made = Kinds(bridge=bridge)
        waits.clear()
        made.warm("shallow", "whole")
        made.step("whole", rows(20))
        assert len(waits) == len(made.moved) == (EAGER_STEPS + 1 if bridge else 0)


def test_the_states_of_the_middle_are_counted_outside_of_the_graphs_memory(waits: list[bool]) -> None:
    """From zero on in each step, where the host reads them, and by nothing but the device."""
    made = Kinds()
    whole: Any = made.engine.whole
    sums = whole._seen.statistics[GAP]
    before, capture = sums.state(), made.fake.capture
    found: list[tuple[str, int]] = []

    class Noting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for name, total in before.items():
                if args and args[0] is total and func._schema.is_mutable:
                    found.append((name, func.__name__))
            return func(*args, **(kwargs or {}))

    def noted(body: Any, states: Any) -> Any:
        with Noting():
            return capture(body, states)

    made.fake.capture = noted  # type: ignore[method-assign]
    made.warm("shallow", "whole")
    made.step("whole", rows(9))
    assert found[: len(before)] == [(name, "zero_.default") for name in before]
    added = [name for name, _ in found[len(before) :]]
    assert sorted(added) == sorted([*before] * 2), "once each a micro-batch"
    after = whole._seen.statistics[GAP].state()
    assert all(after[name] is total for name, total in before.items()) and made.moved[-1][GAP] is sums
    assert made.engine.model.observers == {} and not any(whole._seen._waiting.values())


def rate_of_the_host(made: Kinds) -> None:
    shared, next_given = made.engine.optimizer, made.engine.optimizer.next_given
    rates: list[float] = []
    shared.next_given = lambda lr, whole: (rates.append(lr), next_given(lr, whole=whole))[1]
    shared.step_given = lambda given, whole: shared._update(whole, rates[-1], 0)


def key_of_the_host(made: Kinds) -> None:
    shared = made.engine.optimizer
    shared.step_given = lambda given, whole: shared._update(whole, 1e-3, step_key(1, shared._groups[0].attempts))


def tokens_of_the_host(made: Kinds) -> None:
    """The number of counted states, read while a step is made."""
    whole = made.engine.whole
    observers = whole._seen.observers
    counting = observers[3]
    observers[3] = lambda y_ND: (counting(y_ND), whole._seen.statistics[GAP].tokens)[0]


@pytest.mark.parametrize("plant", [rate_of_the_host, key_of_the_host, tokens_of_the_host])
def test_a_number_of_the_host_would_be_seen(plant: Callable[[Kinds], None], waits: list[bool]) -> None:
    made = Kinds(state="8bit")
    plant(made)
    try:
        made.captured_twice("whole")
    except RuntimeError as error:
        assert plant is tokens_of_the_host and "meta" in str(error)
    else:
        assert plant is not tokens_of_the_host and differences(made.fake) != []


def test_a_table_in_the_graphs_memory_would_be_seen(waits: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    from elo_engine.kernels import adamw_plan

    part_table = adamw_plan.part_table

    def inside(part: Any, *rest: Any) -> Any:
        if isinstance(part, adamw_plan.NotedPart):
            part.table_SC = torch.empty_like(part.table_SC)
        return part_table(part, *rest)

    for name in ("adamw", "adamw_norms"):
        monkeypatch.setattr(__import__(f"elo_engine.kernels.{name}", fromlist=[name]), "part_table", inside)
    made = Kinds()
    made.captured_twice("whole")
    assert places(made.fake.traces[0], "_update_fp32_kernel", 0) == ["made here"] * 2


def test_both_kinds_are_captured_and_let_go_of_together(waits: list[bool]) -> None:
    made = Kinds()
    made.warm("shallow", "whole")
    for kind in ("shallow", "whole", "shallow", "whole"):
        made.step(kind, rows(21))
    done = made.fake.done[2 * EAGER_STEPS :]
    assert done[:6] == ["shallow", "capture 0", "replay 0", "whole", "capture 1", "replay 1"]
    assert done[6:] == ["replay 0", "replay 1"]
    made.engine.let_go()
    assert made.fake.done[-1] == "let go" and made.fake.done.count("let go") == 1, "once for both"
    assert not made.engine.shallow._graphs and not made.engine.whole._graphs
    assert all(gradient is None for _, gradient in made.engine.optimizer.of("align").gradients())
    made.engine.let_go()
    assert made.fake.done.count("let go") == 1, "there was nothing"
    made.step("whole", rows(22))
    assert made.fake.done[-3:] == ["whole", "capture 2", "replay 2"]


def test_nothing_is_captured_that_the_next_launched_step_would_let_go_of(waits: list[bool]) -> None:
    """Three shallow steps to a whole-model one, as in the demo: of each kind one capture, of the thirteenth step on."""
    made = Kinds()
    for _ in range(EAGER_STEPS + 1):
        for kind in ("shallow",) * 3 + ("whole",):
            made.step(kind, rows(20))
    assert made.fake.done[: 4 * EAGER_STEPS] == ["eager"] * 4 * EAGER_STEPS
    replayed = ["shallow", "capture 0", "replay 0", "replay 0", "replay 0", "whole", "capture 1", "replay 1"]
    assert made.fake.done[4 * EAGER_STEPS :] == replayed


def test_steps_of_a_kind_that_are_rare_are_not_waited_for(
    waits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is launched then has the memory of the others' graphs."""
    monkeypatch.setattr(graphed, "AWAITED_STEPS", 2)
    made = Kinds()
    made.warm("shallow")
    for kind in ("shallow", "shallow", "shallow", "whole", "shallow"):
        made.step(kind, rows(21))
    captured = [["shallow", f"capture {number}", f"replay {number}"] for number in range(2)]
    assert made.fake.done[EAGER_STEPS:] == ["eager"] * 2 + [*captured[0], "let go", "eager", *captured[1]]


@pytest.mark.parametrize("must", [False, True])
def test_a_capture_that_fails_ends_graphs_of_both_kinds(must: bool, waits: list[bool]) -> None:
    """Unless those of the other kind must be: they are captured anew after each step that is launched now."""
    made = Kinds(must=(must, False))
    made.warm("whole", "shallow")
    made.step("shallow", rows(20))
    made.fake.fails = RuntimeError("no")
    made.step("whole", rows(21))
    made.fake.fails = None
    assert made.engine.whole._graphs is None and made.engine.shallow._graphs == ({} if must else None)
    failed = "whole: steps are launched kernel by kernel from here on: capturing them failed (no)"
    with_them = "shallow: steps are launched kernel by kernel from here on: capturing those that they take turns with"
    assert failed in made.said and any(text.startswith(with_them) for text in made.said) is not must
    made.fake.done.clear()
    for kind in ("shallow", "whole", "shallow"):
        made.step(kind, rows(22))
    captured = [["shallow", f"capture {number}", f"replay {number}"] for number in range(2)]
    assert made.fake.done == ([*captured[0], "let go", "eager", *captured[1]] if must else ["eager"] * 3)


def test_a_whole_step_that_must_be_a_graph_names_its_key(waits: list[bool]) -> None:
    made = Kinds(must=(False, True), fails=RuntimeError("no"))
    made.warm("shallow", "whole")
    with pytest.raises(FailedError, match=r"align.graph: on, but the step cannot be captured: no; set align.graph:"):
        made.step("whole", rows(20))


def test_a_capture_that_fails_half_way_holds_no_states_of_the_middle(waits: list[bool]) -> None:
    made = Kinds()
    whole: Any = made.engine.whole
    made.warm("shallow", "whole")
    loss, waiting = whole.model.head_loss, list[int]()

    def failing(*args: Any) -> Any:
        waiting.append(len(whole._seen._waiting[GAP]))
        raise RuntimeError("no")

    # after the gap's beginning was seen, and not its end
    middle = whole._seen.observers[3]
    whole._seen.observers[3] = failing
    capture = made.fake.capture

    def once(body: Any, states: Any) -> Any:
        try:
            return capture(body, states)
        finally:
            whole._seen.observers[3] = middle

    made.fake.capture = once  # type: ignore[method-assign]
    made.step("whole", rows(20))
    assert waiting == [1] and not whole._seen._waiting[GAP] and whole.model.observers == {}
    assert any("capturing them failed" in text for text in made.said) and loss == whole.model.head_loss


def test_what_graphs_hold_besides_their_memory_is_what_the_plan_counts(waits: list[bool]) -> None:
    """Buffers of both kinds to the byte; sums of the bridge, but for two numbers a feature that are counted more."""
    made = Kinds(micro_batch=2)
    for kind in ("shallow", "whole"):
        made.warm(kind)
        made.step(kind, rows(20))
    turns = ShallowTurns((0, 3), micro_batch=2, micro_batches=2, recompute="none", bridges=1, graph=True)
    setting = Setting(
        "elo_align", made.engine.model.spec, (0, 1, 2, 3), T, 2, 2, state="fp32", turns=turns, graph=True
    )
    planned = [step_buffer_bytes(shallow_of(setting, turns)), step_buffer_bytes(setting)]
    for engine, counted in zip((made.engine.shallow, made.engine.whole), planned, strict=True):
        buffers = engine._buffers
        held = [buffers._tokens_3N, buffers._numbers, *buffers._offsets.values(), buffers.distinct_U]
        assert sum(tensor.nbytes for tensor in held if tensor is not None) == counted
    sums = made.engine.whole._seen.statistics[GAP].state().values()
    assert 0 <= sums_bytes(setting) - sum(total.nbytes for total in sums) <= 16 * setting.spec.D
    both, none = (predict_memory(replace(setting, graph=on, turns=replace(turns, graph=on))) for on in (True, False))
    more = both.components["activations"] - none.components["activations"]
    assert 0 < more <= sum(planned) + sums_bytes(setting) + 2 * 4 * 128 * 15 * setting.spec.H * setting.spec.E
    for name in ("weights", "gradients", "optimizer", "loss workspace"):
        assert both.components[name] == none.components[name]


def test_it_is_a_collector_of_its_own_that_a_graph_has() -> None:
    """A launched step has new sums each time, a graph its own ones, which no snapshot holds."""
    made = Kinds()
    whole: Any = made.engine.whole
    assert isinstance(whole._seen, Collector) and isinstance(whole, interleaved._WholeGraphs)
    saved = {id(total) for total in whole._bridge.state().values()}
    assert not saved & {id(total) for total in whole._seen.statistics[GAP].state().values()}
