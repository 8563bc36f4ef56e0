"""On a GPU: steps that are CUDA graphs against steps that are launched, bit for bit, without waits and allocations, and
how long either takes. `pytest -s tests/test_graphed_cuda.py` prints the times.

Where steps are compared to the bit, nothing in them may be added up in the order of arrival: not the gradient of the
queries, so documents are short, and not rows of the embedding's, so an id occurs at most twice in a micro-batch, whose
two additions to zero commute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import quantiles
from typing import Any

import numpy as np
import pytest
import torch
from rows_fixture import rows_up_to
from torch import Tensor

from elo_engine.config import OptimizerConfig, Recompute
from elo_engine.data import RowBatch
from elo_engine.model import names, ops
from elo_engine.model.decoder import Decoder
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.presets import preset_spec
from elo_engine.train.graphed import EAGER_STEPS, CudaCaptures, GraphedEngine, Graphing
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine
from elo_engine.train.step_buffers import Room

SPEC = replace(preset_spec("smollm2-135m"), D=256, F=512, V=2048, H=4, K=2, E=64, layers=4)
T, ROWS, STEPS = 512, 4, 20
SHORT = 64  # tokens: documents no longer are one block of keys, so nothing is added up in the order of arrival
CASES: dict[str, dict[str, Any]] = {
    "fp32 state": {}, "8-bit state": {"state": "8bit"}, "8-bit state, masters": {"state": "8bit", "master": "32"},
    "one micro-batch": {"micro_batch": ROWS}, "no clipping": {"clip": None}, "recomputed": {"recompute": "layer"},
    "8-bit head": {"fp8": "head"},
    "whole model, tied": {"whole": "tied"}, "whole model, untied": {"whole": "untied"},
    "whole model, one micro-batch": {"whole": "untied", "micro_batch": ROWS, "state": "8bit"},
    "whole model, recomputed": {"whole": "tied", "recompute": "layer", "state": "8bit"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    reason = ops.why_not_padded(torch.bfloat16, SPEC.E, None)
    if reason is not None:
        pytest.skip(reason)


def step_rows(step: int, longest: int) -> RowBatch:
    """Documents of random lengths up to `longest`, so their number is another one each step. With short ones every id
    occurs at most once in the first half of the rows and once in the second.
    """
    shortest = max(1, longest // (2 + step % 3))
    rows = rows_up_to(step, ROWS, T, shortest, longest, vocabulary=SPEC.V, unlabelled=0.1)
    if longest > SHORT:
        return rows
    chance = np.random.default_rng(step)
    halves = [chance.permutation(SPEC.V)[: ROWS // 2 * T].reshape(-1, T) for _ in range(2)]
    ids = np.concatenate(halves)
    return replace(rows, ids_BT=ids, labels_BT=np.where(rows.labels_BT < 0, -100, np.roll(ids, -1, 1)))


def make(
    kind: Callable[..., Any], micro_batch: int = 2, recompute: Recompute = "none", whole: str = "", fp8: Any = "none",
    **optimizer: Any,
) -> ResidentEngine:  # fmt: skip
    """The shallow model of the first layer and the last, or a whole one, tied or untied."""
    spec = replace(SPEC, tied=whole != "untied")
    generator, device = torch.Generator().manual_seed(3), torch.device("cuda")
    tensors = {}
    for name, shape in names.expected_shapes(spec).items():
        weight = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.05, generator=generator)
        tensors[name] = weight.bfloat16().to(device)
    layers = tuple(range(spec.layers)) if whole else (0, spec.layers - 1)
    model = Decoder(spec, tensors, layers, train_outer=bool(whole), recompute=recompute)
    model.use_fp8(fp8)
    made = MasterAdamW(model, OptimizerConfig(weight_decay=0.1, **optimizer), seed=11)
    return kind(model, made, micro_batch)  # type: ignore[no-any-return]


def as_graphs(model: Decoder, optimizer: MasterAdamW, micro_batch: int) -> GraphedEngine:
    return GraphedEngine(model, optimizer, micro_batch, Graphing(CudaCaptures(model.device), print, must=True))


def launched(model: Decoder, optimizer: MasterAdamW, micro_batch: int) -> GraphedEngine:
    """The same padded steps, never captured."""
    engine = as_graphs(model, optimizer, micro_batch)
    engine._eager_left = 10**9
    return engine


def train(engine: ResidentEngine, longest: int, steps: int = STEPS) -> list[Any]:
    """Losses, norms, whether steps were made, and in the end every weight and moment."""
    outcomes = []
    for step in range(steps):
        rows = step_rows(step, longest)
        lr = 1e-3 * (step + 1) / steps
        outcomes.append(engine.step(rows, rows.tokens_loss, lr, first=step == 0, should_stop=lambda: False))
    optimizer: Any = engine.optimizer
    leaves = [leaf.tensor.detach().clone() for leaf in engine.model.leaves]
    numbers = [(o.loss_sum, o.norm, o.updated) for o in outcomes if o is not None]
    return [numbers, *leaves, *(x.clone() for x in (optimizer.weights() | optimizer.moments()).values())]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_graphs_train_as_the_engine_without_them(case: str) -> None:
    """Twenty steps, rooms of different sizes; what is compared repeats itself in two runs without graphs."""
    if "fp8" in CASES[case] and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no 8-bit floats")
    right = train(make(ResidentEngine, **CASES[case]), SHORT)
    assert same(train(make(ResidentEngine, **CASES[case]), SHORT), right), "launched steps differ from run to run"
    engine: Any = make(as_graphs, **CASES[case])
    found = train(engine, SHORT)
    assert engine._graphs, "nothing was captured"
    assert found[0] == right[0], list(zip(found[0], right[0], strict=True))
    assert same(found, right)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


WHOLE = pytest.mark.parametrize("whole", ["", "tied", "untied"], ids=["shallow", "whole, tied", "whole, untied"])


@WHOLE
def test_long_documents_too_where_attention_is_deterministic(whole: str, deterministic: None) -> None:
    """Against the same padded steps, launched: by how many parts the queries' gradient is summed depends on the number
    of documents, so unpadded steps may differ in the last place. Rows of the embedding's gradient are sorted then and
    not added up as they come, so ids may occur as often as they do.
    """
    right = train(make(launched, whole=whole), T)
    assert same(train(make(launched, whole=whole), T), right)
    assert same(train(make(as_graphs, whole=whole), T), right)


@WHOLE
def test_a_graph_waits_for_nothing_and_asks_for_no_memory(whole: str) -> None:
    engine = make(as_graphs, whole=whole)
    batches = [step_rows(step, SHORT) for step in range(EAGER_STEPS + 8)]
    made = [engine.step(b, b.tokens_loss, 1e-3, first=False, should_stop=lambda: False) for b in batches]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        made += [engine.step(b, b.tokens_loss, 1e-3, first=False, should_stop=lambda: False) for b in batches[-3:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert all(outcome is not None and outcome.updated for outcome in made)


@WHOLE
def test_memory_is_given_back_and_the_next_graph_is_the_same(whole: str) -> None:
    engine: Any = make(as_graphs, whole=whole)
    right = train(make(ResidentEngine, whole=whole), SHORT)
    free = torch.cuda.memory_reserved
    outcomes = []
    for step in range(STEPS):
        rows = step_rows(step, SHORT)
        lr = 1e-3 * (step + 1) / STEPS
        outcomes.append(engine.step(rows, rows.tokens_loss, lr, first=step == 0, should_stop=lambda: False))
        if step % 5 == 4:
            torch.cuda.synchronize()
            before = free()
            engine.let_go()
            assert free() < before and not engine._graphs
    assert [(o.loss_sum, o.norm, o.updated) for o in outcomes] == right[0]
    leaves = [leaf.tensor.detach() for leaf in engine.model.leaves]
    assert same(leaves, right[1 : 1 + len(leaves)])


@WHOLE
def test_a_loss_that_is_no_number_changes_nothing(whole: str) -> None:
    engine: Any = make(as_graphs, whole=whole)
    for step in range(EAGER_STEPS + 2):
        rows = step_rows(step, SHORT)
        engine.step(rows, rows.tokens_loss, 1e-3, first=False, should_stop=lambda: False)
    before = {name: tensor.clone() for name, tensor in engine.optimizer.weights().items()}
    labels = rows.labels_BT.copy()
    labels[0, 0] = SPEC.V + 5
    spoilt = RowBatch(rows.ids_BT, labels, rows.positions_BT, rows.segment_starts, rows.languages)
    assert not engine.step(spoilt, rows.tokens_loss, 1e-3, first=False, should_stop=lambda: False).updated
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.optimizer.weights().items())
    assert engine.step(rows, rows.tokens_loss, 1e-3, first=False, should_stop=lambda: False).updated


def test_a_capture_that_waits_fails_and_training_goes_on() -> None:
    """A planted wait: torch refuses it while it captures, and the stream outside is as it was."""
    said: list[str] = []
    outside = torch.cuda.current_stream()

    def waiting(model: Decoder, optimizer: MasterAdamW, micro_batch: int) -> GraphedEngine:
        class Waits(GraphedEngine):
            def _make(self, room: Room, *, first: bool = False) -> None:
                super()._make(room, first=first)
                self._numbers_3.tolist()

        return Waits(model, optimizer, micro_batch, CudaCaptures(model.device), said.append)

    found = train(make(waiting), SHORT, EAGER_STEPS + 3)
    assert len(said) == 1 and "capturing them failed" in said[0]
    assert torch.cuda.current_stream() == outside
    assert same(found, train(make(ResidentEngine), SHORT, EAGER_STEPS + 3))


class Tight(CudaCaptures):
    """A capture finds 4 MiB: enough for what is small, and not for the first of the large tensors."""

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self._stream.device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
        try:
            return super().capture(body, states)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


class Greedy(CudaCaptures):
    """A capture asks for more than there is when all else is done."""

    def capture(self, body: Callable[[], None], states: Sequence[AdamwState]) -> Callable[[], None]:
        def asking() -> None:
            body()
            torch.empty(1 << 45, dtype=torch.uint8, device=self._stream.device)

        return super().capture(asking, states)


@pytest.mark.parametrize("captures", [Tight, Greedy])
@pytest.mark.parametrize("whole", ["", "tied"], ids=["shallow", "whole"])
def test_memory_that_runs_out_while_capturing_is_told_and_training_goes_on(
    whole: str, captures: type[CudaCaptures]
) -> None:
    """With `auto`; with `on` it is the error that it is. The allocator is sound after either: others capture."""
    said: list[str] = []

    def short(model: Decoder, optimizer: MasterAdamW, micro_batch: int, must: bool = False) -> GraphedEngine:
        return GraphedEngine(model, optimizer, micro_batch, Graphing(captures(model.device), said.append, must))

    right = train(make(ResidentEngine, whole=whole), SHORT)
    assert same(train(make(short, whole=whole), SHORT), right)
    assert len(said) == 1 and "capturing them failed" in said[0] and "out of memory" in said[0]
    with pytest.raises(torch.OutOfMemoryError):
        train(make(partial(short, must=True), whole=whole), SHORT)
    assert same(train(make(as_graphs, whole=whole), SHORT), right)


def test_how_long_a_step_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """A model this small waits for launches, so a graph must be faster; the table is for whoever has the card."""
    lines, medians = [], {}
    for name, kind in (("launched", ResidentEngine), ("graphs", as_graphs)):
        engine = make(kind)
        batches = [step_rows(step, SHORT) for step in range(8)]
        took = []
        for step in range(120):
            rows = batches[step % 8]
            torch.cuda.synchronize()
            began = time.perf_counter()
            engine.step(rows, rows.tokens_loss, 1e-3, first=False, should_stop=lambda: False)
            torch.cuda.synchronize()
            took.append(1e3 * (time.perf_counter() - began))
        tenths = quantiles(took[20:], n=10)
        medians[name] = tenths[4]
        lines.append(f"{name}: p50 {tenths[4]:.3f} ms, p90 {tenths[8]:.3f} ms, p90/p50 {tenths[8] / tenths[4]:.2f}")
    with capsys.disabled():
        where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        print(f"\n{where}, {ROWS} x {T} tokens a step:", *lines, sep="\n  ")
    assert medians["graphs"] < medians["launched"], lines
