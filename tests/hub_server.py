"""A hub on 127.0.0.1: what huggingface_hub and elo ask of one, over real HTTP, a content host beside it, and faults.

    with HubServer({"owner/name": {"config.json": b"..."}}, redirect=True) as hub:
        hub.faults.append(Fault("short", file="*.safetensors", times=2))

Repositories have commits; `push` makes a new one and moves `main`. Every request is in `log` with the
bytes of its body that were really sent.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_only_for_the_hub"


@dataclass
class Fault:
    """What goes wrong with requests for files: kind is an HTTP status or a name that `_serve` knows."""

    kind: int | str
    file: str = "*.safetensors"
    times: int = 1_000_000
    after: int = 0  # requests that are left alone first
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    host: str  # "hub" or "content"
    method: str
    path: str
    file: str
    range: str | None
    token: str | None
    status: int
    sent: int = 0  # bytes of the body


class HubServer:
    """Context manager. redirect: safetensors are answered by the content host, on another port."""

    def __init__(self, repos: dict[str, dict[str, bytes]], *, redirect: bool = False, private: bool = False) -> None:
        self.redirect, self.private = redirect, private
        self.gated = False
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {name: {} for name in repos}
        self.branches: dict[str, dict[str, str]] = {name: {} for name in repos}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.etags: dict[str, str] = {}  # file -> another ETag than its hash
        self.lies: dict[str, str] = {}  # file -> another sha256 in the listing than its own
        self.api_status = 200
        self.delay_s = 0.0
        self.lock = threading.Lock()
        for name, files in repos.items():
            self.push(name, files)

    def push(self, repo: str, files: dict[str, bytes]) -> str:
        """A new commit of these files; `main` is it from now on."""
        number = f"{repo}{len(self.commits[repo])}"
        commit = hashlib.sha1(number.encode()).hexdigest()
        self.commits[repo][commit] = dict(files)
        self.branches[repo]["main"] = commit
        return commit

    def __enter__(self) -> HubServer:
        self._servers = []
        for host in ("hub", "content"):
            handler = type("Handler", (_Handler,), {"hub": self, "host": host})
            server = _Server(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
            self._servers.append(server)
        self.url, self.content_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def point_to(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let huggingface_hub and elo take this for the hub, with caches below `cache`, whatever the tests before did.

        huggingface_hub reads its environment variables once, on import.
        """
        from huggingface_hub import constants

        settings = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache / "hf"),
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("ELO_CACHE", str(cache / "elo"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def sent(self, pattern: str = "*.safetensors") -> int:
        """Bytes of these files that left the server since the log was last cleared."""
        return sum(request.sent for request in self.log if fnmatch.fnmatch(request.file, pattern))

    def asked(self, pattern: str = "*.safetensors") -> list[Request]:
        """Requests for these files that were not answered by a redirect."""
        return [r for r in self.log if fnmatch.fnmatch(r.file, pattern) and r.status not in (302, 307)]

    def fault(self, name: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fnmatch.fnmatch(name, fault.file) and fault.times > 0:
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed is no error of the server
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    host: str
    protocol_version = "HTTP/1.1"
    file = ""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.file = ""
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if self.host == "content":
            _, commit, self.file = path.lstrip("/").split("/", 2)
            self._file(next(c[commit][self.file] for c in self.hub.commits.values() if commit in c), commit)
        elif api and self.hub.api_status != 200:
            self._answer(self.hub.api_status, b"")
        elif api:
            self._listing(api[1], api[2] or "main")
        elif resolve:
            self._resolve(*resolve.groups())
        else:
            self._answer(404, b"")

    def _commit(self, repo: str, revision: str) -> str | None:
        if repo not in self.hub.commits or (self.hub.private and self.headers["Authorization"] != f"Bearer {TOKEN}"):
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        commit = self.hub.branches[repo].get(revision, revision)
        if commit not in self.hub.commits[repo]:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def _listing(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        siblings: list[dict[str, Any]] = []
        for name, data in self.hub.commits[repo][commit].items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _blob(data)}
            if name.endswith(".safetensors"):
                sha256 = self.hub.lies.get(name, hashlib.sha256(data).hexdigest())
                sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        self._answer(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        self.file = name
        data = self.hub.commits[repo][commit].get(name)
        if data is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif self.hub.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {repo} is restricted"})
        elif self.hub.redirect and name.endswith(".safetensors"):
            headers = {
                "Location": f"{self.hub.content_url}/{repo.split('/')[0]}/{commit}/{name}?Signature=secret",
                "X-Linked-Etag": self._etag(data),
                "X-Linked-Size": str(len(data)),
                "X-Repo-Commit": commit,
            }
            self._answer(302, b"", headers)
        else:
            self._file(data, commit)

    def _etag(self, data: bytes) -> str:
        return self.hub.etags.get(self.file, f'"{hashlib.sha256(data).hexdigest()}"')

    def _file(self, data: bytes, commit: str) -> None:
        fault = self.hub.fault(self.file)
        kind = fault.kind if fault else ""
        if isinstance(kind, int):
            self._answer(kind, b"", fault.headers if fault else {})
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        headers = {"ETag": self._etag(data), "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if asked is None or kind == "whole":
            status, body = 200, data
        else:
            begin, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            status, body, shift = 206, data[begin:end], int(kind == "range")
            headers["Content-Range"] = f"bytes {begin + shift}-{end - 1 + shift}/{len(data) + int(kind == 'size')}"
        changes = {
            "etag": {"ETag": '"another"'},
            "weak": {"ETag": 'W/"weak"'},
            "commit": {"X-Repo-Commit": "f" * 40},
            "gzip": {"Content-Encoding": "gzip"},
            "elsewhere": {"Content-Range": "bytes */*"},
        }
        headers |= changes.get(kind, {})
        if kind == "no-etag":
            del headers["ETag"]
        if kind == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        if kind == "long":
            body += b"more"
        self._answer(status, body, headers, part=len(body) // 2 if kind == "short" else len(body))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, part: int | None = None) -> None:
        out = body[:part]
        range_, token = self.headers.get("Range"), self.headers.get("Authorization")
        request = Request(self.host, self.command, self.path, self.file, range_, token, status)
        with self.hub.lock:
            self.hub.log.append(request)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if len(out) < len(body):
            self.close_connection = True
        try:
            for low in range(0, len(out) if self.command == "GET" else 0, 1 << 14):
                time.sleep(self.hub.delay_s)
                piece = out[low : low + (1 << 14)]
                request.sent += len(piece)  # before the client has it, and may ask how much was sent
                self.wfile.write(piece)
        except OSError:  # the client was killed, or had read enough
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        return


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
