"""Reads chosen tensors of a checkpoint, and nothing else: plan -> ring -> device.

Why the destination's memory matters more than how it is read (2 Zen 3 cores, page cache warm, 700 MB): into fresh small
pages 2.5 GB/s, into fresh huge pages 8 GB/s, into the ring's warm slots and from there on 6 to 7. So bytes that need no
conversion on the CPU go straight into tensors on huge pages; all others go through the ring, read ahead by its threads.
What is not in the page cache is read past it (O_DIRECT) through the ring.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.index import CheckpointIndex, check_unchanged, open_shard
from elo_engine.checkpoint.mover import (
    RING_SLOT_BYTES,
    RING_SLOTS,
    RING_THREADS,
    Mover,
    Slot,
    TransferError,
    borrowed,
    make,
)
from elo_engine.checkpoint.plan import Chunk, coalesce, cut, cut_by_tensor, in_file_order
from elo_engine.checkpoint.residency import advise_huge, open_direct, resident_share
from elo_engine.checkpoint.syscalls import open_folder
from elo_engine.checkpoint.targets import Target, Token, free_slot, make_target
from elo_engine.errors import FailedError, UsageError

__all__ = ["METHODS", "CheckpointReader", "RingShape", "coalesce"]

METHODS = ("auto", "pread", "direct", "mmap")
_WAYS = {"pread": "buffered", "direct": "direct", "mmap": "mapped"}
_RESIDENT = 0.5  # with half of a range in the page cache, reading past it asks the disk for more than it saves
# Transfers under way from the page cache. They are copies, so more than the cores can do at once only get in each
# other's way: 1.03 GB took 0.25 s with 4, 0.33 s with 16 (2 Zen 3 cores, 2026-11-23). Direct reads wait for the disk.
_CACHED_AHEAD = 2 * (os.cpu_count() or 2)
_TINY_BYTES = 64 << 10  # tensors smaller than this on average share a transfer: whole pages for each would add up
_MAX_OPEN = 32  # shards; a checkpoint may have more than a process may open
_CACHED_BYTES = 4 << 20  # of one such transfer straight into a tensor, which no slot bounds


@dataclass(frozen=True)
class RingShape:
    """Slots, their bytes and the threads that fill them; for the CPU as checkpoint/mover.py says."""

    slots: int = RING_SLOTS
    slot_bytes: int = RING_SLOT_BYTES
    threads: int = RING_THREADS

    @staticmethod
    def for_device(device: torch.device) -> RingShape:
        """Towards a GPU a core copies at a fraction of the link's rate: one thread a core, two slots a thread."""
        if device.type != "cuda":
            return RingShape()
        threads = max(4, min(16, os.cpu_count() or 4))
        return RingShape(slots=2 * threads, threads=threads)


@dataclass
class _File:
    fd: int
    direct_fd: int = -1  # not opened, or the filesystem has none

    def close(self) -> None:
        for fd in (self.fd, self.direct_fd):
            if fd >= 0:
                os.close(fd)


@dataclass
class _Read:
    """One call of `read`: what is under way."""

    mover: Mover
    target: Target
    out: dict[str, Tensor]
    total: int
    progress: Callable[[int, int], None] | None
    waiting: deque[tuple[Chunk, int, Slot | None]] = field(default_factory=deque)  # being filled, in file order
    in_use: list[tuple[Slot, Token]] = field(default_factory=list)  # filled, and being copied to the device
    done: int = 0


class CheckpointReader:
    """Context manager that reads tensors of one `CheckpointIndex`; not for several threads at once.

    method "auto" (default) asks the page cache, range by range: what is there is read with pread, the rest with
    O_DIRECT. "pread", "direct" and "mmap" force one; "mmap" copies out of a mapping under a guard (C++ only). A file
    that is shortened meanwhile is a FailedError by all of them, and all give equal bytes. `bytes_read` counts the bytes
    really taken from the files' tensor data, `bytes_by_way` the same by "buffered", "direct" and "mapped", `seconds`
    the time.
    """

    def __init__(self, index: CheckpointIndex, method: str = "auto", *, ring: RingShape | None = None) -> None:
        if method not in METHODS:
            raise UsageError(f"reader method {method!r} is unknown: use one of {', '.join(METHODS)}.")
        self.index = index
        self.method = method
        self.bytes_read = 0
        self.bytes_by_way = dict.fromkeys(_WAYS.values(), 0)
        self.seconds = 0.0
        self._ring = ring
        self._files: dict[str, _File] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor. May be called twice; a later `read` opens anew."""
        while self._files:
            self._files.popitem()[1].close()

    def read(
        self,
        names: Iterable[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Tensor]:
        """The named tensors as {name: contiguous tensor}, in file order (shard, offset), each shaped as on
        disk.

        dtype: what floating-point tensors are converted to on the way; others keep theirs. progress(done,
        total) is called in bytes after every transfer. Raises UsageError (no such tensor), RefusedError (packed
        sub-byte dtype) and FailedError (truncated, replaced or changed while it was read; I/O error).
        """
        began = time.perf_counter()
        entries = in_file_order({self.index.entry(name) for name in names})
        where = torch.device(device)
        out: dict[str, Tensor] = {}
        for entry in entries:  # all of them first, so that what does not fit fails before anything is read
            source = entry.torch_dtype
            convert = dtype is not None and source.is_floating_point
            out[entry.name] = torch.empty(entry.shape, dtype=dtype if convert else source, device=where)
            if where.type == "cpu":
                advise_huge(out[entry.name])
        if self.index.remote is not None:
            self.index.remote.ensure(entries, progress)
        shape = self._ring or RingShape.for_device(where)
        with ExitStack() as stack:
            if self._ring is None:
                mover = stack.enter_context(borrowed(shape.slots, shape.slot_bytes, shape.threads))
            else:
                mover = make(shape.slots, shape.slot_bytes, shape.threads)
            read = _Read(mover, make_target(where, mover), out, sum(entry.nbytes for entry in entries), progress)
            try:
                for run in coalesce(entries):
                    self._read_run(run, read)
                while read.waiting:
                    self._take(read)
            finally:
                _settle(read)
        for shard, file in self._files.items():
            check_unchanged(file.fd, self.index.shards[shard], self.index.folder, "while it was read")
        self.seconds += time.perf_counter() - began
        return out

    def _read_run(self, run: list[TensorEntry], read: _Read) -> None:
        if run[0].shard not in self._files:
            self._make_room(read)
        file = self._open(run[0].shard)
        way = self._way(run, file)
        # The header's and fstat's word on the file, once more before its bytes are taken.
        check_unchanged(file.fd, self.index.shards[run[0].shard], self.index.folder, "while it was read")
        # Results are taken in order, so more wait than threads work: one slow read must not leave the disk idle.
        ahead = 4 * read.mover.threads if way == "direct" else min(_CACHED_AHEAD, read.mover.threads)
        for chunk in self._chunks(run, way, read):
            while len(read.waiting) >= ahead:
                self._take(read)
            if len(chunk.pieces) == 1 and self._straight(chunk.pieces[0].entry, read):
                piece = chunk.pieces[0]
                flat = read.out[piece.entry.name].view(-1).view(torch.uint8)
                memory = flat[piece.begin - piece.entry.begin : piece.end - piece.entry.begin]
                read.waiting.append((chunk, read.mover.into(memory, file.fd, chunk.begin, way, file.direct_fd), None))
                continue
            while (slot := free_slot(read.mover, read.target, read.in_use)) is None:
                if read.waiting:
                    self._take(read)
                else:  # every slot is on its way to the device
                    read.target.wait(read.in_use[0][1])
            number = read.mover.fill(slot, file.fd, chunk.begin, chunk.end - chunk.begin, way, file.direct_fd)
            read.waiting.append((chunk, number, slot))

    def _chunks(self, run: list[TensorEntry], way: str, read: _Read) -> Iterator[Chunk]:
        """The run's transfers: one tensor each, or slots shared by neighbours that are tiny or need a conversion."""
        tiny = run[-1].end - run[0].begin < _TINY_BYTES * len(run)
        if tiny or any(not self._straight(entry, read) for entry in run):
            return cut(run, read.mover.slot_bytes)
        return cut_by_tensor(run, read.mover.slot_bytes if way == "direct" or self._ring else _CACHED_BYTES)

    def _straight(self, entry: TensorEntry, read: _Read) -> bool:
        return read.target.reads_into and read.out[entry.name].dtype == entry.torch_dtype

    def _way(self, run: list[TensorEntry], file: _File) -> str:
        if self.method != "auto":
            way = _WAYS[self.method]
            if way == "direct" and file.direct_fd < 0:
                raise UsageError(
                    f"{self.index.folder / run[0].shard}: its filesystem has no direct reads (O_DIRECT). Use method "
                    "'auto'."
                )
            return way
        share = resident_share(file.fd, run[0].begin, run[-1].end - run[0].begin)
        return "direct" if share is not None and share < _RESIDENT and file.direct_fd >= 0 else "buffered"

    def _take(self, read: _Read) -> None:
        """Wait for the oldest transfer and send its bytes on."""
        chunk, number, slot = read.waiting.popleft()
        try:
            transfer = read.mover.wait(number)
        except TransferError as error:
            if slot is not None:
                read.in_use.append((slot, None))
            raise self._failure(chunk, error) from error
        except BaseException:  # Ctrl-C: the slot is given back when nothing writes to it any more
            if slot is not None:
                read.in_use.append((slot, None))
            raise
        self.bytes_read += transfer.transferred
        self.bytes_by_way[transfer.way] += transfer.transferred
        if slot is not None:
            start = transfer.skip - chunk.begin
            try:
                for piece in chunk.pieces:
                    source = slot.memory[start + piece.begin : start + piece.end]
                    read.target.place(source, piece, read.out[piece.entry.name])
            finally:
                read.in_use.append((slot, read.target.mark()))
        read.done += chunk.end - chunk.begin
        if read.progress is not None:
            read.progress(read.done, read.total)

    def _failure(self, chunk: Chunk, error: TransferError) -> FailedError:
        at = next((piece for piece in chunk.pieces if error.at < piece.end), chunk.pieces[0])
        where = f"{self.index.folder / chunk.shard}: tensor {at.entry.name!r}"
        if error.error == 0:
            return FailedError(
                f"{where}: truncated: the file ends at byte {error.at}, bytes up to {chunk.end} were wanted. Somebody "
                "shortened it after it was opened, or it is damaged: fetch it again."
            )
        return FailedError(
            f"{where}: reading {chunk.end - chunk.begin} bytes at offset {chunk.begin} failed at offset {error.at}: "
            f"{os.strerror(error.error)}. Check the disk, then fetch the file again."
        )

    def _open(self, shard: str) -> _File:
        if shard not in self._files:
            info = self.index.shards[shard]
            with open_folder(self.index.folder) as dir_fd:
                file = self._files[shard] = _File(open_shard(info, dir_fd, self.index.folder))
            check_unchanged(file.fd, info, self.index.folder, "after the checkpoint was opened")
            if self.method in ("auto", "direct"):
                file.direct_fd = open_direct(file.fd)
        return self._files[shard]

    def _make_room(self, read: _Read) -> None:
        """Close the shard that was opened first, once nothing of it is being read, if there are too many."""
        if len(self._files) < _MAX_OPEN:
            return
        shard = next(iter(self._files))
        while any(chunk.shard == shard for chunk, _, _ in read.waiting):
            self._take(read)
        check_unchanged(self._files[shard].fd, self.index.shards[shard], self.index.folder, "while it was read")
        self._files.pop(shard).close()


def _settle(read: _Read) -> None:
    """After the last byte or an error: nothing writes to memory any more, and every slot is back in the ring."""
    try:
        read.mover.drain()
    finally:
        read.target.finish()
    for slot, _ in read.in_use:
        read.mover.release(slot)
    for _, _, filling in read.waiting:
        if filling is not None:
            read.mover.release(filling)
    read.in_use.clear()
    read.waiting.clear()
