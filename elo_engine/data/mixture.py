"""Step -> rows, as a pure function: no state to save, none to restore, the same rows on every machine.

Random numbers come from Philox as raw words that are then sorted: the raw stream of a numpy bit generator
never changes between versions, while the permutations drawn from it may.
Shapes: B rows, T tokens a row, N = B*T.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from elo_engine.data.rows import (
    NO_LABEL,
    RowBatch,
    check_sequence_length,
    cut_rows,
    flat_starts,
    sequential_rows,
)
from elo_engine.data.store import TokenStore
from elo_engine.errors import RefusedError, UsageError

__all__ = ["NO_LABEL", "Mixture", "RowBatch", "sequential_rows"]

PACKINGS = ("document", "concat")

# A block is sorted whole for every row in it, and larger ones are hardly meant to be exact.
_MAX_BLOCK_ROWS = 10_000
# Two, since a batch may reach from one epoch into the next.
_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class RowOrigin:
    """What a row of a mixture is made of.

    Attributes:
        row: its number in the run. epoch: of its language. documents: their numbers in the language's folder.
        file: in that folder, where the first one begins. token: where in the file this row does, counted in tokens.
    """

    row: int
    language: str
    epoch: int
    documents: tuple[int, ...]
    folder: str
    file: str
    token: int

    def describe(self) -> str:
        """For a person."""
        numbers = ", ".join(map(str, self.documents[:8])) + (" ..." if len(self.documents) > 8 else "")
        return (
            f"row {self.row} is {self.language}, epoch {self.epoch}, documents {numbers}, from token {self.token} of "
            f"{self.folder}/{self.file}"
        )

    def to_json(self) -> dict[str, Any]:
        """For metrics."""
        return asdict(self) | {"documents": list(self.documents)}


class Mixture:
    """An endless sequence of rows from several token folders in a fixed ratio.

    Rows come in blocks of sum(weights) rows (9:1 -> 10): each block holds exactly its share of every
    language, in an order shuffled anew for each block. A row of a language is that language's next one: for
    each epoch its documents are permuted, joined, and cut into rows of `sequence_length` tokens; what is left
    at the end of an epoch is shorter than a row and not used in it. The rows of a language depend neither on
    the weights nor on the other languages.

    packing "document": labels and segments never cross a document. "concat": a row is one segment, labels run
    on.

    Raises UsageError (weights and stores that do not match, a store shorter than one row, arguments out of
    range) and RefusedError (folders made by different tokenizers). Memory: 16 bytes a document and epoch, two
    epochs kept.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        weights: Mapping[str, float],
        sequence_length: int,
        seed: int,
        packing: str = "document",
    ) -> None:
        if packing not in PACKINGS:
            raise UsageError(f"packing is {packing!r}; it must be one of {', '.join(PACKINGS)}")
        check_sequence_length(sequence_length)
        _check_names(stores, weights)
        self.languages = tuple(sorted(stores))
        self.stores = {name: stores[name] for name in self.languages}
        self.sequence_length, self.seed, self.packing = sequence_length, int(seed), packing
        _check_tokenizers(self.stores)
        self.rows_per_epoch = {name: store.tokens_total // sequence_length for name, store in self.stores.items()}
        for name, rows in self.rows_per_epoch.items():
            if rows == 0:
                raise UsageError(
                    f"{name}: {self.stores[name].tokens_total} tokens in {self.stores[name].folder} are "
                    f"fewer than one row of {sequence_length}; give more text or a smaller sequence_length"
                )
        self.rows_per_block = _whole_ratio({name: weights[name] for name in self.languages})
        self.block_rows = sum(self.rows_per_block.values())
        self._block = np.repeat(np.arange(len(self.languages)), list(self.rows_per_block.values()))
        self._epochs: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self._changing = threading.Lock()  # rows are read ahead while an error names the documents of others

    def batch(self, step: int, rows_per_step: int) -> RowBatch:
        """The rows of one optimizer step."""
        return self.rows(step * rows_per_step, rows_per_step)

    def rows(self, first_row: int, count: int) -> RowBatch:
        """Rows first_row .. first_row + count - 1 of the run, whatever was asked before.

        Raises FailedError when a token file was changed under the mapping, UsageError for a negative first
        row or an empty range.
        """
        if first_row < 0 or count < 1:
            raise UsageError(f"rows({first_row}, {count}): the first row must be >= 0 and the count >= 1")
        for store in self.stores.values():
            store.check_unchanged()
        choice_B, index_B = self._choose(first_row, count)
        shape = (count, self.sequence_length)
        ids_BT, labels_BT, positions_BT = (np.empty(shape, dtype=np.int64) for _ in range(3))
        starts_BT = np.empty(shape, dtype=bool)
        for number, name in enumerate(self.languages):
            at = np.flatnonzero(choice_B == number)
            epochs = index_B[at] // self.rows_per_epoch[name]
            for epoch in np.unique(epochs).tolist():
                # The rows that a language has in an unbroken range are unbroken too: one stretch an epoch.
                here = at[epochs == epoch]
                first = int(index_B[here[0]]) - epoch * self.rows_per_epoch[name]
                order, ends = self._epoch(name, epoch)
                begin = first * self.sequence_length
                cut = cut_rows(self.stores[name], order, ends, begin, len(here), self.sequence_length, self.packing)
                ids_BT[here], labels_BT[here], positions_BT[here], starts_BT[here] = cut
        return RowBatch(
            ids_BT,
            labels_BT,
            positions_BT,
            flat_starts(starts_BT),
            tuple(self.languages[i] for i in choice_B.tolist()),
        )

    def origins(self, first_row: int, count: int) -> list[RowOrigin]:
        """Where the rows of `rows` come from, without reading a token."""
        choice_B, index_B = self._choose(first_row, count)
        found = []
        for row, (number, index) in enumerate(zip(choice_B.tolist(), index_B.tolist(), strict=True), first_row):
            name = self.languages[number]
            store, (epoch, nth) = self.stores[name], divmod(index, self.rows_per_epoch[name])
            order, ends = self._epoch(name, epoch)
            begin = nth * self.sequence_length
            first = int(np.searchsorted(ends, begin, side="right"))
            last = int(np.searchsorted(ends, begin + self.sequence_length, side="left"))
            documents = tuple(order[first : last + 1].tolist())
            file, start = store.place(documents[0])
            inside = begin - int(ends[first] - store.lengths[documents[0]])
            found.append(RowOrigin(row, name, epoch, documents, str(store.folder), file, start + inside))
        return found

    def _choose(self, first_row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of each row's language, and which of that language's rows it is; both int64 [count]."""
        first_block, last_block = first_row // self.block_rows, (first_row + count - 1) // self.block_rows
        words = _words(_key(self.seed, "blocks"), first_block * self.block_rows, (last_block + 1) * self.block_rows)
        order = np.argsort(words.reshape(-1, self.block_rows), axis=1, kind="stable")
        choice = self._block[order]
        index = np.empty_like(choice)
        block = np.arange(first_block, last_block + 1)[:, None]
        for number, share in enumerate(self.rows_per_block.values()):
            chosen = choice == number
            nth = block * share + np.cumsum(chosen, axis=1) - 1
            index[chosen] = nth[chosen]
        begin = first_row - first_block * self.block_rows
        return choice.ravel()[begin : begin + count], index.ravel()[begin : begin + count]

    def _epoch(self, name: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of a language's documents in an epoch and where each then ends; both int64 [documents]."""
        with self._changing:
            return self._plan(name, epoch)

    def _plan(self, name: str, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        plan = self._epochs.get((name, epoch))
        if plan is None:
            store = self.stores[name]
            order = np.argsort(_words(_key(self.seed, name, epoch), 0, store.documents), kind="stable")
            plan = order, np.cumsum(store.lengths[order])
            kept = [key for key in self._epochs if key[0] == name]
            for oldest in kept[: max(0, len(kept) - _EPOCHS_KEPT + 1)]:
                del self._epochs[oldest]
            self._epochs[name, epoch] = plan
        return plan


def _key(seed: int, *purpose: str | int) -> int:
    """A Philox key (128 bits) for one use of the seed; different uses are independent."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()[:16], "little")


def _words(key: int, begin: int, end: int) -> np.ndarray:
    """Words begin..end-1 of the key's stream, uint64 [end - begin]; any part costs only its own length."""
    counter = begin // 4  # Philox makes four words at a time
    words: np.ndarray = np.random.Philox(key=key, counter=counter).random_raw(end - 4 * counter)
    return words[begin - 4 * counter :]


def _check_names(stores: Mapping[str, TokenStore], weights: Mapping[str, float]) -> None:
    if not stores:
        raise UsageError("no token folders were given; name at least one language under data.shards")
    for name in weights:
        if name not in stores:
            known = ", ".join(sorted(stores))
            raise UsageError(
                f"data.mix names {name!r}, which has no token folder (there are: {known}); add it to data.shards"
            )
    for name in stores:
        if name not in weights:
            raise UsageError(
                f"data.shards names {name!r}, which has no weight; give it one in data.mix or leave it out"
            )


def _check_tokenizers(stores: Mapping[str, TokenStore]) -> None:
    first, *others = stores.items()
    for name, store in others:
        if store.tokenizer_sha256 != first[1].tokenizer_sha256:
            raise RefusedError(
                f"{store.folder} ({name}) and {first[1].folder} ({first[0]}) were made by different "
                "tokenizers; write both with the tokenizer of the model"
            )


def _whole_ratio(weights: dict[str, float]) -> dict[str, int]:
    """Weights as the smallest whole numbers in the same ratio, e.g. 0.9 and 0.1 -> 9 and 1."""
    shares: dict[str, Fraction] = {}
    for name, weight in weights.items():
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0):
            raise UsageError(
                f"data.mix.{name} is {weight!r}; a weight must be a number above 0 "
                "(a language that is not wanted is left out of data.shards too)"
            )
        exact = Fraction(float(weight))
        shares[name] = exact.limit_denominator(_MAX_BLOCK_ROWS)
        if abs(shares[name] - exact) > exact / 10**9:
            raise UsageError(
                f"data.mix.{name} is {weight!r}, no short fraction; use whole numbers, for example 9 and 1"
            )
    scale = math.lcm(*(share.denominator for share in shares.values()))
    whole = {name: int(share * scale) for name, share in shares.items()}
    divisor = math.gcd(*whole.values())
    whole = {name: share // divisor for name, share in whole.items()}
    if sum(whole.values()) > _MAX_BLOCK_ROWS:
        ratio = ":".join(str(share) for share in whole.values())
        raise UsageError(f"data.mix is {ratio}, exact only every {sum(whole.values())} rows; use smaller whole numbers")
    return whole
