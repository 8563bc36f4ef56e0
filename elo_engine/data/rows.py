"""Rows of tokens, and how a stream of documents is cut into them. Shapes: B rows, T tokens a row, N = B*T."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from elo_engine.data.store import TokenStore
from elo_engine.errors import UsageError

# The label that torch's cross-entropy leaves out by default.
NO_LABEL = -100


@dataclass(frozen=True)
class RowBatch:
    """Rows of tokens, as numpy arrays.

    ids_BT, labels_BT, positions_BT: int64 [B, T]; a label is the id of the following token, NO_LABEL where
    there is no loss (at a document's end, and where a loss mask leaves the following token out); positions
    restart at every segment. segment_starts: int64 offsets into the flattened tokens where a segment begins,
    with N appended, so it is the cu_seqlens of variable-length attention; every row begins a segment.
    languages: one name per row.
    """

    ids_BT: np.ndarray
    labels_BT: np.ndarray
    positions_BT: np.ndarray
    segment_starts: np.ndarray
    languages: tuple[str, ...]

    @property
    def tokens_loss(self) -> int:
        """Positions that carry a loss."""
        return int(np.count_nonzero(self.labels_BT != NO_LABEL))

    def part(self, first: int, last: int) -> RowBatch:
        """Rows first .. last - 1, as views; every row begins a segment, so segments are cut nowhere."""
        length = self.ids_BT.shape[1]
        inside = (self.segment_starts >= first * length) & (self.segment_starts <= last * length)
        return RowBatch(
            ids_BT=self.ids_BT[first:last],
            labels_BT=self.labels_BT[first:last],
            positions_BT=self.positions_BT[first:last],
            segment_starts=self.segment_starts[inside] - first * length,
            languages=self.languages[first:last],
        )


def sequential_rows(store: TokenStore, sequence_length: int, batch_rows: int, language: str = "") -> Iterator[RowBatch]:
    """Every document once, in stored order, for evaluation: batches of up to `batch_rows` rows.

    Packed by document; a document longer than what is left of its row goes on in the next, without its past.
    The end of the last row is padded with id 0, NO_LABEL, as a segment of its own. Raises UsageError for a
    length or a batch below 1, FailedError when a token file was changed under the mapping.
    """
    check_sequence_length(sequence_length)
    if batch_rows < 1:
        raise UsageError(f"batch_rows is {batch_rows}; it must be at least 1")
    order, ends = np.arange(store.documents), np.cumsum(store.lengths)
    rows_total = -(-store.tokens_total // sequence_length)
    for first in range(0, rows_total, batch_rows):
        store.check_unchanged()
        rows = min(batch_rows, rows_total - first)
        begin = first * sequence_length
        ids_BT, labels_BT, positions_BT, starts_BT = cut_rows(
            store, order, ends, begin, rows, sequence_length, "document"
        )
        yield RowBatch(ids_BT, labels_BT, positions_BT, flat_starts(starts_BT), (language,) * rows)


def cut_rows(
    store: TokenStore,
    order: np.ndarray,
    ends: np.ndarray,
    begin: int,
    rows: int,
    sequence_length: int,
    packing: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the documents joined in `order` (each ending at `ends`), from token `begin` on.

    Returns ids, labels, positions (int64) and segment starts (bool), each [rows, sequence_length]; beyond the
    end of the stream is padding as `sequential_rows` describes it.
    """
    total, tokens = int(ends[-1]), rows * sequence_length
    # One token more than the rows hold: it is the last label if its document began before.
    stop = min(begin + tokens + 1, total)
    first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, stop, side="left")
    documents, document_ends = order[first : last + 1], ends[first : last + 1]
    document_begins = document_ends - store.lengths[documents]
    buffer = np.zeros(tokens + 1, dtype=np.int64)
    inside = np.maximum(document_begins, begin) - document_begins, np.minimum(document_ends, stop) - document_begins
    store.gather(documents, *inside, buffer)
    labels = buffer[1:].copy()
    if store.masked:
        carries_loss = np.zeros(tokens + 1, dtype=np.uint8)
        store.gather_loss(documents, *inside, carries_loss)
        labels[carries_loss[1:] == 0] = NO_LABEL
    starts = np.zeros(tokens, dtype=bool)
    starts[::sequence_length] = True
    if packing == "document":
        last_tokens = document_ends - 1 - begin
        labels[last_tokens[last_tokens < tokens]] = NO_LABEL
        first_tokens = document_begins - begin
        starts[first_tokens[(first_tokens > 0) & (first_tokens < tokens)]] = True
    real = total - begin
    if real <= tokens:  # the stream ends here, so nothing follows its last token
        labels[real - 1 :] = NO_LABEL
    if real < tokens:
        starts[real] = True
    where = np.flatnonzero(starts)
    positions = np.arange(tokens) - np.repeat(where, np.diff(where, append=tokens))
    shape = (rows, sequence_length)
    return buffer[:-1].reshape(shape), labels.reshape(shape), positions.reshape(shape), starts.reshape(shape)


def flat_starts(starts_BT: np.ndarray) -> np.ndarray:
    """Flat offsets of the true places with B*T appended, int64 [segments + 1]."""
    return np.append(np.flatnonzero(starts_BT), starts_BT.size).astype(np.int64, copy=False)


def check_sequence_length(sequence_length: int) -> None:
    """Raise UsageError below 1."""
    if sequence_length < 1:
        raise UsageError(f"sequence_length is {sequence_length}; it must be at least 1")
