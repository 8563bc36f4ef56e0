"""Streams, events and memory of `fake_cuda.py`: what was ordered after what, and whether it had to be.

Time passes by counting: each stream numbers what is queued on it, and knows how far each other one had come when it
last waited for it (vector clocks, Mattern 1989).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

HOST = "host"


class Race(AssertionError):
    """Two streams touch the same memory in no order."""


class Stream:
    """As torch.cuda.Stream."""

    def __init__(self, device: Any = None, name: str = "") -> None:
        self.device = device
        self.name = name or f"stream {len(world.streams)}"
        self.seen: dict[str, int] = {}  # how far each stream had come when this one last waited for it
        world.streams[self.name] = self

    def wait_event(self, event: Event) -> None:
        assert event.seen is not None, "waits for an event that was never recorded: on a card that is no wait at all"
        merge(self.seen, event.seen)

    def wait_stream(self, other: Stream) -> None:
        merge(self.seen, other.seen)

    def synchronize(self) -> None:
        world.waits.append("stream.synchronize")
        merge(world.streams[HOST].seen, self.seen)

    def tick(self) -> int:
        """The number of what is queued now, after all that the host has seen."""
        merge(self.seen, world.streams[HOST].seen)
        self.seen[self.name] = self.seen.get(self.name, 0) + 1
        return self.seen[self.name]


class Event:
    """As torch.cuda.Event."""

    def __init__(self, **options: Any) -> None:
        self.seen: dict[str, int] | None = None
        self.timed = options.get("enable_timing", False)

    def record(self, stream: Stream | None = None) -> None:
        self.seen = dict((stream or world.current).seen)

    def synchronize(self) -> None:
        assert self.seen is not None, "waits for an event that was never recorded"
        merge(world.streams[HOST].seen, self.seen)

    def query(self) -> bool:
        return False

    def elapsed_time(self, after: Event) -> float:
        assert self.timed and after.timed and None not in (self.seen, after.seen), "two that were recorded with a time"
        seen = world.streams[HOST].seen
        for event in (self, after):
            assert all(seen.get(name, 0) >= count for name, count in event.seen.items()), "it may not have come to pass"
        return 1.0


def merge(into: dict[str, int], other: dict[str, int]) -> None:
    for name, count in other.items():
        into[name] = max(into.get(name, 0), count)


class Memory:
    """One storage of the device, or one of the host that copies of the device touch."""

    def __init__(self, tensor: Tensor, stream: Stream | None) -> None:
        self.ref = StorageWeakRef(tensor.untyped_storage())
        self.made_on = stream  # None: of the host
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self.uses: list[tuple[int, int, str, int, bool, str]] = []  # bytes [begin, end), stream, its number, writes, by
        self.recorded: set[str] = set()  # record_stream

    def use(self, tensor: Tensor, stream: Stream, writes: bool, by: str) -> None:
        begin = tensor.storage_offset() * tensor.element_size()
        span = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        end = begin + (span * tensor.element_size() if tensor.numel() else 0)
        number = stream.seen.get(stream.name, 0)
        kept = []
        for use in self.uses:
            first, last, name, when, wrote, who = use
            ordered = stream.seen.get(name, 0) >= when
            overlap = first < end and begin < last
            if overlap and (writes or wrote) and not ordered:
                raise Race(
                    f"{by} on {stream.name} {'writes' if writes else 'reads'} what {who} on {name} "
                    f"{'writes' if wrote else 'reads'}, {self.shape} of {self.dtype}, and neither waits for the other"
                )
            if not (writes and ordered and begin <= first and last <= end):
                kept.append(use)
        self.uses = [*kept, (begin, end, stream.name, number, writes, by)]

    def give_back(self) -> None:
        """What other streams do with it must be known to the stream that gets it again."""
        if self.made_on is None:
            return
        for _, _, name, when, _, who in self.uses:
            if name not in self.recorded and self.made_on.seen.get(name, 0) < when:
                raise Race(
                    f"memory of {self.shape}, {self.dtype}, is given back to {self.made_on.name}, which does not wait "
                    f"for {who} on {name}"
                )


class World:
    """What there is, and what happened since `begin`."""

    def __init__(self) -> None:
        self.streams: dict[str, Stream] = {}
        self.memories: dict[int, Memory] = {}
        self.pinned: list[tuple[int, int]] = []
        self.kept: list[Tensor] = []  # pinned memory stays, so that its addresses stay pinned
        self.waits: list[str] = []
        self.launched: list[str] = []
        self.current: Stream

    def begin(self) -> None:
        self.__init__()  # type: ignore[misc]
        Stream(name=HOST)
        self.current = Stream(name="compute")

    def pin(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        begin = tensor.untyped_storage().data_ptr()
        self.pinned.append((begin, begin + tensor.untyped_storage().nbytes()))
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        pointer = tensor.data_ptr()
        return tensor.numel() == 0 or any(begin <= pointer < end for begin, end in self.pinned)

    def sweep(self, stream: Stream) -> None:
        """A tensor is made on this stream, of what was made on it and given back before."""
        gone = [key for key, one in self.memories.items() if one.made_on in (stream, None) and one.ref.expired()]
        for key in gone:
            self.memories.pop(key).give_back()

    def memory(self, tensor: Tensor) -> Memory:
        key = tensor.untyped_storage()._cdata
        known = self.memories.get(key)
        if known is None or known.ref.expired():
            self.sweep(self.current)
            known = self.memories[key] = Memory(tensor, self.current if isinstance(tensor, FakeTensor) else None)
        return known


world = World()
