"""The sum of a step's gradients over the processes of a run, begun while the backward pass still goes on.

A leaf's all-reduce starts when its gradient of the last micro-batch has arrived, as in DDP (arXiv 2006.15704), and in
an order that all processes have agreed on: that in which the gradients of rank 0's first step arrived. A process whose
gradients arrive otherwise waits with those that come too early. What does not come by autograd (embedding and head of
a whole model) follows at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.distributed import Work

from elo_engine.errors import FailedError
from elo_engine.train import world


class AddingUp:
    """One for the leaves of an optimizer.

    Args:
        names: of the leaves, for an error. wide: a leaf's number -> its gradient of the step in fp32, to be summed in
            place and kept by whoever gives it; None where there is none.
    """

    def __init__(self, names: Sequence[str], wide: Callable[[int], Tensor | None]) -> None:
        self._names, self._wide = names, wide
        self._order: list[int] | None = None  # of those that get a gradient; agreed on in the first step
        self._last = False  # whether the backward pass of the last micro-batch goes on
        self._arrived: list[int] = []
        self._works: list[Work] = []

    def begin(self) -> None:
        """The backward pass of the step's last micro-batch is next."""
        self._last = True

    def drop(self) -> None:
        """A step begins, or is given up."""
        self._last = False
        self._arrived.clear()
        self._works.clear()

    def arrived(self, i: int) -> None:
        """A leaf has its gradient of a micro-batch: one, for no leaf is used twice."""
        if not self._last or i in self._arrived:  # a layer that is run again ends once more, with none for its anchor
            return
        if self._wide(i) is None:  # the embedding's node ends without one
            return
        self._arrived.append(i)
        order, there = self._order or [], set(self._arrived)
        while len(self._works) < len(order) and order[len(self._works)] in there:
            self._start(order[len(self._works)])

    def _start(self, i: int) -> None:
        grad = self._wide(i)
        if grad is None:
            raise FailedError(
                f"{self._names[i]}: got no gradient in this step although it did in the first; the processes' sums "
                "cannot be made. Continue from the last snapshot with --resume auto"
            )
        self._works.append(world.begin_sum(grad))

    def finish(self) -> None:
        """Start what has not been, and wait for all: every gradient is the sum over the processes then.

        Raises:
            FailedError: a leaf has no gradient that had one in the first step.
        """
        if self._order is None:  # where a process has none for a leaf, none has
            there = [i for i in range(len(self._names)) if self._wide(i) is not None]
            mine = self._arrived
            self._order = world.first(lambda: [*mine, *(i for i in there if i not in mine)])
        late = [i for i in range(len(self._names)) if i not in self._order and self._wide(i) is not None]
        if late:
            raise FailedError(
                f"{self._names[late[0]]}: got a gradient in this step and none in the first, so no process's would be "
                "summed. Continue from the last snapshot with --resume auto"
            )
        for i in self._order[len(self._works) :]:
            self._start(i)
        for work in self._works:
            work.wait()
        self.drop()
