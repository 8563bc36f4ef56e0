"""A checkpoint folder that is filled from a hub range by range: sparse files, and a record of which bytes are there.

A shard that is not whole lies as NAME.safetensors.partial, of full size from the start, so that no program takes it for
weights. PARTIAL.json says which of its bytes are present: it is replaced only after they were synced, so whatever stops
the process, what it says is true. A shard that became whole is compared with its hash on the hub and renamed; when all
are, PARTIAL.json goes, and the folder is a checkpoint like any other. One process at a time fetches (flock on a
file in the folder).
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

from elo_engine.checkpoint.commit import sync_folder
from elo_engine.checkpoint.header import TensorEntry, header_length
from elo_engine.checkpoint.partial_record import (
    PARTIAL_NAME,
    PartialShard,
    Record,
    Span,
    blob_hash,
    length,
    locked,
    merged,
    new_writing,
    read_record,
    remove_writing,
    without,
)
from elo_engine.checkpoint.publish import preflight_space
from elo_engine.checkpoint.ranges import TRANSFER, RangeClient, RemoteFile, hub_client, hub_url
from elo_engine.checkpoint.syscalls import SYSCALLS, io_failure, open_regular, read_exactly, write_all
from elo_engine.errors import FailedError, UsageError

PARTIAL_SUFFIX = ".partial"
Progress = Callable[[int, int], None]


class PartialStore:
    """The folder of one pinned commit while not all of its shards are whole; not for several threads at once."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self._on = folder, record
        self._files: dict[str, RemoteFile] = {}

    @classmethod
    def load(cls, folder: Path) -> PartialStore | None:
        """The store in this folder, or None when it has none (any more). FailedError: a record nobody wrote so."""
        record = read_record(folder)
        return None if record is None else cls(folder, record)

    @property
    def shards(self) -> dict[str, PartialShard]:
        return self._on.shards

    @property
    def total_bytes(self) -> int:
        return sum(shard.size for shard in self.shards.values())

    @property
    def present_bytes(self) -> int:
        """Bytes of the shards that are on disk, headers included."""
        return sum(shard.size if self._whole(name) else length(shard.present) for name, shard in self.shards.items())

    def has(self, name: str, begin: int, end: int) -> bool:
        """Whether these bytes of a shard are on disk."""
        return not self._missing(name, [(begin, end)])

    def ensure(self, entries: Iterable[TensorEntry], progress: Progress | None = None) -> int:
        """Fetch what is not there of these tensors; returns the bytes fetched. progress(done, total) counts them.

        Raises FailedError (network, an answer or a hash that is wrong, I/O), UsageError (offline, no access),
        RefusedError (not enough disk space). What arrived and was synced before an error stays.
        """
        wanted: dict[str, list[Span]] = {}
        for entry in entries:
            wanted.setdefault(entry.shard, []).append((entry.begin, entry.end))
        self._refresh()
        # The look without the lock does not wait for another process that fetches something else.
        if all(not self._missing(name, spans) and self._intact(name) for name, spans in wanted.items()):
            return 0
        with self._alone():
            return self._fetch(wanted, progress)

    def complete(self, progress: Progress | None = None) -> int:
        """Fetch all that is missing and make the folder an ordinary checkpoint; returns and raises as `ensure`."""
        with self._alone():
            return self._fetch({name: [(0, shard.size)] for name, shard in self.shards.items()}, progress)

    def fetch_headers(self) -> int:
        """Fetch what precedes the tensors of every shard; returns and raises as `ensure`."""
        self._refresh()
        # Without the lock where nothing is to be done, as in a cache that others can only read.
        with suppress(FileNotFoundError):  # a shard that another process completes at this moment
            if not all(self._whole(name) for name in self.shards) and all(
                self._intact(name) and not self._missing(name, [self._header(name)]) for name in self.shards
            ):
                return 0
        with self._alone():
            # The first answer holds the header's length, and nearly always the header.
            return sum(self._fetch({name: [self._header(name)] for name in self.shards}, None) for _ in range(2))

    def _header(self, name: str) -> Span:
        shard = self.shards[name]
        if self._whole(name):
            return 0, shard.size
        if not self.has(name, 0, min(8, shard.size)):
            return 0, min(shard.size, TRANSFER.header_bytes)
        where = str(self.folder / name)
        fd = open_regular(str(self._partial(name)), None, where)
        try:
            first = bytearray(min(8, shard.size))
            read_exactly(fd, memoryview(first), 0, where)
        finally:
            os.close(fd)
        return 0, 8 + header_length(bytes(first), where, shard.size)

    def _partial(self, name: str) -> Path:
        return self.folder / (name + PARTIAL_SUFFIX)

    def _whole(self, name: str) -> bool:
        """Whether the finished shard is there; only what was verified ever gets this name."""
        try:
            size = os.stat(self.folder / name).st_size
        except FileNotFoundError:
            return False
        if size != self.shards[name].size:
            raise FailedError(
                f"{self.folder / name}: has {size} bytes and {self.shards[name].size} on the hub. Another program "
                "changed it: remove the file and run the command again."
            )
        return True

    def _intact(self, name: str) -> bool:
        """Whether the file that the record speaks of is there."""
        try:
            status = os.lstat(self._partial(name))
        except FileNotFoundError:
            return self._whole(name)
        return stat.S_ISREG(status.st_mode) and status.st_size == self.shards[name].size

    def _missing(self, name: str, wanted: list[Span]) -> list[Span]:
        if self._whole(name):
            return []
        present = self.shards[name].present
        # Joined over gaps only where something is missing, and what is present is never fetched again.
        return without(merged(without(merged(wanted), present), TRANSFER.join_bytes), present)

    def _refresh(self) -> None:
        """Take over what another process recorded; without a record all shards are whole, or somebody removed some."""
        now = read_record(self.folder)
        if now is not None:
            if (now.repo, now.commit, now.shards.keys()) != (self._on.repo, self._on.commit, self.shards.keys()):
                raise FailedError(f"{self.folder / PARTIAL_NAME}: is of another model by now. Run the command again.")
            self._on = now
        elif not all(self._whole(name) for name in self.shards):
            raise FailedError(f"{self.folder}: files have gone since it was opened. Run the command again.")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The folder's lock, the newest record, and files that fit it; at the end no record when all is whole."""
        with locked(self.folder):
            self._refresh()
            broken = [name for name in self.shards if not self._intact(name)]
            for name in broken:
                self.shards[name].present = []
            if broken:
                self._on.write(self.folder)  # before an empty file of the right size is there
            for name in broken:
                self._make_sparse(name)
            yield
            if all(self._whole(name) for name in self.shards):
                (self.folder / PARTIAL_NAME).unlink(missing_ok=True)
                remove_writing(self.folder)
                sync_folder(self.folder)

    def _make_sparse(self, name: str) -> None:
        # Beside the old file and then in its place: removed first, its inode's number could come back, and by that
        # number a reader who has it open tells that it is another file.
        path = self._partial(name)
        try:
            writing = new_writing(self.folder)
            fd = os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(fd, self.shards[name].size)
            finally:
                os.close(fd)
            os.replace(writing, path)
        except OSError as error:
            raise io_failure(error, path, None, "creating the sparse file") from error

    def _fetch(self, wanted: dict[str, list[Span]], progress: Progress | None) -> int:
        """Fetch, record and seal; the lock is held."""
        jobs = [
            (name, low, min(low + TRANSFER.piece_bytes, end))
            for name, spans in wanted.items()
            for begin, end in self._missing(name, spans)
            for low in range(begin, end, TRANSFER.piece_bytes)
        ]
        need = sum(end - begin for _, begin, end in jobs)
        if need:
            preflight_space(self.folder, need)
            with hub_client() as client:
                if client.endpoint != self._on.endpoint:
                    raise UsageError(
                        f"{self.folder}: was begun from {self._on.endpoint}, and HF_ENDPOINT is {client.endpoint} now. "
                        "Set it as it was, or remove the folder to begin anew: two hubs' bytes are not mixed."
                    )
                for name in wanted:
                    self._file(name)  # one for all threads, because it holds what their answers have to agree on
                self._run(client, jobs, need, progress)
        for name in wanted:
            if not self._whole(name) and self.shards[name].present == [(0, self.shards[name].size)]:
                self._seal(name)
        return need

    def _run(self, client: RangeClient, jobs: list[tuple[str, int, int]], need: int, progress: Progress | None) -> None:
        done, unrecorded, since = 0, 0, time.monotonic()
        pool = ThreadPoolExecutor(TRANSFER.threads)
        futures: dict[Future[None], tuple[str, int, int]] = {}
        left: set[Future[None]] = set()
        synced = True

        def record() -> None:
            nonlocal synced
            if not synced:  # the kernel reports a failed sync once, and may have dropped what any piece had written
                return
            synced = False
            ready = {f for f in left if f.done() and not f.cancelled() and f.exception() is None}
            self._record([futures[future] for future in ready])
            left.difference_update(ready)
            synced = True

        try:
            for job in jobs:
                future = pool.submit(self._piece, client, *job)
                futures[future] = job
                left.add(future)
            for future in as_completed(futures):
                future.result()
                _, begin, end = futures[future]
                done += end - begin
                unrecorded += end - begin
                if unrecorded >= TRANSFER.record_bytes or time.monotonic() - since >= TRANSFER.record_s:
                    record()
                    unrecorded, since = 0, time.monotonic()
                if progress is not None:
                    progress(done, need)
        finally:
            client.stop.set()  # of what still runs, after an error
            pool.shutdown(wait=True, cancel_futures=True)
            record()

    def _piece(self, client: RangeClient, name: str, begin: int, end: int) -> None:
        path = self._partial(name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise io_failure(error, path, end - begin, "opening it") from error
        try:
            os.lseek(fd, begin, os.SEEK_SET)
            client.fetch(self._files[name], begin, end, lambda _, chunk: write_all(fd, chunk, path, end - begin))
        finally:
            os.close(fd)

    def _file(self, name: str) -> RemoteFile:
        shard = self.shards[name]
        if name not in self._files:
            url = hub_url(self._on.repo, name, self._on.commit)
            self._files[name] = RemoteFile(
                f"{self._on.repo}@{self._on.commit[:12]}: {name}", url, self._on.commit, shard.size
            )
            self._files[name].etag = shard.etag
        return self._files[name]

    def _record(self, jobs: list[tuple[str, int, int]]) -> None:
        """Sync the data, then say in PARTIAL.json that they are there."""
        for name in sorted({name for name, _, _ in jobs}):
            path = self._partial(name)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    SYSCALLS.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                raise io_failure(error, path, None, "syncing it to the disk") from error
            shard = self.shards[name]
            shard.present = merged(shard.present + [(begin, end) for job, begin, end in jobs if job == name])
            shard.etag = self._file(name).etag
        if jobs:
            self._on.write(self.folder)

    def _seal(self, name: str) -> None:
        """Compare a shard that is all there with its hash, and give it its name."""
        shard, path = self.shards[name], self._partial(name)
        try:
            kind, wanted = ("sha256", shard.sha256) if shard.sha256 else ("git blob hash", shard.blob)
            with open(path, "rb") as file:
                got = hashlib.file_digest(file, hashlib.sha256 if shard.sha256 else lambda: blob_hash(shard.size))
            if got.hexdigest() != wanted:
                shard.present, shard.etag = [], None
                self._files.pop(name, None)
                self._on.write(self.folder)
                path.unlink()
                raise FailedError(
                    f"{self.folder / name}: {kind} is {got.hexdigest()} and {wanted} on the hub. The bytes were "
                    "dropped. Run the command again; if it stays so, what serves this hub's files is broken."
                )
            SYSCALLS.rename(str(path), str(self.folder / name))
            sync_folder(self.folder)
        except OSError as error:
            raise io_failure(error, path, None, "completing it") from error


def cache_folder() -> Path:
    """`ELO_CACHE`, else the user's cache folder."""
    base = os.environ.get("ELO_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elo_engine"
