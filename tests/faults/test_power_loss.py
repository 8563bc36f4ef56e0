"""Power loss while a snapshot is saved: a recorded save, replayed up to each call, with what need not be on the disk
yet taken away. Fault 35.

What a disk may hold after the power went: of a file all that was synced and, of what was written since, all, half or
nothing; of a folder the names that were there when it was last synced, and all of the later changes or none. A rename
is one change: whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from snapshot_fixture import newest, save

from elo_engine.checkpoint import SYSCALLS
from elo_engine.checkpoint import commit as commit_module
from elo_engine.train import state

Tree = dict[str, dict[str, bytes]]  # folder -> file -> bytes


def picture(stage: Path) -> Tree:
    """All folders below a stage, each with its files."""
    return {folder.name: {path.name: path.read_bytes() for path in folder.iterdir()} for folder in stage.iterdir()}


@dataclass(frozen=True)
class Moment:
    """Just after a call.

    Attributes:
        now: as any program sees it. synced: by file's inode, as it was when it was last synced.
        names: by folder's inode, the names that were there (with their inodes) when it was last synced.
    """

    what: str
    now: Tree
    synced: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    inodes: dict[str, int] = field(default_factory=dict)  # `folder` or `folder/file` -> inode


def entries(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


class Recorder:
    """Follows all that a save does."""

    def __init__(self, stage: Path) -> None:
        self.stage, self.moments = stage, list[Moment]()
        self._synced: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        for folder in (stage, *stage.iterdir()):  # what was there before is on the disk
            self._names[folder.stat().st_ino] = entries(folder)
            self._synced |= {path.stat().st_ino: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def fsynced(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_dir():
            self._names[path.stat().st_ino] = entries(path)
        else:
            self._synced[path.stat().st_ino] = path.read_bytes()

    def look(self, what: str) -> None:
        paths = [path for folder in self.stage.iterdir() for path in (folder, *folder.iterdir())]
        inodes = {str(path.relative_to(self.stage)): path.stat().st_ino for path in paths}
        inodes["."] = self.stage.stat().st_ino
        self.moments.append(Moment(what, picture(self.stage), dict(self._synced), dict(self._names), inodes))


def record(stage: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> list[Moment]:
    """The moments of one save."""
    recorder = Recorder(stage)
    with monkeypatch.context() as patch:
        for owner, name in (
            (SYSCALLS, "write"), (SYSCALLS, "fsync"), (SYSCALLS, "rename"), (os, "unlink"), (os, "rmdir"),
        ):  # fmt: skip
            plain = getattr(owner, name)

            def call(*args: object, plain: object = plain, name: str = name, **options: object) -> object:
                result = plain(*args, **options)  # type: ignore[operator]
                if name == "fsync":
                    recorder.fsynced(args[0])  # type: ignore[arg-type]
                recorder.look(name)
                return result

            patch.setattr(owner, name, call)
        save(stage, step)
        recorder.look("end")
    return recorder.moments


def after_power_loss(moment: Moment, *, names: str, content: str) -> Tree:
    """What may be on the disk.

    Args:
        names: `synced` or `now`, of every folder. content: `none`, `half` or `all` of what was not synced.
    """
    by_inode = {inode: path for path, inode in moment.inodes.items()}
    top = moment.names[moment.inodes["."]] if names == "synced" else {n: moment.inodes[n] for n in moment.now}
    found: Tree = {}
    for folder, inode in top.items():
        here = by_inode.get(inode)
        inside = moment.names.get(inode, {})
        if names == "now" and here is not None:
            inside = {name: moment.inodes[f"{here}/{name}"] for name in moment.now[here]}
        found[folder] = {}
        for name, number in inside.items():
            kept, path = moment.synced.get(number, b""), by_inode.get(number)
            latest = kept if path is None else moment.now[path.split("/")[0]][path.split("/")[1]]
            if latest != kept:
                kept = {"none": kept, "half": latest[: len(latest) // 2], "all": latest}[content]
            found[folder][name] = kept
    return found


def build(tree: Tree, stage: Path) -> Path:
    shutil.rmtree(stage, ignore_errors=True)
    for folder, files in tree.items():
        (stage / folder).mkdir(parents=True)
        for name, content in files.items():
            (stage / folder / name).write_bytes(content)
    stage.mkdir(exist_ok=True)
    return stage


def found_after(moments: list[Moment], stage: Path) -> Iterator[tuple[Moment, int]]:
    """Every legal state of a disk, and the step that a resume finds on it."""
    for moment in moments:
        for names in ("synced", "now"):
            for content in ("none", "half", "all"):
                yield moment, newest(build(after_power_loss(moment, names=names, content=content), stage))


def check(moments: list[Moment], stage: Path) -> None:
    """Nothing that was saved is lost, and once `save` has returned, the new snapshot is not either."""
    count = 0
    for moment, step in found_after(moments, stage):
        count += 1
        assert step in (4, 6), f"after {moment.what}: {step}"
        if moment.what == "end":
            assert step == 6, "the save has returned"
    assert count > 100


def test_power_loss_at_every_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is found is the one before or the new one, its hashes and values in order; then work goes on."""
    stage = tmp_path / "pretrain"
    for step in (2, 4):
        save(stage, step)
    moments = record(stage, 6, monkeypatch)
    assert {moment.what for moment in moments} >= {"write", "fsync", "rename", "unlink", "rmdir", "end"}
    check(moments, tmp_path / "replayed")
    last = tmp_path / "replayed"
    for names in ("synced", "now"):
        build(after_power_loss(moments[len(moments) // 2], names=names, content="half"), last)
        state.clear_leftovers(last)
        save(last, 6)
        assert newest(last) == 6 and sorted(path.name for path in last.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("left_out", ["files", "folders"])
def test_a_save_that_does_not_sync_is_seen(left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replay can fail: without the syncs of files, or of folders, a snapshot that was promised is gone."""
    stage = tmp_path / "pretrain"
    for step in (2, 4):
        save(stage, step)
    plain = SYSCALLS.fsync

    def fsync(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").resolve().is_dir() == (left_out == "files"):
            plain(fd)

    recorder_sees = Recorder.fsynced

    def fsynced(self: Recorder, fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").resolve().is_dir() == (left_out == "files"):
            recorder_sees(self, fd)

    monkeypatch.setattr(SYSCALLS, "fsync", fsync)
    monkeypatch.setattr(Recorder, "fsynced", fsynced)
    moments = record(stage, 6, monkeypatch)
    with pytest.raises(AssertionError, match=r"after|returned"):
        check(moments, tmp_path / "replayed")


def test_the_replay_knows_what_it_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / "pretrain"
    save(stage, 2)
    moments = record(stage, 4, monkeypatch)
    assert picture(build(moments[-1].now, tmp_path / "replayed")) == moments[-1].now == picture(stage)
    first = next(moment for moment in moments if moment.what == "rename")
    assert set(after_power_loss(first, names="synced", content="all")) == {"step-00000002"}
    assert set(after_power_loss(first, names="now", content="all")) == {"step-00000002", "step-00000004"}
    assert commit_module.COMMIT_NAME in after_power_loss(first, names="now", content="none")["step-00000004"]
    assert replace(first, what="x").now == first.now
