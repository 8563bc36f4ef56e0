"""The byte mover that is used: csrc/mover.cpp, or its twin in Python where the extension is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from elo_engine.checkpoint.python_mover import PythonMover
from elo_engine.checkpoint.syscalls import NATIVE_FAULTS
from elo_engine.checkpoint.transfer import PAGE, WAYS, Mover, Slot, Transfer, TransferError, lent
from elo_engine.errors import FailedError, UsageError
from elo_engine.native import CSRC, CSRC_REASON

__all__ = [
    "PAGE",
    "RING_SLOTS",
    "RING_SLOT_BYTES",
    "RING_THREADS",
    "Mover",
    "NativeMover",
    "PythonMover",
    "Slot",
    "Transfer",
    "TransferError",
    "borrowed",
    "make",
    "using",
]

# The ring on a CPU, for reading and for writing back. A virtual disk at 1.75 GB/s wants 16 direct reads under way:
# 1.03 GB took 0.86 s with 4 of 4 MiB, 0.72 s with 8 of 2 MiB, 0.71 s and the narrowest spread with 16 of 2 MiB; 32, or
# 1 MiB, brought nothing more (2 Zen 3 cores, 2026-11-23).
RING_SLOTS, RING_SLOT_BYTES, RING_THREADS = 16, 2 << 20, 16


class NativeMover(Mover):
    """csrc/mover.cpp. faults: (call number or -1, errno, at most so many bytes) for tests, see csrc/system_calls.h;
    without any it has the plain system calls.
    """

    def __init__(
        self, slots: int, slot_bytes: int, threads: int, faults: Sequence[tuple[int, int, int]] = NATIVE_FAULTS
    ) -> None:
        super().__init__(slots, slot_bytes, threads)
        if CSRC is None:
            raise UsageError(f"the native mover needs the C++ extension: {CSRC_REASON}")
        try:
            self._native = CSRC.Mover(slots, slot_bytes, threads, list(faults))
        except (MemoryError, RuntimeError) as error:
            raise FailedError(
                f"the {threads} threads and {(slots + threads) * slot_bytes >> 20} MiB for reading cannot be "
                f"had: {error}. Raise the limits on processes and memory (ulimit -u, -v), or free some."
            ) from error
        self.ring = torch.frombuffer(self._native.memory(), dtype=torch.uint8)

    def acquire(self) -> Slot | None:
        index, generation = self._native.acquire()
        return None if index < 0 else self._slot(index, generation)

    def release(self, slot: Slot) -> None:
        self._native.release(slot.index, slot.generation)

    def fill(self, slot: Slot, fd: int, offset: int, length: int, way: str = "buffered", direct_fd: int = -1) -> int:
        number: int = self._native.fill(slot.index, slot.generation, fd, direct_fd, offset, length, WAYS.index(way))
        return number

    def into(self, target: Tensor, fd: int, offset: int, way: str = "buffered", direct_fd: int = -1) -> int:
        size = lent(target).numel()
        number: int = self._native.into(target.data_ptr(), size, fd, direct_fd, offset, size, WAYS.index(way))
        return number

    def store(self, slot: Slot, fd: int, offset: int, length: int) -> int:
        number: int = self._native.store(slot.index, slot.generation, fd, offset, length)
        return number

    def wait(self, number: int) -> Transfer:
        error, ended, at, skip, transferred, way = self._native.wait(number)
        if error or ended:
            raise TransferError(error, at)
        return Transfer(skip, transferred, WAYS[way])

    def drain(self) -> None:
        self._native.drain()


_choice = "auto"
_shared: dict[tuple[type[Mover], int, int, int, int], Mover] = {}


def _native() -> bool:
    return CSRC is not None if _choice == "auto" else _choice == "native"


def make(slots: int, slot_bytes: int, threads: int) -> Mover:
    """A new mover: native where the extension is there, unless `using` says otherwise."""
    return NativeMover(slots, slot_bytes, threads) if _native() else PythonMover(slots, slot_bytes, threads)


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Force "native" or "python" inside the block, for tests and benchmarks; process-wide.

    Raises:
        UsageError: it is unknown, or the extension is missing.
    """
    global _choice
    if choice not in ("auto", "native", "python"):
        raise UsageError(f"mover {choice!r} is unknown: use auto, native or python.")
    if choice == "native" and CSRC is None:
        raise UsageError(f"the native mover needs the C++ extension: {CSRC_REASON}")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


@contextmanager
def borrowed(slots: int, slot_bytes: int, threads: int) -> Iterator[Mover]:
    """The process's mover of these sizes, made once: with a GPU its memory is registered only once.

    Whoever comes while it is in use gets one of their own. After an error it is not given back, because a slot of it
    may still be held.
    """
    kind: type[Mover] = NativeMover if _native() else PythonMover
    key = (kind, slots, slot_bytes, threads, os.getpid())  # threads do not come along into a forked process
    mover = _shared.pop(key, None) or make(slots, slot_bytes, threads)
    yield mover
    _shared[key] = mover
