"""What a snapshot of interleaved training holds: AdamW's state of the detached layers, which learn in every step; that
of everything else, which learns in whole-model steps alone and is counted by itself; and the bridge's statistics.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from elo_engine.train.leaf_state import LeafState

_COUNTS = ("powers", "step", "attempts", "master")  # names that a snapshot's moments have once for all leaves
_REST = "rest."


class Kept(Protocol):
    """What else a snapshot keeps: `train.interleaved.MovingBridge`."""

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: dict[str, Tensor]) -> None: ...


class SharedState:
    """The two groups of leaves, under the names of every other snapshot.

    Args:
        detached, rest: their weights and moments, wherever they lie.
    """

    def __init__(self, detached: LeafState, rest: LeafState, bridge: Kept | None) -> None:
        self._detached, self._rest, self._bridge = detached, rest, bridge

    def weights(self) -> dict[str, Tensor]:
        """Checkpoint names -> the tensors that are updated, as views."""
        return self._detached.weights() | self._rest.weights()

    def moments(self) -> dict[str, Tensor]:
        """Of both groups, and the bridge's statistics; what is counted for whole-model steps alone has a prefix."""
        rest = {_REST + name if name in _COUNTS else name: t for name, t in self._rest.moments().items()}
        return self._detached.moments() | rest | self._kept()

    def _kept(self) -> dict[str, Tensor]:
        return {} if self._bridge is None else self._bridge.state()

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of what a snapshot holds."""
        kept = sum(total.nbytes for total in self._kept().values())
        return self._detached.snapshot_bytes + self._rest.snapshot_bytes + kept

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take over a snapshot. Raises as `LeafState.load`, and FailedError: the bridge's statistics are not there."""
        own = {name: t for name, t in moments.items() if not name.startswith(_REST)}
        self._detached.load(weights, own)
        counts = {name.removeprefix(_REST): t for name, t in moments.items() if name.startswith(_REST)}
        self._rest.load(weights, own | counts if counts else {})
        if self._bridge is not None:
            self._bridge.load(moments)
