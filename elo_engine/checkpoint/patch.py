"""Patches between two checkpoints of one layout: made, applied, taken back, checked.

`diff` keeps only the tensors whose bytes differ (see `patch_file`). `apply` and `revert` move bytes, so the result is
that of the other checkpoint to the last bit and nothing is cast; there is no check for finite values, because some
checkpoints hold infinities on purpose (masks) and the hashes say that these bytes are the recorded ones. All of it
streams: memory does not depend on the size of a checkpoint, a tensor or a patch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.hub import model_files
from elo_engine.checkpoint.index import CheckpointIndex, open_checkpoint
from elo_engine.checkpoint.patch_file import PatchFile
from elo_engine.checkpoint.patch_writer import (
    CHUNK_BYTES,
    Bytes,
    Meter,
    PatchStats,
    Progress,
    refuse_output,
    silent,
    whole_checkpoint,
    write_patch,
)
from elo_engine.checkpoint.pieces import Pieces, ShardReader
from elo_engine.checkpoint.publish import preflight_space, publish
from elo_engine.checkpoint.writer import RewriteStats, rewrite_checkpoint, space_needed
from elo_engine.errors import FailedError, RefusedError


def diff_checkpoints(base: Path, changed: Path, out: Path, progress: Progress = silent) -> PatchStats:
    """Write to the new file `out` what has to be done to `base` to get `changed`; equal ones give an empty patch.

    Raises RefusedError: the two differ in more than their tensors' values (what differs is named), `out` exists or
    lies in one of them, too little space. FailedError: damaged, changed while read, I/O errors.
    """
    left, right = whole_checkpoint(base, progress), whole_checkpoint(changed, progress)
    refuse_output(out, [left.folder, right.folder])
    difference = layout_difference(left, right)
    if difference:
        raise RefusedError(f"{changed}: cannot be a patch of {base}: {difference}. A patch holds weights alone.")
    with ShardReader(right) as reader:
        stats = write_patch(left, _Other(reader), out, progress)
    return PatchStats(stats.tensors, stats.payload_bytes, stats.file_bytes, _other_files(left.folder, right.folder))


def apply_patch(
    folder: Path, patch: Path, out: Path, progress: Progress = silent, *, hard_links: bool = False
) -> RewriteStats:
    """Publish as `out` the checkpoint that the patch makes of its base `folder`; see `rewrite_checkpoint`.

    Raises RefusedError: `folder` is not the base (the first tensor that differs is named; it says so when the patch
    is already in it), `out` exists, too little space. FailedError: a damaged patch, I/O errors.
    """
    return _rewrite(folder, patch, out, progress, hard_links, back=False)


def revert_patch(
    folder: Path, patch: Path, out: Path, progress: Progress = silent, *, hard_links: bool = False
) -> RewriteStats:
    """Publish as `out` the base of a checkpoint that has the patch in it; raises as `apply_patch` does."""
    return _rewrite(folder, patch, out, progress, hard_links, back=True)


def verify_patch(folder: Path, patch: Path, progress: Progress = silent) -> Literal["base", "patched"]:
    """Which of the two sides of a patch a checkpoint is, every byte of both read; "base" for an empty patch.

    Raises FailedError: neither (the first tensor that is neither is named), or the patch is damaged.
    """
    index = whole_checkpoint(folder, progress)
    with PatchFile(patch) as opened:
        check_payloads(opened, progress)
        state = find_state(index, opened, progress)
        opened.check()
    if not (state.base or state.patched):
        raise FailedError(f"{folder}: is neither the base nor the result of {patch}: {state.why}.")
    return "base" if state.base else "patched"


@dataclass(frozen=True)
class State:
    """Which sides of a patch a checkpoint is (both, of an empty patch); `why` is for when it is none."""

    base: bool
    patched: bool
    why: str = ""


def find_state(index: CheckpointIndex, patch: PatchFile, progress: Progress) -> State:
    """Compare every byte of the checkpoint with the hashes of the patch."""
    difference = _foreign(index, patch)
    if difference:
        return State(False, False, difference)
    expected, found = patch.contents.shards, {}
    meter = Meter(progress, "checking the checkpoint", sum(info.size for info in index.shards.values()))
    with ShardReader(index) as reader:
        for info in index.shards.values():
            found[info.name] = _sha256(reader, info.name, 0, info.size, meter)
        base = all(found[name] == hashes.before for name, hashes in expected.items())
        patched = all(found[name] == hashes.after for name, hashes in expected.items())
        why = "" if base or patched else _first_wrong(index, patch, reader, found)
        reader.check()
    return State(base, patched, why)


def check_payloads(patch: PatchFile, progress: Progress) -> None:
    """FailedError unless the XOR data of every tensor is what it was when the patch was made."""
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    meter = Meter(progress, "checking the patch", sum(entry.nbytes for entry in patch.entries.values()))
    for entry in patch.entries.values():
        digest = hashlib.sha256()
        for offset in range(0, entry.nbytes, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, entry.nbytes - offset)]
            patch.read(entry.name, piece.data, offset)
            digest.update(piece.data)
            meter.add(len(piece))
        patch.check_payload(entry.name, digest.hexdigest())


def layout_difference(left: CheckpointIndex, right: CheckpointIndex) -> str:
    """The first thing other than values in which two checkpoints differ; empty when there is none."""
    if left.identity() == right.identity():
        return ""
    if left.shards.keys() != right.shards.keys():
        return f"shard {min(left.shards.keys() ^ right.shards.keys())} is in one of them only"
    if left.entries.keys() != right.entries.keys():
        return f"tensor {min(left.entries.keys() ^ right.entries.keys())!r} is in one of them only"
    for name, entry in left.entries.items():
        other = right.entries[name]
        for what in ("dtype", "shape", "shard"):
            if getattr(entry, what) != getattr(other, what):
                return f"tensor {name!r} has {what} {getattr(entry, what)} and {getattr(other, what)}"
        if (entry.begin, entry.end) != (other.begin, other.end):
            return f"tensor {name!r} lies elsewhere in {entry.shard}"
    for key in sorted(left.config.keys() | right.config.keys()):
        if left.config.get(key) != right.config.get(key):
            return f"config.json: {key} is {left.config.get(key)!r} and {right.config.get(key)!r}"
    return "config.json or the metadata in a shard's header is written differently"


def _other_files(left: Path, right: Path) -> tuple[str, ...]:
    """Tokenizer and other files that differ between two folders, or that one of them lacks."""
    found = [{path.relative_to(folder).as_posix(): path for path in model_files(folder)} for folder in (left, right)]
    names = found[0].keys() | found[1].keys()
    return tuple(sorted(name for name in names if _bytes(found[0].get(name)) != _bytes(found[1].get(name))))


def _bytes(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


class _Other:
    """The changed checkpoint, as what `write_patch` asks for its bytes."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader, self._buffer = reader, np.empty(CHUNK_BYTES, np.uint8)

    def chunk(self, entry: TensorEntry, offset: int, before: Bytes) -> Bytes:
        piece = self._buffer[: len(before)]
        self._reader.read(entry.shard, piece.data, entry.begin + offset)
        return piece

    def check(self) -> None:
        self._reader.check()


def _foreign(index: CheckpointIndex, patch: PatchFile) -> str:
    """Why a patch cannot belong to a checkpoint, judged from headers; the patch is somebody else's content."""
    contents = patch.contents
    for name, entry in patch.entries.items():
        ours = index.entries.get(name)
        if ours is None:
            return f"it has no tensor {name!r}"
        if ours.dtype != contents.tensors[name].dtype or ours.shape != entry.shape:
            return f"its tensor {name!r} is {ours.dtype} {ours.shape}, that of the patch another"
    if {name: info.size for name, info in index.shards.items()} != {n: h.size for n, h in contents.shards.items()}:
        return "its shards have other names or sizes"
    if contents.base != index.identity():
        return "its config.json or the headers of its shards are not those that the patch was made for"
    return ""


def _first_wrong(index: CheckpointIndex, patch: PatchFile, reader: ShardReader, shards: dict[str, str]) -> str:
    sides: dict[str, str] = {}  # the first tensor seen of each side
    for name in (name for name in index.entries if name in patch.entries):
        entry, hashes = index.entries[name], patch.contents.tensors[name]
        digest = _sha256(reader, entry.shard, entry.begin, entry.end)
        if digest not in (hashes.before, hashes.after):
            return f"tensor {name!r} is neither that of the base nor that of the patched checkpoint"
        sides.setdefault("base" if digest == hashes.before else "patched", name)
    if len(sides) == 2:
        return f"tensor {sides['base']!r} is that of the base, but {sides['patched']!r} that of the patched checkpoint"
    expected = patch.contents.shards
    for shard, digest in shards.items():
        if digest not in (expected[shard].before, expected[shard].after):
            return f"{shard} differs from both in a tensor that the patch does not hold"
    return "its shards are of both"


def _sha256(reader: ShardReader, shard: str, begin: int, end: int, meter: Meter | None = None) -> str:
    digest, buffer = hashlib.sha256(), np.empty(CHUNK_BYTES, np.uint8)
    for offset in range(begin, end, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, end - offset)]
        reader.read(shard, piece.data, offset)
        digest.update(piece.data)
        if meter is not None:
            meter.add(len(piece))
    return digest.hexdigest()


def _rewrite(
    folder: Path, patch: Path, out: Path, progress: Progress, hard_links: bool, *, back: bool
) -> RewriteStats:
    index = whole_checkpoint(folder, progress)
    refuse_output(out, [index.folder])
    with PatchFile(patch) as opened:
        state = find_state(index, opened, progress)
        if not (state.patched if back else state.base):
            is_other = state.base if back else state.patched
            why = ("the patch is not in it" if back else "the patch is already in it") if is_other else state.why
            verb, side = ("taken back from", "the patched checkpoint") if back else ("applied to", "its base")
            raise RefusedError(f"{folder}: {patch} cannot be {verb} it, because it is not {side}: {why}.")
        preflight_space(out, space_needed(index, opened.entries, out, hard_links))
        extra = {"kind": "reverted" if back else "patched", "patch": opened.path.name, "source": index.identity()}
        with ShardReader(index) as reader, publish(out, extra=extra) as temporary:
            changed: dict[str, Tensor | Pieces] = {
                name: _Patched(index.entries[name], reader, opened, back) for name in opened.entries
            }
            stats = rewrite_checkpoint(
                index,
                changed,
                temporary,
                lambda done, total: progress(f"writing {out.name}", done, total),
                hard_links=hard_links,
                check_finite=False,
            )
            reader.check()
            opened.check()
            _check_shards(temporary, opened, {index.entries[name].shard for name in changed}, back)
    return stats


def _check_shards(folder: Path, patch: PatchFile, names: set[str], back: bool) -> None:
    """The shards that were put together from two sources, as the disk gives them back. The others are copies of
    files whose hash was just compared, and COMMIT.json hashes them again.
    """
    with ShardReader(open_checkpoint(folder)) as reader:
        for name in sorted(names):
            hashes = patch.contents.shards[name]
            if _sha256(reader, name, 0, hashes.size) != (hashes.before if back else hashes.after):
                raise FailedError(
                    f"{folder / name}: was written with bytes other than the patch records. Check the disk and the "
                    "memory of this machine."
                )


class _Patched:
    """A tensor of the checkpoint with its patch in it (or taken out), as `Pieces`, to be asked for once, in order."""

    def __init__(self, entry: TensorEntry, reader: ShardReader, patch: PatchFile, back: bool) -> None:
        self.shape, self.dtype = entry.shape, entry.torch_dtype
        self._entry, self._reader, self._patch = entry, reader, patch
        hashes = patch.contents.tensors[entry.name]
        self._wanted = hashes.before if back else hashes.after
        self._position = 0
        self._xor, self._result = hashlib.sha256(), hashlib.sha256()

    def piece(self, first: int, count: int) -> Tensor:
        """Raises FailedError at the end of the tensor: its bytes are not those that the patch records."""
        entry, width = self._entry, self.dtype.itemsize
        assert first * width == self._position
        bytes_, other = np.empty(count * width, np.uint8), np.empty(count * width, np.uint8)
        self._reader.read(entry.shard, bytes_.data, entry.begin + self._position)
        self._patch.read(entry.name, other.data, self._position)
        np.bitwise_xor(bytes_, other, out=bytes_)
        self._xor.update(other.data)
        self._result.update(bytes_.data)
        self._position += count * width
        if self._position == entry.nbytes:
            self._patch.check_payload(entry.name, self._xor.hexdigest())
            if self._result.hexdigest() != self._wanted:
                raise FailedError(
                    f"{self._reader.index.folder / entry.shard}: tensor {entry.name!r} does not become "
                    f"what {self._patch.path} records. It changed meanwhile, or the patch contradicts itself."
                )
        return torch.from_numpy(bytes_).view(self.dtype)
