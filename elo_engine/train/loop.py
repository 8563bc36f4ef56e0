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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from elo_engine.config import StageConfig
from elo_engine.data import Mixture, RowBatch
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


class StepOutcome(NamedTuple):
    """One optimizer step as numbers on the host."""

    loss_sum: float  # nats, over the tokens with a label
    norm: float  # of all gradients, before clipping
    updated: bool  # False: the norm was not finite, or the loss, and nothing was changed


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


def to_batch(rows: RowBatch, device: torch.device) -> Batch:
    """Move a micro-batch to the device and flatten it to N = B * T tokens."""

    def move(array_BT: np.ndarray) -> torch.Tensor:
        flat_N = torch.from_numpy(np.ascontiguousarray(array_BT).reshape(-1))
        if device.type == "cuda":
            flat_N = flat_N.pin_memory()  # from pageable memory the copy would wait for the device
        return flat_N.to(device, non_blocking=True)

    packing = Packing([int(start) for start in rows.segment_starts], move(rows.positions_BT))
    return Batch(move(rows.ids_BT), move(rows.labels_BT), packing, int(rows.positions_BT.max()) + 1)


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

    Stopped early, the model stands exactly at the end of the last completed step.

    Raises:
        FailedError: gradients missing or wrong on the first step. NonFiniteError: not finite on the first step, or
        `guards.NON_FINITE_LIMIT` times in a row.
    """
    guards = Guards(mixture, progress)
    while progress.step < turns.steps:
        started = time.perf_counter()
        turn = turns.turn(progress.step)
        rows = mixture.rows(turn.row, turn.rows)
        tokens_loss = int((rows.labels_BT >= 0).sum())
        data_s = time.perf_counter() - started
        try:
            outcome = turn.engine.step(
                rows, tokens_loss, turn.lr, first=turn.number == 0, should_stop=hooks.should_stop
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} ({describe_batch(mixture, turn)})") from None
        if outcome is None:
            return False
        loss_mean = outcome.loss_sum / max(1, tokens_loss)
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.tokens_total += rows.ids_BT.size
        progress.tokens_loss += tokens_loss
        if turn.kind:
            before = progress.loss_tokens_of.get(turn.kind, 0)
            progress.loss_tokens_of[turn.kind] = before + tokens_loss
        metrics: dict[str, Any] = {
            "loss_nats": loss_mean,
            "gradient_norm": outcome.norm,
            "lr": turn.lr,
            "step_s": seconds,
            "data_wait_s": data_s,
            "tokens_per_s": rows.ids_BT.size / seconds,
            **guards.see(turn, outcome, loss_mean),
        }
        if turn.kind:
            metrics |= {
                "kind": turn.kind, "number": turn.number + 1, "kind_tokens_total": (turn.number + 1) * rows.ids_BT.size,
                "kind_tokens_loss": progress.loss_tokens_of[turn.kind],
            }  # fmt: skip
        hooks.on_step(progress, metrics)
        guards.require(turn, outcome, loss_mean)
        for interval, callbacks in hooks.every.items():
            if interval and progress.step % interval == 0 and progress.step < turns.steps:
                for callback in callbacks:
                    callback(progress)
    return True
