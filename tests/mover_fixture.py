"""The movers there are on this machine, and the same faults for either of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from elo_engine.checkpoint import mover as module
from elo_engine.checkpoint.mover import Mover, NativeMover, PythonMover
from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.native import CSRC

KINDS = ("python",) if CSRC is None else ("native", "python")
Faults = Sequence[tuple[int, int, int]]  # (call number or -1, errno, at most so many bytes), csrc/system_calls.h


def make_mover(
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    slots: int = 2,
    slot_bytes: int = 8192,
    threads: int = 2,
    faults: Faults = (),
) -> Mover:
    """A mover of this kind whose transfers fail as `faults` say."""
    if kind == "native":
        return NativeMover(slots, slot_bytes, threads, faults)
    if faults:
        fail(monkeypatch, faults)
    return PythonMover(slots, slot_bytes, threads)


def use_faulty(kind: str, monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    """From now on readers with a ring of their own get such a mover."""

    def make(slots: int, slot_bytes: int, threads: int) -> Mover:
        return make_mover(kind, monkeypatch, slots, slot_bytes, threads, faults)

    monkeypatch.setattr("elo_engine.checkpoint.reader.make", make)
    assert module.make is not make


def fail(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    """FaultyCalls of csrc/system_calls.h, for the table in Python."""
    calls = 0

    def faulty(name: str) -> None:
        real = getattr(SYSCALLS, name)

        def transfer(fd: int, buffer: memoryview, offset: int) -> int:
            nonlocal calls
            number, calls, count = calls, calls + 1, len(buffer)
            for call, code, limit in faults:
                if call not in (number, -1):
                    continue
                if code:
                    raise OSError(code, os.strerror(code))
                count = min(count, limit)
            return 0 if count == 0 else int(real(fd, buffer[:count], offset))

        monkeypatch.setattr(SYSCALLS, name, transfer)

    faulty("pread")
    faulty("pwrite")
