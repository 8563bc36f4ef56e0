"""AdamW of interleaved training: one optimizer, whose steps of one kind update the detached layers and those of the
other kind everything. The detached layers have one state for both; every other weight has a state and counts of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from elo_engine.config import OptimizerConfig
from elo_engine.model.decoder import Decoder
from elo_engine.model.ops.adamw import AdamwState, StepResult, adamw_step, adamw_update, leaf_norms, step_numbers
from elo_engine.model.ops.adamw_given import given_bits
from elo_engine.model.reference_adamw import step_key
from elo_engine.train.gradients import Gradients
from elo_engine.train.leaf_state import LeafState
from elo_engine.train.optim import fresh_state
from elo_engine.train.resident import Optimizer
from elo_engine.train.shared_state import Kept, SharedState


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
        bridge: Kept | None,
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
        return self._update(whole, lr, self._next_key(whole))

    def next_given(self, lr: float, *, whole: bool) -> Tensor:
        """As `MasterAdamW.next_given`, of either kind of step."""
        return given_bits(lr, self._configs[whole].weight_decay, self._next_key(whole))

    def step_given(self, given: Tensor, *, whole: bool) -> StepResult:
        """As `MasterAdamW.step_given`, of either kind of step."""
        return self._update(whole, 0.0, 0, given)

    def states(self, *, whole: bool) -> tuple[AdamwState, ...]:
        """Those that a step of either kind updates."""
        return tuple(group.state for group in (self._groups if whole else self._groups[:1]))

    def _next_key(self, whole: bool) -> int:
        number = self._groups[0].attempt()
        if whole:
            self._groups[1].attempt()
        return step_key(self._seed, number) if self._configs[whole].state == "8bit" else 0

    def _update(self, whole: bool, lr: float, key: int, given: Tensor | None = None) -> StepResult:
        config, grads = self._configs[whole], self._grads.of_one_type()
        own = [[grads[i] for i in places] for places in self._places]
        rates: dict[str, Any] = {"lr": lr, "eps": config.eps, "weight_decay": config.weight_decay}
        rates |= {"clip": config.clip, "key": key, "given": given}
        return self._update_all(own, rates) if whole else adamw_step(self._groups[0].state, own[0], **rates)

    def _update_all(self, own: list[list[Tensor | None]], rates: dict[str, Any]) -> StepResult:
        """Of both groups, in parts: one norm, and what depends on the count of steps for each."""
        there = [[grad for grad in part if grad is not None] for part in own]
        assert [len(part) for part in there] == [len(places) for places in self._places], "everything learns"
        groups = zip(self._groups, there, strict=True)
        norms = [norm for group, part in groups for norm in leaf_norms(part, group.state)]
        first, result = 0, None
        for group, part in zip(self._groups, there, strict=True):
            state = group.state
            numbers = step_numbers(state.powers, norms, bits=32 if state.scales is None else 8, **rates)
            adamw_update(state, part, numbers, first=first)
            first, result = len(part), numbers.result
        assert result is not None
        return result

    def of(self, kind: str) -> OneKind:
        """What an engine takes for an optimizer: of `pretrain` or of `align`."""
        return OneKind(self, kind == "align")


class OneKind(Optimizer):
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
    def states(self) -> tuple[AdamwState, ...]:
        """See `SharedAdamW.states`."""
        return self.shared.states(whole=self._whole)

    def next_given(self, lr: float) -> Tensor:
        """See `SharedAdamW.next_given`."""
        return self.shared.next_given(lr, whole=self._whole)

    def step_given(self, given: Tensor) -> StepResult:
        """See `SharedAdamW.step_given`."""
        return self.shared.step_given(given, whole=self._whole)
