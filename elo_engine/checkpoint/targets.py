"""Where bytes go from a slot: a CPU tensor at once, or a GPU's over its own stream while the next slots are filled.

`mark` gives a token for what has been placed so far; until it is done the slot may not be used again. Reusing it
earlier would corrupt weights silently, which is why slots also carry generations (checkpoint/mover.py).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elo_engine.checkpoint.mover import Mover, Slot
from elo_engine.checkpoint.plan import Piece
from elo_engine.errors import FailedError

Token = Any  # what `done` and `wait` of the same target understand


class Target(ABC):
    """One read's destination device."""

    # Whether bytes that need no conversion may be read straight into the tensors.
    reads_into = False

    @abstractmethod
    def place(self, source: Tensor, piece: Piece, target: Tensor) -> None:
        """Copy a piece (uint8, in a slot) to its place in the contiguous `target`, converting to its dtype."""

    def mark(self) -> Token:
        """A token for everything placed so far; None when it is done already."""
        return None

    def done(self, token: Token) -> bool:
        """Whether what the token stands for has happened."""
        return True

    def wait(self, token: Token) -> None:  # noqa: B027 (what blocks has nothing to wait for)
        """Return when it has."""

    def finish(self) -> None:  # noqa: B027
        """Return when nothing of this read is under way; the tensors may be used."""


class CpuTarget(Target):
    """Copies block, so a slot is free as soon as `place` returns."""

    reads_into = True

    def place(self, source: Tensor, piece: Piece, target: Tensor) -> None:
        _copy(source, piece, target, lambda part: part)


class CudaTarget(Target):
    """Copies on a stream of their own, from a ring that is registered with the driver once.

    Over the bus in the file's dtype, and converted on the device.
    """

    def __init__(self, device: torch.device, mover: Mover) -> None:
        self._device = device
        _register(mover)
        self._stream = torch.cuda.Stream(device)
        # The tensors' memory may still be in use by work queued before them.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def place(self, source: Tensor, piece: Piece, target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            _copy(source, piece, target, lambda part: part.to(self._device, non_blocking=True))

    def mark(self) -> Token:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def done(self, token: Token) -> bool:
        return bool(token.query())

    def wait(self, token: Token) -> None:
        token.synchronize()

    def finish(self) -> None:
        self._stream.synchronize()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def make_target(device: torch.device, mover: Mover) -> Target:
    """The target of a device."""
    return CudaTarget(device, mover) if device.type == "cuda" else CpuTarget()


def free_slot(mover: Mover, target: Target, in_use: list[tuple[Slot, Token]]) -> Slot | None:
    """A slot to fill, after giving back those whose copies are done; `in_use` is oldest first. None: all are busy."""
    while in_use and target.done(in_use[0][1]):
        mover.release(in_use.pop(0)[0])
    return mover.acquire()


def _copy(source: Tensor, piece: Piece, target: Tensor, across: Callable[[Tensor], Tensor]) -> None:
    on_disk = piece.entry.torch_dtype
    first = (piece.begin - piece.entry.begin) // on_disk.itemsize
    flat = target.view(-1)[first : first + source.numel() // on_disk.itemsize]
    if target.dtype == on_disk:
        # As bytes, so that every bit pattern of every dtype survives.
        flat.view(torch.uint8).copy_(source, non_blocking=True)
        return
    if source.storage_offset() % on_disk.itemsize:  # the format does not align tensors to their elements
        source = source.clone()
    flat.copy_(across(source.view(on_disk)))


def _register(mover: Mover) -> None:
    """Page-lock the ring for the GPU, once in its life: pinning afresh for each load costs more than it brings.

    Released before the mover's memory goes: later memory at the same address would pass for registered, and copies from
    it would read the old pages.
    """
    if mover.registered:
        return
    runtime, pointer = torch.cuda.cudart(), mover.ring.data_ptr()
    error = int(runtime.cudaHostRegister(pointer, mover.ring.numel(), 1))  # portable: for every device
    if error:
        raise FailedError(
            f"the {mover.ring.numel()} bytes of the reading ring could not be registered with the GPU (CUDA error "
            f"{error}). Raise the limit on locked memory (ulimit -l), or free host memory."
        )
    mover.registered = True
    weakref.finalize(mover, runtime.cudaHostUnregister, pointer).atexit = False  # by then the driver cleans up itself
