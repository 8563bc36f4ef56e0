"""Writing back: bounded memory, hard links only when asked for, and what a filesystem with reflinks really stores."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elo_engine.checkpoint import (
    RewriteStats,
    open_checkpoint,
    publish,
    rewrite_checkpoint,
    space_needed,
    stored_tensors,
    verify_commit,
)
from elo_engine.checkpoint import clone as clone_module
from elo_engine.checkpoint.patch_file import safetensors_header
from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.errors import FailedError, RefusedError

from .checkpoint_fixture import TRAVELLING, changed_layers, leftovers, make_source, state

Elo = Callable[..., tuple[int, str]]
MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_source(tmp_path / "source")
    return tmp_path / "source"


def test_stored_tensors_are_written_like_those_in_memory(source: Path, tmp_path: Path) -> None:
    changed = changed_layers()
    save_file(changed, tmp_path / "weights.safetensors")
    index, stored = open_checkpoint(source), stored_tensors(tmp_path / "weights.safetensors")
    for name, tensors in (("memory", changed), ("disk", stored)):
        (tmp_path / name).mkdir()
        rewrite_checkpoint(index, tensors, tmp_path / name)
    for name in TRAVELLING:
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
    assert (tmp_path / "disk" / "s-1.safetensors").read_bytes() != (source / "s-1.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["changed", "truncated", "gone", "not finite"])
def test_stored_tensors_that_cannot_be_trusted(source: Path, tmp_path: Path, how: str) -> None:
    path, changed = tmp_path / "weights.safetensors", changed_layers()
    if how == "not finite":
        changed["layers.11.weight"][0, 1] = float("nan")
    save_file(changed, path)
    stored = stored_tensors(path)
    if how == "changed":
        os.utime(path, ns=(0, 1))
    elif how == "truncated":
        os.truncate(path, 300)
    elif how == "gone":
        path.unlink()
    with pytest.raises(FailedError, match=r"changed|no such file|nan at position 1 of 9"), publish(tmp_path / "o") as f:
        rewrite_checkpoint(open_checkpoint(source), stored, f)
    assert not (tmp_path / "o").exists() and not leftovers(tmp_path)


def hub_cache(source: Path, tmp_path: Path) -> Path:
    """The same checkpoint as a hub cache has it: links into ../../blobs."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy2(path, blobs / f"blob-{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{number}")
    return snapshot


@pytest.mark.parametrize("cached", [False, True], ids=["folder", "hub cache"])
def test_unchanged_shards_are_linked_when_asked_for(source: Path, tmp_path: Path, cached: bool) -> None:
    folder = hub_cache(source, tmp_path) if cached else source
    before, index = state(folder), open_checkpoint(folder)
    changed = {"layers.0.weight": changed_layers()["layers.0.weight"]}  # in s-1
    with publish(tmp_path / "out") as out:
        stats = rewrite_checkpoint(index, changed, out, hard_links=True)
    assert state(folder) == before  # bytes, time, inode, mode
    one, two = (folder / "s-1.safetensors").stat(), (folder / "s-2.safetensors").stat()
    assert (one.st_nlink, two.st_nlink) == (1, 2)
    assert (tmp_path / "out" / "s-2.safetensors").lstat().st_ino == two.st_ino
    assert not (tmp_path / "out" / "s-2.safetensors").is_symlink()
    assert stats.bytes_linked == two.st_size and stats.bytes_written == 192 and stats.not_linked == ""
    assert stats.bytes_cloned + stats.bytes_copied == one.st_size - 192
    verify_commit(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert state(folder) == before and (folder / "s-2.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("changes", ["every shard", "no shard"])
def test_without_being_asked_nothing_is_linked(source: Path, tmp_path: Path, changes: str) -> None:
    """A program that empties the output's shard must not empty the source's, least of all one that did not change."""
    before = state(source)
    with publish(tmp_path / "out") as out:
        stats = rewrite_checkpoint(open_checkpoint(source), changed_layers() if changes == "every shard" else {}, out)
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_nlink == 1
        path.write_bytes(b"")
    assert state(source) == before and stats.bytes_linked == 0


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOENT])
def test_where_links_are_declined_shards_are_cloned(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(clone_module.os, "link", link)
    with publish(tmp_path / "out") as out:
        stats = rewrite_checkpoint(open_checkpoint(source), {}, out, hard_links=True)
    assert stats.bytes_linked == 0 and stats.bytes_cloned + stats.bytes_copied > 0
    assert stats.not_linked.count("no hard link") == 1 and os.strerror(code) in stats.not_linked
    assert (source / "s-1.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_broken_disk_is_not_taken_for_a_refusal(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(clone_module.os, "link", link)
    with pytest.raises(FailedError), publish(tmp_path / "out") as out:
        rewrite_checkpoint(open_checkpoint(source), {}, out, hard_links=True)
    assert not leftovers(tmp_path)


def test_another_filesystem_is_never_linked_through(source: Path, tmp_path: Path) -> None:
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second filesystem to write to")
    out = Path("/dev/shm") / f"elo-test-{os.getpid()}"
    out.mkdir()
    try:
        stats = rewrite_checkpoint(open_checkpoint(source), {}, out, hard_links=True)
    finally:
        shutil.rmtree(out)
    assert stats.bytes_linked == 0 and "Invalid cross-device link" in stats.not_linked


def test_a_link_is_never_made_over_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "s-1.safetensors").write_bytes(b"precious")
    with pytest.raises(RefusedError, match="nothing is ever written over"):
        rewrite_checkpoint(open_checkpoint(source), {}, tmp_path / "out", hard_links=True)
    assert (tmp_path / "out" / "s-1.safetensors").read_bytes() == b"precious"


def test_space_needed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, out = open_checkpoint(source), tmp_path / "deep" / "out"
    one, total = index.shards["s-1.safetensors"].size, sum(info.size for info in index.shards.values())

    def declined(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(SYSCALLS, "ficlone", declined)
    assert space_needed(index, ["layers.0.weight"], out) == total
    assert space_needed(index, ["layers.0.weight"], out, hard_links=True) == one
    monkeypatch.setattr(SYSCALLS, "ficlone", lambda *_: None)
    assert space_needed(index, ["layers.0.weight"], out) == 192 + 2 * 4096
    assert sorted(os.listdir(tmp_path)) == ["source"]  # the trial leaves nothing


def test_hard_links_from_the_configuration_and_the_command_line(
    untied: Path, run_tree: dict[str, Any], write_config: Callable[..., Path], elo: Elo, tmp_path: Path
) -> None:
    """In one run by the configuration, in another by `elo reattach --hard-links`; not in a third."""
    shutil.copytree(untied, tmp_path / "model")  # the fixture's model is shared: count links on a copy
    run_tree["model"] = str(tmp_path / "model")
    run_tree["output"] = str(tmp_path / "run")
    assert elo("pretrain", write_config(run_tree), "evaluate.every=0")[0] == 0
    linked = {}
    for name, option in (("plain", ()), ("option", ("--hard-links",)), ("config", ())):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        if name == "config":
            path = tmp_path / name / "config.resolved.yaml"
            path.write_text(path.read_text().replace("hard_links: false", "hard_links: true"))
        status, shown = elo("reattach", tmp_path / name, *option)
        assert status == 0, shown
        shards = list((tmp_path / name / "reattached").glob("*.safetensors"))
        linked[name] = sum(path.stat().st_nlink > 1 for path in shards)
        assert ("in hard links to the source" in shown) == (linked[name] > 0), shown
        assert len(shards) > 1
    assert linked["plain"] == 0 and linked["option"] == linked["config"] > 0


def sparse_shard(path: Path, names: list[str], rows: int) -> None:
    """bf16 tensors of rows x 1 MiB each, which take no space on the disk."""
    header = safetensors_header([(name, "BF16", (rows, MIB // 2), rows * MIB) for name in names], {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + len(names) * rows * MIB)


def sparse_checkpoint(folder: Path, layers: int, rows: int, per_shard: int) -> list[str]:
    """`layers` tensors of rows MiB in shards of `per_shard`; returns their names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    names, weight_map = [f"layers.{i}.weight" for i in range(layers)], {}
    for number in range(layers // per_shard):
        shard, held = f"s-{number}.safetensors", names[number * per_shard : (number + 1) * per_shard]
        sparse_shard(folder / shard, held, rows)
        weight_map |= dict.fromkeys(held, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def sparse_weights(path: Path, names: list[str], rows: int) -> None:
    """fp32 zeros for these tensors, in a file without blocks."""
    header = safetensors_header([(name, "F32", (rows, MIB // 2), 2 * rows * MIB) for name in names], {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + len(names) * 2 * rows * MIB)


MEASURED = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from elo_engine.checkpoint import (apply_patch, average_patches, diff_checkpoints, open_checkpoint, publish,
    rewrite_checkpoint, stored_tensors, verify_patch)
from safetensors.torch import load_file

tiny, small, big = map(Path, sys.argv[1:])

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def write(weights, folder, name):
    with publish(folder / name) as out:
        rewrite_checkpoint(open_checkpoint(folder / "source"), weights, out, hard_links=True)

def measure(work, folder):  # in a child, so that no work finds memory that another one left
    reader, writer = os.pipe()
    if os.fork() == 0:
        work(tiny)  # code pages are mapped once they have run
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts
        before = status("VmRSS:")
        work(folder)
        os.write(writer, str(status("VmHWM:") - before).encode())
        os._exit(0)
    os.close(writer)
    return int(os.read(reader, 100))

weights = [0.1, 0.2, 0.3, 0.4]
print(json.dumps({
    "write": measure(lambda f: write(stored_tensors(f / "weights.safetensors"), f, "out"), big),
    "in memory": measure(lambda f: write(load_file(f / "weights.safetensors"), f, "more"), big),
    "diff": measure(lambda f: diff_checkpoints(f / "source", f / "changed", f / "p"), small),
    "verify": measure(lambda f: verify_patch(f / "source", f / "p"), small),
    "apply": measure(lambda f: apply_patch(f / "source", f / "p", f / "applied", hard_links=True), small),
    "average": measure(lambda f: average_patches(f / "source", [f / "p"] * 4, f / "mean", weights), small),
}))
"""


def test_memory_does_not_depend_on_sizes(tmp_path: Path) -> None:
    """Writing back 2 of 30 layers of a checkpoint of 0.6 GB, and patches of one of 0.1 GB in tensors of 50 MiB.

    Bound: buffers are pieces of 1 Mi elements (4 MiB of fp32, their cast, the check of finite values) and chunks of
    1 MiB with their fp64 values, at most 20 MiB together; hashing and copying take 1 MiB, and what the allocator keeps
    of that is no more than the same again. Holding the two layers' fp32 weights takes 80 MiB, as the planted "in
    memory" does, and two sides of one tensor of the patch 100.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel of this machine does not tell a process's peak")
    sizes = {"tiny": (2, 1, 1), "small": (2, 50, 1), "big": (30, 20, 5)}  # layers, MiB a layer, layers a shard
    for folder, (layers, rows, per_shard) in sizes.items():
        for side in ("source", "changed"):
            names = sparse_checkpoint(tmp_path / folder / side, layers, rows, per_shard)
        sparse_weights(tmp_path / folder / "weights.safetensors", [names[0], names[-1]], rows)
        entry = open_checkpoint(tmp_path / folder / "changed").entries[names[-1]]
        with (tmp_path / folder / "changed" / entry.shard).open("r+b") as file:
            file.seek(entry.end - 2)
            file.write(torch.ones(1).bfloat16().view(torch.uint8).numpy().tobytes())
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *(tmp_path / folder for folder in sizes)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    extra = json.loads(done.stdout)
    assert extra.pop("in memory") > 70 * MIB  # the planted error is seen
    assert max(extra.values()) < 60 * MIB, extra
    changed = load_file(tmp_path / "small" / "mean")
    assert set(changed) == {"layers.1.weight"} and changed["layers.1.weight"].view(torch.bfloat16).float().sum() == 1


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A small XFS, whose files can share extents; the test is skipped where nobody may mount."""
    image, mount = tmp_path / "xfs.img", tmp_path / "xfs"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("needs root and mkfs.xfs")
    made = subprocess.run(["mkfs.xfs", "-q", str(image)], capture_output=True)
    if made.returncode or subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True).returncode:
        pytest.skip("an XFS image cannot be made or mounted here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def used_bytes(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_with_reflinks_only_the_changed_ranges_take_space(xfs: Path) -> None:
    """60 MiB of real bytes, 2 MiB of them changed, on a real XFS."""
    (xfs / "source").mkdir()
    (xfs / "source" / "config.json").write_text("{}")
    generator = torch.Generator().manual_seed(1)
    tensors = {f"layers.{i}.weight": torch.randn(MIB, generator=generator).bfloat16() for i in range(30)}
    save_file(tensors, xfs / "source" / "model.safetensors")
    index, before = open_checkpoint(xfs / "source"), used_bytes(xfs)
    with publish(xfs / "out") as out:
        stats = rewrite_checkpoint(index, {"layers.7.weight": torch.zeros(MIB)}, out)
    size = index.shards["model.safetensors"].size
    assert stats == RewriteStats(bytes_written=2 * MIB, bytes_cloned=size - 2 * MIB)
    assert 2 * MIB <= used_bytes(xfs) - before < 3 * MIB  # and some metadata
    assert space_needed(index, ["layers.7.weight"], xfs / "more") == 2 * MIB + 8192
    loaded = load_file(xfs / "out" / "model.safetensors")
    assert torch.equal(loaded["layers.6.weight"], tensors["layers.6.weight"]) and not loaded["layers.7.weight"].any()
    (xfs / "out" / "model.safetensors").write_bytes(b"")
    assert torch.equal(load_file(xfs / "source" / "model.safetensors")["layers.7.weight"], tensors["layers.7.weight"])
