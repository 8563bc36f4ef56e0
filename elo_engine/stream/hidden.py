"""Hidden states between the layers, for all micro-batches of a step: on the device where they fit, else on the host.

Place l is what enters layer l, place L what enters the final norm, and one more holds the gradient of the hidden states
on its way down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elo_engine.stream.lanes import Fence, Lanes
from elo_engine.stream.slabs import Slab

# on the device when they are kept on the host: state and gradient, of this micro-batch and of the next
AHEAD = 4
SUMS_AHEAD = 2  # as above, where only one place is used
_LEAVING = 1  # states on their way to the host while the next one is made


class DeviceHidden:
    """Everything stays where it was made."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Tensor] = {}

    def begin(self, tokens: Sequence[int]) -> None:
        """A step of micro-batches with these numbers of tokens."""
        self._held.clear()

    def put(self, place: int, m: int, hidden_ND: Tensor) -> None:
        """Keep the state of micro-batch m."""
        self._held[place, m] = hidden_ND

    def soon(self, place: int, m: int) -> None:
        """This state will be asked for."""

    def get(self, place: int, m: int) -> Tensor:
        """The state, until the next `used`."""
        return self._held[place, m]

    def used(self, place: int, m: int, *, again: bool = False) -> None:
        """Done with it for now; it will be asked for `again`, or never."""
        if not again:
            del self._held[place, m]


class HostHidden:
    """States cross the link: written after they are made, read while the micro-batch before is computed.

    Args:
        slab: bytes for `places` times the tokens of a step.
        ahead: states that are on the device at once.
    """

    def __init__(
        self, lanes: Lanes, places: int, tokens: int, D: int, dtype: torch.dtype, slab: Slab, *, ahead: int = AHEAD
    ) -> None:
        self._lanes, self._D, self._dtype, self._ahead = lanes, D, dtype, ahead
        self._slab = slab  # its memory is registered for as long as it lives
        self._leaving: deque[tuple[Fence, Tensor]] = deque()
        self._host = slab.memory.view(dtype).view(places, tokens, D)
        self._fences: dict[tuple[int, int], Fence] = {}
        self._starts: list[int] = []
        self._ring: list[tuple[Tensor, Fence]] = []
        self._next = 0
        self._here: dict[tuple[int, int], tuple[Tensor, Fence]] = {}

    def begin(self, tokens: Sequence[int]) -> None:
        """A step of micro-batches with these numbers of tokens; [] lets go of the one before."""
        self._starts = [0]
        for count in tokens:
            self._starts.append(self._starts[-1] + count)
        self._here.clear()
        while self._leaving:
            self._let_leave()
        if not tokens:
            return
        largest = max(tokens)
        if not self._ring or len(self._ring[0][0]) < largest:
            device = self._lanes.device
            self._ring = [
                (torch.empty(largest, self._D, dtype=self._dtype, device=device), Fence()) for _ in range(self._ahead)
            ]
            with self._lanes.on("compute", writes=[fence for _, fence in self._ring]):
                pass  # as device.Piece

    def _rows(self, place: int, m: int) -> Tensor:
        return self._host[place, self._starts[m] : self._starts[m + 1]]

    def _fence(self, place: int, m: int) -> Fence:
        return self._fences.setdefault((place, m), Fence())

    def put(self, place: int, m: int, hidden_ND: Tensor) -> None:
        """Send the state of micro-batch m to the host."""
        made = Fence()
        with self._lanes.on("compute", writes=[made]):
            pass
        with self._lanes.on("up", reads=[made], writes=[self._fence(place, m)]):
            self._rows(place, m).copy_(hidden_ND, non_blocking=True)
        if self._lanes.streams:
            self._leaving.append((made, hidden_ND))
            if len(self._leaving) > _LEAVING:
                self._let_leave()

    def _let_leave(self) -> None:
        """Let go of the oldest state that is on its way: what is computed from here on comes after its copy."""
        made, _ = self._leaving.popleft()
        with self._lanes.on("compute", writes=[made]):
            pass

    def soon(self, place: int, m: int) -> None:
        """Begin to bring a state."""
        if (place, m) in self._here:
            return
        buffer, fence = self._ring[self._next]
        self._next = (self._next + 1) % self._ahead
        rows = self._rows(place, m)
        with self._lanes.on("down", reads=[self._fence(place, m)], writes=[fence]):
            buffer[: len(rows)].copy_(rows, non_blocking=True)
        self._here[place, m] = buffer[: len(rows)], fence

    def get(self, place: int, m: int) -> Tensor:
        """The state, until the next `used`."""
        self.soon(place, m)
        hidden_ND, fence = self._here[place, m]
        with self._lanes.on("compute", reads=[fence]):
            pass
        return hidden_ND

    def used(self, place: int, m: int, *, again: bool = False) -> None:
        """Done with it for now: what is queued is the last reader of its buffer."""
        _, fence = self._here.pop((place, m))
        with self._lanes.on("compute", reads=[fence]):
            pass


Hidden = Any  # DeviceHidden or HostHidden
