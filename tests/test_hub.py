"""Finding a model by path or hub id, without a network, and the files that travel with its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from elo_engine.checkpoint import ranges
from elo_engine.checkpoint.hub import model_files, resolve_model
from elo_engine.checkpoint.index import open_checkpoint
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.inspection import describe_inspection, inspect_model

from .hub_server import TOKEN, Fault, HubServer

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache with one model, as huggingface_hub lays it out: snapshots are links into blobs."""
    root = tmp_path / "hub"
    model = root / "models--some--model"
    for folder in ("blobs", "refs", f"snapshots/{REVISION}"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    (model / "blobs" / "c0").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": torch.zeros(2)}, model / "blobs" / "c1")
    for name, blob in (("config.json", "c0"), ("model.safetensors", "c1")):
        (model / "snapshots" / REVISION / name).symlink_to(f"../../blobs/{blob}")
    return root


@pytest.fixture
def settings(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Point huggingface_hub to the cache above and to no network; more of its constants by keyword.

    Its environment variables are read once, on import, which other tests may have done already.
    """

    def settings(**changes: object) -> None:
        for name, value in {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": True, **changes}.items():
            monkeypatch.setattr(constants, name, value)

    monkeypatch.setenv("ELO_CACHE", str(tmp_path / "elo"))
    settings()
    return settings


def test_an_existing_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == Path("owner/name")  # a folder wins over a hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/owner") == tmp_path / "owner"
    with pytest.raises(UsageError, match="has no revision 'main'"):
        resolve_model(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    "name", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "a b/c", "../x", "", "-a/b"]
)
def test_neither_folder_nor_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert resolve_model(name) == Path("")  # the working folder, as everywhere
        return
    with pytest.raises(UsageError, match=r"neither a folder on disk \(tried /.*nor a hub id"):
        resolve_model(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"is a file. Give the folder"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_hub_id_from_the_cache_without_a_network(cache: Path, settings: Callable[..., None]) -> None:
    snapshot = resolve_model("some/model")
    assert snapshot == cache / "models--some--model" / "snapshots" / REVISION
    assert list(open_checkpoint(snapshot).entries) == ["a"]
    assert model_files(snapshot) == [snapshot / "config.json"]


def test_unreachable_hub_says_what_was_tried(settings: Callable[..., None]) -> None:
    with pytest.raises(UsageError, match=r"'other/model': no such folder \(tried /.*could not be reached"):
        resolve_model("other/model")
    with pytest.raises(UsageError, match="could not be reached while revision v2 is not in the local cache"):
        resolve_model("some/model", "v2")
    settings(HF_HUB_OFFLINE=False, ENDPOINT="http://127.0.0.1:9")
    with pytest.raises(UsageError, match="could not be reached"):
        resolve_model("other/model")


def test_cached_model_without_safetensors_is_refused(cache: Path, settings: Callable[..., None]) -> None:
    (cache / "models--some--model" / "snapshots" / REVISION / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"some/model \(the default revision\) has no safetensors weights"):
        resolve_model("some/model")


WANTED = ["LICENSE", "config.json", "extra.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
UNWANTED = [
    "PARTIAL.json", "README.md", "consolidated.safetensors", "modeling_x.py", "onnx/model.onnx", "optimizer.pt",
    "original/consolidated.00.pth", "other/model.safetensors", "pytorch_model.bin", "sub/x.json", "tokenizer.partial",
    "tokenizer.pkl", "adapter_model.safetensors",
]  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> dict[str, bytes]:
    """All kinds of files beside a model of one shard that is larger than what is fetched with its header."""
    save_file({"a": torch.arange(65536.0), "b": torch.ones(2)}, tmp_path / "weights")
    weights = (tmp_path / "weights").read_bytes()
    return {name: b"{}" for name in WANTED + UNWANTED} | {"merges.txt": b"", "model.safetensors": weights}


@pytest.fixture
def hub(repository: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({"some/model": repository, "one/pickle": {"config.json": b"{}", "model.bin": b""}}) as hub:
        hub.point_to(monkeypatch, tmp_path)
        monkeypatch.setattr(ranges.TRANSFER, "backoff_s", 0.001)
        yield hub


def test_fetches_what_a_checkpoint_needs_and_no_pickle_or_code(hub: HubServer, repository: dict[str, bytes]) -> None:
    folder = resolve_model("some/model")
    got = sorted(path.name for path in folder.iterdir())
    assert got == sorted([*WANTED, "PARTIAL.json", "model.safetensors.partial"])
    assert all((folder / name).read_bytes() == repository[name] for name in WANTED)
    assert {request.file for request in hub.asked("*?")} == {*WANTED, "model.safetensors"}
    assert hub.sent() == ranges.TRANSFER.header_bytes
    assert [path.name for path in model_files(folder)] == [name for name in WANTED if name != "extra.json"]
    index = open_checkpoint(folder).completed()
    assert list(index.entries) == ["a", "b"] and (folder / "PARTIAL.json").exists() is False
    assert (folder / "model.safetensors").read_bytes() == repository["model.safetensors"]


def test_a_complete_hub_cache_goes_before_the_network(
    cache: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshot = resolve_model("some/model")
    assert snapshot == cache / "models--some--model" / "snapshots" / REVISION and hub.log == []
    (cache / "models--some--model" / "blobs" / "c1").unlink()  # the link is there, the weights are not
    assert resolve_model("some/model").parent.name == "some--model" and hub.log != []


def test_unknown_model_on_a_reachable_hub(hub: HubServer) -> None:
    with pytest.raises(UsageError, match=r"'no/such': no such folder.*the default revision.*Check the spelling"):
        resolve_model("no/such")
    with pytest.raises(UsageError, match=r"the hub has no revision v9 of it for you"):
        resolve_model("some/model", "v9")
    with pytest.raises(UsageError, match=r"is not a hub id"):
        resolve_model("some/mo--del")


def test_no_safetensors_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"one/pickle \(revision [0-9a-f]{40}\) has no safetensors weights"):
        resolve_model("one/pickle")
    assert hub.asked("*?") == []
    hub.push("one/pickle", {"config.json": b"{}", "adapter_model.safetensors": b""})
    with pytest.raises(UsageError, match=r"no weights of a whole model"):
        resolve_model("one/pickle")
    index = json.dumps({"weight_map": {"a": "../evil.safetensors"}}).encode()
    hub.push("one/pickle", {"config.json": b"{}", "s.safetensors": b"", "model.safetensors.index.json": index})
    with pytest.raises(FailedError, match=r"not a plain file name"):
        resolve_model("one/pickle")
    index = json.dumps({"weight_map": {"a": "t.safetensors"}}).encode()
    hub.push("one/pickle", {"config.json": b"{}", "s.safetensors": b"", "model.safetensors.index.json": index})
    with pytest.raises(FailedError, match=r"names t.safetensors, which the repository does not have"):
        resolve_model("one/pickle")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    "name",
    ["../tokenizer.json", "/LICENSE", "a/../../LICENSE", "additional_chat_templates/..", "LICENSE\0", "LICENSE\n"],
)
def test_names_that_lead_elsewhere_are_not_fetched(
    name: str, hub: HubServer, repository: dict[str, bytes], tmp_path: Path
) -> None:
    hub.push("some/model", repository | {name: b"evil"})
    resolve_model("some/model")
    assert not any(path.read_bytes() == b"evil" for path in tmp_path.rglob("*") if path.is_file())


def test_private_and_gated(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private = True
    folder = resolve_model("some/model")
    assert {request.token for request in hub.log} == {f"Bearer {TOKEN}"}
    hub.gated = True
    index = open_checkpoint(folder)
    with pytest.raises(UsageError, match=r"HTTP 403 from .*Access to some/model is restricted.*hf auth login"):
        index.completed()
    hub.push("some/model", {**hub.commits["some/model"][folder.name], "new.json": b"{}"})
    with pytest.raises(UsageError, match=r"HTTP 403"):
        resolve_model("some/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UsageError, match=r"the hub has no the default revision|accept its licence"):
        resolve_model("some/model")


def test_a_small_file_that_is_not_what_the_hub_lists(hub: HubServer) -> None:
    hub.faults.append(Fault("flip", file="config.json"))
    with pytest.raises(FailedError, match=r"config.json: has the hash [0-9a-f]{40} and [0-9a-f]{40} on the hub"):
        resolve_model("some/model")
    hub.faults.clear()
    hub.log.clear()
    assert open_checkpoint(resolve_model("some/model")).config == {}
    assert len(hub.asked("config.json")) == 1 and hub.asked("LICENSE") == []  # what was there stays


def test_a_busy_hub(hub: HubServer) -> None:
    hub.api_status = 503
    with pytest.raises(UsageError, match=r"could not be reached while the default revision.*503"):
        resolve_model("some/model")
    assert len(hub.log) == ranges.TRANSFER.attempts


def test_inspecting_a_model_on_the_hub_reads_headers_only(
    hub: HubServer, untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges.TRANSFER, "header_bytes", 4096)
    hub.push("some/model", {path.name: path.read_bytes() for path in untied.iterdir()})
    local, found = inspect_model(str(untied)), inspect_model("some/model")
    shards = len(found["shards"])
    whole = sum(found["shards"].values())
    assert found["fetched"] == hub.sent() == shards * 4096 < whole // 4 and "fetched" not in local
    assert {key: found[key] for key in local if key != "folder"} == {
        key: local[key] for key in local if key != "folder"
    }
    assert any("fetched from the hub" in line and "the rest" in line for line in describe_inspection(found))
    verified = inspect_model("some/model", verify=True)
    assert verified["fetched"] == hub.sent() == whole and verified["verified_bytes"] == local["bytes"]["total"]
    assert not any("the rest" in line for line in describe_inspection(verified))
    assert {key: value for key, value in inspect_model("some/model").items() if key != "folder"} == {
        key: local[key] for key in local if key != "folder"
    }


def test_model_files(tmp_path: Path) -> None:
    travelling = [
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "USE_POLICY.md",
        "added_tokens.json",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    staying = [
        "COMMIT.json",
        "README.md",
        "additional_chat_templates/run.py",
        "model.safetensors",
        "model.safetensors.index.json",
        "optimizer.pt",
        "original/tokenizer.model",
        "pytorch_model.bin",
        "tokenizer.pkl",
        "tokenization_x.py",
        "tokenizer_x.py",
        "training_args.bin",
    ]
    for name in travelling + staying:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    os.mkfifo(tmp_path / "tokenizer.fifo")
    (tmp_path / "tokenizer_folder").mkdir()
    (tmp_path / "tokenizer.gone").symlink_to("nowhere")
    assert [path.relative_to(tmp_path).as_posix() for path in model_files(tmp_path)] == travelling
