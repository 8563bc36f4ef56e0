"""Ranges over HTTP from a real server: exactly what was asked for, of one version, no token for others, or an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from elo_engine.checkpoint import ranges
from elo_engine.checkpoint.ranges import RangeClient, RemoteFile, Stopped
from elo_engine.errors import EloError, FailedError, UsageError

from .hub_server import TOKEN, Fault, HubServer

DATA = bytes(range(256)) * 400
NAME = "model.safetensors"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"backoff_s": 0.002, "attempts": 4, "timeout_s": 5.0}.items():
        monkeypatch.setattr(ranges.TRANSFER, name, value)


@pytest.fixture(params=[False, True], ids=["direct", "redirect"])
def hub(request: pytest.FixtureRequest) -> Iterator[HubServer]:
    files = {NAME: DATA, "config.json": b"{}", "empty.json": b""}
    with HubServer({"some/model": files}, redirect=request.param) as hub:
        yield hub


@pytest.fixture
def direct() -> Iterator[HubServer]:
    with HubServer({"some/model": {NAME: DATA, "config.json": b"{}"}}) as hub:
        yield hub


@pytest.fixture
def redirecting() -> Iterator[HubServer]:
    with HubServer({"some/model": {NAME: DATA}}, redirect=True) as hub:
        yield hub


def remote(hub: HubServer, name: str = NAME, size: int = len(DATA)) -> RemoteFile:
    commit = hub.branches["some/model"]["main"]
    return RemoteFile(f"some/model: {name}", f"{hub.url}/some/model/resolve/{commit}/{name}", commit, size)


def fetch(hub: HubServer, begin: int, end: int, file: RemoteFile | None = None) -> bytes:
    got = bytearray()

    def sink(offset: int, chunk: bytes) -> None:
        assert offset == begin + len(got)
        got.extend(chunk)

    with RangeClient(hub.url, f"Bearer {TOKEN}") as client:
        client.fetch(file or remote(hub), begin, end, sink)
    return bytes(got)


def test_ranges_are_exact(hub: HubServer) -> None:
    file = remote(hub)
    for begin, end in ((0, 1), (7, 70_001), (len(DATA) - 1, len(DATA)), (0, len(DATA)), (5, 5)):
        assert fetch(hub, begin, end, file) == DATA[begin:end]
    assert hub.sent() == 1 + 70_001 - 7 + 1 + len(DATA)
    assert [request.status for request in hub.asked()] == [206] * 4


def test_a_whole_file_may_come_as_200(hub: HubServer) -> None:
    hub.faults.append(Fault("whole"))
    assert fetch(hub, 0, len(DATA)) == DATA
    with pytest.raises(FailedError, match=r"bytes 0 to 100 of .*HTTP 200 for 206"):
        fetch(hub, 0, 100)
    with pytest.raises(FailedError, match="HTTP 200 for 206"):
        fetch(hub, 1, len(DATA))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("range", r"the answer is 'bytes 8-900/"),
        ("size", r"the answer is 'bytes 7-899/102401'"),
        ("elsewhere", r"the answer is 'bytes \*/\*'"),
        ("long", r"the answer has 897 bytes"),
        ("gzip", "the answer is compressed"),
        ("weak", "weak or malformed"),
        (416, "HTTP 416"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for(kind: str | int, message: str, hub: HubServer) -> None:
    hub.faults.append(Fault(kind))
    got: list[bytes] = []
    with RangeClient(hub.url, None) as client, pytest.raises(FailedError, match=message):
        client.fetch(remote(hub), 7, 900, lambda _, chunk: got.append(chunk))
    assert got == []
    assert len(hub.asked()) == 1  # such an answer is not asked for again


def test_another_commit_than_the_pinned_one(direct: HubServer) -> None:
    direct.faults.append(Fault("commit"))
    with pytest.raises(FailedError, match="the hub answered with the commit ffff"):
        fetch(direct, 0, 10)


def test_no_etag_at_all(direct: HubServer) -> None:
    direct.faults.append(Fault("no-etag"))
    with pytest.raises(FailedError, match="no ETag"):
        fetch(direct, 0, 10)


def test_one_etag_for_all_ranges(hub: HubServer) -> None:
    file = remote(hub)
    fetch(hub, 0, 10, file)
    hub.faults.append(Fault("etag"))  # behind a redirect the hub's own ETag stays, and the content host's changes
    with pytest.raises(
        FailedError, match=r'the file on the server changed: its ETag was "[0-9a-f]{64}" and is "another"'
    ):
        fetch(hub, 10, 20, file)
    hub.faults.clear()
    assert fetch(hub, 10, 20, file) == DATA[10:20]


def test_the_hubs_etag_outlives_the_process_and_the_content_hosts_does_not(redirecting: HubServer) -> None:
    file = remote(redirecting)
    fetch(redirecting, 0, 10, file)
    redirecting.faults.append(Fault("etag"))
    later = remote(redirecting)
    later.etag = file.etag
    assert fetch(redirecting, 10, 20, later) == DATA[10:20]  # another content host of another day
    redirecting.etags[NAME] = '"another"'
    later = remote(redirecting)
    later.etag = file.etag
    with pytest.raises(FailedError, match="changed"):
        fetch(redirecting, 10, 20, later)


def test_a_short_body_is_continued_where_it_stopped(hub: HubServer) -> None:
    hub.faults.append(Fault("short", times=2))
    assert fetch(hub, 0, 80_000) == DATA[:80_000]
    assert [request.range for request in hub.asked()] == ["bytes=0-79999", "bytes=40000-79999", "bytes=60000-79999"]
    assert hub.sent() == 80_000


def test_short_bodies_for_ever(hub: HubServer) -> None:
    hub.faults.append(Fault("short"))
    with pytest.raises(FailedError, match=r"bytes 0 to 1000 stopped at 9\d\d: the answer ended early 4 times"):
        fetch(hub, 0, 1000)
    assert len(hub.asked()) == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status: int, hub: HubServer) -> None:
    hub.faults.append(Fault(status, times=3))
    assert fetch(hub, 3, 9) == DATA[3:9]
    hub.faults.append(Fault(status))
    hub.log.clear()
    with pytest.raises(FailedError, match=rf"HTTP {status} from .*in each of 4 attempts"):
        fetch(hub, 3, 9)
    assert len(hub.asked()) == 4


def test_the_waits_grow_and_retry_after_is_honoured_within_bounds(
    direct: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges.TRANSFER, "backoff_s", 0.04)
    began = time.monotonic()
    direct.faults.append(Fault(503, times=3))
    fetch(direct, 0, 5)
    assert time.monotonic() - began >= 0.24  # 0, 2 and 4 times the first wait
    monkeypatch.setattr(ranges.TRANSFER, "backoff_s", 0.0)
    direct.faults.append(Fault(429, times=1, headers={"Retry-After": "1"}))
    began = time.monotonic()
    fetch(direct, 0, 5)
    assert time.monotonic() - began >= 1
    monkeypatch.setattr(ranges.TRANSFER, "longest_wait_s", 0.01)
    direct.faults.append(Fault(429, times=1, headers={"Retry-After": "86400"}))
    began = time.monotonic()
    fetch(direct, 0, 5)
    assert time.monotonic() - began < 5


def test_stopping_ends_a_wait(direct: HubServer) -> None:
    direct.faults.append(Fault(503, headers={"Retry-After": "60"}))
    with RangeClient(direct.url, None) as client:
        timer = threading.Timer(0.2, client.stop.set)
        timer.start()
        began = time.monotonic()
        with pytest.raises(Stopped):
            client.fetch(remote(direct), 0, 5, lambda *_: None)
        timer.join()
    assert time.monotonic() - began < 5
    assert len(direct.asked()) == 1  # no other attempt, which on a dead network waits for its whole timeout


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_access(status: int, hub: HubServer) -> None:
    hub.faults.append(Fault(status, headers={"X-Error-Message": "Access is restricted"}))
    with pytest.raises(UsageError, match=rf"HTTP {status} from .*Access is restricted.*hf auth login") as caught:
        fetch(hub, 0, 5)
    assert len(hub.asked()) == 1
    assert "Signature" not in str(caught.value)


def test_the_token_goes_to_the_hub_alone(redirecting: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    # A password for every host in ~/.netrc must not go along either, nor a cookie of the hub's.
    (tmp_path / "netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetch(redirecting, 0, 5)
    assert {(request.host, request.token) for request in redirecting.log} == {
        ("hub", f"Bearer {TOKEN}"),
        ("content", None),
    }


def test_the_token_does_not_follow_a_redirect_from_a_file_url(redirecting: HubServer) -> None:
    """The file's URL is another host's from the start: a port is enough to be another."""
    file = remote(redirecting)
    file.url = f"{redirecting.content_url}/some/{file.commit}/{NAME}"
    assert fetch(redirecting, 0, 5, file) == DATA[:5]
    assert [request.token for request in redirecting.log] == [None]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher:x"])
def test_redirects_to_other_schemes_are_not_followed(target: str, direct: HubServer) -> None:
    direct.faults.append(Fault(302, headers={"Location": target}))
    with pytest.raises(FailedError, match=f"redirects to {target.partition(':')[0]}, which is not followed"):
        fetch(direct, 0, 5)


def test_a_circle_of_redirects_ends(direct: HubServer) -> None:
    direct.faults.append(Fault(302, headers={"Location": ""}))
    with pytest.raises(FailedError, match="more than 5 redirects"):
        fetch(direct, 0, 5)


def test_nobody_answers() -> None:
    with HubServer({"some/model": {NAME: DATA}}) as hub:
        file = remote(hub)
    with pytest.raises(FailedError, match=r"could not be reached in 4 attempts \((NewConnection|Connection)\w*Error\)"):
        fetch(hub, 0, 5, file)


def test_small_files_whole(hub: HubServer) -> None:
    hub.faults.append(Fault("short", file="config.json", times=1))
    with RangeClient(hub.url, None) as client:
        assert client.fetch_small(remote(hub, "config.json", 2)) == b"{}"
        assert client.fetch_small(remote(hub, "empty.json", 0)) == b""
        with pytest.raises(FailedError, match="more than the 1 bytes"):
            client.fetch_small(remote(hub, "config.json", 1))
        with pytest.raises(FailedError, match=r"3 bytes stopped at 2: the answer ended early"):
            client.fetch_small(remote(hub, "config.json", 3))
        hub.faults.append(Fault("commit", file="config.json"))
        with pytest.raises(EloError, match="commit ffff"):
            client.fetch_small(remote(hub, "config.json", 2))
