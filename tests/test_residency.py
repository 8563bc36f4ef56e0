"""What the kernel is asked about pages, against what was done to them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

from elo_engine.checkpoint import residency
from elo_engine.checkpoint.residency import HUGE_PAGE, advise_huge, huge_pages, open_direct, resident_share

SIZE = 4 << 20


@pytest.fixture
def fd(tmp_path: Path) -> int:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    return opened


@pytest.mark.parametrize("how", ["cachestat", "mincore"])
def test_share_follows_the_page_cache(fd: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "mincore":
        monkeypatch.setattr(residency, "_cachestat", lambda *_: None)
    os.pread(fd, SIZE, 0)
    assert resident_share(fd, 0, SIZE) == resident_share(fd, 5, 1) == resident_share(fd, 4095, 2) == 1.0
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    share = resident_share(fd, 0, SIZE)
    if share == 1.0:
        pytest.skip("this filesystem keeps its pages (tmpfs)")
    assert share == 0.0
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(fd, SIZE // 4, SIZE // 2)
    found = resident_share(fd, 0, SIZE)
    assert found is not None and 0.2 < found < 0.35
    assert resident_share(fd, SIZE // 2, SIZE // 4) == 1.0
    assert resident_share(fd, 0, SIZE // 4) == 0.0


def test_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_cachestat", lambda *_: None)
    end, other = os.pipe()
    assert resident_share(end, 0, 10) is None
    os.close(end)
    os.close(other)


def test_direct_descriptor_is_the_same_file(fd: int, tmp_path: Path) -> None:
    (tmp_path / "file").rename(tmp_path / "elsewhere")  # the name plays no part
    direct = open_direct(fd)
    if direct < 0:
        pytest.skip("no O_DIRECT on this filesystem")
    assert os.fstat(direct).st_ino == os.fstat(fd).st_ino
    os.close(direct)
    assert open_direct(10**6) == -1


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


def test_a_large_tensor_gets_huge_pages_and_a_small_one_is_left_alone() -> None:
    for count in (0, 1, 1000):
        advise_huge(torch.empty(count))
    if huge_pages() not in ("always", "madvise"):
        pytest.skip("no transparent huge pages here")
    before = huge_bytes()
    # Memory of its own, for the allocator may hand out pages that were touched before.
    memory = mmap.mmap(-1, 16 * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    advise_huge(tensor)
    tensor.fill_(1)
    assert huge_bytes() - before >= 4 * HUGE_PAGE  # all 15 or 16 where memory is not fragmented


def test_huge_page_setting_is_one_of_the_kernels_words() -> None:
    assert huge_pages() in ("always", "madvise", "never", "unknown")
