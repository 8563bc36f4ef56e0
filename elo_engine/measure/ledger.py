"""A ledger of memory: what a training step allocates and frees, entry by entry, and what was live at its peak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss workspace", "slack")


@dataclass(eq=False, slots=True)
class Held:
    """One entry of a ledger: bytes of a component that are live until they are dropped."""

    component: str
    bytes: int
    live: bool = True


class Ledger:
    """Adds and drops in the order in which a step makes them; remembers the first of the highest moments.

    Attributes:
        moment: what the step is doing now, to be set by whoever makes the entries.
        peak_bytes, peak_moment, at_peak: the highest sum so far, when that was, and what it was made of.
    """

    def __init__(self) -> None:
        self.moment = "start"
        self.peak_bytes = 0
        self.peak_moment = self.moment
        self.at_peak: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
        self._live: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
        self._total = 0

    @property
    def live_bytes(self) -> int:
        """Sum of what is live now."""
        return self._total

    def live(self, component: str) -> int:
        """What of it is live now."""
        return self._live[component]

    def add(self, component: str, count: int) -> Held:
        """`count` bytes appear. Keep what is returned: it is what `drop` takes."""
        assert component in self._live and count >= 0, f"{count} bytes of {component!r}"
        self._live[component] += count
        self._total += count
        if self._total > self.peak_bytes:
            self.peak_bytes, self.peak_moment, self.at_peak = self._total, self.moment, dict(self._live)
        return Held(component, count)

    def drop(self, *entries: Held) -> None:
        """Entries are freed, each once."""
        for held in entries:
            assert held.live, f"{held.bytes} bytes of {held.component} are freed twice"
            held.live = False
            self._live[held.component] -= held.bytes
            self._total -= held.bytes

    def spike(self, component: str, count: int) -> None:
        """Bytes that are there during one operation and gone after it."""
        self.drop(self.add(component, count))

    @contextmanager
    def during(self, component: str, count: int) -> Iterator[None]:
        """Bytes that are there inside the block."""
        held = self.add(component, count)
        yield
        self.drop(held)
