"""Interleaved alignment of a model that does not fit on the device: its shallow steps are those of ELO pretraining,
with the detached layers and their optimizer state on the device, its whole-model steps those of a streamed engine.

Between whole-model steps the device has the newest detached layers, and the store everything else. Before such a step
they are put into the store; after it the device takes back what the shallow model is made of: the detached layers,
their state, and embedding, final norm and head. The layers between go on waiting for their updates until the next
whole-model step brings them. So a whole-model step moves, besides what every streamed one does, the detached layers and
their state twice and the vocabulary once. The operations and the order of every sum are those of
`train/interleaved.py`: on a CPU in fp32 a run is the same to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from elo_engine.config import RunConfig
from elo_engine.data import RowBatch
from elo_engine.model.bridge import Bridge, Gap, GapStatistics
from elo_engine.model.decoder import Decoder
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.shallow import shallow_names
from elo_engine.stream.engine import StreamedEngine
from elo_engine.stream.scoring import LayerMajorScorer
from elo_engine.train.interleaved import Interleaving, MovingBridge
from elo_engine.train.loop import StepOutcome
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine
from elo_engine.train.shared_state import SharedState


class Exchange:
    """The detached layers in a store and in a shallow model on the device, one of which is the newer.

    Args:
        whole: its store counts the layers apart. model: of the same layers. optimizer: of the model.
    """

    def __init__(self, whole: WholeTurn, model: Decoder, optimizer: MasterAdamW) -> None:
        self._whole, self._model, self._optimizer = whole, model, optimizer
        store = whole.store
        self._stored = store.state_of(store.apart, store.apart_powers)
        self._parts = [n for n, part in enumerate(store.parts) if part.owner in store.apart or n >= store.layers]

    def put(self) -> None:
        """Device to store."""
        _copy(self._optimizer.state, self._stored)

    def take(self) -> None:
        """Store to device, once the updates of what the shallow model is made of are there."""
        units = self._whole.device_units
        for number in self._parts:
            if number in units.waiting:
                units.bring(number)
        self._whole.lanes.finish()
        _copy(self._stored, self._optimizer.state)
        self.take_outer()

    @torch.no_grad()
    def take_outer(self) -> None:
        """Embedding, final norm and head alone."""
        there = self._whole.trainable()
        for name, tensor in self._model.frozen().items():
            tensor.copy_(there[name])

    def drop_gradients(self) -> None:
        """Of the last shallow step, which a whole-model step has no room for."""
        self._optimizer.zero_grad()


@torch.no_grad()
def _copy(source: AdamwState, target: AdamwState) -> None:
    """Weights, masters, moments and counts."""
    for there, here in zip(_tensors(source), _tensors(target), strict=True):
        here.copy_(there)


def _tensors(state: AdamwState) -> list[Tensor]:
    scales = [] if state.scales is None else [*state.scales[0], *state.scales[1]]
    copies = [*(state.leaves or []), *(state.lows or [])]
    return [*state.weights, *copies, *state.exp_avgs, *state.exp_avg_sqs, *scales, state.powers]


class WholeTurn(StreamedEngine):
    """Whole-model steps whose detached layers come from the device and go back there; `pair` comes first."""

    def pair(self, model: Decoder, optimizer: MasterAdamW, bridge: MovingBridge | None) -> Exchange:
        """With the shallow model, its optimizer and what moves its bridge."""
        self._detached, self._bridge = optimizer, bridge
        self._exchange = Exchange(self, model, optimizer)
        return self._exchange

    @property
    def attempts(self) -> int:
        """See `StreamedEngine`: the detached layers learn in every step."""
        return self._detached.attempts

    def flush(self) -> None:
        """See `StreamedEngine`; the detached layers come from the device."""
        self._exchange.put()
        super().flush()

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `StreamedEngine`. A step that is given up, or skipped, leaves device and bridge as they were."""
        exchange, bridge = self._exchange, self._bridge
        exchange.drop_gradients()
        exchange.put()
        self.watched = {} if bridge is None else bridge.fresh()
        try:
            outcome = super().step(rows, tokens_loss, lr, first=first, should_stop=should_stop)
            seen = self.watched
        finally:
            self.watched = {}
        if outcome is not None:
            self._detached.attempts += 1
            if outcome.updated:
                exchange.take()
                if bridge is not None:
                    bridge.move(seen)
        return outcome


class _State(SharedState):
    """A snapshot of both places."""

    def __init__(
        self, detached: MasterAdamW, whole: WholeTurn, exchange: Exchange, bridge: MovingBridge | None
    ) -> None:
        super().__init__(detached, whole.optimizer, bridge)
        self._exchange = exchange

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """See `SharedState`."""
        super().load(weights, moments)
        self._exchange.take_outer()


class StreamedInterleaving:
    """Both kinds of steps of one run; see `train.interleaved.InterleavedEngine`.

    Args:
        whole: its store is filled, and counts `layers` apart.
        layers: the detached ones. bridges: what stands in for the others, of the fit to these `statistics`.
    """

    def __init__(
        self, whole: WholeTurn, layers: tuple[int, ...], config: RunConfig, *, bridges: Mapping[Gap, Bridge],
        statistics: Mapping[Gap, GapStatistics],
    ) -> None:  # fmt: skip
        self.whole, spec, store, section = whole, whole.spec, whole.store, config.pretrain
        assert store.apart == layers
        there = {
            name: view
            for unit, views in zip(store.units, store.views, strict=True)
            for leaf in unit.leaves(views["weights"])
            for name, view in leaf.split(leaf.tensor)
        }
        tensors: dict[str, Any] = {n: there[n].to(whole.device, copy=True) for n in shallow_names(spec, layers)}
        again = section.runs_again
        self.model = Decoder(spec, tensors, layers, train_outer=False, recompute=again, bridges=bridges)
        optimizer = MasterAdamW(self.model, section.optimizer, seed=config.seed)
        self._bridge = bridge = MovingBridge.of(self.model, statistics, config) if bridges else None
        self.shallow = ResidentEngine(self.model, optimizer, section.rows_at_once)
        self.optimizer = _State(optimizer, whole, whole.pair(self.model, optimizer, bridge), bridge)
        self.turns = Interleaving.of(self.shallow, whole, config)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.whole.device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.whole.dtype

    @property
    def scorer(self) -> LayerMajorScorer:
        """The whole model, as it is between the steps."""
        return self.whole.scorer

    def held(self) -> dict[str, int]:
        """Bytes on the device by component, after a whole-model step."""
        sums = {} if self._bridge is None else self._bridge.state()
        of_bridge = Counter(optimizer=sum(total.nbytes for total in sums.values()))
        return dict(Counter(self.shallow.held()) + Counter(self.whole.held()) + of_bridge)

    def trainable(self) -> set[str]:
        """Checkpoint names of what learns."""
        return set(self.whole.trainable()) | set(self.model.trainable())
