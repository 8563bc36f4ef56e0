"""How a token folder is written: one shard as a stream, small files in one step, the work folder's lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from elo_engine.data.manifest import ShardRecord, documents_file, loss_file, tokens_file
from elo_engine.errors import FailedError, RefusedError

# Name of the file that a small file is written to before it takes its place.
NEW = ".new"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is written into a FailedError that names it."""
    try:
        yield
    except OSError as error:
        raise FailedError(
            f"{path}: cannot be written ({error.strerror or error}); mend the cause (space, mode, device); "
            "the same command then continues from the last complete shard"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: after a crash the old content is there, or the new one whole."""
    new = path.with_name(NEW)
    with naming(path):
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Create the work folder where it is missing and hold it; RefusedError when another process does.

    The lock is on the folder itself and dies with the process, so a killed writer never blocks the next.
    """
    with naming(work):
        work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(descriptor).st_ino == work.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # held, or published under its final name between the two calls
            raise RefusedError(
                f"{work}: another process is writing this token folder; wait for it or choose another --out"
            )
        yield
    finally:
        os.close(descriptor)


class ShardWriter:
    """One shard: ids go to disk as they come, the document table (16 bytes a document) at the end.

    masked: with a byte beside every token that says whether it carries a loss.
    """

    def __init__(self, folder: Path, number: int, dtype: str, *, masked: bool = False) -> None:
        self.tokens = self.loss_tokens = 0
        self._path, self._table_path = folder / tokens_file(number), folder / documents_file(number)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._table = array("q")
        self._digest = hashlib.sha256()
        self._loss_digest = hashlib.sha256()
        self._loss_path = folder / loss_file(number) if masked else None
        self._loss_file: BinaryIO | None = None
        with naming(self._path):
            self._file: BinaryIO = self._path.open("wb")
        if self._loss_path is not None:
            with naming(self._loss_path):
                self._loss_file = self._loss_path.open("wb")

    def add(self, ids: np.ndarray, text_bytes: int, loss: np.ndarray | None = None) -> None:
        """Append one document, int64 [length]; ids that the shard's type cannot hold raise FailedError.

        loss: of a masked shard, bool [length]: which tokens carry a loss.
        """
        if (loss is None) != (self._loss_path is None) or (loss is not None and loss.shape != ids.shape):
            raise ValueError(f"{self._path}: a document of a masked shard, and of no other, has one flag a token")
        if int(ids.min()) < 0 or int(ids.max()) > np.iinfo(self._dtype).max:
            bad = int(np.argmax((ids < 0) | (ids > np.iinfo(self._dtype).max)))
            raise FailedError(
                f"{self._path}: the tokenizer gave id {int(ids[bad])} at position {bad} of document "
                f"{len(self._table) // 2}, beyond its own vocabulary; fetch the tokenizer files again"
            )
        raw = ids.astype(self._dtype).tobytes()
        self._digest.update(raw)
        with naming(self._path):
            self._file.write(raw)
        if loss is not None and self._loss_path is not None and self._loss_file is not None:
            flags = loss.astype(np.uint8).tobytes()
            self._loss_digest.update(flags)
            with naming(self._loss_path):
                self._loss_file.write(flags)
            self.loss_tokens += int(np.count_nonzero(loss))
        self.tokens += len(ids)
        self._table.extend((self.tokens, text_bytes))

    def finish(self) -> ShardRecord:
        """Write the document table and put the files on disk for good."""
        table = np.array(self._table, dtype="<i8").reshape(-1, 2)
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._loss_path is not None and self._loss_file is not None:
            with naming(self._loss_path):
                self._loss_file.flush()
                os.fsync(self._loss_file.fileno())
                self._loss_file.close()
        write_file(self._table_path, table.tobytes())
        return ShardRecord(
            tokens=self.tokens,
            documents=len(table),
            text_bytes=int(table[:, 1].sum()),
            tokens_sha256=self._digest.hexdigest(),
            documents_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
            loss_tokens=self.loss_tokens if self._loss_file is not None else None,
            loss_sha256=self._loss_digest.hexdigest() if self._loss_file is not None else None,
        )

    def close(self) -> None:
        """Let go of the files; what they hold is written again by the next run."""
        # Closing flushes, and on a full disk that fails once more: the first error is the one to report.
        for file in (self._file, self._loss_file):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
