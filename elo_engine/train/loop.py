"""The only training loop: ELO pretraining, alignment and the full continual pretraining baseline all run through
`train`.

A step is: its rows from the mixture (a pure function of seed and step), forward and backward per micro-batch with the
loss divided by the loss tokens of the whole step (so that k micro-batches of b equal one of k x b), clip, AdamW. The
loop knows nothing of files: what it should evaluate, save and show is passed in.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from elo_engine.config import StageConfig
from elo_engine.data import Mixture, RowBatch
from elo_engine.errors import FailedError
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.layers import Packing
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.schedule import learning_rate

NON_FINITE_LIMIT = 4  # steps in a row that may be skipped before the run stops


@dataclass
class Progress:
    """Where a stage stands; everything a resume needs besides weights and moments."""

    step: int = 0  # optimizer steps completed
    tokens_total: int = 0
    tokens_loss: int = 0
    skipped: int = 0  # steps whose gradient was not finite, left out
    skipped_in_a_row: int = 0


@dataclass
class Hooks:
    """What happens around the steps; each is called with the progress made so far."""

    on_step: Callable[[Progress, dict[str, Any]], None] = lambda progress, metrics: None
    every: dict[int, list[Callable[[Progress], Any]]] = field(default_factory=dict)  # steps -> callbacks
    should_stop: Callable[[], bool] = lambda: False


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
    total, length = rows.ids_BT.shape
    for first in range(0, total, micro_batch):
        last = min(total, first + micro_batch)
        inside = (rows.segment_starts >= first * length) & (rows.segment_starts <= last * length)
        yield RowBatch(
            ids_BT=rows.ids_BT[first:last],
            labels_BT=rows.labels_BT[first:last],
            positions_BT=rows.positions_BT[first:last],
            segment_starts=rows.segment_starts[inside] - first * length,
            languages=rows.languages[first:last],
        )


def check_first_gradients(model: Decoder, optimizer: MasterAdamW) -> None:
    """After the first backward pass: everything that should learn has a finite, non-zero gradient, nothing else has
    one.

    Raises:
        FailedError: naming the first tensor for which this does not hold.
    """
    for name, gradient in optimizer.gradients():
        if gradient is None:
            raise FailedError(f"first step: {name} should learn and got no gradient")
        largest = float(torch.linalg.vector_norm(gradient, torch.inf))  # makes no copy, as abs() would
        if not math.isfinite(largest):
            raise FailedError(
                f"first step: the gradient of {name} is not finite; check the checkpoint and the learning data"
            )
        if largest == 0.0:
            raise FailedError(f"first step: the gradient of {name} is zero everywhere, so it would never learn")
    for name, tensor in model.frozen().items():
        if tensor.grad is not None:
            raise FailedError(f"first step: {name} is frozen and got a gradient")


def train(
    model: Decoder,
    optimizer: MasterAdamW,
    mixture: Mixture,
    config: StageConfig,
    *,
    steps: int,
    sequence_length: int,
    progress: Progress,
    hooks: Hooks,
    first_row: int = 0,
) -> bool:
    """Run optimizer steps until `steps` are done; True when they are, False when `should_stop` ended it early.

    Stopped early, the model stands exactly at the end of the last completed step. The stage reads the mixture from row
    `first_row` on, so that a stage after another one sees new text.

    Raises:
        FailedError: gradients missing or wrong on the first step, or not finite NON_FINITE_LIMIT times in a row.
    """
    rows_per_step = config.tokens_per_step // sequence_length
    while progress.step < steps:
        started = time.perf_counter()
        rows = mixture.rows(first_row + progress.step * rows_per_step, rows_per_step)
        tokens_loss = int((rows.labels_BT >= 0).sum())
        data_s = time.perf_counter() - started
        optimizer.zero_grad()
        loss_sum = torch.zeros((), dtype=torch.float32, device=model.device)
        for piece in micro_batches(rows, config.micro_batch):
            if hooks.should_stop():
                optimizer.zero_grad()
                return False
            loss = model.loss_sum(to_batch(piece, model.device))
            (loss / max(1, tokens_loss)).backward()
            loss_sum += loss.detach()
        if progress.step == 0:
            check_first_gradients(model, optimizer)
        lr = learning_rate(progress.step, steps, config.optimizer.lr, config.schedule)
        result = optimizer.step(lr)
        # the step's only wait for the device
        total, norm, taken = torch.stack((loss_sum, result.norm, result.updated)).tolist()
        loss_mean, updated = total / max(1, tokens_loss), taken == 1.0
        seconds = time.perf_counter() - started
        progress.step += 1
        progress.tokens_total += rows.ids_BT.size
        progress.tokens_loss += tokens_loss
        progress.skipped += not updated
        progress.skipped_in_a_row = 0 if updated else progress.skipped_in_a_row + 1
        metrics = {
            "loss_nats": loss_mean,
            "gradient_norm": norm,
            "lr": lr,
            "step_s": seconds,
            "data_wait_s": data_s,
            "tokens_per_s": rows.ids_BT.size / seconds,
            "updated": updated,
        }
        hooks.on_step(progress, metrics)
        if progress.skipped_in_a_row >= NON_FINITE_LIMIT:
            raise FailedError(
                f"step {progress.step}: the gradient was not finite {NON_FINITE_LIMIT} times in a row (norm "
                f"{norm}); those "
                "steps changed nothing. Start a new run with a lower learning rate or without the text of these steps"
            )
        for interval, callbacks in hooks.every.items():
            if interval and progress.step % interval == 0 and progress.step < steps:
                for callback in callbacks:
                    callback(progress)
    return True
