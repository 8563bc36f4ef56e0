"""Reading: the right bytes, no others, in file order, and a typed error when the file does not hold still."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elo_engine.checkpoint.index import CheckpointIndex, open_checkpoint
from elo_engine.checkpoint.reader import CheckpointReader, coalesce
from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.errors import FailedError, RefusedError, UsageError

METHODS = ("pread", "mmap")


def write_folder(folder: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """12 layers of bf16 with a norm each, an embedding, and one of every odd kind."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {f"layers.{i}.weight": normal(16, 24).bfloat16() for i in range(12)}
    found |= {f"layers.{i}.norm": normal(24).bfloat16() for i in range(12)}
    found |= {
        "embed": normal(100, 24).bfloat16(),
        "half": normal(5, 3).half(),
        "double": normal(3).double(),
        "ids": torch.arange(9),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "float8": normal(10).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "infinite": torch.tensor([float("inf"), float("nan"), -0.0]),
    }
    return found


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    names = sorted(tensors)
    first, second = names[::2], names[1::2]
    write_folder(
        tmp_path / "model",
        {
            "x-1.safetensors": {n: tensors[n] for n in first},
            "x-2.safetensors": {n: tensors[n] for n in second},
        },
    )
    return tmp_path / "model"


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert tensor.is_contiguous() and raw(tensor) == raw(wanted[name]), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slot_bytes", [16, 1000, 16 << 20])
def test_everything_is_equal_byte_for_byte(
    folder: Path, tensors: dict[str, Tensor], method: str, slot_bytes: int
) -> None:
    index = open_checkpoint(folder)
    with CheckpointReader(index, method, slot_bytes=slot_bytes) as reader:
        found = reader.read(tensors)
    assert_equal(found, tensors)
    assert list(found) == list(index.entries)
    assert reader.bytes_read == index.total_bytes


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_not_wanted_are_not_read(
    folder: Path, tensors: dict[str, Tensor], method: str
) -> None:
    """The promise is at most 1.05 x the wanted bytes; what is done is exactly 1."""
    index = open_checkpoint(folder)
    names = ["layers.0.weight", "layers.0.norm", "layers.11.weight", "layers.11.norm", "embed"]
    with CheckpointReader(index, method) as reader:
        found = reader.read([*names, names[0]])
        assert_equal(found, {name: tensors[name] for name in names})
        assert reader.bytes_read == index.bytes_of(names)
        reader.read(["scalar"])
        assert reader.bytes_read == index.bytes_of([*names, "scalar"])


def watch_pread(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every (offset, bytes) asked of the system from now on."""
    seen: list[tuple[int, int]] = []
    real = SYSCALLS.pread

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        seen.append((offset, len(buffer)))
        return real(fd, buffer, offset)

    monkeypatch.setattr(SYSCALLS, "pread", pread)
    return seen


def test_reads_by_offset_and_joins_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names sort as text: layers.10 lies before layers.2, and 10, 11 and 2 are three neighbours, so one
    read.
    """
    layers = {f"layers.{i}": torch.full((8,), float(i)) for i in range(12)}
    write_folder(tmp_path / "model", {"model.safetensors": layers})
    index = open_checkpoint(tmp_path / "model")
    begin = {name: entry.begin for name, entry in index.entries.items()}
    assert begin["layers.10"] < begin["layers.2"]
    seen = watch_pread(monkeypatch)
    with CheckpointReader(index) as reader:
        found = reader.read(["layers.2", "layers.7", "layers.10", "layers.11", "layers.0"])
    assert list(found) == ["layers.0", "layers.10", "layers.11", "layers.2", "layers.7"]
    assert seen == [(begin["layers.0"], 32), (begin["layers.10"], 96), (begin["layers.7"], 32)]
    assert_equal(found, {name: layers[name] for name in found})


def test_coalesce_stops_at_gaps_and_shards(folder: Path) -> None:
    entries = list(open_checkpoint(folder).entries.values())
    runs = coalesce(entries)
    assert [run[0].shard for run in runs] == ["x-1.safetensors", "x-2.safetensors"]
    assert sum(entry.nbytes for run in runs for entry in run) == sum(entry.nbytes for entry in entries)
    assert len(coalesce(entries[::2])) > 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slot_bytes", [16, 100, 16 << 20])
def test_dtype_is_converted_on_the_way(
    folder: Path, tensors: dict[str, Tensor], method: str, slot_bytes: int
) -> None:
    with CheckpointReader(open_checkpoint(folder), method, slot_bytes=slot_bytes) as reader:
        found = reader.read(tensors, dtype=torch.float32)
    kept = ("ids", "mask", "bytes")  # only floating point is converted
    assert_equal(found, {n: t if n in kept else t.float() for n, t in tensors.items()})


def crafted(folder: Path, header: dict[str, object], data: bytes) -> CheckpointIndex:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return open_checkpoint(folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("slot_bytes", [16, 17, 1000])
def test_tensors_that_are_not_aligned(tmp_path: Path, method: str, slot_bytes: int) -> None:
    """The format lets a float start at an odd byte, right behind a single byte."""
    values = torch.arange(11, dtype=torch.float64)
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "double": {"dtype": "F64", "shape": [11], "data_offsets": [1, 89]},
    }
    index = crafted(tmp_path / "model", header, b"\x05" + raw(values))
    with CheckpointReader(index, method, slot_bytes=slot_bytes) as reader:
        assert raw(reader.read(["byte", "double"])["double"]) == raw(values)
        assert torch.equal(reader.read(["byte", "double"], dtype=torch.float32)["double"], values.float())


def test_bytes_survive_that_the_dtype_has_no_value_for(tmp_path: Path) -> None:
    index = crafted(
        tmp_path / "model", {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\x00\x02\xff"
    )
    with CheckpointReader(index) as reader:
        assert raw(reader.read(["a"])["a"]) == b"\x00\x02\xff"


def test_packed_dtype_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "F4", "shape": [4], "data_offsets": [2, 4]},
    }
    with CheckpointReader(crafted(tmp_path / "model", header, b"abcd")) as reader:
        with pytest.raises(RefusedError, match="'b' has the packed dtype F4"):
            reader.read(["a", "b"])
        assert reader.bytes_read == 0


def test_unknown_name_and_method(folder: Path) -> None:
    index = open_checkpoint(folder)
    with (
        CheckpointReader(index) as reader,
        pytest.raises(UsageError, match=r"no tensor 'layers\.0\.wait'.*Did you mean"),
    ):
        reader.read(["embed", "layers.0.wait"])
    with pytest.raises(UsageError, match="'direct' is unknown: use 'pread' or 'mmap'"):
        CheckpointReader(index, "direct")


def test_progress_in_bytes(folder: Path, tensors: dict[str, Tensor]) -> None:
    index = open_checkpoint(folder)
    seen: list[tuple[int, int]] = []
    with CheckpointReader(index, slot_bytes=1 << 10) as reader:
        reader.read(tensors, dtype=torch.float32, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (index.total_bytes, index.total_bytes)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len(seen) > 5


@pytest.mark.parametrize("fault", ["one byte", "short", "interrupted"])
def test_short_reads_and_interrupts_change_nothing(
    folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real, calls = SYSCALLS.pread, 0

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if fault == "interrupted" and calls % 2:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        limit = 1 if fault == "one byte" else max(1, len(buffer) // 3)
        return real(fd, buffer[:limit], offset)

    index = open_checkpoint(folder)
    monkeypatch.setattr(SYSCALLS, "pread", pread)
    with CheckpointReader(index) as reader:
        assert_equal(reader.read(tensors), tensors)
        assert reader.bytes_read == index.total_bytes
    assert calls > (index.total_bytes - 1 if fault == "one byte" else 10)


def test_read_error_names_file_tensor_and_offset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_checkpoint(folder)
    real, middle = SYSCALLS.pread, index.entries["layers.3.weight"].begin + 100

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        if offset == middle:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffer[: middle - offset] if offset < middle else buffer, offset)

    monkeypatch.setattr(SYSCALLS, "pread", pread)
    with CheckpointReader(index) as reader, pytest.raises(FailedError) as caught:
        reader.read(["layers.3.weight"])
    shard = index.entries["layers.3.weight"].shard
    for part in (shard, "'layers.3.weight'", f"at offset {middle}", "Input/output error"):
        assert part in str(caught.value)


def disturb_after_first_read(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    real, done = SYSCALLS.pread, False

    def pread(fd: int, buffer: memoryview, offset: int) -> int:
        nonlocal done
        count = real(fd, buffer, offset)
        if not done:
            done = True
            action()
        return count

    monkeypatch.setattr(SYSCALLS, "pread", pread)


def test_truncation_while_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_checkpoint(folder)
    entry = next(e for e in index.entries.values() if e.name == "embed")
    disturb_after_first_read(monkeypatch, lambda: os.truncate(folder / entry.shard, entry.begin + 300))
    with CheckpointReader(index, slot_bytes=256) as reader, pytest.raises(FailedError) as caught:
        reader.read(["embed"])
    assert "'embed': truncated: the file ends at byte" in str(caught.value) and entry.shard in str(
        caught.value
    )


@pytest.mark.parametrize("method", METHODS)
def test_truncation_between_open_and_read(folder: Path, method: str) -> None:
    index = open_checkpoint(folder)
    shard = index.entries["embed"].shard
    os.truncate(folder / shard, index.entries["embed"].begin + 10)
    with (
        CheckpointReader(index, method) as reader,
        pytest.raises(FailedError, match=f"{shard}: was truncated from"),
    ):
        reader.read(["embed"])
    assert reader.bytes_read == 0


def test_truncation_of_a_mapped_file_between_two_reads(folder: Path) -> None:
    """Touching the mapping behind the new end would kill the process, so its size is asked first."""
    index = open_checkpoint(folder)
    with CheckpointReader(index, "mmap") as reader:
        reader.read(["embed"])
        os.truncate(folder / index.entries["embed"].shard, 100)
        with pytest.raises(FailedError, match="was truncated from"):
            reader.read(["embed"])


def test_change_in_place_while_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_checkpoint(folder)
    path = folder / index.entries["embed"].shard

    def touch() -> None:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # clocks may be coarser than this test

    disturb_after_first_read(monkeypatch, touch)
    with (
        CheckpointReader(index, slot_bytes=256) as reader,
        pytest.raises(FailedError, match="was changed while it was"),
    ):
        reader.read(["embed"])


@pytest.mark.parametrize("method", METHODS)
def test_replaced_or_removed_between_open_and_read(folder: Path, method: str) -> None:
    index = open_checkpoint(folder)
    path = folder / index.entries["embed"].shard
    status = path.stat()
    (folder / "new").write_bytes(path.read_bytes())
    os.utime(folder / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(folder / "new", path)  # same size and time, another file
    with CheckpointReader(index, method) as reader, pytest.raises(FailedError, match="was changed after"):
        reader.read(["embed"])
    path.unlink()
    with CheckpointReader(index, method) as reader, pytest.raises(FailedError, match="has gone since"):
        reader.read(["embed"])


@pytest.mark.parametrize("method", METHODS)
def test_source_is_untouched_and_descriptors_are_closed(
    folder: Path, tensors: dict[str, Tensor], method: str
) -> None:
    def state() -> dict[str, tuple[bytes, int, int]]:
        return {p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}

    before, descriptors = state(), os.listdir("/proc/self/fd")
    index = open_checkpoint(folder)
    with CheckpointReader(index, method) as reader:
        for tensor in reader.read(tensors, dtype=torch.float32).values():
            tensor.fill_(1)  # what was read is ours: nothing of it is the file
    with CheckpointReader(index, method) as reader, pytest.raises(UsageError):
        reader.read(["embed", "nothing"])
    reader.close()
    assert state() == before and os.listdir("/proc/self/fd") == descriptors


def test_against_safetensors(folder: Path) -> None:
    for shard in ("x-1.safetensors", "x-2.safetensors"):
        wanted = load_file(folder / shard)
        with CheckpointReader(open_checkpoint(folder)) as reader:
            assert_equal(reader.read(wanted), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_the_gpu(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The slot is reused at once, so a copy that did not wait would mix the pieces."""
    for slot_bytes in (100, 16 << 20):
        with CheckpointReader(open_checkpoint(folder), slot_bytes=slot_bytes) as reader:
            same = reader.read(tensors, device="cuda")
            wide = reader.read(tensors, device="cuda", dtype=torch.float32)
        assert all(tensor.is_cuda for tensor in same.values())
        assert_equal({name: tensor.cpu() for name, tensor in same.items()}, tensors)
        assert all(
            torch.equal(wide[n].cpu(), t.float()) for n, t in tensors.items() if n.startswith("layers")
        )
