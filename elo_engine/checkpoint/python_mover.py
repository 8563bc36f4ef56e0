"""The twin of csrc/mover.cpp, through `SYSCALLS`: used where the extension is missing, what it is tested against."""

from __future__ import annotations

import atexit
import errno
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import torch
from torch import Tensor

from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.checkpoint.transfer import PAGE, Mover, Slot, Transfer, TransferError, lent
from elo_engine.errors import UsageError

_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class _Job:
    """One transfer. Not a Future, whose Condition an interrupt can break; a plain lock it cannot."""

    def __init__(self, run: Callable[[], Transfer]) -> None:
        self.run: Callable[[], Transfer] | None = run  # None once it has run, or must not
        self.transfer: Transfer | None = None
        self.error: BaseException | None = None
        self.ended = False
        self._signal = threading.Lock()
        self._signal.acquire()

    def work(self) -> None:
        run, self.run = self.run, None
        try:
            if _ending.is_set():
                raise RuntimeError(_ENDS)
            if run is not None:
                self.transfer = run()
        except BaseException as error:  # the waiter's to raise
            self.error = error
        self.ended = True
        self._signal.release()

    def join(self) -> None:
        while not self.ended:
            self._signal.acquire(timeout=0.1)


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.work()
        del job  # its memory is not this thread's to keep


_ending, _ENDS = threading.Event(), "mover: the interpreter ends, and no transfer is begun any more"
_threads = weakref.WeakKeyDictionary[threading.Thread, SimpleQueue[_Job | None]]()
_PATIENCE_S = 10.0  # with a transfer that is under way when the interpreter ends


@atexit.register
def _end() -> None:
    """Nobody waits for transfers any more, so none is begun. Those under way are waited for: a thread that comes back
    from one when the interpreter is going is ended where it stands, and where that is within C++ the process crashes.
    """
    _ending.set()
    ends = time.monotonic() + _PATIENCE_S
    for jobs in _threads.values():
        jobs.put(None)
    for thread in list(_threads):
        thread.join(max(0.0, ends - time.monotonic()))


def _dismiss(jobs: SimpleQueue[_Job | None], threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)


class PythonMover(Mover):
    """The twin, through `SYSCALLS`. No mapped reads: without C++ nothing catches the SIGBUS of a shortened file."""

    def __init__(self, slots: int, slot_bytes: int, threads: int) -> None:
        super().__init__(slots, slot_bytes, threads)
        if slots < 1 or threads < 1 or slot_bytes < 2 * PAGE or slot_bytes % PAGE:
            raise ValueError("mover: one slot or more, of whole pages, two or more, and one thread or more")
        self.ring = torch.frombuffer(_huge_memory(slots * slot_bytes), dtype=torch.uint8)
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        for _ in range(threads):
            thread = threading.Thread(target=_work, args=(self._queue,), name="mover", daemon=True)
            thread.start()
            _threads[thread] = self._queue
        weakref.finalize(self, _dismiss, self._queue, threads)
        self._own = threading.local()
        self._generation = 0
        self._held: dict[int, int] = {}  # slot -> generation
        self._busy: dict[int, _Job] = {}  # slot -> its transfer
        self._jobs: dict[int, _Job] = {}
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
        if busy is not None and not busy.ended:
            raise ValueError("mover: the slot's transfer has not ended")

    def release(self, slot: Slot) -> None:
        self._check(slot)
        del self._held[slot.index]

    def _start(self, job: Callable[..., Transfer], fd: int, offset: int, span: int, memory: Tensor, *more: int) -> int:
        if _ending.is_set():
            raise RuntimeError(_ENDS)
        if fd < 0 or offset < 0 or span < 1:
            raise ValueError("mover: a descriptor, an offset or a length is out of range")
        if span > memory.numel():
            raise ValueError("mover: the bytes do not fit their slot")
        self._numbers += 1
        made = self._jobs[self._numbers] = _Job(partial(job, fd, offset, memory.numpy().data, *more))
        self._queue.put(made)
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
        size = lent(target).numel()
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
        job = self._jobs[number]
        job.join()  # an interrupt leaves it known: it still runs, and `drain` has to wait for it
        del self._jobs[number]
        if job.error is not None:
            raise job.error
        assert job.transfer is not None
        return job.transfer

    def drain(self) -> None:
        stopped: KeyboardInterrupt | None = None
        for job in self._jobs.values():
            job.run = None
        while self._jobs:
            number, job = next(iter(self._jobs.items()))
            try:
                job.join()
                self._jobs.pop(number, None)
            except KeyboardInterrupt as error:  # memory and descriptors are lent until the last transfer has ended
                stopped = error
        if stopped is not None:
            raise stopped


def _huge_memory(size: int) -> mmap.mmap:
    """Private, which `mmap` is not by itself: shared memory has no huge pages, and a direct read into 4 KiB pages takes
    three times as long (0.61 against 1.75 GB/s).
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _no_mapping(way: str) -> None:
    if way == "mapped":
        raise UsageError(
            "mapped reads need the C++ extension, which guards them; `elo doctor` says why it is not used."
        )


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
        if count <= 0:
            raise TransferError(0, begin + done)
        if count < PAGE:
            return Transfer(0, transferred + _read(fd, offset, memory, length).transferred, "buffered")
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
