"""The sparse store when things go wrong: nothing false is recorded, and nothing recorded is fetched again."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from elo_engine.checkpoint import partial_record, ranges
from elo_engine.checkpoint.hub import resolve_model
from elo_engine.checkpoint.index import CheckpointIndex, check_unchanged, open_checkpoint, open_shard
from elo_engine.checkpoint.partial import PartialStore
from elo_engine.checkpoint.syscalls import SYSCALLS, open_folder
from elo_engine.errors import FailedError, RefusedError, UsageError

from .checkpoint_fixture import fail_on_call
from .hub_server import Fault, HubServer
from .partial_fixture import (  # noqa: F401
    FIRST,
    HEADER,
    PIECE,
    REPO,
    SECOND,
    SHARDS,
    assert_finished,
    ensure,
    equal_on_disk,
    files,
    hub,
    index,
    layer,
    make_original,
    original,
    record,
    serving,
    spans,
)

# ruff: noqa: F811 (fixtures are parameters of their own name)


@pytest.mark.parametrize("kind", ["etag", "range", "whole", "short", "gzip", 500, 403])
def test_a_bad_answer_is_not_recorded(
    kind: str | int, hub: HubServer, index: CheckpointIndex, files: dict[str, bytes]
) -> None:
    ensure(index, 0)
    before = record(index.folder)
    hub.faults.append(Fault(kind))
    with pytest.raises((FailedError, UsageError)):
        ensure(index, 1)
    assert record(index.folder) == before
    hub.faults.clear()
    ensure(index, 1)
    assert equal_on_disk(index, files, 0, 1)
    index.completed()
    assert_finished(index.folder, files)


def test_what_arrived_before_an_error_stays(
    hub: HubServer, index: CheckpointIndex, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges.TRANSFER, "threads", 1)
    hub.faults.append(Fault(404, after=9))
    with pytest.raises(UsageError, match="HTTP 404"):
        index.completed()
    assert index.remote is not None and index.remote.present_bytes == SHARDS * HEADER + 9 * PIECE
    hub.faults.clear()
    index.completed()
    assert_finished(index.folder, files)
    assert hub.sent() == sum(len(files[name]) for name in (FIRST, SECOND))


def test_a_hash_that_is_not_that_of_the_bytes(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.lies[FIRST] = "0" * 64
    index = open_checkpoint(resolve_model(REPO))
    with pytest.raises(FailedError, match=rf"{FIRST}: sha256 is [0-9a-f]{{64}} and 0{{64}} on the hub"):
        index.completed()
    assert spans(index.folder, FIRST) == []
    assert not (index.folder / FIRST).exists() and not (index.folder / f"{FIRST}.partial").exists()
    with pytest.raises(FailedError, match="missing shard"):
        open_checkpoint(index.folder)
    again = open_checkpoint(resolve_model(REPO))  # begins that shard anew, and finds the same
    assert index.remote is not None and again.remote is not None
    with pytest.raises(FailedError, match="sha256 is"):
        again.completed()


def test_a_flipped_bit_on_the_way(hub: HubServer, index: CheckpointIndex, files: dict[str, bytes]) -> None:
    hub.faults.append(Fault("flip", times=1))
    with pytest.raises(FailedError, match=r"sha256 is .* The bytes were dropped"):
        index.completed()
    open_checkpoint(resolve_model(REPO)).completed()
    assert_finished(index.folder, files)


def test_killed_at_any_moment(
    hub: HubServer, index: CheckpointIndex, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while it fetches, again and again: it gets on, and no recorded byte is asked for twice."""
    monkeypatch.setattr(ranges.TRANSFER, "record_bytes", 2 * PIECE)
    hub.delay_s = 0.002
    rng = random.Random(1)
    present = SHARDS * HEADER
    for _ in range(5):
        hub.log.clear()
        child = os.fork()
        if child == 0:
            try:
                index.completed()
            finally:
                os._exit(0)
        enough = rng.randrange(4 * PIECE, 6 * PIECE)  # of 32 pieces, and of five rounds
        while hub.sent() < enough:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = PartialStore.load(index.folder)
        assert store is not None
        for name, shard in store.shards.items():
            whole = (index.folder / name).exists()
            data = (index.folder / (name if whole else f"{name}.partial")).read_bytes()
            assert all(data[begin:end] == files[name][begin:end] for begin, end in shard.present)
        assert store.present_bytes >= present
        present = store.present_bytes
    assert present > SHARDS * HEADER  # not all of it was lost each time
    hub.delay_s = 0.0
    hub.log.clear()
    index.completed()
    assert hub.sent() == sum(len(files[name]) for name in (FIRST, SECOND)) - present
    assert_finished(index.folder, files)


def test_two_processes_at_once(hub: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.delay_s = 0.002

    all_open = multiprocessing.get_context("fork").Barrier(3)  # whoever opens it when it is whole has nothing to fetch

    def work() -> None:
        index = open_checkpoint(resolve_model(REPO))
        all_open.wait(60)
        for number in (0, 3, 12):
            ensure(index, number)
        index.completed()

    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert_finished(next((tmp_path / "elo" / "hub" / "some--model").glob("?" * 40)), files)
    assert hub.sent() == sum(len(files[name]) for name in (FIRST, SECOND))  # none fetched what another had
    assert len(hub.asked("config.json")) == 1


def test_nothing_is_fetched_without_a_lock(
    hub: HubServer, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    hub.log.clear()
    with pytest.raises(FailedError, match=r"\.elo-lock: cannot be locked \(No locks available\).*Set ELO_CACHE"):
        ensure(index, 0)
    assert hub.log == [] and resolve_model(REPO) == index.folder  # where nothing is fetched, no lock is needed


def test_a_truncated_partial_file(hub: HubServer, index: CheckpointIndex, files: dict[str, bytes]) -> None:
    ensure(index, 0, 12)
    os.truncate(index.folder / f"{FIRST}.partial", 1000)
    with pytest.raises(FailedError, match=rf"{FIRST}: its header was not fetched yet, or the file was truncated"):
        open_checkpoint(index.folder)
    again = open_checkpoint(resolve_model(REPO))
    assert spans(index.folder, FIRST) == [[0, HEADER]] and len(spans(index.folder, SECOND)) > 0
    hub.log.clear()
    assert ensure(again, 0) > 0 and ensure(again, 12) == 0 and equal_on_disk(again, files, 0, 12)
    with open_folder(index.folder) as dir_fd:  # who had it open before learns that it is another file
        fd = open_shard(index.shards[FIRST], dir_fd, index.folder)
        with pytest.raises(FailedError, match=r"s-1.safetensors.partial: was changed"):
            check_unchanged(fd, index.shards[FIRST], index.folder, "")
        os.close(fd)
    (index.folder / f"{SECOND}.partial").unlink()
    open_checkpoint(resolve_model(REPO)).completed()
    assert_finished(index.folder, files)


def test_not_enough_space(hub: HubServer, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.log.clear()
    module = sys.modules[partial_record.__name__.replace("partial_record", "publish")]
    monkeypatch.setattr(module, "free_bytes", lambda path: 1000)
    need = sum(entry.nbytes for entry in layer(index, 5))
    with pytest.raises(RefusedError, match=rf"{need} bytes .* are needed and 1000"):
        ensure(index, 5)
    assert hub.log == []


@pytest.mark.parametrize(("call", "code"), [("write", errno.ENOSPC), ("fsync", errno.EIO)])
def test_the_disk_fails(call: str, code: int, hub: HubServer, index: CheckpointIndex, files: dict[str, bytes]) -> None:
    before = record(index.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges.TRANSFER, "record_bytes", 1)  # another sync after the one that fails would succeed
        fail_on_call(patch, call, 0, code)
        with pytest.raises(FailedError, match=r"no space left|Input/output error|syncing"):
            ensure(index, 5)
    after = record(index.folder)
    assert index.remote is not None
    if call == "fsync":  # and what could not be synced is not tried again as if it could
        assert after == before
    assert equal_where_present(index, files)
    ensure(index, 5)
    assert equal_on_disk(index, files, 5)


def test_data_are_synced_before_the_record_says_that_they_are_there(
    hub: HubServer, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def fsync(fd: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        claimed = record(index.folder)["shards"]
        here = {shard: len(claimed[shard]["present"]) for shard in (FIRST, SECOND)}
        events.append(f"{name} {here}" if name.endswith(".partial") else name)

    monkeypatch.setattr(SYSCALLS, "fsync", fsync)
    ensure(index, 2, 12)
    before = {FIRST: 1, SECOND: 1}  # at the moment of the sync the record knows the headers only
    data = [f"{FIRST}.partial {before}", f"{SECOND}.partial {before}"]
    assert [event.partition("-writing")[0] for event in events] == [*data, ".elo", index.folder.name]


def equal_where_present(index: CheckpointIndex, files: dict[str, bytes]) -> bool:
    return all(
        (index.folder / f"{name}.partial").read_bytes()[begin:end] == files[name][begin:end]
        for name in (FIRST, SECOND)
        for begin, end in spans(index.folder, name)
    )


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """What somebody who knows the format could write."""
    body = record(folder)
    del body["sha256"]
    change(body)
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "PARTIAL.json").write_bytes((json.dumps(body, indent=1, sort_keys=False) + "\n").encode())


def rename_shard(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["shards"].update({name: body["shards"].pop(FIRST)})


def set_shard(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["shards"][FIRST].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_shard("../../outside.safetensors"), "'../../outside.safetensors', which is not a plain file name"),
        (rename_shard("/etc/x.safetensors"), "not a plain file name"),
        (rename_shard("config.json"), "not a plain file name"),
        (set_shard("present", [[0, 10], [5, 20]]), "overlap"),
        (set_shard("present", [[0, 10**9]]), "leave the file"),
        (set_shard("present", [[0, 10, 20]]), "not pairs"),
        (set_shard("size", 0), "bad size"),
        (set_shard("sha256", "x"), "bad sha256"),
        (set_shard("sha256", None), "has no hash for"),
        (set_shard("blob", "x"), "bad blob hash"),
        (set_shard("etag", 'W/"x"'), "bad etag"),
        (lambda body: body.update(repo="../x"), "bad repo"),
        (lambda body: body.update(commit="main"), "bad commit"),
        (lambda body: body.update(format=2), "not of format 1"),
        (lambda body: body.update(shards={}), "names no shards"),
    ],
)
def test_a_record_that_nobody_wrote(
    change: Callable[[dict[str, Any]], None], message: str, hub: HubServer, index: CheckpointIndex
) -> None:
    reseal(index.folder, lambda body: None)
    assert open_checkpoint(index.folder) == index  # the seal as such is right
    reseal(index.folder, change)
    hub.log.clear()
    for use in (open_checkpoint, lambda folder: resolve_model(REPO, folder.name), lambda _: ensure(index, 0)):
        with pytest.raises(FailedError, match=rf"PARTIAL.json: .*{re.escape(message)}"):
            use(index.folder)
    assert hub.asked() == [] and not list(index.folder.parents[2].rglob("outside*"))


def test_a_record_of_before_there_were_blob_hashes_in_it(index: CheckpointIndex, files: dict[str, bytes]) -> None:
    reseal(index.folder, lambda body: [shard.pop("blob") for shard in body["shards"].values()])
    open_checkpoint(index.folder).completed()
    assert_finished(index.folder, files)


def test_a_flipped_digit_in_the_record(index: CheckpointIndex) -> None:
    path = index.folder / "PARTIAL.json"
    path.write_text(path.read_text().replace(str(HEADER), str(HEADER + 1), 1))
    with pytest.raises(FailedError, match=r"PARTIAL.json: its hash is wrong"):
        open_checkpoint(index.folder)


def test_another_hub_does_not_continue_it(
    hub: HubServer, index: CheckpointIndex, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with HubServer({REPO: files}) as other:
        other.point_to(monkeypatch, tmp_path)
        with pytest.raises(UsageError, match=rf"was begun from {hub.url}, and HF_ENDPOINT is {other.url}"):
            ensure(index, 0)
        assert other.log == []


def test_stopped_between_the_last_rename_and_the_records_removal(
    hub: HubServer, index: CheckpointIndex, files: dict[str, bytes]
) -> None:
    kept = (index.folder / "PARTIAL.json").read_bytes()
    index.completed()
    (index.folder / "PARTIAL.json").write_bytes(kept)
    (index.folder / ".elo-writing").write_bytes(b"{")
    assert open_checkpoint(index.folder).remote is None
    hub.log.clear()
    resolve_model(REPO)
    assert hub.asked() == []
    assert_finished(index.folder, files)


def test_a_finished_folder_that_lost_a_file_is_completed_again(
    hub: HubServer, index: CheckpointIndex, files: dict[str, bytes]
) -> None:
    index.completed()
    (index.folder / SECOND).unlink()
    hub.log.clear()
    open_checkpoint(resolve_model(REPO)).completed()
    assert_finished(index.folder, files)
    assert hub.sent() == len(files[SECOND])


def open_files() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def test_nothing_is_left_open(hub: HubServer, index: CheckpointIndex) -> None:
    ensure(index, 0)
    before = open_files()
    hub.faults.append(Fault("short"))
    with pytest.raises(FailedError):
        ensure(index, 1)
    hub.faults.clear()
    index.completed()
    patience = time.monotonic() + 5  # the server's side of the connections is in this process too
    while len(open_files()) > len(before) and time.monotonic() < patience:
        gc.collect()  # urllib3 closes connections with their pool, and the exception above was in a cycle with it
        time.sleep(0.01)
    assert len(open_files()) <= len(before), (before, open_files())
