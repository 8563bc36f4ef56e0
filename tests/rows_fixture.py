"""Rows of random tokens cut into documents at random places."""

from __future__ import annotations

import numpy as np

from elo_engine.data.rows import RowBatch, flat_starts


def random_rows(
    seed: int, B: int, T: int, documents: int, *, vocabulary: int = 304, ends: bool = False, unlabelled: float = 0
) -> RowBatch:
    """B rows of T tokens of so many documents each. ends: the last token of a document has no label. unlabelled: the
    share of tokens that have none.
    """
    chance = np.random.default_rng(seed)
    starts_BT = np.zeros((B, T), bool)
    starts_BT[:, 0] = True
    for row in starts_BT:
        row[chance.choice(np.arange(1, T), documents - 1, replace=False)] = True
    return _filled(chance, starts_BT, vocabulary, ends=ends, unlabelled=unlabelled)


def rows_up_to(
    seed: int, B: int, T: int, shortest: int, longest: int, *, vocabulary: int, unlabelled: float = 0.0
) -> RowBatch:
    """B rows of T tokens of documents of random lengths, so that their number is another one each time."""
    chance = np.random.default_rng(seed)
    starts_BT = np.zeros((B, T), bool)
    for row in starts_BT:
        at = 0
        while at < T:
            row[at] = True
            at += int(chance.integers(shortest, longest + 1))
    return _filled(chance, starts_BT, vocabulary, ends=False, unlabelled=unlabelled)


def _filled(
    chance: np.random.Generator, starts_BT: np.ndarray, vocabulary: int, *, ends: bool, unlabelled: float
) -> RowBatch:
    B, T = starts_BT.shape
    starts = flat_starts(starts_BT)
    positions = np.concatenate([np.arange(size) for size in np.diff(starts)]).reshape(B, T)
    ids = chance.integers(0, vocabulary, (B, T))
    labels = np.roll(ids, -1, 1)
    if ends:
        labels[np.roll(starts_BT, -1, 1)] = -100
    if unlabelled:
        labels[chance.random((B, T)) < unlabelled] = -100
    return RowBatch(ids, labels, positions, starts, ("x",) * B)
