"""Rows read ahead, and numbers read late: the same training, with fewer waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from elo_engine.config import OptimizerConfig, StageConfig
from elo_engine.data import Mixture, RowBatch, RowsAhead, TokenStore
from elo_engine.errors import FailedError, NonFiniteError
from elo_engine.train import loop
from elo_engine.train.loop import Hooks, Progress, StepOutcome, train
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

from .test_loop import shallow

STEPS = 9


@pytest.fixture
def mixture(shards: dict[str, str]) -> Mixture:
    stores = {name: TokenStore(Path(shards[f"{name}-train"])) for name in ("ja", "en")}
    return Mixture(stores, {"ja": 9, "en": 1}, 32, 1)


def same(one: RowBatch, other: RowBatch) -> bool:
    return np.array_equal(one.ids_BT, other.ids_BT) and np.array_equal(one.segment_starts, other.segment_starts)


def test_rows_are_those_of_the_mixture_expected_or_not(mixture: Mixture) -> None:
    with RowsAhead(mixture) as ahead:
        ahead.expect(8, 4)
        assert same(ahead.rows(8, 4), mixture.rows(8, 4))
        ahead.expect(12, 4)
        assert same(ahead.rows(40, 2), mixture.rows(40, 2))
        assert same(ahead.rows(12, 4), mixture.rows(12, 4))
    assert not any(thread.name.startswith("rows") for thread in threading.enumerate())


def test_an_error_is_raised_by_whoever_asks(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with RowsAhead(mixture) as ahead:
        monkeypatch.setattr(mixture, "_choose", broken)
        ahead.expect(0, 4)
        ahead.expect(4, 4)  # nobody asks for the first
        with pytest.raises(FailedError, match="planted"):
            ahead.rows(4, 4)


def broken(*arguments: Any) -> Any:
    raise FailedError("planted")


def test_a_step_and_the_next_ones_rows_go_on_together(
    tied: Path, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step waits until somebody has read the rows after it, which would never be if it were done in turn."""
    model, plain, read = shallow(tied), mixture.rows, threading.Semaphore(0)

    def rows(first_row: int, count: int) -> RowBatch:
        found = plain(first_row, count)
        read.release()
        return found

    class Waiting(ResidentEngine):
        def step(self, *arguments: Any, **options: Any) -> StepOutcome | None:
            self.made = getattr(self, "made", 0) + 1
            for _ in range(1 + (self.made == 1) - (self.made == STEPS)):  # the first had to be read before it began
                assert read.acquire(timeout=30), "the next rows are not read while a step is made"
            return super().step(*arguments, **options)

    monkeypatch.setattr(mixture, "rows", rows)
    run(Waiting(model, MasterAdamW(model, OptimizerConfig()), 2), mixture, Hooks())


def run(engine: ResidentEngine, mixture: Mixture, hooks: Hooks, progress: Progress | None = None) -> bool:
    section = StageConfig(tokens=STEPS * 128, tokens_per_step=128, micro_batch=2)
    return train(
        engine, mixture, section, steps=STEPS, sequence_length=32, progress=progress or Progress(), hooks=hooks
    )


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Numbers wait until they are asked for, as on a GPU; what is launched and read, in order."""
    order: list[str] = []
    begin, numbers = StepOutcome.__init__, StepOutcome._numbers
    launched = [0]

    def launch(self: StepOutcome, numbers_3: torch.Tensor) -> None:
        begin(self, numbers_3)
        launched[0] += 1
        self.number = launched[0]  # type: ignore[attr-defined]
        order.append(f"launched {self.number}")  # type: ignore[attr-defined]

    def asked(self: StepOutcome) -> tuple[float, float, bool]:
        if self._read is None:
            order.append(f"read {self.number}")  # type: ignore[attr-defined]
        return numbers(self)

    monkeypatch.setattr(StepOutcome, "__init__", launch)
    monkeypatch.setattr(StepOutcome, "_numbers", asked)
    monkeypatch.setattr(StepOutcome, "waits", property(lambda self: self._read is None))
    return order


def followed(tied: Path, mixture: Mixture, stop_at: int = 99) -> tuple[list[Any], dict[str, torch.Tensor], Progress]:
    """What a run told, its weights at the end, and its progress; something is due after every fourth step."""
    model = shallow(tied)
    optimizer = MasterAdamW(model, OptimizerConfig())
    told: list[Any] = []

    def on_step(progress: Progress, metrics: dict[str, Any]) -> None:
        told.append((progress.step, progress.tokens_loss, metrics["loss_nats"], metrics["gradient_norm"]))

    def saved(progress: Progress) -> None:
        first = next(iter(optimizer.weights().values()))
        told.append(("saved", progress.step, float(first.double().sum())))

    progress = Progress()
    hooks = Hooks(on_step=on_step, every={4: [saved]}, should_stop=lambda: len(told) >= stop_at)
    run(ResidentEngine(model, optimizer, 2), mixture, hooks, progress)
    return told, {name: view.clone() for name, view in optimizer.weights().items()}, progress


def test_numbers_read_late_are_the_same_training(tied: Path, mixture: Mixture, request: pytest.FixtureRequest) -> None:
    at_once = followed(tied, mixture)
    order: list[str] = request.getfixturevalue("late")
    later = followed(tied, mixture)
    assert later[0] == at_once[0] and later[2] == at_once[2]
    assert all(torch.equal(later[1][name], at_once[1][name]) for name in at_once[1])
    read = [f"read {number}" for number in range(1, STEPS + 1)]
    assert [one for one in order if one in read] == read
    for number in range(1, STEPS):
        before_the_next = order.index(f"read {number}") < order.index(f"launched {number + 1}")
        assert before_the_next == (number % 4 == 0), f"step {number}: late, unless something is due after it"


def test_stopped_with_numbers_still_to_be_read(tied: Path, mixture: Mixture, late: list[str]) -> None:
    """The step before the one that was given up is entered all the same."""
    told, _, progress = followed(tied, mixture, stop_at=2)
    assert progress.step == 3 and [one[0] for one in told] == [1, 2, 3]  # asked again before the fourth
    assert late[-1] == "read 3"


def test_losses_that_are_not_finite_stop_a_step_later(tied: Path, mixture: Mixture, late: list[str]) -> None:
    model = shallow(tied)
    engine = ResidentEngine(model, MasterAdamW(model, OptimizerConfig()), 2)
    plain: Callable[..., Any] = model.loss_sum
    calls = [0]

    def loss_sum(batch: Any) -> torch.Tensor:
        calls[0] += 1
        loss = plain(batch)
        return loss * float("nan") if calls[0] > 4 else loss  # from the third step on, two micro-batches each

    model.loss_sum = loss_sum  # type: ignore[method-assign]
    progress = Progress()
    with pytest.raises(NonFiniteError, match="4 times in a row"):
        run(engine, mixture, Hooks(), progress)
    assert progress.step == 6 and late[-2:] == ["launched 7", "read 6"]


class Clock:
    """A clock that only what is planted moves: hosts launch, a device makes a step, and events know when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.device_until = 0.0
        monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(loop, "now_on", lambda device: max(self.now, self.device_until))

    def launch(self, launch_s: float, device_s: float) -> StepOutcome:
        clock = self

        class Sent(StepOutcome):
            """Its numbers are there when the device is."""

            ended: Any

            @property
            def waits(self) -> bool:
                return self._read is None

            def seconds_since(self, begun: Any) -> float:
                clock.now = max(clock.now, self.ended)
                return float(self.ended - begun)

            def _numbers(self) -> tuple[float, float, bool]:
                clock.now = max(clock.now, self.ended)
                return StepOutcome(torch.tensor([1.0, 1.0, 1.0]))._numbers()

        # the device begins when it is free and something is launched, and ends a little after the last launch at least
        self.device_until = max(self.device_until, self.now) + device_s
        self.now += launch_s
        self.device_until = max(self.device_until, self.now + min(device_s, 0.01))
        made = Sent(torch.tensor([1.0, 1.0, 1.0]))
        made.ended = self.device_until
        return made


@pytest.mark.parametrize(("launch_s", "device_s"), [(1.0, 0.01), (0.01, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("held_up", [0, 1, 5])
def test_a_step_is_timed_by_what_it_took(
    launch_s: float, device_s: float, held_up: int, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that waits for launches, one that is behind them, and neither: every step took a second, also before and
    after what is due between two, which is nobody's. What holds the host up for three seconds before one is launched,
    as the capture of a graph does, is that step's alone, less what the device had still to do.
    """
    clock = Clock(monkeypatch)
    launched = [0]

    class Launches:
        device = torch.device("cpu")

        def step(self, *args: Any, **named: Any) -> StepOutcome:
            clock.now += 3.0 if launched[0] == held_up > 0 else 0.0
            launched[0] += 1
            return clock.launch(launch_s, device_s)

    def evaluated(progress: Progress) -> None:
        clock.now += 50.0

    told: list[float] = []
    hooks = Hooks(on_step=lambda progress, metrics: told.append(metrics["step_s"]), every={4: [evaluated]})
    run(Launches(), mixture, hooks, Progress())  # type: ignore[arg-type]
    assert len(told) == STEPS
    if held_up:
        assert 2.9 < told.pop(held_up) < 4.05, "of the step that was held up"
    assert max(told) < 1.05 and min(told) > 0.95, told


def test_times_of_steps_add_up_to_the_clocks(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one kind of step reads its numbers itself and the other does not."""
    clock, launched = Clock(monkeypatch), [0]

    class Mixed:
        device = torch.device("cpu")

        def step(self, *args: Any, **named: Any) -> StepOutcome:
            launched[0] += 1
            made = clock.launch(0.1, 1.0 + launched[0] / 10)
            if launched[0] % 3 == 0:
                assert made.updated
                monkeypatch.setattr(type(made), "waits", False)
                clock.now += 0.5
            return made

    told: list[float] = []
    run(Mixed(), mixture, Hooks(lambda progress, metrics: told.append(metrics["step_s"])), Progress())  # type: ignore[arg-type]
    assert min(told) > 1.0 and sum(told) == pytest.approx(clock.now)
