"""Byte ranges of a file on a hub, over HTTP: fetched in pieces, each answer checked before a byte of it is used.

A hub answers for a file of a pinned commit itself or redirects to another host. The token goes to the hub's own scheme,
host and port only, whatever an answer redirects to. What makes two answers parts of one file is their ETag: the hub's
(`X-Linked-Etag`, a hash of the content) where it gives one, and the answering server's own.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError
from urllib3.response import BaseHTTPResponse
from urllib3.util.retry import Retry

from elo_engine.errors import FailedError, UsageError

_CHUNK_BYTES = 1 << 20
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")


@dataclass(slots=True)
class TransferSettings:
    """How bytes are fetched; looked up at the time of use, so that a test can make it fast and small."""

    threads: int = 4
    piece_bytes: int = 16 << 20  # a request, and one more for its redirect: a hub allows some 10 a second
    header_bytes: int = 64 << 10  # of every shard first; about 100 bytes a tensor, so one request serves nearly always
    join_bytes: int = 64 << 10  # a gap that costs less than another request's round trip is fetched as well
    record_bytes: int = 128 << 20  # at most this, or this many seconds, of fetched bytes are lost to a crash
    record_s: float = 5.0
    attempts: int = 6
    backoff_s: float = 0.5  # the waits are 0, 1, 2, 4, 8 seconds, or what the server's Retry-After asks for
    longest_wait_s: float = 300.0  # a hub counts requests in windows of five minutes
    timeout_s: float = 30.0


TRANSFER = TransferSettings()


class Stopped(Exception):
    """The transfer was given up because another piece of it failed."""


class _Policy(Retry):
    """urllib3's retries; a wait is bounded and ends when the transfer is stopped."""

    stop: threading.Event

    def new(self, **changes: object) -> _Policy:
        made = super().new(**changes)
        made.stop = self.stop
        return made

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        asked = self.get_retry_after(response) if response is not None else None
        self.stop.wait(min(self.get_backoff_time() if asked is None else asked, TRANSFER.longest_wait_s))
        if self.stop.is_set():  # else all attempts that are left would be made, each with a timeout of its own
            raise Stopped


@dataclass
class RemoteFile:
    """A file of a pinned commit. `etag` is what all its answers have in common, also those of an earlier process;
    `served` is the ETag of the host that sends the bytes, which may be another host on another day.
    """

    label: str  # for messages: repository, commit and name
    url: str
    commit: str
    size: int
    etag: str | None = None
    served: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def agree(self, linked: str | None, served: str | None) -> None:
        """FailedError unless these ETags are those of the answers before; the first answer sets them."""
        if (served or linked) is None:
            raise FailedError(f"{self.label}: the server gives no ETag, so ranges could mix versions. {_OTHER_WAY}")
        for text in (linked, served):
            if text is not None and not re.fullmatch(r'"[^"]*"', text):
                raise FailedError(
                    f"{self.label}: the ETag {text[:80]} is weak or malformed: ranges could mix versions. {_OTHER_WAY}"
                )
        with self._lock:
            for seen, now in ((self.etag, linked or served), (self.served, served)):
                if seen is not None and now != seen:
                    raise FailedError(
                        f"{self.label}: the file on the server changed: its ETag was {seen} and is {now}. Nothing of "
                        "the new answer was kept. Run the command again; if it stays so, remove the cached model."
                    )
            self.etag, self.served = linked or served, served


_OTHER_WAY = "Fetch the whole model with `hf download` and give its folder."


class RangeClient:
    """Context manager: one pool of connections to one hub and the hosts it redirects to. Used from several threads."""

    def __init__(self, endpoint: str, token: str | None, agent: str = "elo_engine") -> None:
        self.endpoint = endpoint
        self.stop = threading.Event()
        self._origin = _origin(endpoint)
        self._token = token
        self._session = requests.Session()
        self._session.headers.update({"User-Agent": agent, "Accept-Encoding": "identity"})
        # Also keeps requests from taking a password for any host from ~/.netrc.
        self._session.auth = self._authorize
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        adapter = HTTPAdapter(pool_maxsize=TRANSFER.threads, max_retries=self._policy())
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)

    def __enter__(self) -> RangeClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def fetch(self, file: RemoteFile, begin: int, end: int, sink: Callable[[int, bytes], None]) -> None:
        """Give bytes begin..end of the file to sink(offset, bytes), in order; after an error none of them may be used.

        A body that ends early is continued from where it stopped, a bounded number of times. Raises FailedError
        (unreachable, an answer that is not exactly what was asked for, another version of the file), UsageError (no
        access, no such file), Stopped (`stop` is set).
        """
        position, retry = begin, self._policy()
        while position < end:
            with self._open(file, {"Range": f"bytes={position}-{end - 1}"}) as (response, linked):
                _check_range(file, response, position, end)
                file.agree(linked, response.headers.get("ETag"))
                try:
                    for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
                        if self.stop.is_set():
                            raise Stopped
                        if position + len(chunk) > end:
                            raise FailedError(f"{file.label}: more bytes than {begin} to {end} were sent. {_OTHER_WAY}")
                        sink(position, chunk)
                        position += len(chunk)
                    broken: HTTPError = ProtocolError("the connection was closed")
                except HTTPError as error:
                    broken = error
            if position < end:
                retry = self._again(retry, broken, f"{file.label}: bytes {begin} to {end} stopped at {position}")

    def fetch_small(self, file: RemoteFile) -> bytes:
        """The whole of a small file; raises as `fetch`. Its content is the caller's to verify."""
        retry = self._policy()
        while True:
            body = bytearray()
            with self._open(file, {}) as (response, _):
                if response.status_code != 200:
                    raise FailedError(f"{file.label}: HTTP {response.status_code} where the whole file was asked for.")
                try:
                    for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
                        body += chunk
                        if len(body) > file.size:
                            raise FailedError(f"{file.label}: has more than the {file.size} bytes that the hub lists.")
                    broken: HTTPError = ProtocolError("the connection was closed")
                except HTTPError as error:
                    broken = error
            if len(body) == file.size:
                return bytes(body)
            retry = self._again(retry, broken, f"{file.label}: {file.size} bytes stopped at {len(body)}")

    def _policy(self) -> _Policy:
        policy = _Policy(
            total=max(TRANSFER.attempts - 1, 0),
            status_forcelist=_AGAIN,
            allowed_methods=("GET",),
            backoff_factor=TRANSFER.backoff_s,
            raise_on_status=False,
        )
        policy.stop = self.stop
        return policy

    def _again(self, retry: _Policy, broken: HTTPError, what: str) -> _Policy:
        try:
            left = retry.increment("GET", error=broken)
        except MaxRetryError:
            raise FailedError(
                f"{what}: the answer ended early {TRANSFER.attempts} times ({type(broken).__name__}). Check the "
                "network and run the command again: it continues with what it has."
            ) from broken
        left.sleep()
        return left

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.pop("Authorization", None)
        if self._token and request.url and _origin(request.url) == self._origin:
            request.headers["Authorization"] = self._token
        return request

    def _open(self, file: RemoteFile, headers: dict[str, str]) -> _Answer:
        """The answer after redirects, its body unread, and the hub's own ETag of the file, if it gave one."""
        url, linked = file.url, None
        for _ in range(_MAX_REDIRECTS + 1):
            if self.stop.is_set():
                raise Stopped
            try:
                response = self._session.get(
                    url, headers=headers, stream=True, allow_redirects=False, timeout=TRANSFER.timeout_s
                )
            except requests.RequestException as error:
                raise FailedError(
                    f"{file.label}: {_place(url)} could not be reached in {TRANSFER.attempts} attempts "
                    f"({_cause(error)}). Check the network and run the command again: it continues with what it has."
                ) from error
            try:
                if _origin(url) == self._origin:  # what another host says of the hub's commits has no weight
                    self._check_commit(file, response)
                    linked = response.headers.get("X-Linked-Etag") or linked
                if response.status_code not in _REDIRECTS:
                    _check_status(file, response, url)
                    return _Answer(response, linked)
                target = urljoin(url, response.headers.get("Location", ""))
                scheme = urlsplit(target).scheme
                if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
                    raise FailedError(f"{file.label}: {_place(url)} redirects to {scheme}, which is not followed.")
                url = target
                length = response.headers.get("Content-Length", "")
                if length.isdecimal() and int(length) <= _CHUNK_BYTES:
                    with suppress(requests.RequestException):
                        _ = response.content  # read to its end, the connection serves the next request too
            except BaseException:
                response.close()
                raise
            response.close()
        raise FailedError(f"{file.label}: more than {_MAX_REDIRECTS} redirects, the last to {_place(url)}.")

    def _check_commit(self, file: RemoteFile, response: requests.Response) -> None:
        commit = response.headers.get("X-Repo-Commit")
        if commit is not None and commit != file.commit:
            raise FailedError(
                f"{file.label}: the hub answered with the commit {commit[:80]}. Nothing of it was used. Run the "
                "command again."
            )


class _Answer:
    """Context manager that closes a response, whether its body was read or not."""

    def __init__(self, response: requests.Response, linked: str | None) -> None:
        self._response, self._linked = response, linked

    def __enter__(self) -> tuple[requests.Response, str | None]:
        return self._response, self._linked

    def __exit__(self, *_: object) -> None:
        self._response.close()


def hub_url(repo: str, name: str, commit: str) -> str:
    """Where the hub that huggingface_hub is set to gives a file of a pinned commit."""
    from huggingface_hub import constants, hf_hub_url

    return hf_hub_url(repo, name, revision=commit, endpoint=constants.ENDPOINT)


def hub_client() -> RangeClient:
    """A client with the endpoint, token and user agent of huggingface_hub; UsageError when that is set to offline."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            "HF_HUB_OFFLINE is set, and bytes of the model are not in the cache yet. Unset it and run again."
        )
    headers = {name.lower(): value for name, value in build_hf_headers(library_name="elo_engine").items()}
    return RangeClient(constants.ENDPOINT, headers.get("authorization"), headers.get("user-agent", "elo_engine"))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _place(url: str) -> str:
    """The URL for a message, without what may grant access: a signature in its query, a password before the host."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _cause(error: BaseException) -> str:
    """The innermost exception's name; the texts above it hold the whole URL."""
    reason: object = error
    while isinstance(reason, BaseException):
        error = reason
        reason = getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, BaseException)), None)
    return type(error).__name__


def _check_status(file: RemoteFile, response: requests.Response, url: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    said = re.sub(r"[^ -~]", "?", response.headers.get("X-Error-Message", ""))[:200]
    text = f"{file.label}: HTTP {status} from {_place(url)}{': ' + said if said else ''}."
    if status in (401, 403, 404):
        raise UsageError(
            f"{text} The hub has no such file for you: for a gated or private model accept its licence on the hub and "
            "log in with `hf auth login`."
        )
    tries = f" in each of {TRANSFER.attempts} attempts" if status in _AGAIN else ""
    raise FailedError(f"{text} It answered so{tries}. Run the command again later: it continues with what it has.")


def _check_range(file: RemoteFile, response: requests.Response, begin: int, end: int) -> None:
    """The answer's headers have to say: exactly these bytes, of a file of exactly this size, as they are."""
    asked = f"{file.label}: bytes {begin} to {end} of {file.size} were asked for"
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FailedError(f"{asked}, and the answer is compressed. {_OTHER_WAY}")
    if response.status_code == 200:
        if (begin, end) != (0, file.size):
            raise FailedError(
                f"{asked}, and the server sends the whole file (HTTP 200 for 206): it knows no ranges. {_OTHER_WAY}"
            )
    else:
        got = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(got)
        if match is None or tuple(map(int, match.groups())) != (begin, end - 1, file.size):
            raise FailedError(f"{asked}, and the answer is {got[:80]!r}. Nothing of it was used. {_OTHER_WAY}")
    length = response.headers.get("Content-Length")
    if length is not None and length.strip() != str(end - begin):
        raise FailedError(f"{asked}, and the answer has {length[:40]} bytes. Nothing of it was used. {_OTHER_WAY}")
