"""A model of 2 MiB in two shards, on a hub of its own, and questions about the sparse store that is filled from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from elo_engine.checkpoint import ranges
from elo_engine.checkpoint.hub import resolve_model
from elo_engine.checkpoint.index import CheckpointIndex, open_checkpoint
from elo_engine.checkpoint.syscalls import SYSCALLS

from .checkpoint_fixture import INDEX
from .hub_server import HubServer

REPO, FIRST, SECOND = "some/model", "s-1.safetensors", "s-2.safetensors"
SHARDS, LAYERS, HEADER, PIECE = 2, 16, 4096, 64 << 10
MIB = 1 << 20


def make_original(folder: Path) -> dict[str, bytes]:
    """16 layers of 128 KiB and a norm each: large enough for holes that a filesystem leaves out. Returns the files."""
    generator = torch.Generator().manual_seed(5)
    shards: dict[str, dict[str, torch.Tensor]] = {FIRST: {}, SECOND: {}}
    for i in range(LAYERS):
        shard = shards[FIRST if i < LAYERS // 2 else SECOND]
        shard[f"layers.{i:02}.weight"] = torch.randn(256, 128, generator=generator)
        shard[f"layers.{i:02}.norm"] = torch.randn(16, generator=generator)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def serving(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubServer]:
    """A hub with these files, which huggingface_hub and elo use, and transfers that are quick and small.

    Nothing is synced, which takes most of the time and matters to a power loss only; their order has a test of its own.
    """
    monkeypatch.setattr(SYSCALLS, "fsync", lambda fd: None)
    quick = {"backoff_s": 0.001, "attempts": 3, "timeout_s": 5.0, "threads": 3, "record_s": 60.0}
    small = {"header_bytes": HEADER, "piece_bytes": PIECE, "join_bytes": 0, "record_bytes": 8 * PIECE}
    for name, value in (quick | small).items():
        monkeypatch.setattr(ranges.TRANSFER, name, value)
    with HubServer({REPO: files}, redirect=True) as hub:
        hub.point_to(monkeypatch, cache)
        yield hub


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "PARTIAL.json").read_text())


def spans(folder: Path, name: str) -> list[list[int]]:
    return record(folder)["shards"][name]["present"]


def layer(index: CheckpointIndex, number: int) -> list[Any]:
    return [entry for name, entry in index.entries.items() if name.startswith(f"layers.{number:02}.")]


def ensure(index: CheckpointIndex, *numbers: int, **more: Any) -> int:
    assert index.remote is not None
    return index.remote.ensure([entry for number in numbers for entry in layer(index, number)], **more)


def equal_on_disk(index: CheckpointIndex, files: dict[str, bytes], *numbers: int) -> bool:
    return all(
        (index.folder / index.shards[entry.shard].file).read_bytes()[entry.begin : entry.end]
        == files[entry.shard][entry.begin : entry.end]
        for number in numbers
        for entry in layer(index, number)
    )


def assert_finished(folder: Path, files: dict[str, bytes]) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files  # and nothing else


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_original(folder)
    return folder


@pytest.fixture
def files(original: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in original.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with serving(files, monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def index(hub: HubServer) -> CheckpointIndex:
    return open_checkpoint(resolve_model(REPO))
