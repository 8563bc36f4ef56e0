"""Embedding and head of a store whose vocabulary comes to the device in slices, for training and for scoring."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.model.sliced_head import SlicedLoss
from elo_engine.stream.device import DeviceUnits
from elo_engine.stream.store import Store


class Vocabulary:
    """The slices of a store with `sliced`.

    Attributes:
        embedding, head: numbers of the parts that hold their rows, in order; norm: that of the final norm.
    """

    def __init__(self, store: Store, units: DeviceUnits) -> None:
        self._store, self._units = store, units
        self.embedding = store.parts_of(store.embedding, "embedding")
        (self.norm,) = store.parts_of(store.last, "norm")
        self.head = self.embedding if store.spec.tied else store.parts_of(store.last, "head")

    def rows(self, number: int) -> tuple[int, int]:
        """First row of a slice in its matrix, and the row after its last."""
        found = self._store.parts[number].slice
        assert found is not None
        return found[1:]

    def slices(self, numbers: list[int], after: int | None) -> closing[Generator[tuple[int, Tensor]]]:
        """The number and the weights of each slice; while one is used the next comes, at last part `after`."""

        def each() -> Generator[tuple[int, Tensor]]:
            for number, following in zip(numbers, [*numbers[1:], after], strict=True):
                with self._units.rows(number) as weights_SD:
                    self._units.soon(following)
                    yield number, weights_SD

        return closing(each())

    def span(self, ids_U: Tensor, number: int) -> tuple[int, int, int]:
        """The first row of a slice, and where its tokens begin and end among the ordered ones on the host."""
        begin, end = self.rows(number)
        first, last = torch.searchsorted(ids_U, torch.tensor([begin, end])).tolist()
        return begin, first, last

    def embed(self, ids: Tensor, poll: Callable[[], None]) -> Callable[[Tensor], Tensor]:
        """Gather the rows of these tokens, of any shape and on the host -> what turns some of them, [N] on the device,
        into [N, D]. Layer 0 is on its way then.
        """
        device = self._store.device
        ids_U = torch.unique(ids.reshape(-1))  # in order, so that a slice's are next to each other
        sent_U = ids_U.pin_memory() if device.type == "cuda" else ids_U  # from pageable memory the copy would wait
        here_U = sent_U.to(device, non_blocking=True)
        table_UD = torch.empty((len(ids_U), self._store.spec.D), dtype=self._store.dtype, device=device)
        with self.slices(self.embedding, 0) as slices:
            for number, weights_SD in slices:
                poll()
                begin, first, last = self.span(ids_U, number)
                table_UD[first:last] = F.embedding(here_U[first:last] - begin, weights_SD)
        return lambda ids_N: F.embedding(torch.searchsorted(here_U, ids_N), table_UD)

    def losses(
        self, normed: Callable[[int], Tensor], labels: Sequence[Tensor], poll: Callable[[], None],
        used: Callable[[int], None] = lambda m: None, *, after: int | None = None,
    ) -> list[SlicedLoss]:
        """Once through the slices of the head: the losses of every micro-batch m, whose final norm's output [N, D] is
        `normed(m)` until `used(m)`. Part `after` is on its way then.
        """
        found = [SlicedLoss(labels_N, self._store.spec.head_softcap) for labels_N in labels]
        with self.slices(self.head, after) as slices:
            for number, head_SD in slices:
                for m, loss in enumerate(found):
                    poll()
                    loss.observe(normed(m), head_SD, self.rows(number)[0])
                    used(m)
        return found
