"""The sparse store against a real server, where what is fetched is counted: what is wanted, and each byte once."""

from __future__ import annotations

import itertools
import os
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from elo_engine.checkpoint import partial_record, ranges
from elo_engine.checkpoint.hub import resolve_model
from elo_engine.checkpoint.index import CheckpointIndex, check_unchanged, open_checkpoint, open_shard
from elo_engine.checkpoint.syscalls import open_folder
from elo_engine.errors import FailedError, UsageError

from .hub_server import Fault, HubServer
from .partial_fixture import (  # noqa: F401
    FIRST,
    HEADER,
    LAYERS,
    MIB,
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


def test_beginning_fetches_headers_and_small_files(hub: HubServer, index: CheckpointIndex, original: Path) -> None:
    commit = hub.branches[REPO]["main"]
    assert index.folder.name == commit and index.folder.parent.name == "some--model"
    assert hub.sent() == SHARDS * HEADER
    whole = open_checkpoint(original)
    assert index.identity() == whole.identity() and index.entries == whole.entries
    assert index.remote is not None and index.remote.present_bytes == SHARDS * HEADER
    assert index.remote.total_bytes == sum(info.size for info in whole.shards.values()) > MIB
    for name in (FIRST, SECOND):
        status = (index.folder / f"{name}.partial").stat()
        assert status.st_size == (original / name).stat().st_size
        assert status.st_blocks * 512 <= 16 * HEADER < status.st_size // 10
        assert (index.shards[name].file, index.shards[name].mtime_ns) == (f"{name}.partial", None)
        assert not (index.folder / name).exists()
    hub.log.clear()
    assert resolve_model(REPO) == index.folder and open_checkpoint(index.folder) == index
    assert hub.asked() == [] and hub.sent() == 0  # one question: which commit it is now


def test_a_header_longer_than_the_first_request(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, original: Path
) -> None:
    monkeypatch.setattr(ranges.TRANSFER, "header_bytes", 100)
    index = open_checkpoint(resolve_model(REPO))
    assert index.identity() == open_checkpoint(original).identity()
    assert hub.sent() == sum(info.header_bytes for info in index.shards.values())
    assert len(hub.asked()) == 2 * SHARDS


def test_only_wanted_tensors_are_fetched_and_each_byte_once(
    hub: HubServer, index: CheckpointIndex, files: dict[str, bytes]
) -> None:
    wanted = sum(entry.nbytes for number in (0, 15) for entry in layer(index, number))
    seen: list[tuple[int, int]] = []
    hub.log.clear()
    got = ensure(index, 0, 15, progress=lambda done, total: seen.append((done, total)))
    # A norm may lie in what was fetched with the header.
    assert wanted - SHARDS * HEADER <= got == hub.sent() <= wanted
    assert equal_on_disk(index, files, 0, 15) and not equal_on_disk(index, files, 7)
    assert seen[-1] == (got, got) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert index.remote is not None and index.remote.present_bytes == got + SHARDS * HEADER
    on_disk = sum((index.folder / info.file).stat().st_blocks * 512 for info in index.shards.values())
    assert on_disk < index.remote.total_bytes // 2
    hub.log.clear()
    assert ensure(index, 0, 15) == 0 and hub.log == []
    assert ensure(open_checkpoint(index.folder), 0, 15, 1) == sum(entry.nbytes for entry in layer(index, 1))
    with open_folder(index.folder) as dir_fd:  # what arrives is no change of the file
        fd = open_shard(index.shards[FIRST], dir_fd, index.folder)
        check_unchanged(fd, index.shards[FIRST], index.folder, "")
        os.close(fd)


def test_small_gaps_are_fetched_instead_of_asked_around(
    hub: HubServer, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [index.entries[f"layers.0{i}.norm"] for i in (0, 2)]
    gap = entries[1].begin - entries[0].end
    monkeypatch.setattr(ranges.TRANSFER, "join_bytes", gap)
    hub.log.clear()
    assert index.remote is not None
    assert index.remote.ensure(entries) in range(gap + 1) and len(hub.asked()) <= 1
    assert index.remote.ensure(entries) == 0


def test_completing(hub: HubServer, index: CheckpointIndex, files: dict[str, bytes], original: Path) -> None:
    ensure(index, 3)
    seen: list[tuple[int, int]] = []
    finished = index.completed(lambda done, total: seen.append((done, total)))
    assert_finished(index.folder, files)
    assert hub.sent() == sum(len(files[name]) for name in (FIRST, SECOND))  # every byte exactly once
    assert seen[-1][0] == seen[-1][1] == hub.sent() - SHARDS * HEADER - sum(e.nbytes for e in layer(index, 3))
    assert finished.remote is None and finished.completed() is finished
    assert finished.identity() == index.identity() == open_checkpoint(original).identity()
    assert finished.shards[FIRST].file == FIRST and finished.shards[FIRST].mtime_ns is not None
    tensors, wanted = load_file(index.folder / FIRST), load_file(original / FIRST)
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    # The index from before still reads, because the files were only renamed, and fetches nothing more.
    with open_folder(index.folder) as dir_fd:
        fd = open_shard(index.shards[FIRST], dir_fd, index.folder)
        check_unchanged(fd, index.shards[FIRST], index.folder, "")
        os.close(fd)
    hub.log.clear()
    assert ensure(index, 0, 1, 2) == 0 and index.completed().identity() == index.identity() and hub.log == []
    assert resolve_model(REPO) == index.folder and hub.asked() == []


def test_a_shard_that_becomes_whole_by_chance_is_finished(hub: HubServer, index: CheckpointIndex) -> None:
    ensure(index, *range(LAYERS // 2))
    assert (index.folder / FIRST).exists() and not (index.folder / f"{FIRST}.partial").exists()
    again = open_checkpoint(index.folder)
    assert again.remote is not None and again.identity() == index.identity()
    assert (again.shards[FIRST].file, again.shards[SECOND].file) == (FIRST, f"{SECOND}.partial")


def test_without_a_network_afterwards(hub: HubServer, index: CheckpointIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(index, 0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a commit is what it is without asking
        assert resolve_model(REPO, index.folder.name) == index.folder
    with pytest.warns(UserWarning, match=f"the default revision is taken for the commit {index.folder.name}.*OFFLINE"):
        assert resolve_model(REPO) == index.folder
    with pytest.warns(UserWarning, match="revision main is taken"):
        assert resolve_model(REPO, "main") == index.folder
    again = open_checkpoint(index.folder)
    assert ensure(again, 0) == 0
    with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE is set"):
        ensure(again, 1)
    with pytest.raises(UsageError, match="could not be reached while revision v2"):
        resolve_model(REPO, "v2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.api_status = 503
    with pytest.warns(UserWarning, match="the hub could not be reached.*503"):
        assert resolve_model(REPO) == index.folder
    hub.__exit__(None, None, None)
    with pytest.warns(UserWarning, match="the hub could not be reached"):
        assert resolve_model(REPO) == index.folder
    with pytest.raises(FailedError, match="could not be reached in 3 attempts"):
        ensure(again, 1)


def test_a_shard_outside_lfs_is_held_against_its_blob_hash(
    hub: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.lies[FIRST] = None  # type: ignore[assignment]
    index = open_checkpoint(resolve_model(REPO))
    assert record(index.folder)["shards"][FIRST]["sha256"] is None
    hub.faults.append(Fault("flip", file=FIRST, times=1))
    with pytest.raises(FailedError, match=rf"{FIRST}: git blob hash is [0-9a-f]{{40}} and [0-9a-f]{{40}} on the hub"):
        index.completed()
    assert not (index.folder / FIRST).exists() and spans(index.folder, FIRST) == []
    open_checkpoint(resolve_model(REPO)).completed()
    assert_finished(index.folder, files)


def test_a_shard_without_any_hash_is_not_begun(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.lies[FIRST] = None  # type: ignore[assignment]
    monkeypatch.setattr(sys.modules[HubServer.__module__], "_blob", lambda data: None)
    with pytest.raises(FailedError, match=rf"{FIRST}: the hub lists no hash of it"):
        resolve_model(REPO)
    assert hub.sent() == 0 and not list(tmp_path.rglob("PARTIAL.json"))


def test_a_moved_branch_and_a_pinned_commit(
    hub: HubServer, index: CheckpointIndex, files: dict[str, bytes], tmp_path: Path
) -> None:
    ensure(index, 0)
    changed = load_and_double(files[FIRST], tmp_path)
    commit = hub.push(REPO, files | {FIRST: changed})
    hub.log.clear()
    assert resolve_model(REPO, index.folder.name) == index.folder and hub.log == []
    ensure(index, 1)
    assert equal_on_disk(index, files, 0, 1)  # still the commit it was opened from
    new = open_checkpoint(resolve_model(REPO))
    assert new.folder == index.folder.parent / commit
    ensure(new, 0)
    assert equal_on_disk(new, files | {FIRST: changed}, 0) and not equal_on_disk(new, files, 0)
    index.completed()
    assert_finished(index.folder, files)


def load_and_double(shard: bytes, folder: Path) -> bytes:
    path = folder / "shard"
    path.write_bytes(shard)
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return path.read_bytes()


def test_spans_are_sets_of_bytes() -> None:
    rng = random.Random(2)

    def some() -> list[tuple[int, int]]:
        return [tuple(sorted((rng.randrange(40), rng.randrange(40)))) for _ in range(rng.randrange(6))]  # type: ignore

    def as_set(spans: list[tuple[int, int]]) -> set[int]:
        return {offset for begin, end in spans for offset in range(begin, end)}

    for _ in range(500):
        one, two = some(), partial_record.merged(some())
        merged = partial_record.merged(one)
        assert as_set(merged) == as_set(one) and partial_record.length(merged) == len(as_set(one))
        assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))
        assert as_set(partial_record.without(merged, two)) == as_set(one) - as_set(two)
