"""What a snapshot of a streamed stage holds: the store's memory, under the names of every other snapshot."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from elo_engine.stream.store import Store
from elo_engine.train.leaf_state import LeafState


class StreamedState(LeafState):
    """Views of a store; updates that wait are made before anything is handed out.

    Args:
        flush: makes them.
    """

    def __init__(self, store: Store, flush: Callable[[], None]) -> None:
        leaves = [
            leaf for unit, views in zip(store.units, store.views, strict=True) for leaf in unit.leaves(views["weights"])
        ]
        super().__init__(leaves, store.whole_state())
        self._flush = flush

    @property
    def attempts(self) -> int:
        """Steps taken or skipped."""
        return self._attempts

    @attempts.setter
    def attempts(self, count: int) -> None:
        self._attempts = count

    def leaf_views(self) -> dict[str, Tensor]:
        """Checkpoint names -> the weights the model computes with, as they are now."""
        return {name: view for leaf in self._leaves for name, view in leaf.split(leaf.tensor)}

    def weights(self) -> dict[str, Tensor]:
        """See `LeafState`."""
        self._flush()
        return super().weights()

    def moments(self) -> dict[str, Tensor]:
        """See `LeafState`."""
        self._flush()
        return super().moments()
