"""Reading: the right bytes, no others, in file order, by every way and either mover."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mover_fixture import KINDS
from reader_fixture import assert_equal, folder, raw, tensors, write_folder  # noqa: F401
from safetensors.torch import load_file
from torch import Tensor

from elo_engine.checkpoint.header import DTYPE_BITS, TensorEntry
from elo_engine.checkpoint.index import CheckpointIndex, open_checkpoint
from elo_engine.checkpoint.mover import using
from elo_engine.checkpoint.plan import coalesce, cut, cut_by_tensor, in_file_order
from elo_engine.checkpoint.reader import CheckpointReader, RingShape
from elo_engine.errors import FailedError, RefusedError, UsageError

# ruff: noqa: F811 (fixtures are parameters of their own name)
WAYS = (
    *((mover, "mmap") for mover in KINDS if mover == "native"),
    *((mover, way) for mover in KINDS for way in ("auto", "pread", "direct")),
)
each_way = pytest.mark.parametrize(("mover", "method"), WAYS)
SMALL = RingShape(slots=2, slot_bytes=8192, threads=2)  # the smallest slots there are: every larger tensor is cut
RINGS = (None, SMALL, RingShape(slots=1, slot_bytes=3 * 4096, threads=1))


@each_way
@pytest.mark.parametrize("ring", RINGS)
def test_everything_is_equal_byte_for_byte(
    folder: Path, tensors: dict[str, Tensor], mover: str, method: str, ring: RingShape | None
) -> None:
    index = open_checkpoint(folder)
    with using(mover), CheckpointReader(index, method, ring=ring) as reader:
        found = reader.read(tensors)
    assert_equal(found, tensors)
    assert list(found) == list(index.entries)
    if method == "direct":
        assert index.total_bytes <= reader.bytes_read == reader.bytes_by_way["direct"]
    else:
        assert reader.bytes_read == index.total_bytes


@each_way
def test_bytes_that_are_not_wanted_are_not_read(
    folder: Path, tensors: dict[str, Tensor], mover: str, method: str
) -> None:
    """The promise is at most 1.02 x the wanted bytes; what is done is exactly 1, and with direct reads whole pages."""
    index = open_checkpoint(folder)
    names = ["layers.0.weight", "layers.0.norm", "layers.11.weight", "layers.11.norm", "embed"]
    with using(mover), CheckpointReader(index, method) as reader:
        found = reader.read([*names, names[0]])
        assert_equal(found, {name: tensors[name] for name in names})
        if method == "direct":
            runs = coalesce(in_file_order({index.entry(name) for name in names}))
            assert index.bytes_of(names) < reader.bytes_read <= index.bytes_of(names) + 2 * 4096 * len(runs)
            return
        assert reader.bytes_read == index.bytes_of(names)
        reader.read(["scalar"])
        assert reader.bytes_read == index.bytes_of([*names, "scalar"])


def test_reads_by_offset_and_joins_neighbours(tmp_path: Path) -> None:
    """Names sort as text: layers.10 lies before layers.2, and 10, 11 and 2 are three neighbours, so one
    read.
    """
    layers = {f"layers.{i}": torch.full((8,), float(i)) for i in range(12)}
    write_folder(tmp_path / "model", {"model.safetensors": layers})
    index = open_checkpoint(tmp_path / "model")
    begin = {name: entry.begin for name, entry in index.entries.items()}
    assert begin["layers.10"] < begin["layers.2"]
    wanted = {index.entry(f"layers.{i}") for i in (2, 7, 10, 11, 0)}
    runs = coalesce(in_file_order(wanted))
    assert [[entry.name for entry in run] for run in runs] == [
        ["layers.0"],
        ["layers.10", "layers.11", "layers.2"],
        ["layers.7"],
    ]
    chunks = [chunk for run in runs for chunk in cut(run, 8192)]
    assert [(chunk.begin, chunk.end - chunk.begin) for chunk in chunks] == [
        (begin["layers.0"], 32), (begin["layers.10"], 96), (begin["layers.7"], 32),
    ]  # fmt: skip
    with CheckpointReader(index) as reader:
        found = reader.read([entry.name for entry in wanted])
    assert list(found) == ["layers.0", "layers.10", "layers.11", "layers.2", "layers.7"]
    assert_equal(found, {name: layers[name] for name in found})


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["U8", "BF16", "F32", "F64", "C64"]), st.integers(0, 9000)), min_size=1, max_size=8
    ),
    st.integers(8, 30_000),
    st.sampled_from([8192, 3 * 4096]),
)
def test_chunks_cover_every_byte_once_and_cut_no_element(
    sizes: list[tuple[str, int]], start: int, slot_bytes: int
) -> None:
    entries, at = [], start
    for i, (dtype, count) in enumerate(sizes):
        end = at + count * DTYPE_BITS[dtype] // 8
        entries.append(TensorEntry(f"t{i}", dtype, (count,), "s", at, end))
        at = end
    for run in coalesce(entries):
        chunks = list(cut(run, slot_bytes))
        assert [chunk.begin for chunk in chunks[1:]] == [chunk.end for chunk in chunks[:-1]]
        assert (chunks[0].begin, chunks[-1].end) == (run[0].begin, run[-1].end)
        for chunk in chunks:
            assert -(-chunk.end // 4096) * 4096 - chunk.begin // 4096 * 4096 <= slot_bytes  # with the pages around it
            assert [piece.begin for piece in chunk.pieces[1:]] == [piece.end for piece in chunk.pieces[:-1]]
            assert (chunk.pieces[0].begin, chunk.pieces[-1].end) == (chunk.begin, chunk.end)
            assert all(
                (piece.end - piece.entry.begin) % piece.entry.torch_dtype.itemsize == 0 for piece in chunk.pieces
            )
        by_tensor = [piece for chunk in cut_by_tensor(run, slot_bytes) for piece in chunk.pieces]
        assert sum(piece.end - piece.begin for piece in by_tensor) == run[-1].end - run[0].begin


def test_coalesce_stops_at_gaps_and_shards(folder: Path) -> None:
    entries = list(open_checkpoint(folder).entries.values())
    runs = coalesce(entries)
    assert [run[0].shard for run in runs] == ["x-1.safetensors", "x-2.safetensors"]
    assert sum(entry.nbytes for run in runs for entry in run) == sum(entry.nbytes for entry in entries)
    assert len(coalesce(entries[::2])) > 2


@each_way
@pytest.mark.parametrize("ring", RINGS)
def test_dtype_is_converted_on_the_way(
    folder: Path, tensors: dict[str, Tensor], mover: str, method: str, ring: RingShape | None
) -> None:
    with using(mover), CheckpointReader(open_checkpoint(folder), method, ring=ring) as reader:
        found = reader.read(tensors, dtype=torch.float32)
    kept = ("ids", "mask", "bytes")  # only floating point is converted
    assert_equal(found, {n: t if n in kept else t.float() for n, t in tensors.items()})


def crafted(folder: Path, header: dict[str, object], data: bytes) -> CheckpointIndex:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return open_checkpoint(folder)


@each_way
@pytest.mark.parametrize("ring", RINGS)
def test_tensors_that_are_not_aligned(tmp_path: Path, mover: str, method: str, ring: RingShape | None) -> None:
    """The format lets a float start at an odd byte, right behind a single byte."""
    values = torch.arange(11, dtype=torch.float64)
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "double": {"dtype": "F64", "shape": [11], "data_offsets": [1, 89]},
    }
    index = crafted(tmp_path / "model", header, b"\x05" + raw(values))
    with using(mover), CheckpointReader(index, method, ring=ring) as reader:
        assert raw(reader.read(["byte", "double"])["double"]) == raw(values)
        assert torch.equal(reader.read(["byte", "double"], dtype=torch.float32)["double"], values.float())


def test_bytes_survive_that_the_dtype_has_no_value_for(tmp_path: Path) -> None:
    index = crafted(tmp_path / "model", {"a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\x00\x02\xff")
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
    with pytest.raises(UsageError, match="'magic' is unknown: use one of auto, pread, direct, mmap"):
        CheckpointReader(index, "magic")


def test_progress_in_bytes(folder: Path, tensors: dict[str, Tensor]) -> None:
    index = open_checkpoint(folder)
    seen: list[tuple[int, int]] = []
    with CheckpointReader(index, ring=SMALL) as reader:
        reader.read(tensors, dtype=torch.float32, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (index.total_bytes, index.total_bytes)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len(seen) > 5


@each_way
def test_truncation_between_open_and_read(folder: Path, mover: str, method: str) -> None:
    index = open_checkpoint(folder)
    shard = index.entries["embed"].shard
    os.truncate(folder / shard, index.entries["embed"].begin + 10)
    with (
        using(mover),
        CheckpointReader(index, method) as reader,
        pytest.raises(FailedError, match=f"{shard}: was truncated from"),
    ):
        reader.read(["embed"])
    assert reader.bytes_read == 0


@each_way
def test_replaced_or_removed_between_open_and_read(folder: Path, mover: str, method: str) -> None:
    index = open_checkpoint(folder)
    path = folder / index.entries["embed"].shard
    status = path.stat()
    (folder / "new").write_bytes(path.read_bytes())
    os.utime(folder / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(folder / "new", path)  # same size and time, another file
    with using(mover), CheckpointReader(index, method) as reader, pytest.raises(FailedError, match="was changed after"):
        reader.read(["embed"])
    path.unlink()
    with using(mover), CheckpointReader(index, method) as reader, pytest.raises(FailedError, match="has gone since"):
        reader.read(["embed"])


@each_way
def test_source_is_untouched_and_descriptors_are_closed(
    folder: Path, tensors: dict[str, Tensor], mover: str, method: str
) -> None:
    def state() -> dict[str, tuple[bytes, int, int]]:
        return {p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}

    before, descriptors = state(), os.listdir("/proc/self/fd")
    index = open_checkpoint(folder)
    with using(mover), CheckpointReader(index, method) as reader:
        for tensor in reader.read(tensors, dtype=torch.float32).values():
            tensor.fill_(1)  # what was read is ours: nothing of it is the file
    with using(mover), CheckpointReader(index, method) as reader, pytest.raises(UsageError):
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
    for ring in RINGS:
        with CheckpointReader(open_checkpoint(folder), ring=ring) as reader:
            same = reader.read(tensors, device="cuda")
            wide = reader.read(tensors, device="cuda", dtype=torch.float32)
        assert all(tensor.is_cuda for tensor in same.values())
        assert_equal({name: tensor.cpu() for name, tensor in same.items()}, tensors)
        assert all(torch.equal(wide[n].cpu(), t.float()) for n, t in tensors.items() if n.startswith("layers"))
