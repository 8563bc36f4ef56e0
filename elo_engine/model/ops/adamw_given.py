"""AdamW's steps that are captured and repeated: what is a step's own lies on the device, under Triton alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from elo_engine.model.ops.adamw import AdamwState

GIVEN = 3  # int32 numbers of `given_bits`


def given_bits(lr: float, weight_decay: float, key: int) -> Tensor:
    """int32 [GIVEN] on the host: what `adamw_step` and `step_numbers` take as `given` once it is on the device."""
    from elo_engine.kernels import adamw_plan

    bits: Tensor = adamw_plan.given_bits(lr, weight_decay, key)
    return bits


@contextmanager
def addresses_noted(states: Sequence[AdamwState]) -> Iterator[Callable[[], Any]]:
    """Inside, nothing is sent from the host: the addresses of the gradients, which a capture finds out, are noted. What
    is given, called once the capture is done, sends them; its result is to be kept as long as what was captured, which
    reads it. Steps outside of the block are as before.

    Args:
        states: one, whose step is `adamw_step`; or all whose gradients are clipped together, by a step in parts:
            `leaf_norms` and `adamw_update` of each.
    """
    from elo_engine.kernels import adamw_plan

    before = [state._plan for state in states]
    noted: list[Any]
    if len(states) == 1:
        (state,) = states
        before = [state._plan or adamw_plan.adamw_plan(state.weights)]
        noted = [adamw_plan.noting(before[0])]
        state._plan = noted[0]
    else:
        noted = [adamw_plan.noting_part(state.weights) for state in states]
        for state, part in zip(states, noted, strict=True):
            state._noted = part

    def deliver() -> Any:
        for plan in noted:
            adamw_plan.deliver(plan)
        return noted

    try:
        yield deliver
    finally:
        for state, plan in zip(states, before, strict=True):
            state._plan, state._noted = plan, None
