"""Copies of source files: shared extents, else a copy inside the kernel, else through a buffer.

Hard links are no clone: a program that truncates and rewrites the copy would destroy the source with it. They
are made only where the person asked for them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elo_engine.checkpoint.commit import write_file
from elo_engine.checkpoint.syscalls import (
    NO_SPACE,
    SYSCALLS,
    io_failure,
    open_regular,
    read_exactly,
    write_all,
)
from elo_engine.errors import RefusedError

COPY_BYTES = 16 << 20  # between two reports of progress; also what an interrupt has to wait for
_HARD_ERRORS = (*NO_SPACE, errno.EIO)  # everything else only says that this way of copying does not work here


@dataclass(frozen=True)
class Clone:
    """One file on its way: both descriptors, both names for messages, its size, where to report bytes."""

    source_fd: int
    target_fd: int
    source: str
    target: Path
    size: int
    report: Callable[[int], None]


def link_file(source_fd: int, source: str, target: Path) -> str:
    """Make `target` a hard link to the open source file itself, also where that was opened through a symbolic
    link (a hub cache); returns "" or, when the system declines, why.

    The source keeps its bytes, times, mode and owner, which are the target's as well; its link count grows.
    Raises RefusedError (`target` exists) and FailedError (a full or a broken disk).
    """
    try:
        # /proc names the very file that was opened and checked. Only with a descriptor does os.link call linkat,
        # which follows the name in /proc; the plain link(2) would try to link the symbolic link there.
        os.link(f"/proc/self/fd/{source_fd}", target, src_dir_fd=source_fd, follow_symlinks=True)
    except FileExistsError:
        raise RefusedError(f"{target}: exists, and nothing is ever written over. Choose another name.") from None
    except OSError as error:
        if error.errno in _HARD_ERRORS:
            raise io_failure(error, target, None, "linking the source") from error
        return f"{source}: no hard link to it at {target}: {error.strerror}"
    return ""


def shares_extents(source: Path, folder: Path) -> bool:
    """Whether a file in `folder` could share the source's extents: tried with a file that never has a name."""
    try:
        target_fd = os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):  # not every filesystem has nameless files, nor has every platform
        return False
    try:
        source_fd = open_regular(str(source), None, str(source))
        try:
            SYSCALLS.ficlone(source_fd, target_fd)
        finally:
            os.close(source_fd)
    except OSError:
        return False
    finally:
        os.close(target_fd)
    return True


def clone_except(clone: Clone, replaced: list[tuple[int, int]]) -> bool:
    """Give the target the source's bytes, except for the `replaced` ranges (sorted [begin, end) offsets).

    Those are the caller's to write. Where extents can be shared the whole file is, because that costs
    nothing. Returns whether they are shared.
    """
    try:
        SYSCALLS.ficlone(clone.source_fd, clone.target_fd)
    except OSError as error:
        if error.errno in _HARD_ERRORS:
            raise io_failure(error, clone.target, clone.size, "cloning the source") from error
    else:
        clone.report(clone.size - sum(end - begin for begin, end in replaced))
        return True
    position = 0
    for begin, end in [*replaced, (clone.size, clone.size)]:
        _copy_range(clone, position, begin)
        position = end
    return False


def _copy_range(clone: Clone, begin: int, end: int) -> None:
    """Copy bytes begin..end to the same place: in the kernel, and from where that stops through a buffer."""
    while begin < end:
        count = min(COPY_BYTES, end - begin)
        try:
            count = SYSCALLS.copy_range(clone.source_fd, clone.target_fd, count, begin)
        except OSError as error:
            if error.errno in _HARD_ERRORS:
                raise io_failure(error, clone.target, clone.size, "copying the source") from error
            break  # another filesystem, or one that cannot
        if count <= 0:
            break  # the file's end, or a filesystem that only says so: reading tells which
        begin += count
        clone.report(count)
    buffer = memoryview(bytearray(min(COPY_BYTES, max(end - begin, 0))))
    while begin < end:
        piece = buffer[: end - begin]
        read_exactly(clone.source_fd, piece, begin, clone.source)
        os.lseek(clone.target_fd, begin, os.SEEK_SET)
        write_all(clone.target_fd, piece, clone.target, clone.size)
        begin += len(piece)
        clone.report(len(piece))


def copy_small_file(source: Path, target: Path) -> None:
    """Copy a file byte for byte into a new one, with the umask's mode; makes the target's folder."""
    try:
        fd = open_regular(str(source), None, str(source))
        try:
            data = bytearray(os.fstat(fd).st_size)
            read_exactly(fd, memoryview(data), 0, str(source))
        finally:
            os.close(fd)
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise io_failure(error, target, None, "copying it from the source") from error
    write_file(target, bytes(data))
