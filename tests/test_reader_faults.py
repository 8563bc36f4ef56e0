"""Files that do not hold still, disks that fail: a typed error naming file, tensor and offset, nothing left behind."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from mover_fixture import KINDS, Faults, use_faulty
from reader_fixture import assert_equal, folder, tensors  # noqa: F401
from torch import Tensor

from elo_engine.checkpoint.index import open_checkpoint
from elo_engine.checkpoint.mover import using
from elo_engine.checkpoint.reader import CheckpointReader, RingShape
from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.errors import FailedError, UsageError

# ruff: noqa: F811 (fixtures are parameters of their own name)
each = pytest.mark.parametrize("kind", KINDS)
ONE_BY_ONE = RingShape(slots=1, slot_bytes=8192, threads=1)  # a transfer starts when the one before it has been used


@each
@pytest.mark.parametrize("method", ["pread", "direct"])
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([(-1, 0, 997)], id="short"),
        pytest.param([(call, errno.EINTR, 0) for call in range(0, 40, 2)], id="interrupted"),
    ],
)
def test_short_reads_and_interrupts_change_nothing(
    kind: str, method: str, faults: Faults, folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_checkpoint(folder)
    use_faulty(kind, monkeypatch, faults)
    for dtype in (None, torch.float32):
        with CheckpointReader(index, method, ring=ONE_BY_ONE) as reader:
            found = reader.read(tensors, dtype=dtype)
        if dtype is None:
            assert_equal(found, tensors)
        else:
            assert torch.equal(found["wide"], tensors["wide"])


@each
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_read_error_names_file_tensor_and_offset(
    kind: str, dtype: torch.dtype | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_checkpoint(folder)
    entry = index.entries["embed"]
    use_faulty(kind, monkeypatch, [(0, 0, 100), (1, errno.EIO, 0)])
    with CheckpointReader(index, "pread", ring=ONE_BY_ONE) as reader, pytest.raises(FailedError) as caught:
        reader.read(["embed"], dtype=dtype)
    for part in (entry.shard, "'embed'", f"at offset {entry.begin + 100}", "Input/output error", "Check the disk"):
        assert part in str(caught.value)


@each
@pytest.mark.parametrize("method", ["auto", "pread", "direct"])
def test_truncation_while_reading(kind: str, method: str, folder: Path) -> None:
    """After the first slot has been used the file is cut off in the middle of the second."""
    index = open_checkpoint(folder)
    entry = index.entries["embed"]
    with using(kind), CheckpointReader(index, method, ring=ONE_BY_ONE) as reader, pytest.raises(FailedError) as caught:
        reader.read(
            ["embed"],
            dtype=torch.float32,
            progress=lambda done, total: os.truncate(folder / entry.shard, entry.begin + 9000),
        )
    assert "'embed': truncated: the file ends at byte" in str(caught.value) and entry.shard in str(caught.value)


@each
def test_change_in_place_while_reading(kind: str, folder: Path) -> None:
    index = open_checkpoint(folder)
    path = folder / index.entries["embed"].shard

    def touch(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # clocks may be coarser than this test

    with (
        using(kind),
        CheckpointReader(index, ring=ONE_BY_ONE) as reader,
        pytest.raises(FailedError, match="was changed while it was"),
    ):
        reader.read(["embed"], progress=touch)


@each
def test_a_filesystem_without_direct_reads(
    kind: str, folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced it is refused; left to the reader, the page cache serves even for what is not in it."""
    monkeypatch.setattr("elo_engine.checkpoint.reader.open_direct", lambda fd: -1)
    monkeypatch.setattr("elo_engine.checkpoint.reader.resident_share", lambda fd, offset, length: 0.0)
    index = open_checkpoint(folder)
    with using(kind), CheckpointReader(index) as reader:
        assert_equal(reader.read(tensors), tensors)
        assert reader.bytes_by_way == {"buffered": index.total_bytes, "direct": 0, "mapped": 0}
    with (
        using(kind),
        CheckpointReader(index, "direct") as reader,
        pytest.raises(UsageError, match="has no direct reads"),
    ):
        reader.read(tensors)


@each
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 0.6, 1.0])
def test_the_page_cache_decides(kind: str, share: float | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elo_engine.checkpoint.reader.resident_share", lambda fd, offset, length: share)
    with using(kind), CheckpointReader(open_checkpoint(folder)) as reader:
        reader.read(["embed"])
    assert (reader.bytes_by_way["direct"] > 0) == (share is not None and share < 0.5)
    assert (reader.bytes_by_way["buffered"] > 0) == (share is None or share > 0.5)


@each
def test_an_error_in_the_middle_leaves_the_ring_whole(kind: str, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Somebody's progress callback throws while slots are being filled; the same ring then serves the next read."""
    index = open_checkpoint(folder)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = set(os.listdir("/proc/self/fd"))
    with using(kind):
        for _ in range(6):  # more often than the ring has slots
            with CheckpointReader(index, "direct") as reader, pytest.raises(KeyboardInterrupt):
                reader.read(tensors, dtype=torch.float32, progress=stop)
        with CheckpointReader(index, "direct") as reader:
            assert_equal(reader.read(tensors), tensors)
    assert set(os.listdir("/proc/self/fd")) == before


@each
def test_two_readers_at_once_have_rings_of_their_own(kind: str, folder: Path, tensors: dict[str, Tensor]) -> None:
    index, found = open_checkpoint(folder), []

    def read() -> None:
        with CheckpointReader(index, "direct") as reader:
            found.append(reader.read(tensors))

    with using(kind):
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    for one in found:
        assert_equal(one, tensors)


def test_the_twin_reads_through_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, buffer: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    index = open_checkpoint(folder)
    monkeypatch.setattr(SYSCALLS, "pread", refuse)
    with using("python"), CheckpointReader(index) as reader, pytest.raises(FailedError, match="Input/output error"):
        reader.read(["embed"])
