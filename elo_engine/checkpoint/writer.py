"""Writes weights: small new files, and a changed copy of a whole checkpoint.

A changed tensor keeps its dtype and shape, so a changed shard keeps its header and layout: clone the shard,
write the changed ranges. A clone shares the source's extents where the filesystem can (XFS, Btrfs, bcachefs:
only the changed ranges are written); elsewhere (ext4) it is a copy, of unchanged shards too, because the only
way around that are hard links, through which a program that writes into the output would write into the
source: they are for whoever asks. A changed tensor is written piece by piece, from memory or from a file, so
the memory needed does not depend on any size. Nothing here makes an output visible or durable, that is the
part of `publish`:

    with publish(target, extra={"source": index.identity()}) as folder:
        rewrite_checkpoint(index, trained, folder)
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from elo_engine.checkpoint.clone import Clone, clone_except, copy_small_file, link_file, shares_extents
from elo_engine.checkpoint.commit import create_file, verify_commit
from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.hub import model_files
from elo_engine.checkpoint.index import (
    INDEX_NAME,
    CheckpointIndex,
    ShardInfo,
    check_unchanged,
    open_checkpoint,
    open_shard,
)
from elo_engine.checkpoint.mover import RING_SLOT_BYTES, RING_SLOTS, RING_THREADS, Mover, Slot, TransferError, borrowed
from elo_engine.checkpoint.pieces import PIECE_ITEMS, Pieces, TensorPieces
from elo_engine.checkpoint.publish import preflight_space, publish
from elo_engine.checkpoint.syscalls import SYSCALLS, io_failure, open_folder
from elo_engine.errors import FailedError, RefusedError, UsageError

__all__ = [
    "SYSCALLS",
    "RewriteStats",
    "preflight_space",
    "publish",
    "rewrite_checkpoint",
    "space_needed",
    "verify_commit",
    "write_safetensors",
]

_BLOCK_BYTES = 4096
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RewriteStats:
    """How the bytes of the output's shards came about; the four counts add up to the shards' sizes.

    `bytes_written` from changed tensors; of the rest, `bytes_cloned` share the source's extents and take no
    space of their own, `bytes_linked` are in hard links to the source's files, `bytes_copied` are a second copy.
    `not_linked` says why a shard is not a hard link although one was asked for; empty when none was declined.
    """

    bytes_written: int
    bytes_cloned: int
    bytes_copied: int = 0
    bytes_linked: int = 0
    not_linked: str = ""


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a new safetensors file, synced and with the umask's mode (by itself the library leaves 0600).

    Tensors may be on any device, strided, or share memory; each is stored whole under its own name. Raises
    RefusedError when `path` exists, FailedError on I/O errors, naming the file and the bytes needed.
    """
    path = Path(path)
    need = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    # Claims the name, and learns the umask's mode without touching the umask, which all threads share.
    fd = create_file(path)
    mode = os.fstat(fd).st_mode & 0o777
    os.close(fd)
    try:
        save_file(_separate(tensors), path, metadata)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fchmod(fd, mode)
            SYSCALLS.fsync(fd)
        finally:
            os.close(fd)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # the library hides the error number in its text
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            cause = OSError(number, os.strerror(number) if code else str(error))
            raise io_failure(cause, path, need, "writing it") from error
        if isinstance(error, OSError):
            raise io_failure(error, path, need, "writing it") from error
        raise


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors no two of which overlap, as the serialiser wants; copies only where it must. Tensors side
    by side in one piece of memory are written from there.
    """
    out = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    end = 0
    for name in sorted(out, key=lambda name: out[name].data_ptr()):
        begin = out[name].data_ptr()
        if begin < end and out[name].nbytes:
            out[name] = out[name].clone()
        else:
            end = max(end, begin + out[name].nbytes)
    return out


def rewrite_checkpoint(
    index: CheckpointIndex,
    changed: Mapping[str, Tensor | Pieces],
    folder: Path,
    progress: Progress | None = None,
    *,
    hard_links: bool = False,
    check_finite: bool = True,
) -> RewriteStats:
    """Write the checkpoint of `index`, with `changed` in place of its own tensors, into the existing
    `folder`.

    changed: {name: tensor of the checkpoint's shape, or `Pieces` to be asked for it}, any device, cast to the
    checkpoint's dtype. Everything else is the source's bytes; without a change the weights are byte-identical.
    Model files travel byte for byte, the index file is written last. progress(done, total) counts bytes of the
    shards. hard_links: shards without a changed tensor become hard links to the source's files, with their mode
    and owner; where the system declines they are cloned, and the stats say why. check_finite: off only for bytes
    that are known by their hash. The source is only read.

    Raises UsageError (unknown tensor, other shape, other kind of dtype), RefusedError (`folder` lies in the
    source, a file exists), FailedError (a non-finite value, a source that changed meanwhile, I/O errors).
    """
    folder = Path(folder)
    source, target = index.folder.resolve(), folder.resolve()
    if target == source or source in target.parents:
        raise RefusedError(f"{folder}: lies in its source {index.folder}. Choose an output outside of it.")
    pieces = {name: TensorPieces(value) if isinstance(value, Tensor) else value for name, value in changed.items()}
    for name, tensor in pieces.items():
        _check_fits(index.entry(name), tensor, index.folder)
    total = sum(info.size for info in index.shards.values())
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    job = _Job(index, pieces, folder, report, hard_links, check_finite)
    with open_folder(index.folder) as dir_fd:
        entries: dict[str, list[TensorEntry]] = {name: [] for name in index.shards}
        for entry in index.entries.values():
            if entry.name in pieces:
                entries[entry.shard].append(entry)
        parts = [_rewrite_shard(job, info, entries[info.name], dir_fd) for info in index.shards.values()]
    for path in model_files(index.folder):
        copy_small_file(path, folder / path.relative_to(index.folder))
    # The shards were compared one by one; this also covers config.json and a shard replaced after its turn.
    now = open_checkpoint(index.folder)
    if now.identity() != index.identity() or now.shards != index.shards:
        raise FailedError(
            f"{index.folder}: changed while it was copied. Stop what writes to it and run the command again."
        )
    if (index.folder / INDEX_NAME).exists():
        copy_small_file(index.folder / INDEX_NAME, folder / INDEX_NAME)
    return RewriteStats(
        bytes_written=sum(part.bytes_written for part in parts),
        bytes_cloned=sum(part.bytes_cloned for part in parts),
        bytes_copied=sum(part.bytes_copied for part in parts),
        bytes_linked=sum(part.bytes_linked for part in parts),
        not_linked=next((part.not_linked for part in parts if part.not_linked), ""),
    )


def space_needed(
    index: CheckpointIndex, changed: Iterable[str], target: Path, hard_links: bool = False
) -> int:
    """Bytes that `rewrite_checkpoint` needs free where `target` will be: those of the changed tensors where
    extents can be shared, of the shards that hold them with hard links, of all shards otherwise.
    """
    names = set(changed)
    existing = Path(os.path.abspath(target))
    while not existing.exists():
        existing = existing.parent
    paths = [index.folder / info.name for info in index.shards.values()]
    if existing.is_dir() and shares_extents(paths[0], existing):
        return index.bytes_of(names) + 2 * _BLOCK_BYTES * len(names)  # a range's first and last block are whole
    device = existing.stat().st_dev
    if hard_links and all(path.exists() and path.stat().st_dev == device for path in paths):
        return sum(index.shards[shard].size for shard in {index.entry(name).shard for name in names})
    return sum(info.size for info in index.shards.values())


@dataclass(frozen=True)
class _Job:
    index: CheckpointIndex
    changed: Mapping[str, Pieces]
    folder: Path
    report: Callable[[int], None]
    hard_links: bool
    check_finite: bool


def _check_fits(entry: TensorEntry, tensor: Pieces, folder: Path) -> None:
    where = f"{folder / entry.shard}: tensor {entry.name!r}"
    if tuple(tensor.shape) != entry.shape:
        raise UsageError(f"{where} has shape {entry.shape} in the checkpoint, not {tuple(tensor.shape)}.")
    on_disk = entry.torch_dtype
    if tensor.dtype != on_disk and not (tensor.dtype.is_floating_point and on_disk.is_floating_point):
        raise UsageError(f"{where} is {on_disk} in the checkpoint, not {tensor.dtype}: only floats are cast.")


def _rewrite_shard(job: _Job, info: ShardInfo, entries: list[TensorEntry], dir_fd: int) -> RewriteStats:
    """entries: the changed tensors of this shard, in file order."""
    index = job.index
    path, where = job.folder / info.name, str(index.folder / info.name)
    declined = ""
    source_fd = open_shard(info, dir_fd, index.folder)
    try:
        check_unchanged(source_fd, info, index.folder, "after the checkpoint was opened")
        if job.hard_links and not entries:
            declined = link_file(source_fd, where, path)
            if not declined:
                check_unchanged(source_fd, info, index.folder, "while it was linked")
                job.report(info.size)
                return RewriteStats(0, 0, bytes_linked=info.size)
        target_fd = create_file(path)
        try:
            clone = Clone(source_fd, target_fd, where, path, info.size, job.report)
            shared = clone_except(clone, [(entry.begin, entry.end) for entry in entries])
            for entry in entries:
                _write_tensor(entry, job.changed[entry.name], clone, job.check_finite)
        finally:
            os.close(target_fd)
        check_unchanged(source_fd, info, index.folder, "while it was copied")
    finally:
        os.close(source_fd)
    written = sum(entry.nbytes for entry in entries)
    rest = info.size - written
    return RewriteStats(written, rest if shared else 0, 0 if shared else rest, not_linked=declined)


def _write_tensor(entry: TensorEntry, tensor: Pieces, clone: Clone, check_finite: bool) -> None:
    """Cast one tensor piece by piece into the ring, check it there, and write it at its place in the shard.

    While one slot is written the next is cast.
    """
    total, width = math.prod(entry.shape), entry.torch_dtype.itemsize
    step = min(PIECE_ITEMS, RING_SLOT_BYTES // width)
    with borrowed(RING_SLOTS, RING_SLOT_BYTES, RING_THREADS) as mover:
        writing: deque[tuple[int, Slot]] = deque()
        slot: Slot | None = None  # the one being cast into
        try:
            for first in range(0, total, step):
                while (slot := mover.acquire()) is None:
                    _written(mover, writing, clone)
                count = min(step, total - first)
                piece = slot.memory[: count * width].view(entry.torch_dtype)
                before = tensor.piece(first, count)
                piece.copy_(before)
                if check_finite:
                    _require_finite(piece, before, first, total, entry, clone.target)
                offset = entry.begin + first * width
                writing.append((mover.store(slot, clone.target_fd, offset, count * width), slot))
                slot = None
            while writing:
                _written(mover, writing, clone)
        finally:
            mover.drain()
            for left in [slot, *(slot for _, slot in writing)]:
                if left is not None:
                    mover.release(left)


def _written(mover: Mover, writing: deque[tuple[int, Slot]], clone: Clone) -> None:
    """Wait for the oldest piece and give its slot back."""
    number, slot = writing[0]
    try:
        clone.report(mover.wait(number).transferred)
    except TransferError as error:
        cause = OSError(error.error, os.strerror(error.error))
        raise io_failure(cause, clone.target, clone.size, "write") from error
    writing.popleft()
    mover.release(slot)


def _require_finite(piece: Tensor, before: Tensor, first: int, total: int, entry: TensorEntry, target: Path) -> None:
    """After the cast, so that a value too large for fp16 is found as well; the 8-bit floats have no test."""
    if not piece.is_floating_point():
        return
    finite = torch.isfinite(piece if piece.itemsize > 1 else piece.float())
    if not bool(finite.all()):
        bad = int(torch.argmin(finite.to(torch.uint8)))
        raise FailedError(
            f"{target}: tensor {entry.name!r}: {before[bad].item()} at position {first + bad} of {total} is not finite "
            f"as {entry.dtype}. Such weights are never written: look for the step where the training broke."
        )
