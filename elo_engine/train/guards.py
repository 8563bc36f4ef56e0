"""What watches over the steps of a stage: numbers that are not finite, and losses far above the usual.

A step whose loss or gradient norm is not finite changes nothing: the engines see to that. Here such steps are counted,
and too many in a row end the run, with the rows and documents they were made of. A loss far above its running mean is
only told: whether it matters is a person's to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elo_engine.errors import NonFiniteError

if TYPE_CHECKING:
    from elo_engine.data import Mixture
    from elo_engine.train.loop import Progress, StepOutcome, Turn

NON_FINITE_LIMIT = 4  # steps in a row that may be skipped before the run stops

# Loss of a step among its neighbours: the mean over a window fades with 1/50 a step, so that it follows the learning.
SPIKE_MEMORY = 50  # steps
SPIKE_AFTER = 20  # steps before anything is called a spike: the first ones fall fast
SPIKE_DEVIATIONS = 6.0
SPIKE_SHARE = 0.02  # of the mean, the least that counts as one deviation: a flat curve's own noise is no spike


@dataclass(frozen=True)
class Spike:
    """A loss far above the running mean; all in nats."""

    loss: float
    mean: float
    deviation: float


class LossSpread:
    """Running mean and variance of a loss, over the last SPIKE_MEMORY steps or so (West 1979, with a fading weight).

    Args:
        state: [losses seen, mean, variance] of an earlier process; () for a new run.
    """

    def __init__(self, state: list[float] | tuple[float, ...] = ()) -> None:
        self.count, self.mean, self.variance = state or (0.0, 0.0, 0.0)

    @property
    def state(self) -> list[float]:
        """What continues it."""
        return [self.count, self.mean, self.variance]

    def see(self, loss: float) -> Spike | None:
        """Count a loss in nats, and say if it is a spike. One that is not finite is left out: it is told elsewhere.

        A spike counts as the highest loss that is none, so that one does not hide the next, and a level that stays
        becomes the usual one.
        """
        if not math.isfinite(loss):
            return None
        deviation = max(math.sqrt(self.variance), SPIKE_SHARE * abs(self.mean))
        limit, found = self.mean + SPIKE_DEVIATIONS * deviation, None
        if self.count >= SPIKE_AFTER and loss > limit:
            found, loss = Spike(loss, self.mean, deviation), limit
        weight = max(1 / SPIKE_MEMORY, 1 / (self.count + 1))
        away = loss - self.mean
        self.count += 1
        self.mean += weight * away
        self.variance = (1 - weight) * (self.variance + weight * away * away)
        return found


def scale_of(loss: Tensor) -> Tensor:
    """What a backward pass of this loss [] begins with: one, or NaN where the loss is not finite, so that the norm of
    the gradient is not either and the step is left out. The host does not wait for the device.
    """
    seen = loss.detach()
    return torch.where(torch.isfinite(seen), torch.ones_like(seen), torch.full_like(seen, torch.nan))


def describe_batch(mixture: Mixture, turn: Turn) -> str:
    """The rows and documents of a step, for an error: the first rows in full, and how many more there are."""
    shown = 4
    origins = mixture.origins(turn.row, turn.rows)
    told = "; ".join(origin.describe() for origin in origins[:shown])
    more = f"; and {len(origins) - shown} rows more" if len(origins) > shown else ""
    return f"seed {mixture.seed}, rows {turn.row} to {turn.row + turn.rows - 1} of the mixture: {told}{more}"


class Guards:
    """Of a stage's steps; what it counts is kept in `Progress`, so that a resumed run goes on counting."""

    def __init__(self, mixture: Mixture, progress: Progress) -> None:
        self._mixture, self._progress = mixture, progress

    def see(self, turn: Turn, outcome: StepOutcome, loss_nats: float) -> dict[str, Any]:
        """Count a step that was made and say what belongs into its metrics. `loss_nats`: a token's, on the mean."""
        progress = self._progress
        spread = LossSpread(progress.spreads.get(turn.kind, ()))
        spike = spread.see(loss_nats) if outcome.updated else None
        progress.spreads[turn.kind] = spread.state
        progress.skipped += not outcome.updated
        progress.skipped_in_a_row = 0 if outcome.updated else progress.skipped_in_a_row + 1
        told: dict[str, Any] = {"updated": outcome.updated, "skipped": progress.skipped, "spike": spike is not None}
        if spike is not None:
            told |= {"usual_loss_nats": spike.mean, "usual_deviation_nats": spike.deviation}
        if not outcome.updated:
            told["batch"] = [origin.to_json() for origin in self._mixture.origins(turn.row, turn.rows)]
        return told

    def require(self, turn: Turn, outcome: StepOutcome, loss_nats: float) -> None:
        """After the step was recorded.

        Raises:
            NonFiniteError: NON_FINITE_LIMIT steps in a row were left out; or a step was made although its loss was not
            finite, which only an engine that updates from the norm alone can do.
        """
        where = f"step {self._progress.step}"
        if outcome.updated and not math.isfinite(loss_nats):
            raise NonFiniteError(
                f"{where}: the loss is {loss_nats} although the gradient's norm is {outcome.norm}, so the step was "
                "made; it is in no snapshot. Continue from the last one with --resume auto after looking at "
                f"this step's text ({describe_batch(self._mixture, turn)})"
            )
        if self._progress.skipped_in_a_row >= NON_FINITE_LIMIT:
            raise NonFiniteError(
                f"{where}: the loss or the gradient was not finite {NON_FINITE_LIMIT} times in a row (loss "
                f"{loss_nats}, norm {outcome.norm}); those steps changed nothing. Start a new run with a lower "
                "learning rate or without the text of these steps, which metrics.jsonl names; the last one is of "
                f"{describe_batch(self._mixture, turn)}"
            )
