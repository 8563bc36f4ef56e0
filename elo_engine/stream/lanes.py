"""Order between copies and computation: three streams on a GPU, nothing on a CPU, where everything happens at once.

Whoever touches a piece of memory says so, and whether it writes: a reader waits for the last writer, a writer also for
all readers since. That is all the order there is, so what does not touch the same memory overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch

LaneName = Literal["compute", "down", "up"]  # down: host to device


class Fence:
    """What has been queued for one piece of memory."""

    def __init__(self) -> None:
        self._written: Any = None
        self._read: list[Any] = []

    def before_reading(self) -> list[Any]:
        """The events to wait for."""
        return [] if self._written is None else [self._written]

    def before_writing(self) -> list[Any]:
        """The events to wait for."""
        return [*self.before_reading(), *self._read]

    def was_read(self, event: Any) -> None:
        """A reader is queued."""
        self._read.append(event)

    def was_written(self, event: Any) -> None:
        """A writer is queued; it has waited for all that were there."""
        self._written, self._read = event, []


class Lanes:
    """The streams of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: dict[str, Any] = {}
        if device.type == "cuda":
            self.streams = {"down": torch.cuda.Stream(device), "up": torch.cuda.Stream(device)}

    @contextmanager
    def on(self, lane: LaneName, *, reads: Sequence[Fence] = (), writes: Sequence[Fence] = ()) -> Iterator[None]:
        """Queue what is inside the block on a lane, after what it depends on."""
        if not self.streams:
            yield
            return
        stream = self.streams.get(lane) or torch.cuda.current_stream(self.device)
        for fence in reads:
            for event in fence.before_reading():
                stream.wait_event(event)
        for fence in writes:
            for event in fence.before_writing():
                stream.wait_event(event)
        with torch.cuda.stream(stream) if lane != "compute" else nullcontext():
            yield
        event = torch.cuda.Event()
        event.record(stream)
        for fence in reads:
            fence.was_read(event)
        for fence in writes:
            fence.was_written(event)

    def keep_until_read(self, *pieces: Any) -> None:
        """Memory that is about to be let go of: the computation behind it, which may get it, waits for its readers."""
        for piece in pieces:
            with self.on("compute", writes=[piece.fence]):
                pass

    def finish(self) -> None:
        """Wait on the host until every lane is empty."""
        if self.streams:
            torch.cuda.synchronize(self.device)
