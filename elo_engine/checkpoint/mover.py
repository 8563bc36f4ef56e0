"""Moves bytes from files to memory and back: one fixed ring of slots on huge pages, and a pool of threads.

`Mover` is the interface; `NativeMover` runs csrc/mover.cpp, `PythonMover` is its twin, used where the extension is
missing and what it is tested against. A slot belongs to whoever acquired it, under a generation number: giving back a
slot that has been given back already is refused, because somebody else's bytes may be in it by now. Nothing here knows
what the bytes mean.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.errors import UsageError
from elo_engine.native import CSRC, CSRC_REASON

PAGE = 4096  # csrc/mover.h: kPage
WAYS = ("buffered", "direct", "mapped")
# The ring on a CPU, for reading and for writing back. A virtual disk at 1.75 GB/s wants 16 direct reads under way:
# 1.03 GB took 0.86 s with 4 of 4 MiB, 0.72 s with 8 of 2 MiB, 0.71 s and the narrowest spread with 16 of 2 MiB; 32, or
# 1 MiB, brought nothing more (2 Zen 3 cores, 2026-11-23).
RING_SLOTS, RING_SLOT_BYTES, RING_THREADS = 16, 2 << 20, 16
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Slot:
    """A piece of the ring, the holder's until `release`. `memory`: uint8, all its bytes."""

    index: int
    generation: int
    memory: Tensor


@dataclass(frozen=True, slots=True)
class Transfer:
    """A finished transfer. `skip`: where in the slot the first wanted byte lies; `transferred`: bytes really taken from
    or given to the file; `way`: how, which is "buffered" where a direct read was not possible.
    """

    skip: int
    transferred: int
    way: str


class TransferError(Exception):
    """A transfer that failed at file offset `at`: `error` is the system's number, or 0 where the file ended there."""

    def __init__(self, error: int, at: int) -> None:
        super().__init__(f"{os.strerror(error) if error else 'the file ended'} at byte {at}")
        self.error = error
        self.at = at


class Mover(ABC):
    """`slots` pieces of `slot_bytes` (whole pages), moved by `threads`. Not for several callers at once.

    ValueError for what a caller must not do: a stale slot, bytes that do not fit, an unknown transfer.
    """

    def __init__(self, slots: int, slot_bytes: int, threads: int) -> None:
        self.slots, self.slot_bytes, self.threads = slots, slot_bytes, threads
        self.ring: Tensor  # uint8 [slots * slot_bytes]

    def _slot(self, index: int, generation: int) -> Slot:
        return Slot(index, generation, self.ring[index * self.slot_bytes : (index + 1) * self.slot_bytes])

    @abstractmethod
    def acquire(self) -> Slot | None:
        """A free slot, or None."""

    @abstractmethod
    def release(self, slot: Slot) -> None:
        """Give a slot back; what is in it must have been used."""

    @abstractmethod
    def fill(self, slot: Slot, fd: int, offset: int, length: int, way: str = "buffered", direct_fd: int = -1) -> int:
        """Start reading into a slot; the number to `wait` for. "direct" reads whole pages around the range, from
        `direct_fd`, the same file opened with O_DIRECT.
        """

    @abstractmethod
    def into(self, target: Tensor, fd: int, offset: int, way: str = "buffered", direct_fd: int = -1) -> int:
        """Start reading straight into `target` (contiguous uint8, CPU), which must live until `wait` or `drain`.

        "direct" goes by way of a slot of the thread's own, which the range and the pages around it must fit.
        """

    @abstractmethod
    def store(self, slot: Slot, fd: int, offset: int, length: int) -> int:
        """Start writing the slot's first `length` bytes to `offset`."""

    @abstractmethod
    def wait(self, number: int) -> Transfer:
        """The result of a transfer, once; TransferError when it failed."""

    @abstractmethod
    def drain(self) -> None:
        """Drop what has not begun and wait for the rest, so that no memory is used any more. Slots stay held."""


def _lent(target: Tensor) -> Tensor:
    if target.device.type != "cpu" or target.dtype != torch.uint8 or not target.is_contiguous():
        raise ValueError("mover: the memory to read into must be contiguous bytes on the CPU")
    return target


class NativeMover(Mover):
    """csrc/mover.cpp. faults: (call number or -1, errno, at most so many bytes) for tests, see csrc/system_calls.h."""

    def __init__(self, slots: int, slot_bytes: int, threads: int, faults: Sequence[tuple[int, int, int]] = ()) -> None:
        super().__init__(slots, slot_bytes, threads)
        if CSRC is None:
            raise UsageError(f"the native mover needs the C++ extension: {CSRC_REASON}")
        self._native = CSRC.Mover(slots, slot_bytes, threads, list(faults))
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
        size = _lent(target).numel()
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


class PythonMover(Mover):
    """The twin, through `SYSCALLS`. No mapped reads: without C++ nothing catches the SIGBUS of a shortened file."""

    def __init__(self, slots: int, slot_bytes: int, threads: int) -> None:
        super().__init__(slots, slot_bytes, threads)
        if slots < 1 or threads < 1 or slot_bytes < 2 * PAGE or slot_bytes % PAGE:
            raise ValueError("mover: one slot or more, of whole pages, two or more, and one thread or more")
        self.ring = torch.frombuffer(_huge_memory(slots * slot_bytes), dtype=torch.uint8)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mover")
        self._own = threading.local()
        self._generation = 0
        self._held: dict[int, int] = {}  # slot -> generation
        self._busy: dict[int, Future[Transfer]] = {}  # slot -> its transfer
        self._jobs: dict[int, Future[Transfer]] = {}
        self._numbers = 0

    def acquire(self) -> Slot | None:
        free = next((index for index in range(self.slots) if index not in self._held), None)
        if free is None:
            return None
        self._generation += 1
        self._held[free] = self._generation
        return self._slot(free, self._generation)

    def _check(self, slot: Slot) -> None:
        if not 0 <= slot.index < self.slots:
            raise ValueError("mover: there is no such slot")
        if self._held.get(slot.index) != slot.generation:
            raise ValueError("mover: stale: the slot has been released since, and may hold other bytes")
        busy = self._busy.get(slot.index)
        if busy is not None and not busy.done():
            raise ValueError("mover: the slot's transfer has not ended")

    def release(self, slot: Slot) -> None:
        self._check(slot)
        del self._held[slot.index]

    def _start(self, job: Callable[..., Transfer], fd: int, offset: int, span: int, memory: Tensor, *more: int) -> int:
        if fd < 0 or offset < 0 or span < 1:
            raise ValueError("mover: a descriptor, an offset or a length is out of range")
        if span > memory.numel():
            raise ValueError("mover: the bytes do not fit their slot")
        self._numbers += 1
        self._jobs[self._numbers] = self._pool.submit(job, fd, offset, memory.numpy().data, *more)
        return self._numbers

    def fill(self, slot: Slot, fd: int, offset: int, length: int, way: str = "buffered", direct_fd: int = -1) -> int:
        self._check(slot)
        _no_mapping(way)
        if way == "buffered":
            number = self._start(_read, fd, offset, length, slot.memory, length)
        elif direct_fd < 0:
            raise ValueError("mover: a direct read needs its descriptor")
        else:
            span = -(-(offset % PAGE + length) // PAGE) * PAGE if length > 0 else 0
            number = self._start(_read_direct, fd, offset, span, slot.memory, length, direct_fd)
        self._busy[slot.index] = self._jobs[number]
        return number

    def into(self, target: Tensor, fd: int, offset: int, way: str = "buffered", direct_fd: int = -1) -> int:
        _no_mapping(way)
        size = _lent(target).numel()
        if way == "buffered":
            return self._start(_read, fd, offset, size, target, size)
        if direct_fd < 0:
            raise ValueError("mover: a direct read needs its descriptor")
        if -(-(offset % PAGE + size) // PAGE) * PAGE > self.slot_bytes:
            raise ValueError("mover: the bytes do not fit their slot")
        return self._start(self._read_through, fd, offset, size, target, size, direct_fd)

    def _read_through(self, fd: int, offset: int, memory: memoryview, length: int, direct_fd: int) -> Transfer:
        if not hasattr(self._own, "slot"):  # of this thread, whole pages and aligned to them
            self._own.slot = memoryview(_huge_memory(self.slot_bytes))
        found = _read_direct(fd, offset, self._own.slot, length, direct_fd)
        memory[:length] = self._own.slot[found.skip : found.skip + length]
        return Transfer(0, found.transferred, found.way)

    def store(self, slot: Slot, fd: int, offset: int, length: int) -> int:
        self._check(slot)
        number = self._start(_write, fd, offset, length, slot.memory, length)
        self._busy[slot.index] = self._jobs[number]
        return number

    def wait(self, number: int) -> Transfer:
        if number not in self._jobs:
            raise ValueError("mover: no such transfer, or its result was given out")
        return self._jobs.pop(number).result()

    def drain(self) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.cancel()
        for job in jobs.values():
            if not job.cancelled():
                job.exception()


def _huge_memory(size: int) -> mmap.mmap:
    """Private, which `mmap` is not by itself: shared memory has no huge pages, and a direct read into 4 KiB pages takes
    three times as long (0.61 against 1.75 GB/s).
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _no_mapping(way: str) -> None:
    if way == "mapped":
        why = CSRC_REASON or "the twin is forced"
        raise UsageError(f"mapped reads need the C++ extension, which guards them: {why}")


def _read(fd: int, offset: int, memory: memoryview, length: int, done: int = 0) -> Transfer:
    size = os.fstat(fd).st_size
    if offset + length > size:
        raise TransferError(0, size)
    while done < length:
        try:
            count = SYSCALLS.pread(fd, memory[done:length], offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            raise TransferError(error.errno or errno.EIO, offset + done) from error
        if count <= 0:
            raise TransferError(0, offset + done)
        done += count
    return Transfer(0, length, "buffered")


def _read_direct(fd: int, offset: int, memory: memoryview, length: int, direct_fd: int) -> Transfer:
    """As Mover::read_direct in csrc/mover.cpp, which says why it goes on as it does."""
    size = os.fstat(fd).st_size
    if offset + length > size:
        raise TransferError(0, size)
    skip = offset % PAGE
    begin, wanted = offset - skip, skip + length
    span = -(-wanted // PAGE) * PAGE
    done = transferred = 0
    while done < wanted:
        try:
            count = SYSCALLS.pread(direct_fd, memory[done:span], begin + done)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in _NO_DIRECT:
                return Transfer(0, transferred + _read(fd, offset, memory, length).transferred, "buffered")
            raise TransferError(error.errno or errno.EIO, begin + done) from error
        transferred += count
        if count > 0 and done + count >= wanted:
            break
        if count < PAGE:
            raise TransferError(0, begin + done + max(count, 0))
        done = (done + count) // PAGE * PAGE
    return Transfer(skip, transferred, "direct")


def _write(fd: int, offset: int, memory: memoryview, length: int) -> Transfer:
    done = 0
    while done < length:
        try:
            count = SYSCALLS.pwrite(fd, memory[done:length], offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            raise TransferError(error.errno or errno.EIO, offset + done) from error
        if count <= 0:
            raise TransferError(errno.EIO, offset + done)
        done += count
    return Transfer(0, done, "buffered")


_choice = "auto"
_shared: dict[tuple[type[Mover], int, int, int, int], Mover] = {}
_in_use = threading.Lock()


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
    """The process's mover of these sizes, made once: its pages are touched and, with a GPU, registered only once.

    Whoever comes while it is in use gets one of their own.
    """
    if not _in_use.acquire(blocking=False):
        yield make(slots, slot_bytes, threads)
        return
    try:
        kind: type[Mover] = NativeMover if _native() else PythonMover
        key = (kind, slots, slot_bytes, threads, os.getpid())  # threads do not come along into a forked process
        if key not in _shared:
            _shared[key] = make(slots, slot_bytes, threads)
        yield _shared[key]
    finally:
        _in_use.release()
