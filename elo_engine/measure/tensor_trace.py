"""Every byte that torch's CPU allocator hands out and takes back in a stretch of work, in order.

torch's profiler reports each allocation and each free of that allocator, also those inside operators and in the
backward pass. It knows no block that was allocated before it began, so those are found at entry among the living
tensors of this process, and the end of each is seen through a weak reference.

Not seen: memory that is not a tensor's (scratch of C++ and of BLAS, Python's own), tensors on foreign memory that are
made inside the block (`torch.from_numpy`), and what only C++ holds at entry, such as tensors saved in the graph of a
loss that still lives: call it with no graph alive.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elo_engine.errors import FailedError

_FREED = "elo_engine: end of base storage "  # how the end of a storage is named among the profiler's events


@dataclass
class TensorTrace:
    """Filled when the block ends.

    Attributes:
        base_bytes: of all CPU storages that lived at entry.
        peak_bytes: the most that lived at one time: base, plus what was allocated, minus what was freed since.
        timeline: (seconds since the block began, bytes that live) after each allocation and each free; the first
            entry is the base, the last one the end of the block.
    """

    base_bytes: int = 0
    peak_bytes: int = 0
    timeline: list[tuple[float, int]] = field(default_factory=list)


class _Base:
    """The storages that live at entry. Frees are announced to the profiler by name, so that they keep their place."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.at: dict[int, int] = {}  # address -> number
        self._storages: list[Any] = []
        self._holders: list[int] = []  # Python objects that still hold it
        self._watches: list[weakref.ref[Any]] = []
        for holder, storage in _living_storages():
            number = self.at.setdefault(storage.data_ptr(), len(self.sizes))
            if number == len(self.sizes):
                self.sizes.append(storage.nbytes())
                self._storages.append(_weak(storage))
                self._holders.append(0)
            self._holders[number] += 1
            self._watches.append(weakref.ref(holder, self._watcher(number)))

    def _watcher(self, number: int) -> Any:
        def gone(_: Any) -> None:
            self._holders[number] -= 1
            if not self._holders[number]:
                with torch._C._profiler._RecordFunctionFast(f"{_FREED}{number}"):
                    pass

        return gone

    def freed(self, number: int) -> bool:
        return bool(self._storages[number].expired())

    def close(self) -> None:
        """Watch no longer."""
        self._watches.clear()


def _weak(storage: torch.UntypedStorage) -> Any:
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(storage)


def _living_storages() -> Iterator[tuple[Any, torch.UntypedStorage]]:
    """Every Python object that holds a CPU storage, with it; a tensor's gradient is an object once it is asked for."""
    gc.collect()
    seen: set[int] = set()
    # By type, each asked once: there are hundreds of thousands of objects, and some answer isinstance() by importing.
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, (Tensor, torch.UntypedStorage))}
    todo = [x for x in objects if type(x) in kinds]
    del objects
    while todo:
        holder = todo.pop()
        if id(holder) in seen or holder.device.type != "cpu":
            continue
        seen.add(id(holder))
        if isinstance(holder, Tensor):
            if holder.is_leaf and holder.grad is not None:
                todo.append(holder.grad)
            if hasattr(holder, "__tensor_flatten__"):  # a wrapper, such as a DTensor: its parts have the storages
                parts = [getattr(holder, part) for part in holder.__tensor_flatten__()[0]]
                todo.extend(part for part in parts if isinstance(part, Tensor))
                continue
            if holder.layout != torch.strided:
                continue
            storage = holder.untyped_storage()
        else:
            storage = holder
        # what cannot be resized lies in memory of others: the reader's ring, numpy's arrays
        if storage.nbytes() and storage.data_ptr() and storage.resizable():
            yield holder, storage


@contextmanager
def traced_tensor_bytes() -> Iterator[TensorTrace]:
    """Trace the block on this thread (the backward pass of CPU tensors runs on it too).

    Raises:
        FailedError: the profiler's events do not add up, so that no figure of this trace could be trusted.
    """
    trace = TensorTrace()
    base = _Base()
    trace.base_bytes = trace.peak_bytes = sum(base.sizes)
    profiler = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True, use_cpu=True)
    began = time.perf_counter()
    try:
        with profiler:
            yield trace
    finally:
        seconds = time.perf_counter() - began
        base.close()
        trace.timeline.append((0.0, trace.base_bytes))
        if profiler.kineto_results is not None:
            _replay(trace, base, profiler.kineto_results)
        trace.timeline.append((seconds, trace.timeline[-1][1]))


def _replay(trace: TensorTrace, base: _Base, results: Any) -> None:
    """Walk through the events in the order of their time; fills peak and timeline."""
    events = sorted(_memory_events(results.experimental_event_tree()), key=lambda event: event.start_time_ns)
    ours: dict[int, int] = {}  # address -> bytes, of what was allocated since
    left = set(range(len(base.sizes)))
    live, began, counter = trace.base_bytes, results.trace_start_ns(), None
    for event in events:
        if event.tag != torch._C._profiler._EventType.Allocation:
            number = int(event.name.removeprefix(_FREED))
            if number not in left or not base.freed(number):
                continue
            left.discard(number)
            live -= base.sizes[number]
        else:
            fields = event.extra_fields
            total, count = fields.total_allocated, fields.alloc_size
            if counter is not None and total != counter + count:
                raise FailedError(
                    f"tensor trace: the profiler counts {total} bytes after {counter} and an event of {count}, so "
                    "events are missing or out of order; trace a shorter stretch"
                )
            counter = total
            if count > 0:
                ours[fields.ptr] = count
                live += count
            elif fields.ptr in ours:
                live -= ours.pop(fields.ptr)
            else:
                # from an earlier trace, which the profiler remembers; its size may be that of a block before it
                number = base.at.get(fields.ptr, -1)
                if number not in left:
                    continue
                left.discard(number)
                live -= base.sizes[number]
        trace.timeline.append(((event.start_time_ns - began) / 1e9, live))
        trace.peak_bytes = max(trace.peak_bytes, live)
    # A storage that lost its end (a parameter's `.data` was replaced) counts as live to the last: never too little.
    late = sum(base.sizes[number] for number in left if base.freed(number))
    if late:
        trace.timeline.append((trace.timeline[-1][0], live - late))


def _memory_events(roots: list[Any]) -> Iterator[Any]:
    todo, allocation = list(roots), torch._C._profiler._EventType.Allocation
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if event.tag == allocation:
            if event.extra_fields.device.type == "cpu":
                yield event
        elif event.name.startswith(_FREED):
            yield event
