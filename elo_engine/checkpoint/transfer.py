"""What a byte mover is: one ring of slots, lent and given back under a generation number, and transfers to wait for.

A slot belongs to whoever acquired it: giving back a slot that has been given back already is refused, because somebody
else's bytes may be in it by now. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 4096  # csrc/mover.h: kPage
WAYS = ("buffered", "direct", "mapped")


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
        self.registered = False  # with a GPU's driver; checkpoint/targets.py sees to it

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


def lent(target: Tensor) -> Tensor:
    if target.device.type != "cpu" or target.dtype != torch.uint8 or not target.is_contiguous():
        raise ValueError("mover: the memory to read into must be contiguous bytes on the CPU")
    return target
