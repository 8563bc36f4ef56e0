"""Reads chosen tensors of a checkpoint, and nothing else, through one reused staging slot.

Why a slot and not the destination or a mapping: reading into fresh pages costs more than reading into a warm
buffer and copying (2 cores, page cache warm, 600 MB of bf16: 1.7 to 1.9 GB/s through the slot, 1.2 to 1.5
GB/s straight into new tensors), and a conversion to another dtype or device needs the bytes in between
anyway.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.index import CheckpointIndex, check_unchanged
from elo_engine.checkpoint.syscalls import open_folder, open_regular, read_exactly
from elo_engine.errors import FailedError, UsageError

SLOT_BYTES = 16 << 20  # larger slots measured no faster and fall out of the last-level cache
_WIDEST_ITEM = 16


class CheckpointReader:
    """Context manager that reads tensors of one `CheckpointIndex`; not for several threads at once.

    method "pread" (default) reads with positioned reads: a file that is shortened meanwhile is a FailedError.
    "mmap" copies from a mapping, with the file's state compared before and after every copy; a file shortened
    in between those two can still end the process with SIGBUS, which is why it is not the default. Both give
    equal bytes. `bytes_read` counts the bytes really taken from the files' tensor data.
    """

    def __init__(
        self, index: CheckpointIndex, method: str = "pread", *, slot_bytes: int = SLOT_BYTES
    ) -> None:
        if method not in ("pread", "mmap"):
            raise UsageError(f"reader method {method!r} is unknown: use 'pread' or 'mmap'.")
        assert slot_bytes >= _WIDEST_ITEM
        self.index = index
        self.method = method
        self.bytes_read = 0
        self._slot_bytes = slot_bytes
        self._slot: Tensor | None = None
        self._stack = ExitStack()
        self._files: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor and mapping and drop the slot. May be called twice; a later `read` opens
        anew.
        """
        self._stack.close()
        self._files.clear()
        self._maps.clear()
        self._slot = None

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
        total) is called in bytes after every slot. Raises UsageError (no such tensor), RefusedError (packed
        sub-byte dtype) and FailedError (truncated, replaced or changed while it was read; I/O error).
        """
        entries = sorted(
            {self.index.entry(name) for name in names}, key=lambda e: (e.shard, e.begin, e.end, e.name)
        )
        target = torch.device(device)
        out: dict[str, Tensor] = {}
        for entry in entries:  # all of them first, so that what does not fit fails before anything is read
            source = entry.torch_dtype
            out[entry.name] = torch.empty(
                entry.shape,
                dtype=dtype if dtype is not None and source.is_floating_point else source,
                device=target,
            )
        total = sum(entry.nbytes for entry in entries)
        done = 0
        for run in coalesce(entries):
            for begin, end in self._cuts(run):
                slot = self._fill(run, begin, end, target)
                for entry in run:
                    low, high = max(begin, entry.begin), min(end, entry.end)
                    if low < high:
                        _place(slot[low - begin : high - begin], entry, low, out[entry.name])
                done += end - begin
                if progress is not None:
                    progress(done, total)
        for shard, fd in self._files.items():
            check_unchanged(fd, self.index.shards[shard], self.index.folder, "while it was read")
        return out

    def _cuts(self, run: list[TensorEntry]) -> Iterator[tuple[int, int]]:
        """Byte ranges of at most one slot that cover the run and never cut through an element."""
        begin, last = run[0].begin, run[-1].end
        while begin < last:
            end = min(begin + self._slot_bytes, last)
            cut = next((entry for entry in run if entry.begin < end < entry.end), None)
            if cut is not None:
                end -= (end - cut.begin) % cut.torch_dtype.itemsize
            yield begin, end
            begin = end

    def _fill(self, run: list[TensorEntry], begin: int, end: int, device: torch.device) -> Tensor:
        """Bytes begin..end of the run's shard as a uint8 view of the slot; valid until the next call."""
        shard = run[0].shard
        fd = self._open(shard)
        if self._slot is None or (device.type == "cuda" and not self._slot.is_pinned()):
            self._slot = torch.empty(self._slot_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        slot = self._slot[: end - begin]
        buffer = slot.numpy().data
        first = next(entry for entry in run if entry.end > begin)
        where = f"{self.index.folder / shard}: tensor {first.name!r}"
        if self.method == "pread":
            read_exactly(fd, buffer, begin, where)
        else:
            # Touching a page behind the end of a shortened file is a SIGBUS, so ask right before.
            check_unchanged(fd, self.index.shards[shard], self.index.folder, "while it was read")
            with memoryview(self._map(shard, fd)) as mapping, mapping[begin:end] as piece:
                buffer[:] = piece
            check_unchanged(fd, self.index.shards[shard], self.index.folder, "while it was read")
        self.bytes_read += end - begin
        return slot

    def _open(self, shard: str) -> int:
        if shard not in self._files:
            where = str(self.index.folder / shard)
            with open_folder(self.index.folder) as dir_fd:
                try:
                    fd = open_regular(shard, dir_fd, where)
                except FileNotFoundError:
                    raise FailedError(
                        f"{where}: has gone since the checkpoint was opened. Fetch it again."
                    ) from None
            self._stack.callback(os.close, fd)
            check_unchanged(
                fd, self.index.shards[shard], self.index.folder, "after the checkpoint was opened"
            )
            self._files[shard] = fd
        return self._files[shard]

    def _map(self, shard: str, fd: int) -> mmap.mmap:
        if shard not in self._maps:
            mapping = mmap.mmap(fd, self.index.shards[shard].size, access=mmap.ACCESS_READ)
            self._maps[shard] = self._stack.enter_context(mapping)
        return self._maps[shard]


def coalesce(entries: list[TensorEntry]) -> list[list[TensorEntry]]:
    """Runs of tensors that lie one after the other in one shard; `entries` is sorted by (shard, offset).

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


def _place(piece: Tensor, entry: TensorEntry, low: int, target: Tensor) -> None:
    """Copy a uint8 piece, which starts at file offset `low`, to where it belongs in the target tensor.

    Every copy blocks until the slot may be used again, also towards a GPU.
    """
    source = entry.torch_dtype
    first = (low - entry.begin) // source.itemsize
    flat = target.view(-1)[first : first + piece.numel() // source.itemsize]
    if target.dtype == source:
        flat.view(torch.uint8).copy_(piece)  # as bytes, so that every bit pattern of every dtype survives
        return
    if piece.storage_offset() % source.itemsize:  # the format does not align tensors to their elements
        piece = piece.clone()
    # Over the bus in the file's dtype, which is the smaller one, and converted on the device.
    flat.copy_(piece.view(source).to(target.device))
