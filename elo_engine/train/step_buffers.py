"""What one optimizer step is fed, at places on the device that stay: token ids, labels, positions, bounds of documents,
and the numbers that are the step's own; of a whole model also the ids that its embedding's gradient has rows for.

Each is filled by one copy from pinned memory and has the same shape for every text, so that a step that was captured as
a CUDA graph finds its own data there. The number of documents alone varies: bounds are padded by empty documents to a
power of two, and each such number has a buffer of its own. How many different ids a step has varies too, but never
above its tokens, nor the vocabulary: that many rows there are always, as the planner counts them, and those of ids that
do not occur stay zero.

Shapes as in the legend; M micro-batches, S documents of one of them with the empty ones, N tokens of a step, U rows of
the embedding's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elo_engine.data import RowBatch
from elo_engine.model.decoder import Batch
from elo_engine.model.layers import PaddedPacking
from elo_engine.model.ops.adamw_given import GIVEN

# Documents that a micro-batch has room for at least. An empty one is a few thousand blocks of attention that return at
# once and 128 rows of its backward pass's sum; a step that outgrows its room is another capture.
FEWEST_DOCUMENTS = 16
# Tokens of the longest document that attention's grid has room for at least: two blocks of it.
SHORTEST_ROOM = 256


class Room(NamedTuple):
    """What a captured step has room for: documents of a micro-batch, and tokens of each."""

    documents: int
    longest: int


def distinct_ids(ids_BT: np.ndarray, V: int, U: int) -> np.ndarray:
    """[U] in rising order, each once: the ids that occur, and the smallest of those that do not. Nothing is sorted:
    262,144 ids, 71,613 of 128,256 different ones, take 1.7 ms, and torch.unique 34 (median of 15, a busy Xeon core).
    """
    there_V = np.zeros(V, bool)
    there_V[ids_BT] = True
    there_V[np.flatnonzero(~there_V)[: U - np.count_nonzero(there_V)]] = True
    return np.flatnonzero(there_V)


class StepBuffers:
    """Of steps of equally many rows.

    Args:
        rows, sequence_length: of a step. micro_batch: rows that go through the model at once.
        vocabulary: V where the embedding learns.

    Attributes:
        distinct_U: what `Decoder.begin_step` takes as `distinct` ids; None where the embedding is frozen.
    """

    def __init__(
        self, rows: int, sequence_length: int, micro_batch: int, device: torch.device, vocabulary: int | None = None
    ) -> None:
        self.shape, self._device, self._V = (rows, sequence_length), device, vocabulary
        firsts = range(0, rows, micro_batch)
        self._ends = [(first * sequence_length, min(rows, first + micro_batch) * sequence_length) for first in firsts]
        self._tokens_3N = torch.zeros((3, rows * sequence_length), dtype=torch.int64, device=device)
        self._numbers = torch.zeros(GIVEN + 1, dtype=torch.int32, device=device)
        self._offsets: dict[int, Tensor] = {}  # documents -> [M, S + 1]
        self.distinct_U: Tensor | None = None
        if vocabulary is not None:
            rows_U = min(vocabulary, rows * sequence_length)
            self.distinct_U = torch.zeros(rows_U, dtype=torch.int64, device=device)
        # what the optimizer takes as `given`; one over the tokens of the step that carry a loss, fp32 []
        self.given, self.inverse = self._numbers[:GIVEN], self._numbers[GIVEN:].view(torch.float32)[0]

    def room(self, rows: RowBatch) -> Room:
        """What to pad the micro-batches of these rows to: powers of two, and no longer than a row."""
        most = max(
            int(np.count_nonzero((rows.segment_starts >= first) & (rows.segment_starts < last)))
            for first, last in self._ends
        )
        longest = max(SHORTEST_ROOM, 1 << int(rows.positions_BT.max()).bit_length())
        return Room(max(FEWEST_DOCUMENTS, 1 << (most - 1).bit_length()), min(longest, self.shape[1]))

    def fill(self, rows: RowBatch, room: Room, given: Tensor, tokens_loss: int) -> None:
        """Send a step's own to the device, without a wait, after all that was launched before.

        Args:
            room: of `room`. given: on the host. tokens_loss: positions of the step that carry a loss.
        """
        assert rows.ids_BT.shape == self.shape, f"rows of {rows.ids_BT.shape} in buffers of {self.shape}"
        tokens_3N = self._host(self._tokens_3N)
        for place_N, array_BT in zip(tokens_3N.numpy(), (rows.ids_BT, rows.labels_BT, rows.positions_BT), strict=True):
            place_N[:] = array_BT.reshape(-1)
        offsets_MS = self._host(self._bounds(room.documents))
        for row, (first, last) in zip(offsets_MS.numpy(), self._ends, strict=True):
            starts = rows.segment_starts[(rows.segment_starts >= first) & (rows.segment_starts < last)] - first
            row[: len(starts)], row[len(starts) :] = starts, last - first
        numbers = self._host(self._numbers)
        numbers[:GIVEN] = given
        numbers[GIVEN:] = (torch.ones(1) / max(1, tokens_loss)).view(torch.int32)  # fp32, rounded once
        if self.distinct_U is not None:
            assert self._V is not None
            distinct_U = self._host(self.distinct_U)
            distinct_U.numpy()[:] = distinct_ids(rows.ids_BT, self._V, len(distinct_U))
            self.distinct_U.copy_(distinct_U, non_blocking=True)
        self._tokens_3N.copy_(tokens_3N, non_blocking=True)
        self._bounds(room.documents).copy_(offsets_MS, non_blocking=True)
        self._numbers.copy_(numbers, non_blocking=True)

    def batches(self, room: Room) -> Iterator[Batch]:
        """The micro-batches, as views: nothing here is read on the host."""
        T = self.shape[1]
        for offsets_S1, (first, last) in zip(self._bounds(room.documents), self._ends, strict=True):
            ids_N, labels_N, positions_N = self._tokens_3N[:, first:last]
            yield Batch(ids_N, labels_N, PaddedPacking(offsets_S1, positions_N, room.longest), T)

    def _bounds(self, documents: int) -> Tensor:
        if documents not in self._offsets:
            shape = (len(self._ends), documents + 1)
            self._offsets[documents] = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._offsets[documents]

    def _host(self, like: Tensor) -> Tensor:
        # torch gives pinned memory out again only when the copy that reads it is done, so the next step's are others
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._device.type == "cuda")
