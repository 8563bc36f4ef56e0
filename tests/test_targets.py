"""Reading overlaps copying to a device, and no slot is used before its copy is done: with a slow fake device."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mover_fixture import KINDS
from reader_fixture import assert_equal, folder, tensors  # noqa: F401
from torch import Tensor

from elo_engine.checkpoint.index import open_checkpoint
from elo_engine.checkpoint.mover import Mover, using
from elo_engine.checkpoint.plan import Piece
from elo_engine.checkpoint.reader import CheckpointReader, RingShape
from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.checkpoint.targets import CpuTarget, Target, Token

# ruff: noqa: F811 (fixtures are parameters of their own name)
each = pytest.mark.parametrize("kind", KINDS)


class SlowDevice(Target):
    """Copies in order on a thread of its own, each after a delay, as a stream does: the bytes leave the slot late."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.copies = 0
        self._stream = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def place(self, source: Tensor, piece: Piece, target: Tensor) -> None:
        self._last = self._stream.submit(self._copy, source, piece, target)

    def _copy(self, source: Tensor, piece: Piece, target: Tensor) -> None:
        time.sleep(self.delay_s)
        CpuTarget().place(source, piece, target)
        self.copies += 1

    def mark(self) -> Token:
        return self._last

    def done(self, token: Token) -> bool:
        return bool(token.done())

    def wait(self, token: Token) -> None:
        token.result()

    def finish(self) -> None:
        self._stream.submit(lambda: None).result()


class CarelessDevice(SlowDevice):
    """Says at once that its copies are done."""

    def done(self, token: Token) -> bool:
        return True


class BrokenDevice(SlowDevice):
    """The third copy cannot be started."""

    def place(self, source: Tensor, piece: Piece, target: Tensor) -> None:
        if self.copies >= 2:
            raise RuntimeError("the device fell off the bus")
        super().place(source, piece, target)


def use(monkeypatch: pytest.MonkeyPatch, device: Target) -> None:
    def make_target(where: torch.device, mover: Mover) -> Target:
        return device

    monkeypatch.setattr("elo_engine.checkpoint.reader.make_target", make_target)


@each
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_slow_device_gets_every_byte(
    kind: str,
    slots: int,
    dtype: torch.dtype | None,
    folder: Path,
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SlowDevice(0.001)
    use(monkeypatch, device)
    with using(kind), CheckpointReader(open_checkpoint(folder), ring=RingShape(slots, 8192, 2)) as reader:
        found = reader.read(tensors, dtype=dtype)
    kept = ("ids", "mask", "bytes")
    assert_equal(found, {n: t if dtype is None or n in kept else t.float() for n, t in tensors.items()})
    assert device.copies >= len(tensors) - 1


@each
def test_reusing_a_slot_too_early_would_be_seen(
    kind: str, folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: with a device that lies about its copies it would."""
    use(monkeypatch, CarelessDevice(0.002))
    with using(kind), CheckpointReader(open_checkpoint(folder), ring=RingShape(2, 8192, 2)) as reader:
        found = reader.read(tensors)
    with pytest.raises(AssertionError):
        assert_equal(found, tensors)


@each
def test_reading_goes_on_while_the_device_copies(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About twice 10 ms of copying a slot and, for the twin, 20 ms of reading: together, not one after the other."""
    names, read_s, copy_s = [f"layers.{i}.weight" for i in range(12)], 0.02, 0.01
    real, filled = SYSCALLS.pread, []

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        time.sleep(read_s)
        filled.append(time.perf_counter())
        return real(fd, buffer, offset)

    index = open_checkpoint(folder)
    device = SlowDevice(copy_s)
    use(monkeypatch, device)
    monkeypatch.setattr(SYSCALLS, "pread", pread)
    began = time.perf_counter()
    with using(kind), CheckpointReader(index, "pread", ring=RingShape(4, 3 * 4096, 1)) as reader:
        reader.read(names)
    took = time.perf_counter() - began
    copies = device.copies
    if kind == "python":
        one_after_the_other = len(filled) * read_s + copies * copy_s
        assert len(filled) >= 8 and took < 0.8 * one_after_the_other, (took, one_after_the_other)
    else:  # native reads take no time: the copies alone remain
        assert took < 1.5 * copies * copy_s + 0.1


@each
def test_a_device_that_fails_and_a_reader_that_gives_up_leave_nothing_running(
    kind: str, folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_checkpoint(folder)
    before = set(os.listdir("/proc/self/fd"))
    with using(kind):
        for _ in range(5):
            use(monkeypatch, broken := BrokenDevice(0.001))
            with CheckpointReader(index, "direct") as reader, pytest.raises(RuntimeError, match="off the bus"):
                reader.read([name for name in tensors if name.startswith("layers.1")])
                reader.read(tensors)
            copies = broken.copies
            time.sleep(0.01)
            assert broken.copies == copies  # `finish` waited for those under way
        use(monkeypatch, SlowDevice(0.001))
        with CheckpointReader(index, "direct") as reader:
            assert_equal(reader.read(tensors), tensors)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("slots", [1, 8])
def test_to_a_real_one(slots: int, folder: Path, tensors: dict[str, Tensor]) -> None:
    for method in ("pread", "direct"):
        with CheckpointReader(open_checkpoint(folder), method, ring=RingShape(slots, 8192, 4)) as reader:
            same = reader.read(tensors, device="cuda")
            wide = reader.read(tensors, device="cuda", dtype=torch.float32)
        assert_equal({name: tensor.cpu() for name, tensor in same.items()}, tensors)
        assert all(torch.equal(wide[n].cpu(), t.float()) for n, t in tensors.items() if n.startswith("layers"))
