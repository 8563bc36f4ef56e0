"""Makes a patch file of a base checkpoint and of whatever knows the changed bytes: another checkpoint, an average.

Two passes. The first reads everything, hashes whole shards and finds the tensors that differ; the second writes
those. The header comes first in the file and is written last, in the place kept for it, so a file that is not
finished does not open.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.index import CheckpointIndex, open_checkpoint
from elo_engine.checkpoint.patch_file import PatchContents, ShardHashes, TensorHashes, patch_header
from elo_engine.checkpoint.pieces import ShardReader
from elo_engine.checkpoint.publish import preflight_space, refuse_existing
from elo_engine.checkpoint.publish_file import publish_file
from elo_engine.checkpoint.syscalls import write_all
from elo_engine.errors import RefusedError

Bytes = NDArray[np.uint8]
CHUNK_BYTES = 1 << 20  # a multiple of every element's width; both sides and their XOR stay in the second-level cache
_UNKNOWN = "0" * 64  # as wide as any hash
Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


def silent(what: str, done: int, total: int) -> None:
    """The progress of those who do not want to know."""


class Meter:
    """Counts bytes of one kind of work towards a total."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total, self._done = progress, what, total, 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._what, self._done, self._total)


def whole_checkpoint(folder: Path, progress: Progress) -> CheckpointIndex:
    """A checkpoint of which every byte is on disk; of a hub's model the rest is fetched."""
    return open_checkpoint(folder).completed(lambda done, total: progress(f"fetching {folder.name}", done, total))


class ChangedBytes(Protocol):
    """The other side of a patch."""

    def chunk(self, entry: TensorEntry, offset: int, before: Bytes) -> Bytes:
        """The changed tensor's bytes from its byte `offset` on, given the base's; valid until the next call. Every
        tensor is asked for from its beginning to its end, some of them twice.
        """

    def check(self) -> None:
        """FailedError when what the bytes came from changed meanwhile."""


@dataclass(frozen=True)
class PatchStats:
    """What a new patch holds. `other_files`: files that travel with a model, differ, and are not in the patch."""

    tensors: int
    payload_bytes: int
    file_bytes: int
    other_files: tuple[str, ...] = ()


def refuse_output(out: Path, sources: Sequence[Path]) -> None:
    """RefusedError when `out` exists or lies in a source: a safetensors file there would be a foreign shard."""
    refuse_existing(Path(os.path.abspath(out)))
    target = Path(out).resolve()
    for source in sources:
        if source.resolve() in target.parents:
            raise RefusedError(f"{out}: lies in its source {source}. Choose an output outside of it.")


def write_patch(
    base: CheckpointIndex, changed: ChangedBytes, out: Path, progress: Progress
) -> PatchStats:
    """Write the new file `out`; progress(what, done, total) counts bytes of the base.

    Raises RefusedError (`out` exists, too little space, a packed dtype), FailedError (a source that changed
    meanwhile, I/O errors).
    """
    with ShardReader(base) as reader:
        entries, shards = _survey(base, reader, changed, progress)
        # Wide elements first, as the format's own writer does, so that all are aligned.
        entries.sort(key=lambda entry: (-entry.torch_dtype.itemsize, entry.shard, entry.begin))
        hashes = {entry.name: TensorHashes(entry.dtype, _UNKNOWN, _UNKNOWN, _UNKNOWN) for entry in entries}
        room = len(patch_header(entries, PatchContents(base.identity(), hashes, shards)))
        payload = sum(entry.nbytes for entry in entries)
        preflight_space(out, room + payload)
        with publish_file(out) as (fd, path):
            write_all(fd, bytes(room), path, room + payload)
            meter, target = Meter(progress, f"writing {out.name}", payload), (fd, path, room + payload)
            for entry in entries:
                hashes[entry.name] = _write_xor(entry, reader, changed, target, meter)
            header = patch_header(entries, PatchContents(base.identity(), hashes, shards))
            assert len(header) == room
            os.lseek(fd, 0, os.SEEK_SET)
            write_all(fd, header, path, room + payload)
            reader.check()
            changed.check()
    return PatchStats(len(entries), payload, room + payload)


def _survey(
    base: CheckpointIndex,
    reader: ShardReader,
    changed: ChangedBytes,
    progress: Progress,
) -> tuple[list[TensorEntry], dict[str, ShardHashes]]:
    """The tensors that differ, and both sides' hashes of every shard. Headers are the same on both sides."""
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    meter = Meter(progress, "comparing", sum(info.size for info in base.shards.values()))
    differing: list[TensorEntry] = []
    shards: dict[str, ShardHashes] = {}
    for info in base.shards.values():
        before, after = hashlib.sha256(), None  # one hash for both, until they part
        for offset in range(0, info.header_bytes, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, info.header_bytes - offset)]
            reader.read(info.name, piece.data, offset)
            before.update(piece.data)
        meter.add(info.header_bytes)
        for entry in (entry for entry in base.entries.values() if entry.shard == info.name):
            differs = False
            for offset in range(0, entry.nbytes, CHUNK_BYTES):
                piece = buffer[: min(CHUNK_BYTES, entry.nbytes - offset)]
                reader.read(info.name, piece.data, entry.begin + offset)
                now = changed.chunk(entry, offset, piece)
                if not np.array_equal(piece, now):
                    differs = True
                    after = after or before.copy()
                before.update(piece.data)
                if after is not None:
                    after.update(now.data)
                meter.add(len(piece))
            if differs:
                differing.append(entry)
        shards[info.name] = ShardHashes(info.size, before.hexdigest(), (after or before).hexdigest())
    return differing, shards


def _write_xor(
    entry: TensorEntry,
    reader: ShardReader,
    changed: ChangedBytes,
    target: tuple[int, Path, int],
    meter: Meter,
) -> TensorHashes:
    """Write one tensor's XOR at the descriptor's position. target: descriptor, path, bytes of the whole file."""
    fd, path, need = target
    before, after, both = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    buffer, xor = np.empty(CHUNK_BYTES, np.uint8), np.empty(CHUNK_BYTES, np.uint8)
    for offset in range(0, entry.nbytes, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, entry.nbytes - offset)]
        reader.read(entry.shard, piece.data, entry.begin + offset)
        now = changed.chunk(entry, offset, piece)
        out = np.bitwise_xor(piece, now, out=xor[: len(piece)])
        before.update(piece.data)
        after.update(now.data)
        both.update(out.data)
        write_all(fd, out.data, path, need)
        meter.add(len(piece))
    return TensorHashes(entry.dtype, before.hexdigest(), after.hexdigest(), both.hexdigest())
