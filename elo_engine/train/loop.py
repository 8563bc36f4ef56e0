"""The only training loop: ELO pretraining, alignment and the full continual pretraining baseline all run through
`train`.

A step is: its rows from the mixture (a pure function of seed and step), forward and backward with the loss divided by
the loss tokens of the whole step (so that k micro-batches of b equal one of k x b), clip, AdamW. How that is done is an
engine's: `train/resident.py` holds the whole model on the device, `stream/` a few of its layers. The loop knows nothing
of files: what it should evaluate, save and show is passed in.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from elo_engine.config import StageConfig
from elo_engine.data import Mixture, RowBatch, RowsAhead
from elo_engine.errors import NonFiniteError
from elo_engine.model.decoder import Batch
from elo_engine.model.layers import Packing
from elo_engine.train.guards import Guards, describe_batch
from elo_engine.train.schedule import learning_rate


@dataclass
class Progress:
    """Where a stage stands; everything a resume needs besides weights and moments."""

    step: int = 0  # optimizer steps completed
    tokens_total: int = 0
    tokens_loss: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite, left out
    skipped_in_a_row: int = 0
    loss_tokens_of: dict[str, int] = field(default_factory=dict)  # of the kinds of steps, where there are several
    spreads: dict[str, list[float]] = field(default_factory=dict)  # of the loss, by kind: `LossSpread`'s state


@dataclass
class Hooks:
    """What happens around the steps; each is called with the progress made so far."""

    on_step: Callable[[Progress, dict[str, Any]], None] = lambda progress, metrics: None
    every: dict[int, list[Callable[[Progress], Any]]] = field(default_factory=dict)  # steps -> callbacks
    should_stop: Callable[[], bool] = lambda: False

    def nothing_after(self, step: int, steps: int) -> bool:
        """Whether the next step follows at once."""
        return step < steps and not self.due(step, steps)

    def due(self, step: int, steps: int) -> list[Callable[[Progress], Any]]:
        """What is to be called when so many of all steps are done; nothing after the last one."""
        return [
            callback
            for interval, callbacks in self.every.items()
            if interval and step % interval == 0 and step < steps
            for callback in callbacks
        ]


def now_on(device: torch.device) -> torch.cuda.Event | None:
    """The moment when a GPU is through with all that was launched before; None elsewhere."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class StepOutcome:
    """One optimizer step in numbers. On a GPU they are on their way when the step is launched; whoever asks for one of
    them waits until the device has come so far.

    Args:
        numbers_3: loss sum, norm, and 1 where the step was made, in fp32 on the device.

    Attributes:
        ended: recorded on a GPU when the device has made the step; None elsewhere.
    """

    def __init__(self, numbers_3: torch.Tensor) -> None:
        self._sent_3, self.ended = numbers_3, None
        self._read: tuple[float, float, bool] | None = None
        if numbers_3.is_cuda:
            self._sent_3 = torch.empty(3, pin_memory=True)  # into pageable memory the copy would wait
            self._sent_3.copy_(numbers_3, non_blocking=True)
            self.ended = now_on(numbers_3.device)

    @property
    def waits(self) -> bool:
        """Whether asking would wait for the device."""
        return self._read is None and self.ended is not None

    def seconds_since(self, begun: torch.cuda.Event | None) -> float | None:
        """From `begun` to the step's end on the device's own clock, waiting for both; None where it has none."""
        if begun is None or self.ended is None:
            return None
        self.ended.synchronize()
        milliseconds: float = begun.elapsed_time(self.ended)
        return milliseconds / 1e3

    def _numbers(self) -> tuple[float, float, bool]:
        if self._read is None:
            if self.ended is not None:
                self.ended.synchronize()
            total, norm, taken = self._sent_3.tolist()
            self._read = total, norm, taken == 1.0
        return self._read

    @property
    def loss_sum(self) -> float:
        """Nats, over the tokens with a label."""
        return self._numbers()[0]

    @property
    def norm(self) -> float:
        """Of all gradients, before clipping."""
        return self._numbers()[1]

    @property
    def updated(self) -> bool:
        """False: the norm was not finite, or the loss, and nothing was changed."""
        return self._numbers()[2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepOutcome) and self._numbers() == other._numbers()

    def __repr__(self) -> str:
        return "StepOutcome(loss_sum={}, norm={}, updated={})".format(*self._numbers())


class Engine(Protocol):
    """Whoever takes a model through one optimizer step."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """Forward, backward and update for the rows of one step, of which `tokens_loss` positions carry a loss. None
        where `should_stop` ended it early: then the model stands as if the step had not begun.

        Raises:
            FailedError: on the `first` step, when gradients are missing, zero, or where none should be.
            NonFiniteError: on the `first` step, when they are not finite.
        """


class StopSignal:
    """SIGINT and SIGTERM turned into a flag that the loop polls between micro-batches."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.received is not None

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        """Handlers in place inside the block and restored after it. A second signal changes nothing: a snapshot is
        atomic, and the step in hand is given up at once.
        """

        def handler(number: int, frame: Any) -> None:
            self.received = self.received or signal.Signals(number)

        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, old in previous.items():
                signal.signal(number, old)


def to_batch(rows: RowBatch, device: torch.device, embedding_VD: torch.Tensor | None = None) -> Batch:
    """Move a micro-batch to the device and flatten it to N = B * T tokens; with an embedding on the host, also its rows
    of these tokens.
    """

    def flat(array_BT: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array_BT).reshape(-1))

    def send(tensor: torch.Tensor) -> torch.Tensor:
        if device.type == "cuda":
            tensor = tensor.pin_memory()  # from pageable memory the copy would wait for the device
        return tensor.to(device, non_blocking=True)

    ids_N = flat(rows.ids_BT)
    packing = Packing([int(start) for start in rows.segment_starts], send(flat(rows.positions_BT)))
    embedded_ND = None if embedding_VD is None else send(F.embedding(ids_N, embedding_VD))
    longest = int(rows.positions_BT.max()) + 1
    return Batch(send(ids_N), send(flat(rows.labels_BT)), packing, longest, embedded_ND)


def micro_batches(rows: RowBatch, micro_batch: int) -> Iterator[RowBatch]:
    """Cut the rows of a step into micro-batches; document bounds are cut at the same rows."""
    total = len(rows.ids_BT)
    for first in range(0, total, micro_batch):
        yield rows.part(first, min(total, first + micro_batch))


@dataclass(frozen=True)
class Turn:
    """An optimizer step to come.

    Attributes:
        kind: "" where all steps of a stage are alike, else which kind this is; number: how many of it were before.
        row, rows: the first one of the mixture, and how many.
    """

    engine: Engine
    number: int
    row: int
    rows: int
    lr: float
    kind: str = ""


class Turns(Protocol):
    """The steps of a stage, a pure function of their number."""

    @property
    def steps(self) -> int:
        """How many."""

    def turn(self, step: int) -> Turn:
        """Step number `step`, from 0."""


@dataclass(frozen=True)
class Straight:
    """One engine, one schedule, row after row from `first_row` on."""

    engine: Engine
    config: StageConfig
    steps: int
    sequence_length: int
    first_row: int = 0

    def turn(self, step: int) -> Turn:
        """See `Turns`."""
        rows = self.config.tokens_per_step // self.sequence_length
        lr = learning_rate(step, self.steps, self.config.optimizer.lr, self.config.schedule)
        return Turn(self.engine, step, self.first_row + step * rows, rows, lr)


def train(
    engine: Engine,
    mixture: Mixture,
    config: StageConfig,
    *,
    steps: int,
    sequence_length: int,
    progress: Progress,
    hooks: Hooks,
    first_row: int = 0,
) -> bool:
    """`train_turns` with one engine. The stage reads the mixture from row `first_row` on, so that a stage after another
    one sees new text.
    """
    return train_turns(Straight(engine, config, steps, sequence_length, first_row), mixture, progress, hooks)


def train_turns(turns: Turns, mixture: Mixture, progress: Progress, hooks: Hooks) -> bool:
    """Run optimizer steps until all are done; True when they are, False when `should_stop` ended it early.

    Stopped early, the model stands exactly at the end of the last completed step. A step's rows are read while the one
    before is made. On a GPU the numbers of a step are read when the next one is launched, so that the device never
    waits for the host; before anything that happens between two steps they are read at once.

    Raises:
        FailedError: gradients missing or wrong on the first step. NonFiniteError: not finite on the first step, or
        `guards.NON_FINITE_LIMIT` times in a row.
    """
    book = _Book(mixture, progress, hooks, turns.steps)
    waiting: _Made | None = None
    with RowsAhead(mixture) as ahead:
        for number in range(progress.step, turns.steps):
            turn, started = turns.turn(number), time.perf_counter()
            begun = now_on(turn.engine.device) if waiting is None else waiting.outcome.ended
            began = started if waiting is None else None
            rows = ahead.rows(turn.row, turn.rows)
            data_s = time.perf_counter() - started
            if number + 1 < turns.steps:
                coming = turns.turn(number + 1)
                ahead.expect(coming.row, coming.rows)
            tokens_loss = rows.tokens_loss
            try:
                outcome = turn.engine.step(
                    rows, tokens_loss, turn.lr, first=turn.number == 0, should_stop=hooks.should_stop
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} ({describe_batch(mixture, turn)})") from None
            if waiting is not None:
                book.enter(waiting)
            waiting = None
            if outcome is None:
                return False
            made = _Made(turn, rows.ids_BT.size, tokens_loss, outcome, began, begun, data_s)
            if outcome.waits and hooks.nothing_after(number + 1, turns.steps):
                waiting = made
            else:
                book.enter(made)
    return True


@dataclass(frozen=True)
class _Made:
    """A step that was launched."""

    turn: Turn
    tokens: int
    tokens_loss: int
    outcome: StepOutcome
    began: float | None  # None: at the end of the step before, whose numbers were still to be read
    begun: torch.cuda.Event | None  # the same on the device's clock
    data_s: float


class _Book:
    """Enters steps into the progress, in order, and does what is due after each."""

    def __init__(self, mixture: Mixture, progress: Progress, hooks: Hooks, steps: int) -> None:
        self._progress, self._hooks, self._steps = progress, hooks, steps
        self._guards = Guards(mixture, progress)
        self._ended = 0.0  # the last step, and all that was due after it

    def enter(self, made: _Made) -> None:
        """Read the step's numbers, waiting for the device if need be."""
        progress, turn, outcome = self._progress, made.turn, made.outcome
        began = self._ended if made.began is None else made.began
        # The device's clock where the numbers are read late: when they are, it may long have been through with the
        # step, and waited for the next one's launches.
        seconds = outcome.seconds_since(made.begun) if outcome.waits else None
        loss_mean = outcome.loss_sum / max(1, made.tokens_loss)
        if seconds is None:
            seconds = time.perf_counter() - began
        ended = began + seconds
        progress.step += 1
        progress.tokens_total += made.tokens
        progress.tokens_loss += made.tokens_loss
        if turn.kind:
            before = progress.loss_tokens_of.get(turn.kind, 0)
            progress.loss_tokens_of[turn.kind] = before + made.tokens_loss
        metrics: dict[str, Any] = {
            "loss_nats": loss_mean,
            "gradient_norm": outcome.norm,
            "lr": turn.lr,
            "step_s": seconds,
            "data_wait_s": made.data_s,
            "tokens_per_s": made.tokens / seconds,
            **self._guards.see(turn, outcome, loss_mean),
        }
        if turn.kind:
            metrics |= {
                "kind": turn.kind, "number": turn.number + 1, "kind_tokens_total": (turn.number + 1) * made.tokens,
                "kind_tokens_loss": progress.loss_tokens_of[turn.kind],
            }  # fmt: skip
        self._hooks.on_step(progress, metrics)
        self._guards.require(turn, outcome, loss_mean)
        due = self._hooks.due(progress.step, self._steps)
        for callback in due:
            callback(progress)
        self._ended = time.perf_counter() if due else ended
