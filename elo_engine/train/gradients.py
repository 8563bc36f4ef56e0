"""Where the gradients of a step add up: one a leaf, over its micro-batches.

In fp32 autograd adds them into the leaf's own. In bf16 a gradient is set aside as it came, and widened to an fp32 sum
when a second one arrives, so a step of one micro-batch pays for nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from elo_engine.model.decoder import Leaf
from elo_engine.train import world
from elo_engine.train.adding_up import AddingUp


class Gradients:
    """The gradients of some leaves; a bf16 leaf gets a hook, so make it once."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._mixed = any(leaf.tensor.dtype != torch.float32 for leaf in leaves)
        self._aside: list[Tensor | None] = [None] * len(leaves)
        if self._mixed:
            for i, leaf in enumerate(leaves):
                leaf.tensor.register_post_accumulate_grad_hook(_set_aside(self._aside, i))
        self._sums: AddingUp | None = None
        if world.size() > 1:
            self._sums = sums = AddingUp([leaf.names[0] for leaf in leaves], self._wide)
            for i, leaf in enumerate(leaves):  # after what sets it aside
                leaf.tensor.register_post_accumulate_grad_hook(_tell(sums, i))

    def clear(self) -> None:
        """Drop the gradients; the next backward pass allocates them where it needs them."""
        for i, leaf in enumerate(self._leaves):
            leaf.tensor.grad = self._aside[i] = None
        if self._sums is not None:
            self._sums.drop()

    def begin_adding_up(self) -> None:
        """The backward pass of the step's last micro-batch is next: each gradient's sum over the processes can start
        when it has arrived.
        """
        if self._sums is not None:
            self._sums.begin()

    def take(self, outer: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Leaves and the gradients of the step that were added up beside autograd, `Decoder.outer_gradients`: in fp32,
        or in the weights' type already. They take the type of the other gradients, which are of bf16 only after a
        single micro-batch of bf16.
        """
        for tensor, grad in outer:
            i = next(i for i, leaf in enumerate(self._leaves) if leaf.tensor is tensor)
            if not self._mixed:
                tensor.grad = grad
            else:
                wide = any(other is not None and other.dtype == torch.float32 for other in self._aside)
                self._aside[i] = grad if wide else grad.to(tensor.dtype)
            del grad  # before the next one is made

    def add_up(self) -> None:
        """Each becomes the sum over the processes of the run, in fp32: a sum of bf16 would lose a bit at every process.

        All of a step's gradients are there; where a process has none for a leaf, none has.
        """
        if self._sums is not None:
            self._sums.finish()

    def _wide(self, i: int) -> Tensor | None:
        """The gradient so far, widened for good."""
        if not self._mixed:
            return self._leaves[i].tensor.grad
        grad = self._aside[i]
        self._aside[i] = None if grad is None else grad.float()
        return self._aside[i]

    def as_they_came(self) -> list[Tensor | None]:
        """One a leaf; None where none has arrived."""
        return list(self._aside) if self._mixed else [leaf.tensor.grad for leaf in self._leaves]

    def of_one_type(self) -> list[Tensor | None]:
        """One a leaf, all fp32 if any is."""
        grads = self.as_they_came()
        if len({grad.dtype for grad in grads if grad is not None}) > 1:
            return [None if grad is None else grad.float() for grad in grads]
        return grads

    def by_name(self) -> Iterator[tuple[str, Tensor | None]]:
        """Checkpoint name -> gradient of the step so far."""
        for leaf, grad in zip(self._leaves, self.of_one_type(), strict=True):
            if grad is None:
                for name in leaf.names:
                    yield name, None
            else:
                yield from leaf.split(grad)


def _set_aside(aside: list[Tensor | None], i: int) -> Callable[[Tensor], None]:
    def hook(leaf: Tensor) -> None:
        if leaf.grad is None:
            return
        before = aside[i]
        if before is None:
            aside[i] = leaf.grad
        elif before.dtype == torch.float32:
            before.add_(leaf.grad)
        else:
            aside[i] = before.float().add_(leaf.grad)
        leaf.grad = None

    return hook


def _tell(sums: AddingUp, i: int) -> Callable[[Tensor], None]:
    """A hook that does not keep the sums, which know the leaves: no collector sees the circle through a tensor."""
    there = weakref.ref(sums)

    def hook(_: Tensor) -> None:
        if (alive := there()) is not None:
            alive.arrived(i)

    return hook
