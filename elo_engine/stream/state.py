"""What a snapshot of a streamed stage holds: the store's memory, under the names of every other snapshot."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from elo_engine.stream.store import Store
from elo_engine.train.leaf_state import LeafState


class StreamedState(LeafState):
    """Views of a store, but of the layers that it counts apart; updates that wait are made before anything is handed
    out.

    Args:
        flush: makes them.
    """

    def __init__(self, store: Store, flush: Callable[[], None]) -> None:
        numbers = [number for number in range(len(store.units)) if number not in store.apart]
        leaves = [leaf for number in numbers for leaf in store.units[number].leaves(store.views[number]["weights"])]
        super().__init__(leaves, store.state_of(numbers, store.powers))
        self._flush = flush

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
