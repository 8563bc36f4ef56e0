"""What a read will do, before it does anything: which byte ranges, in file order, cut to what a slot holds.

Tensor names sort as text ("layers.10" before "layers.2"), files do not: everything is ordered by shard and offset, and
neighbours are read as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.mover import PAGE


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one tensor inside a chunk: absolute offsets in its shard."""

    entry: TensorEntry
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One transfer: bytes begin .. end of a shard and the tensors' parts that lie in them, end to end."""

    shard: str
    begin: int
    end: int
    pieces: tuple[Piece, ...]


def in_file_order(entries: set[TensorEntry]) -> list[TensorEntry]:
    """Sorted by shard, then offset."""
    return sorted(entries, key=lambda e: (e.shard, e.begin, e.end, e.name))


def coalesce(entries: list[TensorEntry]) -> list[list[TensorEntry]]:
    """Runs of tensors that lie one after the other in one shard; `entries` is in file order.

    Only true neighbours are joined: a gap is a tensor nobody asked for. Empty tensors have no bytes and join
    no run.
    """
    runs: list[list[TensorEntry]] = []
    for entry in entries:
        if entry.nbytes == 0:
            continue
        if runs and runs[-1][-1].shard == entry.shard and runs[-1][-1].end == entry.begin:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs


def cut(run: list[TensorEntry], slot_bytes: int) -> Iterator[Chunk]:
    """Chunks of one run that fit a slot, whole pages of the file included, and never cut through an element.

    All but the first begin at a page, so that a direct read takes no block twice, unless an element lies across.
    """
    begin, last, at = run[0].begin, run[-1].end, 0
    while begin < last:
        end = min(begin // PAGE * PAGE + slot_bytes, last)
        while run[at].end <= begin:
            at += 1
        pieces = []
        for number in range(at, len(run)):  # no slice: of 100,000 tensors every chunk would copy the rest of the list
            entry = run[number]
            if entry.begin >= end:
                break
            if entry.end > end:
                end -= (end - entry.begin) % entry.torch_dtype.itemsize
            if entry.begin < end:
                pieces.append(Piece(entry, max(begin, entry.begin), min(end, entry.end)))
        yield Chunk(run[0].shard, begin, end, tuple(pieces))
        begin = end


def cut_by_tensor(run: list[TensorEntry], slot_bytes: int) -> Iterator[Chunk]:
    """Chunks of one tensor each, for reading straight into the tensors' own memory; else as `cut`."""
    for entry in run:
        begin = entry.begin
        while begin < entry.end:
            end = min(begin // PAGE * PAGE + slot_bytes, entry.end)
            yield Chunk(entry.shard, begin, end, (Piece(entry, begin, end),))
            begin = end
