"""The byte mover, in C++ and its twin: the same bytes, the same refusals, the same failures."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forked import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from mover_fixture import KINDS, Faults, make_mover

from elo_engine.checkpoint.mover import PAGE, Mover, Transfer, TransferError, borrowed, make, using
from elo_engine.checkpoint.residency import open_direct
from elo_engine.errors import UsageError

SLOT = 2 * PAGE
SIZE = 5 * PAGE + 123
BYTES = bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy())
each = pytest.mark.parametrize("kind", KINDS)
native_only = pytest.mark.skipif("native" not in KINDS, reason="no C++ extension")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A descriptor of SIZE known bytes, and the same opened with O_DIRECT (-1 where that does not work)."""
    (tmp_path / "file").write_bytes(BYTES)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    direct_fd = open_direct(fd)
    yield fd, direct_fd
    os.close(fd)
    if direct_fd >= 0:
        os.close(direct_fd)


def read(
    mover: Mover, fd: int, offset: int, length: int, way: str = "buffered", direct_fd: int = -1
) -> tuple[bytes, Transfer]:
    """Through a slot, which is given back whatever happens."""
    slot = mover.acquire()
    assert slot is not None
    try:
        found = mover.wait(mover.fill(slot, fd, offset, length, way, direct_fd))
        return bytes(slot.memory[found.skip : found.skip + length].numpy()), found
    finally:
        mover.release(slot)


@each
@pytest.mark.parametrize("way", ["buffered", "direct", "mapped"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (0, SLOT),
        (1, 4095),
        (4095, 2),
        (4097, 4095),
        (PAGE, PAGE),
        (SIZE - 1, 1),
        (SIZE - 200, 200),
        (3000, SLOT - PAGE),
    ],
)
def test_any_range_comes_as_it_is(
    kind: str, way: str, offset: int, length: int, file: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "mapped" and kind == "python":
        pytest.skip("the twin refuses it, see below")
    if way == "direct" and file[1] < 0:
        pytest.skip("no O_DIRECT on this filesystem")
    data, found = read(make_mover(kind, monkeypatch), file[0], offset, length, way, file[1])
    assert data == BYTES[offset : offset + length]
    assert found.way == way
    if way == "direct":  # whole pages, but never past the end of the file
        assert found.transferred == min((offset + length + PAGE - 1) // PAGE * PAGE, SIZE) - offset // PAGE * PAGE
    else:
        assert found.transferred == length


@each
@settings(max_examples=60, deadline=None)
@given(
    offset=st.integers(0, SIZE - 1),
    length=st.integers(1, SIZE),
    limit=st.sampled_from([1, 7, 4096, None]),
    way=st.sampled_from(["buffered", "direct"]),
)
def test_straight_into_memory(
    kind: str, tmp_path_factory: pytest.TempPathFactory, offset: int, length: int, limit: int | None, way: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "straight"
    if not path.exists():
        path.write_bytes(BYTES)
    length = min(length, SIZE - offset, SLOT - offset % PAGE if way == "direct" else SIZE)
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as opened:
        mover = make_mover(kind, patch, faults=[] if limit is None or length > 300 else [(-1, 0, limit)])
        memory = torch.zeros(length + 2, dtype=torch.uint8)
        direct_fd = open_direct(opened.fileno())
        try:
            taken = direct_fd if direct_fd >= 0 else opened.fileno()
            assert mover.wait(mover.into(memory[1:-1], opened.fileno(), offset, way, taken)).skip == 0
        finally:
            if direct_fd >= 0:
                os.close(direct_fd)
    assert bytes(memory.numpy()) == b"\0" + BYTES[offset : offset + length] + b"\0"


@each
@pytest.mark.parametrize("way", ["buffered", "direct"])
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([(-1, 0, 1)], id="one byte at a time"),
        pytest.param([(0, errno.EINTR, 0), (2, errno.EINTR, 0), (1, 0, 4000)], id="interrupted and short"),
        pytest.param([(0, 0, PAGE)], id="one page, then the rest"),
        pytest.param([(0, 0, PAGE + 1), (1, 0, 4095)], id="off a page"),
        pytest.param([(-1, 0, 512)], id="blocks smaller than a page"),
    ],
)
def test_short_transfers_and_interrupts_change_nothing(
    kind: str, way: str, faults: Faults, file: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "direct" and file[1] < 0:
        pytest.skip("no O_DIRECT on this filesystem")
    mover = make_mover(kind, monkeypatch, faults=faults)
    data, _ = read(mover, file[0], 1000, 6000, way, file[1])
    assert data == BYTES[1000:7000]


@each
def test_a_direct_read_that_the_filesystem_refuses_is_read_through_the_cache(
    kind: str, file: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = make_mover(kind, monkeypatch, faults=[(0, errno.EINVAL, 0)])
    data, found = read(mover, file[0], 100, 5000, "direct", file[0])
    assert data == BYTES[100:5100] and found == Transfer(0, 5000, "buffered")


@each
@pytest.mark.parametrize("way", ["buffered", "direct"])
def test_failures_say_where(kind: str, way: str, file: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error in the middle; a file that ends early although it was long enough when asked; a range behind it."""
    first = PAGE if way == "direct" else 100
    cases: list[tuple[Faults, int, int]] = [
        ([(0, 0, first), (1, errno.EIO, 0)], errno.EIO, first),
        ([(0, 0, first), (1, 0, 0)], 0, first),
    ]
    for faults, code, at in cases:
        with monkeypatch.context() as patch:
            mover = make_mover(kind, patch, faults=faults)
            with pytest.raises(TransferError) as caught:
                read(mover, file[0], 0, 6000, way, file[0] if way == "direct" else -1)
            assert (caught.value.error, caught.value.at) == (code, at)
            assert read(mover, file[0], 0, 10)[0] == BYTES[:10]  # and it works on
    mover = make_mover(kind, monkeypatch)
    with pytest.raises(TransferError, match="the file ended") as caught:
        read(mover, file[0], SIZE - 5, 6, way, file[0])
    assert (caught.value.error, caught.value.at) == (0, SIZE)


@each
def test_closed_descriptor_is_an_error_number(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    os.close(fd)
    mover = make_mover(kind, monkeypatch)
    with pytest.raises((TransferError, OSError)) as caught:
        read(mover, fd, 0, 10)
    assert getattr(caught.value, "error", getattr(caught.value, "errno", None)) == errno.EBADF


@each
def test_writing_and_its_faults(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    cases: list[tuple[Faults, int | None]] = [
        ([], None),
        ([(-1, 0, 700)], None),
        ([(0, errno.EINTR, 0)], None),
        ([(1, errno.ENOSPC, 0), (0, 0, 9)], errno.ENOSPC),
        ([(0, errno.EIO, 0)], errno.EIO),
        ([(-1, 0, 0)], errno.EIO),
    ]
    for faults, code in cases:
        os.ftruncate(fd, 0)
        with monkeypatch.context() as patch:
            mover = make_mover(kind, patch, faults=faults)
            slot = mover.acquire()
            assert slot is not None
            slot.memory[:5000] = torch.frombuffer(bytearray(BYTES[:5000]), dtype=torch.uint8)
            number = mover.store(slot, fd, 33, 5000)
            if code is None:
                assert mover.wait(number).transferred == 5000
                assert path.read_bytes() == bytes(33) + BYTES[:5000]
            else:
                with pytest.raises(TransferError) as caught:
                    mover.wait(number)
                assert caught.value.error == code
            mover.release(slot)
    os.close(fd)


@each
def test_slots_belong_to_whoever_acquired_them(
    kind: str, file: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = make_mover(kind, monkeypatch)
    first, second = mover.acquire(), mover.acquire()
    assert first is not None and second is not None and mover.acquire() is None
    assert first.memory.data_ptr() % PAGE == 0 and first.memory.numel() == SLOT
    mover.release(first)
    for late in (
        lambda: mover.release(first),
        lambda: mover.fill(first, file[0], 0, 1),
        lambda: mover.store(first, file[0], 0, 1),
    ):
        with pytest.raises(ValueError, match="stale"):
            late()
    again = mover.acquire()
    assert again is not None and again.index == first.index and again.generation > first.generation
    with pytest.raises(ValueError, match="stale"):  # the same slot, but somebody else's by now
        mover.release(first)
    mover.release(again)
    mover.release(second)


@each
def test_what_a_caller_must_not_do(kind: str, file: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    mover, (fd, _) = make_mover(kind, monkeypatch), file
    slot = mover.acquire()
    assert slot is not None
    bad: list[Callable[[], object]] = [
        lambda: mover.fill(slot, fd, 0, SLOT + 1),
        lambda: mover.fill(slot, fd, 1, SLOT, "direct", fd),  # the pages around it do not fit
        lambda: mover.fill(slot, fd, 0, 10, "direct"),
        lambda: mover.fill(slot, fd, -1, 10),
        lambda: mover.fill(slot, fd, 0, 0),
        lambda: mover.fill(slot, -1, 0, 1),
        lambda: mover.fill(slot, fd, 0, 1, "sideways"),
        lambda: mover.into(torch.zeros(4), fd, 0),
        lambda: mover.into(torch.zeros(8, dtype=torch.uint8)[::2], fd, 0),
        lambda: mover.into(torch.zeros(8, dtype=torch.uint8), fd, 0, "direct"),  # without its descriptor
        lambda: mover.into(torch.zeros(SLOT, dtype=torch.uint8), fd, 1, "direct", fd),
        lambda: mover.store(slot, fd, 0, SLOT + 1),
        lambda: mover.wait(12345),
        lambda: make_mover(kind, monkeypatch, slots=0),
        lambda: make_mover(kind, monkeypatch, slot_bytes=PAGE),
        lambda: make_mover(kind, monkeypatch, slot_bytes=SLOT + 1),
        lambda: make_mover(kind, monkeypatch, threads=0),
    ]
    for number, call in enumerate(bad):
        with pytest.raises(ValueError):
            call()
            pytest.fail(f"case {number} was accepted")
    number = mover.fill(slot, fd, 0, 10)
    mover.wait(number)
    with pytest.raises(ValueError, match="given out"):
        mover.wait(number)
    mover.release(slot)  # after all of that the slot is still the caller's


@each
def test_nothing_is_written_after_draining(kind: str, file: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    mover = make_mover(kind, monkeypatch, threads=1)
    memory = torch.zeros(2000, SIZE, dtype=torch.uint8)
    numbers = [mover.into(row, file[0], 0) for row in memory]
    mover.drain()
    memory.zero_()
    with pytest.raises(ValueError):
        mover.wait(numbers[-1])
    time.sleep(0.02)
    assert int(memory.sum()) == 0


def test_using_and_borrowing() -> None:
    with pytest.raises(UsageError, match="unknown"), using("gpu"):
        pass
    for kind in KINDS:
        with using(kind), borrowed(2, SLOT, 1) as one, borrowed(2, SLOT, 1) as two:
            assert one is not two  # it is in use
            assert type(one).__name__.lower().startswith(kind) and type(two) is type(one)
        with using(kind), borrowed(2, SLOT, 1) as later:
            assert later is one


def test_the_twin_has_no_mapped_reads(file: tuple[int, int]) -> None:
    with using("python"):
        mover = make(2, SLOT, 1)
    slot = mover.acquire()
    assert slot is not None
    with pytest.raises(UsageError, match="mapped reads need the C"):
        mover.fill(slot, file[0], 0, 1, "mapped")
    with pytest.raises(UsageError, match="mapped reads need the C"):
        mover.into(torch.zeros(1, dtype=torch.uint8), file[0], 0, "mapped")


SHRINKING = """
import faulthandler, os, signal, sys, threading, torch
faulthandler.enable()
from elo_engine.checkpoint.mover import NativeMover, TransferError
path, size = sys.argv[1], 8 << 20
def whole():
    with open(path, "wb") as file: file.write(b"x" * size)
whole()
fd, mover, memory = os.open(path, os.O_RDONLY), NativeMover(1, 8192, 2), torch.zeros(size, dtype=torch.uint8)
seen = {"whole": 0, "ended": 0}
for turn in range(5000):
    os.truncate(path, size)
    number = mover.into(memory, fd, 0, "mapped")
    for _ in range(turn % 7 * 400): pass
    os.truncate(path, 4096)
    try: mover.wait(number); seen["whole"] += 1
    except TransferError as error:
        assert error.error == 0 and error.at == 4096, error
        seen["ended"] += 1
    if min(seen.values()) > 20: break
print(seen)
if len(sys.argv) > 2:  # somebody else's SIGBUS is none of the mover's business
    import mmap
    os.truncate(path, 4096); mapping = mmap.mmap(fd, 4096, access=mmap.ACCESS_READ); os.truncate(path, 0)
    mapping[0]
"""


@native_only
def test_a_file_cut_off_under_its_mapping_is_an_error_and_not_the_end(tmp_path: Path, forked: Forked) -> None:
    done = forked(SHRINKING, tmp_path / "file")
    assert done.returncode == 0, done.stderr
    assert "'ended': 0" not in done.stdout


@native_only
def test_the_handler_before_ours_gets_its_signals_back(tmp_path: Path, forked: Forked) -> None:
    done = forked(SHRINKING, tmp_path / "file", "die")
    assert done.returncode == -7 and "Fatal Python error: Bus error" in done.stderr, (done.returncode, done.stderr)
