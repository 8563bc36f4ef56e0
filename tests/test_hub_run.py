"""A run from a hub id: pretraining fetches the detached tensors alone, reattaching the rest; the result is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from elo_engine.checkpoint import open_checkpoint, ranges

from .hub_server import HubServer

Elo = Callable[..., tuple[int, str]]
Write = Callable[[dict[str, Any]], Path]


def weights(run: Path, stage: str) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((run / stage).rglob("*.safetensors")))


def test_a_run_from_a_hub_fetches_what_it_needs_when_it_needs_it(
    untied: Path,
    run_tree: dict[str, Any],
    write_config: Write,
    elo: Elo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranges.TRANSFER, "header_bytes", 4096)
    monkeypatch.setattr(ranges.TRANSFER, "join_bytes", 0)
    del run_tree["evaluate"]["shards"]  # the whole model's held-out loss would need the whole model first
    run_tree["evaluate"]["every"] = 0
    local = run_tree | {"model": str(untied), "output": str(tmp_path / "local")}
    remote = run_tree | {"model": "some/model", "output": str(tmp_path / "remote")}
    assert elo("pretrain", write_config(local))[0] == 0
    with HubServer({"some/model": {path.name: path.read_bytes() for path in untied.iterdir()}}) as hub:
        hub.point_to(monkeypatch, tmp_path / "cache")
        status, shown = elo("pretrain", write_config(remote))
        assert status == 0, shown
        index = open_checkpoint(next((tmp_path / "cache").rglob("PARTIAL.json")).parent)
        layers = [name for name in index.entries if ".layers.1." in name or ".layers.2." in name]
        fetched = hub.sent()
        assert fetched <= index.total_bytes - index.bytes_of(layers) + 4096 * len(index.shards)
        assert weights(tmp_path / "remote", "pretrain") == weights(tmp_path / "local", "pretrain")
        status, shown = elo("reattach", tmp_path / "remote")
        assert status == 0, shown
        assert hub.sent() == sum(shard.size for shard in index.shards.values()) > fetched  # each byte once
    assert elo("reattach", tmp_path / "local")[0] == 0
    assert weights(tmp_path / "remote", "reattached") == weights(tmp_path / "local", "reattached")
    assert not list((tmp_path / "cache").rglob("*.partial"))


def moved(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same model with other values, which no header shows."""
    return {
        name: data[:-1] + bytes([data[-1] ^ 1]) if name.endswith(".safetensors") else data
        for name, data in files.items()
    }


@pytest.mark.parametrize("asked", [None, "main"])
def test_a_run_keeps_the_commit_it_was_started_from(
    asked: str | None,
    untied: Path,
    run_tree: dict[str, Any],
    write_config: Write,
    elo: Elo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_tree["evaluate"] = {"every": 0}
    run = tmp_path / "run"
    local = write_config(run_tree | {"model": str(untied), "output": str(tmp_path / "local")}, "local.yaml")
    remote = write_config(run_tree | {"model": "some/model", "output": str(run), "revision": asked})
    files = {path.name: path.read_bytes() for path in untied.iterdir()}
    with HubServer({"some/model": files}) as hub:
        hub.point_to(monkeypatch, tmp_path / "cache")
        first = hub.branches["some/model"]["main"]
        assert elo("pretrain", local)[0] == 0 and elo("pretrain", remote)[0] == 0
        assert yaml.safe_load((run / "config.resolved.yaml").read_text())["revision"] == first
        hub.push("some/model", moved(files))
        status, shown = elo("pretrain", remote, "--resume", "auto")
        assert status == 0, shown
        status, shown = elo("pretrain", remote, "revision=" + hub.branches["some/model"]["main"], "--resume", "auto")
        assert status == 3 and "differing in revision" in shown
        run = run.rename(tmp_path / "elsewhere")
        assert elo("reattach", run)[0] == 0 and elo("reattach", tmp_path / "local")[0] == 0
        assert weights(run, "reattached") == weights(tmp_path / "local", "reattached")
        status, shown = elo("align", run)
        assert status == 0, shown
        assert elo("align", tmp_path / "local")[0] == 0
    assert weights(run, "model") == weights(tmp_path / "local", "model")
    assert (run / "model" / "README.md").read_text().startswith("---\nbase_model: some/model\n")


def test_a_folder_that_was_replaced_is_not_reattached_to(
    untied: Path, tied: Path, run_tree: dict[str, Any], write_config: Write, elo: Elo, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(untied, model)
    run_tree["evaluate"] = {"every": 0}
    assert elo("pretrain", write_config(run_tree | {"model": str(model)}))[0] == 0
    shutil.rmtree(model)
    shutil.copytree(tied, model)
    status, shown = elo("reattach", run_tree["output"])
    assert status == 3 and "is not the checkpoint that" in shown
    assert not (Path(run_tree["output"]) / "reattached").exists()
