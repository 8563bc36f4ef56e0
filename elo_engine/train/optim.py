"""AdamW (Loshchilov and Hutter 2019) over a model's leaves: what is a weight, where gradients add up, what is saved.

state fp32: masters and moments in fp32. Where the model computes in fp32 its leaves are the masters; where it computes
in bf16 the masters are copies, and the leaves are rewritten after the update.
state 8bit: moments of 8 bits and no masters; the leaf is the weight, and a bf16 leaf is rounded at random. With
`master: 32` a bf16 leaf is a copy of an fp32 master there too; with 24 it has 8 more bits beside it (`split_weights`).

The gradient of a step adds up in fp32. With a single micro-batch a bf16 gradient is used as it came: it is set aside,
and widened only when a second one arrives. The update itself is elo_engine.model.ops.adamw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig
from elo_engine.model.decoder import Decoder, Leaf
from elo_engine.model.ops.adamw import AdamwState, StepResult, adamw_step
from elo_engine.model.ops.adamw_given import given_bits
from elo_engine.model.reference_adamw import step_key
from elo_engine.train.gradients import Gradients
from elo_engine.train.leaf_state import LeafState


def fresh_state(leaves: Sequence[Leaf], config: OptimizerConfig) -> AdamwState:
    """AdamW's state of these leaves before the first step."""
    tensors = [leaf.tensor.detach() for leaf in leaves]
    master = config.kept_master(bf16=tensors[0].dtype != torch.float32)
    copies = tensors if master == "32" else None
    # detach() shares the storage: an update in place is seen by the model.
    weights = tensors if copies is None else [tensor.float() for tensor in tensors]
    bits: Literal[8, 32] = 8 if config.state == "8bit" else 32
    return AdamwState.zeros(weights, copies, config.betas, bits=bits, split=master == "24")


class MasterAdamW(LeafState):
    """The optimizer of one stage; moments live under the checkpoint's tensor names when they are saved.

    Args:
        model: its leaves are trained; frozen tensors get nothing.
        config: AdamW's numbers, `state` and `master`.
        seed: of the random rounding in 8-bit state; equal seeds draw equal numbers at equal steps.
    """

    def __init__(self, model: Decoder, config: OptimizerConfig, seed: int = 42) -> None:
        super().__init__(model.leaves, fresh_state(model.leaves, config))
        self._config, self._seed = config, seed
        self._grads = Gradients(model.leaves)

    def zero_grad(self) -> None:
        """Drop the gradients; the next backward pass allocates them where it needs them."""
        self._grads.clear()

    def take(self, outer: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Gradients of leaves that were added up beside autograd: `Decoder.outer_gradients`."""
        self._grads.take(outer)

    def begin_adding_up(self) -> None:
        """The last micro-batch's backward pass is next; `add_up` may begin in it."""
        self._grads.begin_adding_up()

    def add_up(self) -> None:
        """Gradients become sums over the processes of the run, before `step`."""
        self._grads.add_up()

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Checkpoint name -> accumulated gradient of the step so far, in the type it has (None: none has arrived)."""
        return self._grads.by_name()

    def step(self, lr: float) -> StepResult:
        """Clip by the global norm and update; on a GPU the host does not wait. Returns the norm before clipping and
        whether it was finite, as scalars on the device; if it was not, nothing was changed.
        """
        return self._update(lr, self._next_key())

    @property
    def states(self) -> tuple[AdamwState, ...]:
        """AdamW's of all leaves, which are one."""
        return (self._state,)

    def next_given(self, lr: float) -> Tensor:
        """Count a step, and the numbers that are its own, on the host: what `step_given` finds on the device."""
        return given_bits(lr, self._config.weight_decay, self._next_key())

    def step_given(self, given: Tensor) -> StepResult:
        """`step` with its numbers on the device: nothing of the host's goes into it, so it can be repeated as it is."""
        return self._update(0.0, 0, given)

    def _next_key(self) -> int:
        key = step_key(self._seed, self._attempts) if self._eight else 0
        self._attempts += 1
        return key

    def _update(self, lr: float, key: int, given: Tensor | None = None) -> StepResult:
        config = self._config
        return adamw_step(
            self._state,
            self._grads.of_one_type(),
            lr=lr,
            eps=config.eps,
            weight_decay=config.weight_decay,
            clip=config.clip,
            key=key,
            given=given,
        )

