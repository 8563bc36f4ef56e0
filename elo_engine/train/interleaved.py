"""ELO pretraining and alignment in turns (`align.when: interleaved`): one whole model, of which most steps train the
detached layers alone, as the shallow model does, and some, spread evenly, everything.

The two kinds of steps share the detached layers, their masters and their moments, so a whole-model step goes on where
the shallow ones are. Every other weight learns in whole-model steps alone, and has counts of its own for AdamW's bias
correction. Where a bridge stands in for the middle, each whole-model step also shows what the middle does now: the
bridge's statistics are taken from its activations, without another pass, over a window of `detach.bridge_tokens`
tokens, and the bridge is fitted anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elo_engine.config import RunConfig, StageConfig
from elo_engine.data import RowBatch
from elo_engine.measure.components import held_bytes
from elo_engine.model.bridge import Bridge, Collector, Gap, GapStatistics
from elo_engine.model.decoder import Decoder
from elo_engine.train.graphed import GraphedEngine, Graphing
from elo_engine.train.loop import Engine, StepOutcome, Turn
from elo_engine.train.resident import ResidentEngine
from elo_engine.train.schedule import learning_rate
from elo_engine.train.shared_adamw import OneKind, SharedAdamW
from elo_engine.train.step_buffers import Room


class MovingBridge:
    """The bridge of a shallow model, fitted again and again to what the whole model does.

    Args:
        statistics: those that the first bridge was fitted to. window: tokens that the sums weigh at
            most; what was counted earlier fades.
    """

    def __init__(
        self, shallow: Decoder, statistics: Mapping[Gap, GapStatistics], *, ridge: float, window: int
    ) -> None:
        self._shallow, self._ridge, self._window = shallow, ridge, window
        self._statistics = dict(statistics)

    @classmethod
    def of(cls, shallow: Decoder, statistics: Mapping[Gap, GapStatistics], config: RunConfig) -> MovingBridge:
        """As a run is configured."""
        return cls(shallow, statistics, ridge=config.detach.ridge, window=config.detach.bridge_tokens)

    def fresh(self) -> dict[Gap, GapStatistics]:
        """For the states of one whole-model step."""
        device, D = self._shallow.device, self._shallow.spec.D
        return {gap: GapStatistics(D, device) for gap in self._statistics}

    def move(self, seen: Mapping[Gap, GapStatistics]) -> None:
        """Count the states of a completed step, forget as many, and fit."""
        for gap, known in self._statistics.items():
            new = seen[gap]
            known.scale(min(1.0, max(0.0, self._window - new.tokens) / max(known.tokens, 1.0)))
            known.merge(new)
        self._fit()

    def _fit(self) -> None:
        fitted: dict[Gap, Bridge] = {gap: known.fit(self._ridge).bridge for gap, known in self._statistics.items()}
        self._shallow.replace_bridges(fitted)

    def state(self) -> dict[str, Tensor]:
        """For a snapshot; the bridge follows from it."""
        return {
            f"bridge.{gap[0]}.{gap[1]}.{name}": total
            for gap, known in self._statistics.items()
            for name, total in known.state().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises FailedError: it is not there, or of another model."""
        for gap, known in self._statistics.items():
            prefix = f"bridge.{gap[0]}.{gap[1]}."
            known.load({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
        self._fit()


class _Launched(ResidentEngine):
    """Steps that are launched kernel by kernel.

    Args:
        how: of the other kind of steps, where those are graphs. A leaf's gradients are to be added up on one stream,
            the graphs', so these go there too.
    """

    def __init__(self, model: Decoder, optimizer: OneKind, micro_batch: int, how: Graphing | None) -> None:
        super().__init__(model, optimizer, micro_batch)
        self._how = how

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`."""

        def make() -> StepOutcome | None:
            return super(_Launched, self).step(rows, tokens_loss, lr, first=first, should_stop=should_stop)

        return make() if self._how is None else self._how.captures.eager(make)


class _WholeLaunched(_Launched):
    """Whole-model steps that move the bridge."""

    def __init__(
        self, model: Decoder, optimizer: OneKind, micro_batch: int, bridge: MovingBridge | None, how: Graphing | None
    ) -> None:
        super().__init__(model, optimizer, micro_batch, how)
        self._bridge = bridge

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`. A step that is given up, or skipped, leaves the bridge as it was."""
        if self._bridge is None:
            return super().step(rows, tokens_loss, lr, first=first, should_stop=should_stop)
        seen = Collector(self._bridge.fresh())
        self.model.observers = seen.observers
        try:
            outcome = super().step(rows, tokens_loss, lr, first=first, should_stop=should_stop)
        finally:
            self.model.observers = {}
        if outcome is not None and outcome.updated:
            self._bridge.move(seen.statistics)
        return outcome


class _Graphs(GraphedEngine):
    """Steps as graphs, among others of another kind."""

    optimizer: OneKind

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`. A graph drops no gradients before its own, and those of a launched step are large."""
        self.optimizer.zero_grad()
        return super().step(rows, tokens_loss, lr, first=first, should_stop=should_stop)


class _WholeGraphs(_Graphs):
    """Whole-model steps that move the bridge, as graphs: a graph counts the states of its own step, from zero on, in
    sums that lie where all of them find them, and the host does the rest when it has seen that the step was made, as
    after a launched one.
    """

    def __init__(
        self, model: Decoder, optimizer: OneKind, micro_batch: int, bridge: MovingBridge | None, how: Graphing
    ) -> None:
        super().__init__(model, optimizer, micro_batch, how)
        self._bridge = bridge
        # not in the graphs' memory, since they are read when a graph is through
        self._seen = None if bridge is None else Collector(bridge.fresh())

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`. A step that is skipped leaves the bridge as it was."""
        outcome = super().step(rows, tokens_loss, lr, first=first, should_stop=should_stop)
        if self._bridge is not None and self._seen is not None and outcome is not None and outcome.updated:
            self._bridge.move(self._seen.statistics)
        return outcome

    def _make(self, room: Room, *, first: bool = False) -> None:
        if self._seen is None:
            super()._make(room, first=first)
            return
        for sums in self._seen.statistics.values():
            sums.clear()
        self.model.observers = self._seen.observers
        try:
            super()._make(room, first=first)
        finally:
            self.model.observers = {}
            self._seen.drop()


@dataclass(frozen=True)
class Interleaving:
    """Shallow steps with whole-model steps spread evenly among them, the last of all being one; each kind has the rows
    and learning rates that it would have as a stage of its own.
    """

    engines: tuple[Engine, Engine]
    sections: tuple[StageConfig, StageConfig]
    each: tuple[int, int]  # steps
    sequence_length: int

    @classmethod
    def of(cls, shallow: Engine, whole: Engine, config: RunConfig) -> Interleaving:
        """The steps of a run."""
        each = config.steps("pretrain"), config.steps("align")
        return cls((shallow, whole), (config.pretrain, config.align), each, config.data.sequence_length)

    @property
    def steps(self) -> int:
        """See `Turns`."""
        return sum(self.each)

    def turn(self, step: int) -> Turn:
        """See `Turns`."""
        before = step * self.each[1] // self.steps  # whole-model steps
        whole = (step + 1) * self.each[1] // self.steps > before
        number, section = (before if whole else step - before), self.sections[whole]
        rows = [part.tokens_per_step // self.sequence_length for part in self.sections]
        row = number * rows[whole] + (self.each[0] * rows[0] if whole else 0)
        lr = learning_rate(number, self.each[whole], section.optimizer.lr, section.schedule)
        return Turn(self.engines[whole], number, row, rows[whole], lr, "align" if whole else "pretrain")


class InterleavedEngine:
    """Both kinds of steps of one run.

    Args:
        whole: everything learns.
        layers: the detached ones. bridges: what stands in for the others, of the fit to these `statistics`.
        how: shallow and whole-model steps become graphs, with the same `captures`; None: they are launched.
    """

    def __init__(
        self, whole: Decoder, layers: tuple[int, ...], config: RunConfig, *, bridges: Mapping[Gap, Bridge],
        statistics: Mapping[Gap, GapStatistics], how: tuple[Graphing | None, Graphing | None] = (None, None),
    ) -> None:  # fmt: skip
        self.model = whole
        sections: tuple[StageConfig, StageConfig] = (config.pretrain, config.align)
        shallow = whole.shallow(layers, recompute=config.pretrain.runs_again, bridges=bridges)
        moving = MovingBridge.of(shallow, statistics, config) if bridges else None
        configs = sections[0].optimizer, sections[1].optimizer
        self.optimizer = SharedAdamW(whole, shallow, configs, seed=config.seed, bridge=moving)
        kinds = self.optimizer.of("pretrain"), self.optimizer.of("align")
        rows, beside = [section.rows_at_once for section in sections], (how[1], how[0])
        self.shallow: ResidentEngine
        self.whole: ResidentEngine
        if how[0] is None:
            self.shallow = _Launched(shallow, kinds[0], rows[0], beside[0])
        else:
            self.shallow = _Graphs(shallow, kinds[0], rows[0], how[0])
        if how[1] is None:
            self.whole = _WholeLaunched(whole, kinds[1], rows[1], moving, beside[1])
        else:
            self.whole = _WholeGraphs(whole, kinds[1], rows[1], moving, how[1])
        self.turns = Interleaving.of(self.shallow, self.whole, config)

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
        """The whole model."""
        return self.model

    def let_go(self) -> None:
        """Of the memory of steps that are graphs, of both kinds."""
        for engine in (self.shallow, self.whole):
            if isinstance(engine, GraphedEngine):
                engine.let_go()

    def held(self) -> dict[str, int]:
        """Bytes on the device by component, after a step whose gradients are still there."""
        present = [*self.model.trainable().values(), *self.shallow.model.bridge_tensors]
        gradients = dict(self.optimizer.of("align").gradients())
        return held_bytes(present, gradients.values(), self.optimizer, self.device)
