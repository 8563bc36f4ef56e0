"""Tensors that are read piece by piece: what a writer needs of a tensor that does not have to be in memory.

Positioned reads and no mapping: a file that is shortened meanwhile is an error, not a SIGBUS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from elo_engine.checkpoint.header import TensorEntry, header_length, parse_header
from elo_engine.checkpoint.index import CheckpointIndex, check_unchanged, open_checkpoint, open_shard
from elo_engine.checkpoint.syscalls import open_folder, open_regular, read_exactly
from elo_engine.errors import FailedError

OPEN_SHARDS = 32  # of a reader: `ulimit -n` is often 1024, and a large model has as many shards
PIECE_ITEMS = 1 << 20  # elements at once: with its cast and its check of finite values some 16 MiB of memory


class Pieces(Protocol):
    """A tensor that can be asked for a stretch of its elements, in row-major order."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def piece(self, first: int, count: int) -> Tensor:
        """Elements first .. first + count as a 1-D tensor; it may be overwritten by the next call."""


class TensorPieces:
    """A tensor in memory, on any device, as `Pieces`."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self._flat = tensor.detach().reshape(-1)

    def piece(self, first: int, count: int) -> Tensor:
        return self._flat[first : first + count]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file as `Pieces`.

    The file is opened for every piece (some 10 us, for 4 MiB) and compared with what it was when its header was
    read, so that nobody has to close it and two versions never mix.
    """

    path: Path
    entry: TensorEntry
    seen: tuple[int, int, int]  # size, mtime_ns, inode

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.torch_dtype

    def piece(self, first: int, count: int) -> Tensor:
        """Raises FailedError: the file is gone, changed or truncated, or cannot be read."""
        width = self.dtype.itemsize
        slot = torch.empty(count * width, dtype=torch.uint8)
        where = f"{self.path}: tensor {self.entry.name!r}"
        fd = open_existing(self.path)
        try:
            check_same(fd, self.seen, self.path)
            read_exactly(fd, slot.numpy().data, self.entry.begin + first * width, where)
            check_same(fd, self.seen, self.path)
        finally:
            os.close(fd)
        return slot.view(self.dtype)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file by name, in file order; reads the header alone.

    Raises FailedError: no such file, not a regular one, or a header that breaks a rule of the format.
    """
    fd = open_existing(path)
    try:
        entries, _, seen = read_header(fd, path)
    finally:
        os.close(fd)
    return {name: StoredTensor(path, entry, seen) for name, entry in entries.items()}


def open_existing(path: Path) -> int:
    """Descriptor of a regular file; FailedError when it is missing."""
    try:
        return open_regular(str(path), None, str(path))
    except FileNotFoundError:
        raise FailedError(f"{path}: no such file. Check the path, or make the file again.") from None


def read_header(fd: int, path: Path) -> tuple[dict[str, TensorEntry], dict[str, str], tuple[int, int, int]]:
    """Tensors in file order, `__metadata__`, and what `check_same` compares, of an open safetensors file."""
    status = os.fstat(fd)
    first = bytearray(min(8, status.st_size))
    read_exactly(fd, memoryview(first), 0, str(path))
    blob = bytearray(8 + header_length(bytes(first), str(path), status.st_size))
    read_exactly(fd, memoryview(blob), 0, str(path))
    entries, metadata = parse_header(bytes(blob), shard=path.name, file_size=status.st_size, where=str(path))
    return entries, metadata, (status.st_size, status.st_mtime_ns, status.st_ino)


def check_same(fd: int, seen: tuple[int, int, int], path: Path) -> None:
    """FailedError unless the open file has the size, time and inode that it had when its header was read."""
    status = os.fstat(fd)
    if (status.st_size, status.st_mtime_ns, status.st_ino) != seen:
        raise FailedError(f"{path}: was changed while it was read. Stop what writes to it and run the command again.")


class ShardReader:
    """Bytes of one checkpoint's shards. Context manager; `check` is for before anything is made of what was read.

    At most OPEN_SHARDS are open at once; of more, the one that was not read for longest is closed.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._files: dict[str, int] = {}  # descriptors, the one read last at the end

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, shard: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of a shard. Raises FailedError: changed, truncated, gone, I/O error."""
        fd = self._files.pop(shard, None)
        if fd is None:
            self._make_room()
            fd = self._open(shard)
        self._files[shard] = fd
        read_exactly(fd, buffer, offset, str(self.index.folder / shard))

    def check(self) -> None:
        """FailedError when the folder is no longer what it was: a shard that was read, another one, config.json."""
        for shard in self._files:
            self._check_open(shard)
        now = open_checkpoint(self.index.folder)
        if now.identity() != self.index.identity() or now.shards != self.index.shards:
            raise FailedError(
                f"{self.index.folder}: was changed while it was read. Stop what writes to it and run the command again."
            )

    def _check_open(self, shard: str) -> None:
        check_unchanged(self._files[shard], self.index.shards[shard], self.index.folder, "while it was read")

    def _make_room(self) -> None:
        """A shard that is closed here is compared first: nobody could tell later what was read of it."""
        while len(self._files) >= OPEN_SHARDS:
            oldest = next(iter(self._files))
            self._check_open(oldest)
            os.close(self._files.pop(oldest))

    def _open(self, shard: str) -> int:
        info = self.index.shards[shard]
        with open_folder(self.index.folder) as dir_fd:
            fd = open_shard(info, dir_fd, self.index.folder)
        try:
            check_unchanged(fd, info, self.index.folder, "after the checkpoint was opened")
        except BaseException:
            os.close(fd)
            raise
        return fd
