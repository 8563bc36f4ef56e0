"""Gradients of weights: how they arrive from a node of the backward pass and add up over micro-batches. Sizes in bytes.
"""

from __future__ import annotations

from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_shapes import outer_rows
from elo_engine.measure.setting import Setting

GRAD = "gradients"
_UNIQUE = 3  # times the ids of a step: what torch.unique takes on a CPU, its result among it


class Gradients:
    """What has arrived so far. A node hands its gradients over when it has ended: until then those of a later
    micro-batch stand beside the sums they belong to.

    Args:
        widens: this engine's way in bf16: a first gradient is set aside as it came, a second makes the sum fp32.
        copies: torch adds bf16 to fp32 by way of an fp32 copy, as it does on the CPU.
        at_once: a gradient is made fp32 as it comes, to be summed over processes (`train/adding_up.py`).
    """

    def __init__(self, ledger: Ledger, *, widens: bool, copies: bool = False, at_once: bool = False) -> None:
        self._ledger, self._widens, self._copies, self._at_once = ledger, widens, copies, at_once
        self._sums: dict[str, Held] = {}
        self._wide: set[str] = set()
        self._arrived: list[tuple[str, Held]] = []

    def arrive(self, name: str, count: int) -> None:
        """A node makes the gradient called `name`, of `count` bytes."""
        self._arrived.append((name, self._ledger.add(GRAD, count)))

    def settle(self) -> None:
        """The node has ended: first gradients become the sums, later ones are added to them."""
        for name, arrived in self._arrived:
            before = self._sums.get(name)
            if before is None:
                self._sums[name] = arrived
                if self._widens and self._at_once:
                    self._sums[name] = self._ledger.add(GRAD, 2 * arrived.bytes)
                    self._ledger.drop(arrived)
                continue
            wide = self._widens and name not in self._wide
            if wide:
                self._wide.add(name)
                self._sums[name] = self._ledger.add(GRAD, 2 * arrived.bytes)
            if self._widens and self._copies:
                self._ledger.spike(GRAD, 2 * arrived.bytes)
            self._ledger.drop(arrived, *([before] if wide else []))
        self._arrived.clear()


class OuterSums:
    """Gradients of embedding and head of a whole model, which `model/outer.py` adds up beside autograd: an fp32 matrix
    for the head from the first loss of a step on, fp32 rows for the embedding from its first backward pass on, as many
    as `outer_rows`.
    """

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        spec = setting.spec
        self._setting, self._ledger = setting, ledger
        self._size, self._tokens = spec.V * spec.D, setting.tokens_per_step
        self._U = outer_rows(setting)
        self._sum: Held | None = None
        self._rows: list[Held] = []

    def begin(self) -> None:
        """A loss is about to be made, and with it the head's gradient."""
        if self._sum is None:
            self._sum = self._ledger.add(GRAD, 4 * self._size)

    def add_rows(self) -> None:
        """The embedding's backward pass of a micro-batch."""
        ledger, setting = self._ledger, self._setting
        if not self._rows:
            if setting.device == "cpu":  # a GPU's are found on the host
                ledger.spike("activations", _UNIQUE * 8 * self._tokens)
            ids = 0 if setting.graph else 8 * self._U  # of a graph they are the step's, and stay
            self._rows = [ledger.add("activations", ids), ledger.add(GRAD, 4 * self._U * setting.spec.D)]
        wide = 4 * setting.N * setting.spec.D if setting.width == 2 else 0
        ledger.spike("activations", 8 * setting.N + wide)  # where the rows are, and the gradient in fp32

    def finish(self) -> None:
        """The end of the step: the weights' gradients, one after the other; bf16 after a single micro-batch of it."""
        ledger, tied = self._ledger, self._setting.spec.tied
        assert self._sum is not None and self._rows
        if tied:
            ledger.drop(*self._rows)  # added to the sum
        narrow = self._setting.width == 2 and self._setting.micro_batches == 1
        several = self._setting.one_gradient_summed
        if narrow and not several:
            ledger.add(GRAD, 2 * self._size)
            ledger.drop(self._sum)
        if not tied:
            made = ledger.add(GRAD, (2 if narrow else 4) * self._size)
            if narrow:
                ledger.spike(GRAD, 2 * self._U * self._setting.spec.D)
            ledger.drop(*self._rows)
            if narrow and several:
                ledger.add(GRAD, 4 * self._size)
                ledger.drop(made)
