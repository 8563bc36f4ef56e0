"""A step with the whole model on the device: forward and backward micro-batch by micro-batch, then the update.

Of several processes each has the model and takes its share of the step's rows; gradients are added up over them, and
all make the same update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from elo_engine.data import RowBatch
from elo_engine.errors import FailedError, NonFiniteError
from elo_engine.measure.components import held_bytes
from elo_engine.model.decoder import Decoder
from elo_engine.model.ops.adamw import StepResult
from elo_engine.train import world
from elo_engine.train.guards import scale_of
from elo_engine.train.loop import StepOutcome, micro_batches, to_batch


class Optimizer(Protocol):
    """What an engine asks of `MasterAdamW`, which see."""

    @property
    def attempts(self) -> int:
        """Steps that were begun before."""

    def zero_grad(self) -> None: ...

    def take(self, outer: Iterator[tuple[Tensor, Tensor]]) -> None: ...

    def begin_adding_up(self) -> None:
        """The last micro-batch's backward pass is next; `add_up` may begin in it."""

    def add_up(self) -> None:
        """Gradients become sums over the processes; nothing where there is one."""

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]: ...

    def step(self, lr: float) -> StepResult: ...


class ResidentEngine:
    """A model and its optimizer, as `train` takes them.

    Args:
        micro_batch: rows that go through the model at once.
    """

    def __init__(self, model: Decoder, optimizer: Optimizer, micro_batch: int) -> None:
        self.model, self.optimizer = model, optimizer
        self._micro_batch = micro_batch

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return self.model.dtype

    @property
    def scorer(self) -> Decoder:
        """Whose held-out losses are scored."""
        return self.model

    def held(self) -> dict[str, int]:
        """Bytes on the device by component, after a step whose gradients are still there."""
        weights, gradients = self.model.trainable() | self.model.frozen(), dict(self.optimizer.gradients())
        present = [*weights.values(), *self.model.bridge_tensors, *self.model.fp8_tensors]
        return held_bytes(present, gradients.values(), self.optimizer, self.device)

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`; but for the first step the host does not wait for the device."""
        model, optimizer = self.model, self.optimizer
        optimizer.zero_grad()
        model.round_fp8(optimizer.attempts)
        rows = world.share(rows)
        model.begin_step(torch.from_numpy(rows.ids_BT))
        loss_sum = torch.zeros((), dtype=torch.float32, device=model.device)
        pieces = [*micro_batches(rows, self._micro_batch)]
        for number, piece in enumerate(pieces, 1):
            if should_stop():
                optimizer.zero_grad()
                model.drop_step()
                return None
            loss = model.loss_sum(to_batch(piece, model.device, model.host_embedding_VD))
            if number == len(pieces):
                optimizer.begin_adding_up()
            (loss / max(1, tokens_loss)).backward(scale_of(loss))
            loss_sum += loss.detach()
        optimizer.take(model.outer_gradients(1 / max(1, tokens_loss)))
        optimizer.add_up()
        world.add_up([loss_sum])
        if first:
            check_first_gradients(model, optimizer)
        result = optimizer.step(lr)
        return StepOutcome(torch.stack((loss_sum, result.norm, result.updated)))


def check_first_gradients(model: Decoder, optimizer: Optimizer) -> None:
    """After the first backward pass: everything that should learn has a finite, non-zero gradient, nothing else has
    one.

    Raises:
        FailedError: naming the first tensor for which this does not hold.
    """
    require_gradients(optimizer.gradients())
    for name, tensor in model.frozen().items():
        if tensor.grad is not None:
            raise FailedError(f"first step: {name} is frozen and got a gradient")


def require_gradients(gradients: Iterable[tuple[str, Tensor | None]]) -> None:
    """Every tensor's gradient of the first step, by name: there, finite, and not zero everywhere.

    Raises:
        FailedError, NonFiniteError: naming the first tensor for which this does not hold.
    """
    for name, gradient in gradients:
        if gradient is None:
            raise FailedError(f"first step: {name} should learn and got no gradient")
        largest = float(torch.linalg.vector_norm(gradient, torch.inf))  # makes no copy, as abs() would
        if not math.isfinite(largest):
            raise NonFiniteError(
                f"first step: the gradient of {name} is not finite; check the checkpoint and the learning data"
            )
        if largest == 0.0:
            raise FailedError(f"first step: the gradient of {name} is zero everywhere, so it would never learn")
