"""Writes weights: small new files, and a changed copy of a whole checkpoint.

A changed tensor keeps its dtype and shape, so a changed shard keeps its header and layout: clone the shard,
write the changed ranges. Nothing here makes an output visible or durable, that is the part of `publish`:

    with publish(target, extra={"source": index.identity()}) as folder:
        rewrite_checkpoint(index, trained, folder)
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from elo_engine.checkpoint.clone import Clone, clone_except, copy_small_file
from elo_engine.checkpoint.commit import create_file, verify_commit
from elo_engine.checkpoint.header import TensorEntry
from elo_engine.checkpoint.hub import model_files
from elo_engine.checkpoint.index import (
    INDEX_NAME,
    CheckpointIndex,
    ShardInfo,
    check_unchanged,
    open_checkpoint,
)
from elo_engine.checkpoint.publish import preflight_space, publish
from elo_engine.checkpoint.syscalls import SYSCALLS, io_failure, open_folder, open_regular, write_all
from elo_engine.errors import FailedError, RefusedError, UsageError

__all__ = [
    "SYSCALLS",
    "RewriteStats",
    "preflight_space",
    "publish",
    "rewrite_checkpoint",
    "verify_commit",
    "write_safetensors",
]

_CAST_ITEMS = 4 << 20  # elements cast at once: bounds the extra memory to a few times 16 MiB
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RewriteStats:
    """Bytes of the output's shards: `bytes_written` from changed tensors, `bytes_cloned` from the source."""

    bytes_written: int
    bytes_cloned: int


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
    """Contiguous CPU tensors that share no memory, as the serialiser wants; copies only where it must."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        out[name] = plain
    return out


def rewrite_checkpoint(
    index: CheckpointIndex, changed: dict[str, Tensor], folder: Path, progress: Progress | None = None
) -> RewriteStats:
    """Write the checkpoint of `index`, with `changed` in place of its own tensors, into the existing
    `folder`.

    changed: {name: tensor of the checkpoint's shape}, any device, cast to the checkpoint's dtype. Everything
    else is the source's bytes; without a change the weights are byte-identical. Model files travel byte for
    byte, the index file is written last. progress(done, total) counts bytes of the shards. The source is only
    read.

    Raises UsageError (unknown tensor, other shape, other kind of dtype), RefusedError (`folder` lies in the
    source, a file exists), FailedError (a non-finite value, a source that changed meanwhile, I/O errors).
    """
    folder = Path(folder)
    source, target = index.folder.resolve(), folder.resolve()
    if target == source or source in target.parents:
        raise RefusedError(f"{folder}: lies in its source {index.folder}. Choose an output outside of it.")
    for name, tensor in changed.items():
        _check_fits(index.entry(name), tensor, index.folder)
    written = index.bytes_of(changed)
    total = sum(info.size for info in index.shards.values())
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    with open_folder(index.folder) as dir_fd:
        for info in index.shards.values():
            _rewrite_shard(index, info, changed, folder, dir_fd, report)
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
    return RewriteStats(bytes_written=written, bytes_cloned=total - written)


def _check_fits(entry: TensorEntry, tensor: Tensor, folder: Path) -> None:
    where = f"{folder / entry.shard}: tensor {entry.name!r}"
    if tuple(tensor.shape) != entry.shape:
        raise UsageError(f"{where} has shape {entry.shape} in the checkpoint, not {tuple(tensor.shape)}.")
    on_disk = entry.torch_dtype
    if tensor.dtype != on_disk and not (tensor.dtype.is_floating_point and on_disk.is_floating_point):
        raise UsageError(f"{where} is {on_disk} in the checkpoint, not {tensor.dtype}: only floats are cast.")


def _rewrite_shard(
    index: CheckpointIndex,
    info: ShardInfo,
    changed: dict[str, Tensor],
    folder: Path,
    dir_fd: int,
    report: Callable[[int], None],
) -> None:
    entries = [e for e in index.entries.values() if e.shard == info.name and e.name in changed]
    path, where = folder / info.name, str(index.folder / info.name)
    try:
        source_fd = open_regular(info.name, dir_fd, where)
    except FileNotFoundError:
        raise FailedError(f"{where}: has gone since the checkpoint was opened. Fetch it again.") from None
    try:
        check_unchanged(source_fd, info, index.folder, "after the checkpoint was opened")
        target_fd = create_file(path)
        try:
            clone = Clone(source_fd, target_fd, where, path, info.size, report)
            clone_except(clone, [(entry.begin, entry.end) for entry in entries])
            for entry in entries:
                _write_tensor(entry, changed[entry.name], clone)
        finally:
            os.close(target_fd)
        check_unchanged(source_fd, info, index.folder, "while it was copied")
    finally:
        os.close(source_fd)


def _write_tensor(entry: TensorEntry, tensor: Tensor, clone: Clone) -> None:
    """Cast, check and write one tensor piece by piece at its place in the shard."""
    flat = tensor.detach().reshape(-1)
    os.lseek(clone.target_fd, entry.begin, os.SEEK_SET)
    for first in range(0, flat.numel(), _CAST_ITEMS):
        before = flat[first : first + _CAST_ITEMS].to("cpu")
        piece = before.to(entry.torch_dtype).contiguous()
        if piece.is_floating_point():
            # After the cast, so that a value too large for fp16 is found as well; the 8-bit floats have no
            # test.
            finite = torch.isfinite(piece if piece.itemsize > 1 else piece.float())
            if not bool(finite.all()):
                bad = int(torch.argmin(finite.to(torch.uint8)))
                raise FailedError(
                    f"{clone.target}: tensor {entry.name!r}: {before[bad].item()} at position {first + bad} "
                    f"of {flat.numel()} is not finite as {entry.dtype}. Such weights are never written: look "
                    "for the step where the training broke."
                )
        write_all(clone.target_fd, piece.view(torch.uint8).numpy().data, clone.target, clone.size)
        clone.report(piece.numel() * piece.itemsize)
