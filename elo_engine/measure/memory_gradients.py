"""Gradients of weights: how they arrive from a node of the backward pass and add up over micro-batches."""

from __future__ import annotations

from elo_engine.measure.ledger import Held, Ledger

GRAD = "gradients"


class Gradients:
    """What has arrived so far. A node hands its gradients over when it has ended: until then those of a later
    micro-batch stand beside the sums they belong to.

    Args:
        widens: this engine's way in bf16: a first gradient is set aside as it came, a second makes the sum fp32.
        copies: torch adds bf16 to fp32 by way of an fp32 copy, as it does on the CPU.
    """

    def __init__(self, ledger: Ledger, *, widens: bool, copies: bool = False) -> None:
        self._ledger, self._widens, self._copies = ledger, widens, copies
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
                continue
            wide = self._widens and name not in self._wide
            if wide:
                self._wide.add(name)
                self._sums[name] = self._ledger.add(GRAD, 2 * arrived.bytes)
            if self._widens and self._copies:
                self._ledger.spike(GRAD, 2 * arrived.bytes)
            self._ledger.drop(arrived, *([before] if wide else []))
        self._arrived.clear()
