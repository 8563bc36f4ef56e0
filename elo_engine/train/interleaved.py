"""ELO pretraining and alignment in turns (`align.when: interleaved`): one whole model, of which most steps train the
detached layers alone, as the shallow model does, and some, spread evenly, everything.

The two kinds of steps share the detached layers, their masters and their moments, so a whole-model step goes on where
the shallow ones are. Every other weight learns in whole-model steps alone, and has counts of its own for AdamW's bias
correction. Where a bridge stands in for the middle, each whole-model step also shows what the middle does now: the
bridge's statistics are taken from its activations, without another pass, over a window of `detach.bridge_tokens`
tokens, and the bridge is fitted anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig, RunConfig, StageConfig
from elo_engine.data import RowBatch
from elo_engine.measure.components import held_bytes
from elo_engine.model.bridge import Bridge, Collector, Gap, GapStatistics
from elo_engine.model.decoder import Decoder
from elo_engine.model.ops.adamw import (
    AdamwState,
    StepResult,
    adamw_step,
    adamw_update,
    given_bits,
    leaf_norms,
    step_numbers,
)
from elo_engine.model.reference_adamw import step_key
from elo_engine.train.gradients import Gradients
from elo_engine.train.graphed import GraphedEngine, Graphing
from elo_engine.train.leaf_state import LeafState
from elo_engine.train.loop import Engine, StepOutcome, Turn
from elo_engine.train.optim import fresh_state
from elo_engine.train.resident import Optimizer, ResidentEngine
from elo_engine.train.schedule import learning_rate
from elo_engine.train.shared_state import SharedState


class _Group(LeafState):
    """Leaves that are updated together."""

    def attempt(self) -> int:
        """One more step, taken or skipped; how many there were before."""
        self.attempts += 1
        return self.attempts - 1


class SharedAdamW(SharedState):
    """AdamW for steps of two kinds; what a snapshot holds is under the names of every other snapshot.

    Args:
        whole, shallow: models of the same tensors.
        configs: of shallow steps and of whole-model steps; equal in what the state is made of.
        bridge: what else a snapshot keeps.
    """

    def __init__(
        self, whole: Decoder, shallow: Decoder, configs: tuple[OptimizerConfig, OptimizerConfig], *, seed: int,
        bridge: MovingBridge | None,
    ) -> None:  # fmt: skip
        inside = {id(leaf.tensor) for leaf in shallow.leaves}
        self._places = (
            [i for i, leaf in enumerate(whole.leaves) if id(leaf.tensor) in inside],
            [i for i, leaf in enumerate(whole.leaves) if id(leaf.tensor) not in inside],
        )
        leaves = [[whole.leaves[i] for i in places] for places in self._places]
        detached, rest = (_Group(part, fresh_state(part, configs[1])) for part in leaves)
        super().__init__(detached, rest, bridge)
        self._groups = detached, rest
        self._names = {name for leaf in shallow.leaves for name in leaf.names}
        self._configs, self._seed = configs, seed
        self._grads = Gradients(whole.leaves)

    def step(self, lr: float, *, whole: bool) -> StepResult:
        """As `MasterAdamW.step`, of the leaves of either kind of step; clipped by the norm of their gradients."""
        key = self._next_key()
        if not whole:
            return self._shallow_step(lr, key)
        config, grads = self._configs[whole], self._grads.of_one_type()
        own = [[grads[i] for i in places] for places in self._places]
        rates: dict[str, Any] = {"lr": lr, "eps": config.eps, "weight_decay": config.weight_decay}
        rest = self._groups[1]
        rest.attempt()
        there = [[grad for grad in part if grad is not None] for part in own]
        assert [len(part) for part in there] == [len(places) for places in self._places], "everything learns"
        norms, first, result = leaf_norms([*there[0], *there[1]]), 0, None
        for group, part in zip(self._groups, there, strict=True):
            numbers = step_numbers(
                group.state.powers, norms, bits=8 if config.state == "8bit" else 32, clip=config.clip, key=key, **rates
            )
            adamw_update(group.state, part, numbers, first=first)
            first, result = len(part), numbers.result
        assert result is not None
        return result

    def next_given(self, lr: float) -> Tensor:
        """As `MasterAdamW.next_given`, of a shallow step."""
        return given_bits(lr, self._configs[0].weight_decay, self._next_key())

    def step_given(self, given: Tensor) -> StepResult:
        """As `MasterAdamW.step_given`, of a shallow step."""
        return self._shallow_step(0.0, 0, given)

    def _next_key(self) -> int:
        number = self._groups[0].attempt()
        return step_key(self._seed, number) if self._configs[0].state == "8bit" else 0

    def _shallow_step(self, lr: float, key: int, given: Tensor | None = None) -> StepResult:
        config, grads = self._configs[0], self._grads.of_one_type()
        return adamw_step(
            self._groups[0].state, [grads[i] for i in self._places[0]], lr=lr, eps=config.eps,
            weight_decay=config.weight_decay, clip=config.clip, key=key, given=given,
        )  # fmt: skip

    def of(self, kind: str) -> _OneKind:
        """What an engine takes for an optimizer: of `pretrain` or of `align`."""
        return _OneKind(self, kind == "align")


class _OneKind(Optimizer):
    """The optimizer as one of the two engines sees it."""

    def __init__(self, shared: SharedAdamW, whole: bool) -> None:
        self.shared, self._whole = shared, whole

    @property
    def attempts(self) -> int:
        """Steps of either kind that were begun before."""
        return max(group.attempts for group in self.shared._groups)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.shared._grads.clear()

    def begin_adding_up(self) -> None:
        """There is one process."""

    def add_up(self) -> None:
        """There is one process."""

    def take(self, outer: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Gradients of leaves that were added up beside autograd."""
        self.shared._grads.take(outer)

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Checkpoint name -> gradient of the step so far, of what this kind of step trains."""
        names = self.shared._names
        return ((name, grad) for name, grad in self.shared._grads.by_name() if self._whole or name in names)

    def step(self, lr: float) -> StepResult:
        """See `SharedAdamW.step`."""
        return self.shared.step(lr, whole=self._whole)

    @property
    def state(self) -> AdamwState:
        """AdamW's of the leaves that shallow steps train."""
        return self.shared._groups[0].state

    def next_given(self, lr: float) -> Tensor:
        """See `SharedAdamW.next_given`."""
        return self.shared.next_given(lr)

    def step_given(self, given: Tensor) -> StepResult:
        """See `SharedAdamW.step_given`."""
        return self.shared.step_given(given)


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


class _ShallowGraphs(GraphedEngine):
    """Shallow steps as graphs, between whole-model steps that are launched."""

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`. A graph drops no gradients before its own, and those of a whole-model step are large."""
        self.optimizer.zero_grad()
        return super().step(rows, tokens_loss, lr, first=first, should_stop=should_stop)


class _WholeEngine(ResidentEngine):
    """Whole-model steps that move the bridge.

    Args:
        how: of the shallow steps. A leaf's gradients are to be added up on one stream, theirs, so these go there too.
    """

    def __init__(
        self, model: Decoder, optimizer: _OneKind, micro_batch: int, bridge: MovingBridge | None, how: Graphing | None
    ) -> None:
        super().__init__(model, optimizer, micro_batch)
        self._bridge, self._how = bridge, how

    def step(
        self, rows: RowBatch, tokens_loss: int, lr: float, *, first: bool, should_stop: Callable[[], bool]
    ) -> StepOutcome | None:
        """See `Engine`. A step that is given up, or skipped, leaves the bridge as it was."""

        def make() -> StepOutcome | None:
            return super(_WholeEngine, self).step(rows, tokens_loss, lr, first=first, should_stop=should_stop)

        def make_where_it_belongs() -> StepOutcome | None:
            return make() if self._how is None else self._how.captures.eager(make)

        if self._bridge is None:
            return make_where_it_belongs()
        seen = Collector(self._bridge.fresh())
        self.model.observers = seen.observers
        try:
            outcome = make_where_it_belongs()
        finally:
            self.model.observers = {}
        if outcome is not None and outcome.updated:
            self._bridge.move(seen.statistics)
        return outcome


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
        how: shallow steps become graphs; None: they are launched.
    """

    def __init__(
        self, whole: Decoder, layers: tuple[int, ...], config: RunConfig, *, bridges: Mapping[Gap, Bridge],
        statistics: Mapping[Gap, GapStatistics], how: Graphing | None = None,
    ) -> None:  # fmt: skip
        self.model = whole
        sections: tuple[StageConfig, StageConfig] = (config.pretrain, config.align)
        shallow = whole.shallow(layers, recompute=config.pretrain.runs_again, bridges=bridges)
        moving = MovingBridge.of(shallow, statistics, config) if bridges else None
        configs = sections[0].optimizer, sections[1].optimizer
        self.optimizer = SharedAdamW(whole, shallow, configs, seed=config.seed, bridge=moving)
        kinds, rows = (self.optimizer.of("pretrain"), self.optimizer.of("align")), sections[0].rows_at_once
        self.shallow = (
            ResidentEngine(shallow, kinds[0], rows) if how is None else _ShallowGraphs(shallow, kinds[0], rows, how)
        )
        self.whole = _WholeEngine(whole, kinds[1], sections[1].rows_at_once, moving, how)
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
        """Of the memory of shallow steps that are graphs."""
        if isinstance(self.shallow, GraphedEngine):
            self.shallow.let_go()

    def held(self) -> dict[str, int]:
        """Bytes on the device by component, after a step whose gradients are still there."""
        present = [*self.model.trainable().values(), *self.shallow.model.bridge_tensors]
        gradients = dict(self.optimizer.of("align").gradients())
        return held_bytes(present, gradients.values(), self.optimizer, self.device)
