"""Copies of source files: shared extents, else a copy inside the kernel, else through a buffer.

Hard links are no clone: a program that truncates and rewrites the copy would destroy the source with it.
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


def clone_except(clone: Clone, replaced: list[tuple[int, int]]) -> None:
    """Give the target the source's bytes, except for the `replaced` ranges (sorted [begin, end) offsets).

    Those are the caller's to write. Where extents can be shared the whole file is, because that costs
    nothing.
    """
    try:
        SYSCALLS.ficlone(clone.source_fd, clone.target_fd)
    except OSError as error:
        if error.errno in _HARD_ERRORS:
            raise io_failure(error, clone.target, clone.size, "cloning the source") from error
    else:
        clone.report(clone.size - sum(end - begin for begin, end in replaced))
        return
    position = 0
    for begin, end in [*replaced, (clone.size, clone.size)]:
        _copy_range(clone, position, begin)
        position = end


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
