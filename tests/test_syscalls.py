"""Descriptors: few are open at once, and a lack of them is called that."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from elo_engine.checkpoint import apply_patch, diff_checkpoints, open_checkpoint, verify_patch
from elo_engine.checkpoint import syscalls as module
from elo_engine.checkpoint.index import INDEX_NAME
from elo_engine.checkpoint.pieces import OPEN_SHARDS, ShardReader
from elo_engine.checkpoint.syscalls import open_folder, open_regular
from elo_engine.errors import FailedError

SHARDS = 3 * OPEN_SHARDS


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """The system's own limit, so that `more` files can still be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0) for _ in range(more + 1)]  # the lowest free numbers
    for fd in taken:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A checkpoint of more shards than are open at once."""
    folder = tmp_path / "many"
    folder.mkdir()
    weight_map = {}
    for number in range(SHARDS):
        name = f"s-{number:03}.safetensors"
        save_file({f"t{number}": torch.full((4,), float(number))}, folder / name, {"format": "pt"})
        weight_map[f"t{number}"] = name
    text = ", ".join(f'"{tensor}": "{name}"' for tensor, name in weight_map.items())
    (folder / INDEX_NAME).write_text(f'{{"metadata": {{}}, "weight_map": {{{text}}}}}')
    (folder / "config.json").write_text("{}")
    return folder


def value(reader: ShardReader, number: int) -> float:
    entry = reader.index.entries[f"t{number}"]
    buffer = bytearray(entry.nbytes)
    reader.read(entry.shard, memoryview(buffer), entry.begin)
    return float(torch.frombuffer(buffer, dtype=torch.float32)[0])


def test_a_reader_keeps_few_shards_open(many: Path) -> None:
    before = descriptors()
    with ShardReader(open_checkpoint(many)) as reader:
        for number in [*range(SHARDS), *range(SHARDS)]:  # again: those that were closed are opened once more
            assert value(reader, number) == number and value(reader, 0) == 0
            assert descriptors() - before <= OPEN_SHARDS
        assert descriptors() - before == OPEN_SHARDS
        reader.check()
    assert descriptors() == before


@pytest.mark.parametrize("when", ["it is closed", "it is opened again", "the end"])
def test_a_change_is_noticed_although_the_shard_was_closed(many: Path, when: str) -> None:
    path, before = many / "s-000.safetensors", descriptors()
    with pytest.raises(FailedError, match="changed"), ShardReader(open_checkpoint(many)) as reader:
        value(reader, 0)
        if when == "it is closed":
            os.utime(path, ns=(0, 1))
        for number in range(1, OPEN_SHARDS + 1):
            value(reader, number)
        assert when != "it is closed"
        os.utime(path, ns=(0, 1))
        if when == "it is opened again":
            value(reader, 0)
            pytest.fail("two versions of a shard were read")
        reader.check()
    assert descriptors() == before


def test_patches_of_more_shards_than_descriptors(many: Path, tmp_path: Path) -> None:
    shutil.copytree(many, tmp_path / "changed")
    for number in (0, SHARDS - 1):
        path = tmp_path / "changed" / f"s-{number:03}.safetensors"
        save_file({f"t{number}": torch.zeros(4) - 1}, path, {"format": "pt"})
    with few_descriptors(2 * OPEN_SHARDS + 16):
        diff_checkpoints(many, tmp_path / "changed", tmp_path / "p")
        apply_patch(many, tmp_path / "p", tmp_path / "new")
        assert verify_patch(tmp_path / "new", tmp_path / "p") == "patched"


def test_a_lack_of_descriptors_is_no_matter_of_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with few_descriptors(0):
        with pytest.raises(FailedError, match=r"Too many open files\. .*raise `ulimit -n`") as file:
            open_regular(str(tmp_path / "file"), None, "file")
        with pytest.raises(FailedError, match=r"Too many open files\. .*raise `ulimit -n`"), open_folder(tmp_path):
            pass
    assert "permissions" not in str(file.value)

    codes = [errno.ENFILE, errno.EACCES]

    def fail(*_: object, **__: object) -> int:
        code = codes.pop(0)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "open", fail)
    for advice in ("raise `ulimit -n` and fs.file-max", "Check its permissions"):
        with pytest.raises(FailedError, match=advice):
            open_regular("file", None, "file")
