"""PARTIAL.json, the record of which bytes of a half-fetched checkpoint are on disk, and the lock of its folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from elo_engine.checkpoint.commit import sync_folder, write_file
from elo_engine.checkpoint.header import strict_json
from elo_engine.checkpoint.syscalls import io_failure, open_regular
from elo_engine.errors import FailedError

PARTIAL_NAME = "PARTIAL.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_WRITING = ".elo-writing"  # how the name of a file begins until it is whole and synced
_LOCK_NAME = ".elo-lock"
_MAX_RECORD_BYTES = 100_000_000
Span = tuple[int, int]  # byte offsets in a file, end exclusive


@dataclass
class PartialShard:
    """One shard on the hub; `present` are the sorted, disjoint spans that are on disk."""

    size: int
    sha256: str | None
    etag: str | None = None
    present: list[Span] = field(default_factory=list)
    blob: str | None = None  # git blob hash, of a file that the hub keeps outside LFS and so has no sha256 of


@dataclass
class Record:
    """What PARTIAL.json says: which commit of which repository on which hub, and its shards by name."""

    repo: str
    commit: str
    endpoint: str
    shards: dict[str, PartialShard]

    def write(self, folder: Path) -> None:
        """Replace the folder's record; what it calls present has been synced by then."""
        replace_file(folder / PARTIAL_NAME, _sealed_text({"format": 1, **asdict(self)}))


def read_record(folder: Path) -> Record | None:
    """The folder's record, None when there is none; FailedError when it is not exactly what was written."""
    body = _read(folder)
    if body is None:
        return None
    shards = {
        name: PartialShard(s["size"], s["sha256"], s["etag"], [(a, b) for a, b in s["present"]], s.get("blob"))
        for name, s in body["shards"].items()
    }
    return Record(body["repo"], body["commit"], body["endpoint"], shards)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which dies with the process. FailedError: the filesystem grants none.

    The lock is a file that is open for writing, because NFS passes only such locks on to other hosts. It goes when the
    lock is let go; whoever waited for it then sees that it is no longer the file of that name, and begins again.
    """
    path = folder / _LOCK_NAME
    fd = _lock_file(path)
    try:
        yield
    finally:
        with suppress(OSError):  # left behind it is in nobody's way
            path.unlink()
        os.close(fd)


def _lock_file(path: Path) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise io_failure(error, path, None, "opening it") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                    return fd
        except OSError as error:
            os.close(fd)
            raise FailedError(
                f"{path}: cannot be locked ({error.strerror}), and two processes that fetch into one folder would "
                "damage it. Set ELO_CACHE to a folder on a filesystem with locks, such as a local disk."
            ) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Put a small file in the place of the one before, atomically and durably; the caller holds the folder's lock."""
    try:
        writing = new_writing(path.parent)
        write_file(writing, data, sync=True)
        os.replace(writing, path)
        sync_folder(path.parent)
    except OSError as error:
        raise io_failure(error, path, len(data), "writing it") from error


def new_writing(folder: Path) -> Path:
    """A new name to write under; those of processes that were stopped go, which the folder's lock makes sure of."""
    remove_writing(folder)
    return folder / f"{_WRITING}-{uuid.uuid4().hex}"


def remove_writing(folder: Path) -> None:
    """Remove what stopped processes were writing; the caller holds the folder's lock."""
    for left in folder.glob(f"{_WRITING}*"):
        left.unlink(missing_ok=True)


def _sealed_text(body: dict[str, Any]) -> bytes:
    """JSON with a hash over the rest of itself: a flipped digit in a span would make a hole into weights."""
    plain = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(plain, sort_keys=True)
    return (json.dumps({**plain, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1) + "\n").encode()


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / PARTIAL_NAME
    try:
        fd = open_regular(str(path), None, str(path))
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        raw = file.read(_MAX_RECORD_BYTES + 1)

    def changed(why: str) -> NoReturn:
        raise FailedError(
            f"{path}: {why}. It was changed after it was written, so nothing says which bytes are there: remove the "
            "folder and run the command again."
        )

    if len(raw) > _MAX_RECORD_BYTES:
        changed("is too large")
    body = strict_json(raw, str(path), integers_only=True)
    if not isinstance(body, dict) or _sealed_text(body) != raw:
        changed("its hash is wrong")
    why = _malformed(body)
    if why:
        changed(why)
    return body


def _malformed(body: dict[str, Any]) -> str:
    """What is wrong with a record, or nothing."""

    def fits(value: Any, pattern: str) -> bool:
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None

    if body.keys() != {"format", "repo", "commit", "endpoint", "shards", "sha256"} or body["format"] != 1:
        return "is not of format 1"
    patterns = {"repo": HUB_ID.pattern, "commit": COMMIT_HASH.pattern, "endpoint": r"https?://\S+"}
    for key, pattern in patterns.items():
        if not fits(body[key], pattern):
            return f"has a bad {key}"
    if not isinstance(body["shards"], dict) or not body["shards"]:
        return "names no shards"
    for name, shard in body["shards"].items():
        if not SHARD_NAME.fullmatch(name):
            return f"names the shard {name[:200]!r}, which is not a plain file name ending in .safetensors"
        if not isinstance(shard, dict) or shard.keys() - {"blob"} != {"size", "sha256", "etag", "present"}:
            return f"has a malformed entry for {name}"
        if type(shard["size"]) is not int or not 0 < shard["size"] < 2**63:
            return f"has a bad size for {name}"
        if not (shard["sha256"] is None or fits(shard["sha256"], "[0-9a-f]{64}")):
            return f"has a bad sha256 for {name}"
        if not (shard.get("blob") is None or fits(shard["blob"], "[0-9a-f]{40}")):
            return f"has a bad blob hash for {name}"
        if shard["sha256"] is None and shard.get("blob") is None:
            return f"has no hash for {name}"
        if not (shard["etag"] is None or fits(shard["etag"], '"[^"]*"')):
            return f"has a bad etag for {name}"
        position = -1
        for span in shard["present"] if isinstance(shard["present"], list) else [None]:
            if not (isinstance(span, list) and len(span) == 2 and all(type(offset) is int for offset in span)):
                return f"has spans for {name} that are not pairs of offsets"
            if not position < span[0] < span[1] <= shard["size"]:
                return f"has spans for {name} that overlap, run backwards or leave the file"
            position = span[1]
    return ""


def merged(spans: list[Span], gap: int = 0) -> list[Span]:
    """The same bytes, sorted, empty spans left out and those at most `gap` apart joined."""
    out: list[Span] = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if out and begin <= out[-1][1] + gap:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def without(spans: list[Span], present: list[Span]) -> list[Span]:
    """What of the sorted, disjoint spans is not in the sorted, disjoint `present`."""
    out = []
    for begin, end in spans:
        for low, high in present:
            if high > begin and low < end:
                if low > begin:
                    out.append((begin, low))
                begin = high
        if begin < end:
            out.append((begin, end))
    return out


def blob_hash(size: int) -> hashlib._Hash:
    """git's hash of a file of this size, to be given its bytes."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def length(spans: list[Span]) -> int:
    return sum(end - begin for begin, end in spans)
