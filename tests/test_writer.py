"""Writing: only the changed ranges differ from the source, which itself never changes."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from elo_engine.checkpoint import clone as clone_module
from elo_engine.checkpoint.index import CheckpointIndex, open_checkpoint
from elo_engine.checkpoint.mover import Mover, NativeMover, using
from elo_engine.checkpoint.writer import (
    SYSCALLS,
    publish,
    rewrite_checkpoint,
    verify_commit,
    write_safetensors,
)
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.native import CSRC

from .checkpoint_fixture import INDEX, TRAVELLING, changed_layers, fail_on_call, leftovers, make_source, state
from .mover_fixture import Faults

NativeFaults = Callable[[Faults], list[Mover]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_source(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def index(source: Path) -> CheckpointIndex:
    return open_checkpoint(source)


def test_without_a_change_the_output_is_byte_identical(index: CheckpointIndex, tmp_path: Path) -> None:
    before = state(index.folder)
    with publish(tmp_path / "out") as folder:
        stats = rewrite_checkpoint(index, {}, folder)
    assert {p.name for p in (tmp_path / "out").iterdir()} == TRAVELLING | {"COMMIT.json"}
    for name in TRAVELLING:
        assert (tmp_path / "out" / name).read_bytes() == (index.folder / name).read_bytes()
    assert open_checkpoint(tmp_path / "out").identity() == index.identity()
    total = sum(info.size for info in index.shards.values())
    assert stats.bytes_written == stats.bytes_linked == 0 and stats.bytes_cloned + stats.bytes_copied == total
    assert state(index.folder) == before


def ranges_that_differ(one: bytes, other: bytes) -> set[int]:
    assert len(one) == len(other)
    return {i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b}


def check_rewritten(index: CheckpointIndex, out: Path, changed: dict[str, Tensor]) -> None:
    """Only the changed tensors' ranges differ, and they hold the values cast to the checkpoint's dtype."""
    for shard in index.shards:
        different = ranges_that_differ((out / shard).read_bytes(), (index.folder / shard).read_bytes())
        allowed = {i for n in changed if (e := index.entries[n]).shard == shard for i in range(e.begin, e.end)}
        assert different <= allowed and bool(different) == bool(allowed)
        loaded = load_file(out / shard)
        for name in changed.keys() & loaded.keys():
            assert torch.equal(loaded[name], changed[name].to(index.entries[name].torch_dtype))


def test_only_the_changed_ranges_are_written(index: CheckpointIndex, tmp_path: Path) -> None:
    before, changed, seen = state(index.folder), changed_layers(), []
    with publish(tmp_path / "out") as folder:
        stats = rewrite_checkpoint(index, changed, folder, lambda done, total: seen.append((done, total)))
    check_rewritten(index, tmp_path / "out", changed)
    total = sum(info.size for info in index.shards.values())
    assert stats.bytes_written == 2 * 192 and stats.bytes_cloned + stats.bytes_copied == total - 2 * 192
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert state(index.folder) == before


def test_every_way_of_cloning_gives_the_same(
    index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, used = SYSCALLS.copy_range, []

    def reflink(source_fd: int, target_fd: int) -> None:  # what FICLONE does, on a disk that cannot
        used.append("reflink")
        os.ftruncate(target_fd, os.fstat(source_fd).st_size)
        os.pwrite(target_fd, os.pread(source_fd, 1 << 20, 0), 0)

    def none(*_: object) -> int:
        used.append("none")
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def short(source_fd: int, target_fd: int, count: int, offset: int) -> int:
        used.append("short")
        return real(source_fd, target_fd, min(count, 100), offset)

    def gives_up(source_fd: int, target_fd: int, count: int, offset: int) -> int:
        used.append("gives up")
        return 0 if len(used) > 2 else real(source_fd, target_fd, min(count, 100), offset)

    changed = changed_layers()
    for number, patch in enumerate(
        [{"ficlone": reflink}, {"copy_range": none}, {"copy_range": short}, {"copy_range": gives_up}]
    ):
        used.clear()
        with monkeypatch.context() as context:
            context.setattr(clone_module, "COPY_BYTES", 256)
            for name, function in patch.items():
                context.setattr(SYSCALLS, name, function)
            out = tmp_path / f"out-{number}"
            out.mkdir()
            stats = rewrite_checkpoint(index, changed, out)
        rest = sum(info.size for info in index.shards.values()) - 2 * 192
        assert used and (stats.bytes_cloned, stats.bytes_copied) == ((rest, 0) if number == 0 else (0, rest))
        check_rewritten(index, out, changed)


def test_one_byte_transfers_and_interrupts(
    index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, positioned, calls = SYSCALLS.write, SYSCALLS.pwrite, 0

    def write(fd: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        return real(fd, data[:1])

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 7 == 0:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        return positioned(fd, data[:1], offset)

    monkeypatch.setattr(SYSCALLS, "write", write)
    monkeypatch.setattr(SYSCALLS, "pwrite", pwrite)
    changed = changed_layers()
    with using("python"), publish(tmp_path / "out") as folder:
        rewrite_checkpoint(index, changed, folder)
    check_rewritten(index, tmp_path / "out", changed)
    verify_commit(tmp_path / "out")
    assert calls > 400


@pytest.fixture
def native_faults(monkeypatch: pytest.MonkeyPatch) -> NativeFaults:
    """From now on tensors are written by native movers, one a tensor, in pieces of 7, with these faults."""
    if CSRC is None:
        pytest.skip("the C++ extension is not built")
    made: list[Mover] = []

    def use(faults: Faults) -> list[Mover]:
        @contextmanager
        def borrowed(*_: int) -> Iterator[Mover]:
            made.append(NativeMover(4, 8192, 2, faults))
            yield made[-1]

        monkeypatch.setattr("elo_engine.checkpoint.writer.borrowed", borrowed)
        monkeypatch.setattr("elo_engine.checkpoint.writer.PIECE_ITEMS", 7)
        return made

    return use


@pytest.mark.parametrize("call", [0, 3, 9])
@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, r"no space left on the device: \d+ bytes are needed"), (errno.EIO, "write failed: Input/output")],
)
def test_native_writes_that_fail(
    index: CheckpointIndex, tmp_path: Path, native_faults: NativeFaults, call: int, code: int, message: str
) -> None:
    before, made = state(index.folder), native_faults([(call, code, 0)])
    with pytest.raises(FailedError, match=rf"s-1\.safetensors: {message}"), publish(tmp_path / "out") as folder:
        rewrite_checkpoint(index, changed_layers(), folder)
    (mover,) = made
    assert all(mover.acquire() is not None for _ in range(4))  # every slot was given back
    assert os.listdir(tmp_path) == ["source"] and state(index.folder) == before


@pytest.mark.parametrize(
    "faults", [[(-1, 0, 5)], [(0, errno.EINTR, 0), (5, errno.EINTR, 0)], [(-1, 0, 1), (4, errno.EINTR, 0)]]
)
def test_native_writes_that_are_short_or_interrupted(
    index: CheckpointIndex, tmp_path: Path, native_faults: NativeFaults, faults: Faults
) -> None:
    for name in ("plain", "out"):
        made = native_faults(faults) if name == "out" else []
        with publish(tmp_path / name) as folder:
            rewrite_checkpoint(index, changed_layers(), folder)
    assert len(made) == 2
    for name in TRAVELLING:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    check_rewritten(index, tmp_path / "out", changed_layers())


def test_single_file_without_an_index(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, source / "model.safetensors")
    with publish(tmp_path / "out") as folder:
        rewrite_checkpoint(open_checkpoint(source), {"b": torch.full((4,), 7.0)}, folder)
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded["a"].tolist() == [0.0] * 4 and loaded["b"].tolist() == [7.0] * 4
    assert not (tmp_path / "out" / INDEX).exists()


def test_the_index_is_written_last(index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real, positioned = SYSCALLS.write, SYSCALLS.pwrite

    def write(fd: int, data: memoryview) -> int:
        written.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        return real(fd, data)

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        written.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        return positioned(fd, data, offset)

    monkeypatch.setattr(SYSCALLS, "write", write)
    monkeypatch.setattr(SYSCALLS, "pwrite", pwrite)
    with using("python"), publish(tmp_path / "out") as folder:
        rewrite_checkpoint(index, changed_layers(), folder)
    assert written[-2:] == [INDEX, "COMMIT.json"] and written.index("s-1.safetensors") == 0


def test_strided_tensors_are_written_in_order(index: CheckpointIndex, tmp_path: Path) -> None:
    changed = {"layers.0.weight": torch.randn(12, 8).t()}
    (tmp_path / "out").mkdir()
    rewrite_checkpoint(index, changed, tmp_path / "out")
    check_rewritten(index, tmp_path / "out", changed)


def test_large_tensors_go_in_pieces(index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elo_engine.checkpoint.writer.PIECE_ITEMS", 7)
    changed = changed_layers()
    (tmp_path / "out").mkdir()
    rewrite_checkpoint(index, changed, tmp_path / "out")
    check_rewritten(index, tmp_path / "out", changed)
    changed["layers.0.weight"][7, 10] = float("nan")
    (tmp_path / "bad").mkdir()
    with pytest.raises(FailedError, match=r"'layers\.0\.weight': nan at position 94 of 96 is not finite as BF16"):
        rewrite_checkpoint(index, changed, tmp_path / "bad")


@pytest.mark.parametrize(("name", "value"), [("layers.11.norm", float("inf")), ("half", 1e6), ("float8", float("nan"))])
def test_non_finite_values_are_never_published(index: CheckpointIndex, tmp_path: Path, name: str, value: float) -> None:
    """1e6 is finite in fp32 and not in the fp16 of the checkpoint."""
    tensor = torch.zeros(index.entries[name].shape)
    tensor[3] = value
    with (
        pytest.raises(FailedError, match=rf"'{name}': \S+ at position 3 of"),
        publish(tmp_path / "out") as folder,
    ):
        rewrite_checkpoint(index, {name: tensor}, folder)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_changed_tensors_must_fit(index: CheckpointIndex, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for changed, message in [
        ({"layers.0.wight": torch.zeros(8, 12)}, r"no tensor 'layers\.0\.wight'.*Did you mean"),
        ({"layers.0.weight": torch.zeros(12, 8)}, r"has shape \(8, 12\) in the checkpoint, not \(12, 8\)"),
        ({"ids": torch.zeros(4)}, r"is torch\.int64 in the checkpoint, not torch\.float32"),
        (
            {"half": torch.zeros(5, dtype=torch.int64)},
            r"is torch\.float16 in the checkpoint, not torch\.int64",
        ),
    ]:
        with pytest.raises(UsageError, match=message):
            rewrite_checkpoint(index, changed, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())  # refused before a byte was copied
    rewrite_checkpoint(index, {"ids": torch.arange(4) + 5}, tmp_path / "out")
    assert load_file(tmp_path / "out" / "s-2.safetensors")["ids"].tolist() == [5, 6, 7, 8]


def test_an_output_inside_its_source_is_refused(index: CheckpointIndex, tmp_path: Path) -> None:
    before = state(index.folder)
    (tmp_path / "link").symlink_to(index.folder)
    for folder in (index.folder, tmp_path / "link", tmp_path / "link" / "sub"):
        with pytest.raises(RefusedError, match="lies in its source"):
            rewrite_checkpoint(index, {}, folder)
    with pytest.raises(RefusedError, match="lies in its source"), publish(index.folder / "sub") as inside:
        rewrite_checkpoint(index, {}, inside)
    assert state(index.folder) == before


def test_a_changed_shard_ends_the_copy_at_once(index: CheckpointIndex, tmp_path: Path) -> None:
    """Not after the other shards, which may be many gigabytes."""
    path, seen = index.folder / "s-1.safetensors", []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    (tmp_path / "out").mkdir()
    with pytest.raises(FailedError, match=r"s-1\.safetensors: was changed while it was copied"):
        rewrite_checkpoint(index, {}, tmp_path / "out", progress)
    assert os.listdir(tmp_path / "out") == ["s-1.safetensors"] and seen


def test_files_are_never_written_over(index: CheckpointIndex, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "s-2.safetensors").write_bytes(b"precious")
    with pytest.raises(RefusedError, match="nothing is ever written over"):
        rewrite_checkpoint(index, {}, tmp_path / "out")
    assert (tmp_path / "out" / "s-2.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("what", ["shard", "earlier shard", "config", "truncated", "removed", "before"])
def test_a_source_that_changes_is_noticed(
    index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    real = SYSCALLS.pwrite

    def disturb() -> None:
        path = index.folder / ("s-1.safetensors" if what == "earlier shard" else "s-2.safetensors")
        if what == "config":
            (index.folder / "config.json").write_text('{"model_type": "qwen3"}')
        elif what == "truncated":
            os.truncate(path, 300)
        elif what == "removed":
            path.unlink()
        else:
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("s-2.safetensors"):
            disturb()
        return real(fd, data, offset)

    if what == "before":
        disturb()
    else:
        monkeypatch.setattr(SYSCALLS, "pwrite", pwrite)
    with (
        using("python"),
        pytest.raises(FailedError, match=r"s-2|changed|missing"),
        publish(tmp_path / "out") as folder,
    ):
        rewrite_checkpoint(index, changed_layers(), folder)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_write_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = torch.arange(6.0)
    tensors = {
        "plain": torch.randn(3, 4).bfloat16(),
        "strided": torch.randn(4, 3).t(),
        "tied": shared,
        "tied again": shared,
        "slice": shared[2:4],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "empty again": torch.zeros(2, 0),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    calls = fail_on_call(monkeypatch, "fsync", -1, 0)
    write_safetensors(tmp_path / "a.safetensors", tensors, {"step": "7"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name].detach()), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"step": "7"}
    assert calls[0] == 1
    with pytest.raises(RefusedError, match="nothing is ever written over"):
        write_safetensors(tmp_path / "a.safetensors", {"b": torch.zeros(1)})
    assert load_file(tmp_path / "a.safetensors").keys() == tensors.keys()


def test_write_safetensors_on_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real limit of the system, 100 kB a file, ends the serialiser in the middle of its write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(FailedError, match=r"a\.safetensors: writing it failed: File too large"):
            write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    fail_on_call(monkeypatch, "fsync", 0, errno.ENOSPC)
    with pytest.raises(FailedError, match=r"a\.safetensors: no space left on the device: 4194304 bytes are needed"):
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1 << 20)})
    with pytest.raises(FailedError, match="No such file or directory"):
        write_safetensors(tmp_path / "no" / "a.safetensors", {"a": torch.zeros(1)})
    assert not os.listdir(tmp_path)
