"""Publishing: an output is absent, or complete and verifiable, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import Forked

from elo_engine.checkpoint import syscalls
from elo_engine.checkpoint.index import CheckpointIndex, open_checkpoint
from elo_engine.checkpoint.mover import using
from elo_engine.checkpoint.writer import (
    preflight_space,
    publish,
    rewrite_checkpoint,
    verify_commit,
    write_safetensors,
)
from elo_engine.errors import FailedError, RefusedError, UsageError

from .checkpoint_fixture import TRAVELLING, changed_layers, fail_on_call, leftovers, make_source, state


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_source(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def index(source: Path) -> CheckpointIndex:
    return open_checkpoint(source)


@contextmanager
def umask(mode: int) -> Iterator[None]:
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


def test_publish_and_verify(tmp_path: Path) -> None:
    extra: dict[str, object] = {"source": "abc", "steps": {2: 0.1, 10: None}}
    with publish(tmp_path / "deep" / "er" / "out", extra) as folder:
        assert folder.parent == tmp_path / "deep" / "er" and not (tmp_path / "deep" / "er" / "out").exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_bytes(b"xyz")
        (folder / "a").write_bytes(b"")
        extra["late"] = True  # what is only known at the end
    out = tmp_path / "deep" / "er" / "out"
    commit = verify_commit(out)
    assert commit["extra"] == {"source": "abc", "steps": {"2": 0.1, "10": None}, "late": True}
    assert {name: entry["size"] for name, entry in commit["files"].items()} == {"a": 0, "sub/b": 3}
    assert os.listdir(out.parent) == ["out"]


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        target = tmp_path / "out"
        make(target)
        with pytest.raises(RefusedError, match="the output exists"), publish(target):
            pytest.fail("the body must not run")
        assert os.listdir(tmp_path) == ["out"]
        target.rmdir() if target.is_dir() else target.unlink()


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the output exists"), publish(tmp_path / "out") as folder:
        (folder / "a").touch()
        (tmp_path / "out").mkdir()  # empty: a plain rename would replace it
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(tmp_path / "out")


def test_rename_where_the_system_cannot_do_it_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls.ctypes, "CDLL", lambda *_, **__: object())
    with publish(tmp_path / "out") as folder:
        (folder / "a").touch()
    verify_commit(tmp_path / "out")
    with pytest.raises(RefusedError), publish(tmp_path / "two") as folder:
        (tmp_path / "two").mkdir()
    assert sorted(os.listdir(tmp_path)) == ["out", "two"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), FailedError("x"), SystemExit(3)])
def test_on_an_error_nothing_is_left(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, publish(tmp_path / "new" / "out") as folder:
        (folder / "a").touch()
        raise error
    assert caught.value is error and not os.listdir(tmp_path)


def test_two_writers_for_one_target(tmp_path: Path) -> None:
    """The second sees that the first is alive, the first finds the target taken."""
    with pytest.raises(RefusedError, match="the output exists"), publish(tmp_path / "out") as first:
        (first / "a").write_bytes(b"first")
        with publish(tmp_path / "out") as second:
            assert first.is_dir()
            (second / "a").write_bytes(b"second")
        assert first.is_dir()
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_bytes() == b"second"


@pytest.mark.filterwarnings("error")  # not even tried
def test_only_own_stale_folders_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".out.tmp-1-00112233"
    (stale / "sub").mkdir(parents=True)
    (stale / "sub" / "a").touch()
    foreign = [
        ".out2.tmp-1-00112233",
        ".out.tmp-1-0011223",
        ".out.tmp-x-00112233",
        "out.tmp-1-00112233",
        ".out",
    ]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    (tmp_path / ".out.tmp-1-0000000f").touch()  # a file of such a name
    (tmp_path / ".out.tmp-1-0000000a").symlink_to(tmp_path / ".out2.tmp-1-00112233")  # a link to a foreign folder
    with publish(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert not stale.exists() and (tmp_path / ".out.tmp-1-0000000f").exists()
    assert all((tmp_path / name / "precious").exists() for name in foreign)


def test_a_target_name_is_not_a_pattern(tmp_path: Path) -> None:
    (tmp_path / ".axb.tmp-1-00112233").mkdir()
    with publish(tmp_path / "a.b"):
        pass
    assert (tmp_path / ".axb.tmp-1-00112233").exists()


@pytest.mark.parametrize(
    ("mask", "folder_mode", "file_mode"),
    [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o007, 0o770, 0o660)],
)
def test_modes_follow_the_umask(
    index: CheckpointIndex, tmp_path: Path, mask: int, folder_mode: int, file_mode: int
) -> None:
    with umask(mask), publish(tmp_path / "out") as folder:
        rewrite_checkpoint(index, {}, folder)
        write_safetensors(folder / "state.safetensors", {"a": torch.zeros(2)})
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder_mode
    files = list((tmp_path / "out").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {file_mode} and len(files) == 8


def test_links_in_an_output_are_refused(tmp_path: Path) -> None:
    for make in (lambda path: path.symlink_to("/etc/passwd"), os.mkfifo):
        with pytest.raises(FailedError, match="plain files only"), publish(tmp_path / "out") as folder:
            make(folder / "x")
    with pytest.raises(FailedError, match="written by `publish` alone"), publish(tmp_path / "out") as folder:
        (folder / "COMMIT.json").touch()
    with pytest.raises(FailedError, match="not plain JSON"), publish(tmp_path / "out", {"a": {1}}):
        pass
    assert not os.listdir(tmp_path)


def test_a_target_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
        with pytest.raises(FailedError, match="Not a directory"), publish(target):
            pytest.fail("the body must not run")
    with pytest.raises(UsageError, match="cannot be an output folder"), publish(Path("/")):
        pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "x"


def count_calls(index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> int:
    with monkeypatch.context() as context:
        calls = fail_on_call(context, name, -1, 0)
        with using("python"), publish(tmp_path / "count") as folder:
            rewrite_checkpoint(index, changed_layers(), folder)
    shutil.rmtree(tmp_path / "count")
    return calls[0]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((name, code) for name in ("write", "pwrite") for code in (errno.ENOSPC, errno.EIO)),
        ("copy_range", errno.ENOSPC),
        ("copy_range", errno.EIO),
    ],
)
def test_a_full_disk_or_an_error_at_every_write(
    index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    before, total = state(index.folder), count_calls(index, tmp_path, monkeypatch, name)
    assert total >= (2 if name == "pwrite" else 4)
    for number in range(total):
        with monkeypatch.context() as context:
            fail_on_call(context, name, number, code)
            with using("python"), pytest.raises(FailedError) as caught, publish(tmp_path / "out") as folder:
                rewrite_checkpoint(index, changed_layers(), folder)
        text = str(caught.value)
        if code == errno.ENOSPC:
            assert "no space left" in text and "bytes are needed" in text and "are free" in text
        assert any(name in text for name in TRAVELLING | {"COMMIT.json"}), text
        assert os.listdir(tmp_path) == ["source"]
    assert state(index.folder) == before


def test_a_failed_sync_is_never_success(
    index: CheckpointIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = count_calls(index, tmp_path, monkeypatch, "fsync")
    assert total == len(TRAVELLING) + 4  # the files, the folder, COMMIT, the folder again, the parent
    for number in range(total):
        with monkeypatch.context() as context:
            calls = fail_on_call(context, "fsync", number, errno.EIO)
            with pytest.raises(FailedError) as caught, publish(tmp_path / "out") as folder:
                rewrite_checkpoint(index, changed_layers(), folder)
        assert calls[0] == number + 1  # not tried again
        if number < total - 1:
            assert os.listdir(tmp_path) == ["source"]
        else:  # after the rename the output is complete, only its name is not known to be on the disk
            assert "is complete, but the disk did not confirm" in str(caught.value)
            verify_commit(tmp_path / "out")
            assert not leftovers(tmp_path)


def test_a_failed_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on_call(monkeypatch, "rename", 0, errno.EIO)
    with pytest.raises(FailedError, match="nothing was published"), publish(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert not os.listdir(tmp_path)


def test_a_full_disk_in_the_body(tmp_path: Path) -> None:
    with (
        pytest.raises(FailedError, match=r"log\.txt: no space left on the device"),
        publish(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "log.txt")
    assert not os.listdir(tmp_path)


def test_preflight(tmp_path: Path) -> None:
    preflight_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(RefusedError, match=rf"{1 << 60} bytes \(1152921504\.61 GB\) are needed and \d+ \("):
        preflight_space(tmp_path / "not" / "yet" / "there", 1 << 60)


def test_damage_is_found(index: CheckpointIndex, tmp_path: Path) -> None:
    with publish(tmp_path / "good", {"x": [1, 2.5, "ü"]}) as folder:
        rewrite_checkpoint(index, changed_layers(), folder)

    def damaged(action: Callable[[Path], object], message: str, deep: bool = True) -> None:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        action(tmp_path / "bad")
        with pytest.raises(FailedError, match=message):
            verify_commit(tmp_path / "bad", deep=deep)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    verify_commit(tmp_path / "good")
    damaged(lambda f: flip(f / "s-1.safetensors"), r"s-1\.safetensors: its bytes changed")
    verify_commit(tmp_path / "bad", deep=False)  # sizes are all that the quick check looks at
    damaged(lambda f: os.truncate(f / "s-1.safetensors", 9), r"s-1\.safetensors: has 9 bytes", deep=False)
    damaged(lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: missing", deep=False)
    damaged(lambda f: (f / "evil.py").touch(), r"evil\.py: an extra file", deep=False)
    damaged(lambda f: (f / "COMMIT.json").unlink(), r"COMMIT\.json: missing, so the folder was never", deep=False)
    damaged(lambda f: (f / "COMMIT.json").write_text("[]"), r"COMMIT\.json: was changed")
    damaged(lambda f: (f / "COMMIT.json").write_text('{"files": {}}'), r"COMMIT\.json: was changed")
    damaged(lambda f: (f / "LICENSE").unlink() or (f / "LICENSE").symlink_to("/etc/passwd"), "plain files only")


def test_every_flipped_bit_in_commit_is_found(tmp_path: Path) -> None:
    with publish(tmp_path / "out", {"loss": 1.5, "note": None, "text": "a b"}) as folder:
        (folder / "a").write_bytes(b"abc")
    path, good, choose = (
        tmp_path / "out" / "COMMIT.json",
        (tmp_path / "out" / "COMMIT.json").read_bytes(),
        random.Random(5),
    )
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << choose.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(FailedError, match=r"COMMIT\.json"):
            verify_commit(tmp_path / "out")
    path.write_bytes(good)
    verify_commit(tmp_path / "out")


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from elo_engine.checkpoint.index import open_checkpoint
from elo_engine.checkpoint.mover import using
from elo_engine.checkpoint.writer import SYSCALLS, publish, rewrite_checkpoint

index, base = open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2])
changed = {name: torch.full((8, 12), 0.5) for name in ("layers.0.weight", "layers.11.weight")}

def run(folder, kill_at):
    calls = []
    def hook(name, real):
        def call(*arguments):
            if len(calls) == kill_at:
                if name in ("write", "pwrite"):  # half of it reaches the file
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            result = real(*arguments)
            if name == "rename" and kill_at == -2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    for name in ("write", "pwrite", "fsync", "rename", "ficlone", "copy_range"):
        setattr(SYSCALLS, name, hook(name, getattr(SYSCALLS, name)))
    with using("python"), publish(folder / "out", {"kill_at": kill_at}) as temporary:
        rewrite_checkpoint(index, changed, temporary)
    return calls

def fork(kill_at):
    folder = base / str(kill_at)
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        (folder / "calls.json").write_text(json.dumps(run(folder, kill_at)))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert fork(-1) == 0
calls = json.loads((base / "-1" / "calls.json").read_text())
print(json.dumps({"calls": calls, "status": {k: fork(k) for k in [-2, *range(len(calls))]}}))
"""


def test_killed_at_every_step_of_publishing(source: Path, tmp_path: Path, forked: Forked) -> None:
    """Absent, or complete and verifiable; and the next run removes what the killed one left and succeeds."""
    before = state(source)
    (tmp_path / "runs").mkdir()
    done = forked(KILLED, source, tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["status"].values()) == {-9} and {"write", "pwrite", "fsync", "rename"} <= set(report["calls"])
    assert state(source) == before
    index, wanted, complete = open_checkpoint(source), state(tmp_path / "runs" / "-1" / "out"), 0
    for kill_at in report["status"]:
        folder = tmp_path / "runs" / kill_at
        renamed = int(kill_at) in (-2, len(report["calls"]) - 1)
        assert (folder / "out").exists() == renamed, report["calls"][int(kill_at)]
        assert len(leftovers(folder)) == (not renamed)
        if renamed:
            complete += 1
            with pytest.raises(RefusedError), publish(folder / "out"):
                pytest.fail("the body must not run")
        else:
            with publish(folder / "out") as temporary:
                rewrite_checkpoint(index, {}, temporary)
        verify_commit(folder / "out")
        assert open_checkpoint(folder / "out").identity() == index.identity()
        if renamed:
            assert all(state(folder / "out")[n][0] == wanted[n][0] for n in TRAVELLING)
        assert os.listdir(folder) == ["out"]
    assert complete == 2
