"""Finding a model by path or hub id, without a network, and the files that travel with its weights."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from elo_engine.checkpoint.hub import model_files, resolve_model
from elo_engine.checkpoint.index import open_checkpoint
from elo_engine.errors import RefusedError, UsageError

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
def settings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Point huggingface_hub to the cache above and to no network; more of its constants by keyword.

    Its environment variables are read once, on import, which other tests may have done already.
    """

    def settings(**changes: object) -> None:
        for name, value in {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": True, **changes}.items():
            monkeypatch.setattr(constants, name, value)

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


class _Hub(BaseHTTPRequestHandler):
    """The two questions that a snapshot asks of a hub, for one repository with all kinds of files."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        name = self.path.partition(f"/resolve/{REVISION}/")[2]
        if self.path.startswith("/api/models/some/model/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in self.files.items()
            ]
            self._answer(json.dumps(rows).encode())
        elif self.path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": n, "size": len(b)} for n, b in self.files.items()]
            self._answer(json.dumps({"id": "some/model", "sha": REVISION, "siblings": siblings}).encode())
        elif name in self.files:
            self._answer(self.files[name])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body):040d}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    wanted = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "LICENSE"]
    unwanted = ["pytorch_model.bin", "modeling_x.py", "original/consolidated.00.pth", "README.md"]
    unwanted += ["consolidated.safetensors", "onnx/model.onnx", "other/model.safetensors", "tokenizer.pkl"]
    _Hub.files = {name: b"{}" for name in wanted + unwanted}
    _Hub.files["model.safetensors"] = (tmp_path / "weights").read_bytes()
    _Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_fetches_what_a_checkpoint_needs_and_no_pickle_or_code(
    hub: str, tmp_path: Path, settings: Callable[..., None]
) -> None:
    url = hub + "/{repo_id}/resolve/{revision}/{filename}"
    settings(
        HF_HUB_CACHE=str(tmp_path / "fresh"),
        HF_HUB_OFFLINE=False,
        ENDPOINT=hub,
        HUGGINGFACE_CO_URL_TEMPLATE=url,
    )
    folder = resolve_model("some/model")
    got = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    weights = "model.safetensors"
    assert got == ["LICENSE", "config.json", "merges.txt", weights, "tokenizer.json", "tokenizer.model"]
    assert (folder / weights).read_bytes() == _Hub.files[weights]
    assert any(weights in path for path in _Hub.asked)
    assert not any(".bin" in path or ".py" in path or "consolidated" in path for path in _Hub.asked)


def test_unknown_model_on_a_reachable_hub(hub: str, settings: Callable[..., None]) -> None:
    settings(HF_HUB_OFFLINE=False, ENDPOINT=hub)
    with pytest.raises(UsageError, match=r"'no/such': no such folder.*Check the spelling"):
        resolve_model("no/such")


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
