"""Patches under faults: absent or complete, whatever kills the process, the disk or the source."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from pathlib import Path

import pytest
from forked import Forked

from elo_engine.checkpoint import apply_patch, diff_checkpoints, verify_commit, verify_patch
from elo_engine.checkpoint.syscalls import SYSCALLS
from elo_engine.errors import FailedError

from .checkpoint_fixture import fail_on_call, leftovers, state
from .patch_fixture import base, changed, make_changed, patch, same_weights  # noqa: F401

# ruff: noqa: F811 (fixtures are parameters of their own name)


DISK = [("write", errno.ENOSPC), *((name, errno.EIO) for name in ("write", "fsync", "rename", "pread"))]


@pytest.mark.parametrize(("name", "code"), DISK)
def test_a_disk_that_fails_while_a_patch_is_written(
    base: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    with monkeypatch.context() as context:
        calls = fail_on_call(context, name, -1, 0)
        diff_checkpoints(base, changed, tmp_path / "count")
    (tmp_path / "count").unlink()
    for number in range(calls[0]):
        with monkeypatch.context() as context:
            fail_on_call(context, name, number, code)
            with pytest.raises(FailedError) as caught:
                diff_checkpoints(base, changed, tmp_path / "p")
        if code == errno.ENOSPC:
            assert "bytes are needed" in str(caught.value)
        if "is complete, but the disk did not confirm" in str(caught.value):  # the sync of the folder, after the rename
            assert number == calls[0] - 1 and verify_patch(base, tmp_path / "p") == "base"
        else:
            assert sorted(os.listdir(tmp_path)) == ["base", "changed"]


@pytest.mark.parametrize("which", ["base", "changed"])
@pytest.mark.parametrize("how", ["touched", "truncated", "replaced", "config"])
def test_a_checkpoint_that_changes_while_it_is_read(
    base: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, how: str
) -> None:
    path, real = tmp_path / which / "s-1.safetensors", SYSCALLS.write

    def write(fd: int, data: memoryview) -> int:
        if how == "touched":
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        elif how == "truncated":
            os.truncate(path, 300)
        elif how == "config":
            (path.parent / "config.json").write_text("{}")
        else:
            path.with_suffix(".new").write_bytes(path.read_bytes())
            path.with_suffix(".new").rename(path)
        return real(fd, data)

    monkeypatch.setattr(SYSCALLS, "write", write)
    with pytest.raises(FailedError, match=r"changed|truncated"):
        diff_checkpoints(base, changed, tmp_path / "p")
    assert sorted(os.listdir(tmp_path)) == ["base", "changed"]


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from elo_engine.checkpoint import SYSCALLS, apply_patch, diff_checkpoints
from elo_engine.checkpoint.mover import using

verb, base, other, runs = sys.argv[1], *map(Path, sys.argv[2:])

def run(folder, kill_at):
    calls = []
    def hook(name, real):
        def call(*arguments):
            if len(calls) == kill_at:
                if name in ("write", "pwrite"):  # half of it reaches the file
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            return real(*arguments)
        return call
    for name in ("write", "pwrite", "fsync", "rename", "copy_range"):
        setattr(SYSCALLS, name, hook(name, getattr(SYSCALLS, name)))
    with using("python"):
        (diff_checkpoints if verb == "diff" else apply_patch)(base, other, folder / "out")
    return calls

def fork(kill_at):
    folder = runs / str(kill_at)
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        calls = run(folder, kill_at)
        (runs / "calls.json").write_text(json.dumps(calls))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert fork(-1) == 0
calls = json.loads((runs / "calls.json").read_text())
points = sorted({*range(0, len(calls), 3), *range(len(calls) - 4, len(calls))})
print(json.dumps({"calls": calls, "status": {k: fork(k) for k in points}}))
"""


@pytest.mark.parametrize("verb", ["diff", "apply"])
def test_killed_on_the_way(
    base: Path, changed: Path, patch: Path, tmp_path: Path, verb: str, forked: Forked
) -> None:
    before = state(base), state(changed)
    other = changed if verb == "diff" else patch
    done = forked(KILLED, verb, base, other, tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["status"].values()) == {-signal.SIGKILL} and {"write", "fsync", "rename"} <= set(report["calls"])
    again = diff_checkpoints if verb == "diff" else apply_patch
    for number in map(int, report["status"]):
        folder, call = tmp_path / "runs" / str(number), report["calls"][number]
        if "rename" in report["calls"][:number]:  # killed after it: complete
            assert os.listdir(folder) == ["out"]
        else:
            assert not (folder / "out").exists() and len(leftovers(folder)) == 1, call
            assert len(os.listdir(folder)) == 1
            again(base, other, folder / "out")
        assert os.listdir(folder) == ["out"]
        if verb == "diff":
            assert (folder / "out").read_bytes() == patch.read_bytes()
        else:
            verify_commit(folder / "out")
            assert same_weights(folder / "out", changed)
    assert (state(base), state(changed)) == before


def test_an_unfinished_patch_does_not_open(base: Path, changed: Path, tmp_path: Path) -> None:
    """The header is written last, so even the temporary file of a killed diff is no safetensors file."""
    seen: list[bytes] = []

    def look(what: str, done: int, total: int) -> None:
        seen.extend(p.read_bytes() for p in tmp_path.glob(".p.tmp-*"))

    diff_checkpoints(base, changed, tmp_path / "p", look)
    assert len(seen) >= 4 and all(data[:8] == bytes(8) for data in seen)


def test_leftovers_of_others_stay(base: Path, changed: Path, tmp_path: Path) -> None:
    (tmp_path / ".p.tmp-1-00112233").write_bytes(b"stale")
    foreign = [".p2.tmp-1-00112233", ".p.tmp-x-00112233", "p.tmp-1-00112233"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"precious")
    (tmp_path / ".p.tmp-1-0000000a").symlink_to(tmp_path / foreign[0])
    (tmp_path / ".p.tmp-1-0000000b").mkdir()
    diff_checkpoints(base, changed, tmp_path / "p")
    assert not (tmp_path / ".p.tmp-1-00112233").exists()
    assert all((tmp_path / name).exists() for name in [*foreign, ".p.tmp-1-0000000a", ".p.tmp-1-0000000b"])


def test_leftovers_are_removed_where_a_lock_needs_write_access(
    base: Path, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, which makes a lock of the file's bytes of it."""
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(fd, operation)

    (tmp_path / ".p.tmp-1-00112233").write_bytes(b"stale")
    monkeypatch.setattr(fcntl, "flock", flock)
    diff_checkpoints(base, changed, tmp_path / "p")
    assert not leftovers(tmp_path)
