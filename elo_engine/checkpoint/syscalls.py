"""The few system calls that move checkpoint bytes, in one table, and the loops that use them correctly.

Everything in `checkpoint/` reads, writes, syncs, clones and renames through `SYSCALLS`, looked up at the time
of the call, so that a test can put a short read, a full disk or a kill at an exact place
(`monkeypatch.setattr(SYSCALLS, "fsync", ...)`) while the rest stays the real thing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elo_engine.checkpoint.fault_points import VARIABLE, arm
from elo_engine.errors import FailedError, UsageError

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int); shares the extents on XFS, Btrfs, bcachefs
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_DESCRIPTOR = {
    errno.EMFILE: "This process may not open more files: raise `ulimit -n`, then run the command again.",
    errno.ENFILE: "The whole system may not open more files: raise `ulimit -n` and fs.file-max, or close other "
    "programs, then run the command again.",
}


def _pread(fd: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(fd, [buffer], offset)


def _pwrite(fd: int, buffer: memoryview, offset: int) -> int:
    return os.pwritev(fd, [buffer], offset)


def _ficlone(source_fd: int, target_fd: int) -> None:
    fcntl.ioctl(target_fd, _FICLONE, source_fd)


def _copy_range(source_fd: int, target_fd: int, count: int, offset: int) -> int:
    """Copy inside the kernel, to the same offset; ENOSYS where the platform has no such call."""
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.copy_file_range(source_fd, target_fd, count, offset, offset)


def _rename_without_replacing(source: str, target: str) -> None:
    """Rename, or FileExistsError when the target exists: one atomic step where the system has renameat2."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):  # some network filesystems do not know the flag
            raise OSError(code, os.strerror(code), source, None, target)
    # Check, then rename: the window between the two is the price of a filesystem without the flag. A folder
    # that appears in it is replaced only if it is empty; the kernel refuses otherwise.
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), source, None, target)
    os.rename(source, target)


@dataclass(slots=True)
class Syscalls:
    """The table. `slots` makes a misspelt replacement an AttributeError instead of a test that injects
    nothing.
    """

    pread: Callable[[int, memoryview, int], int] = _pread
    pwrite: Callable[[int, memoryview, int], int] = _pwrite
    write: Callable[[int, memoryview], int] = os.write
    fsync: Callable[[int], None] = os.fsync
    rename: Callable[[str, str], None] = _rename_without_replacing
    ficlone: Callable[[int, int], None] = _ficlone
    copy_range: Callable[[int, int, int, int], int] = _copy_range


SYSCALLS = Syscalls()
NATIVE_FAULTS = arm(SYSCALLS, os.environ[VARIABLE]) if VARIABLE in os.environ else ()  # nothing is wrapped otherwise


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """A descriptor of the folder, closed at the end; UsageError when there is no such folder."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UsageError(f"{folder}: no such folder. Check the path to the model.") from None
    except NotADirectoryError:
        raise UsageError(
            f"{folder}: not a folder. Give the folder that holds config.json and the weights."
        ) from None
    except OSError as error:
        raise _cannot_open(str(folder), error, "Check its permissions.") from error
    try:
        yield fd
    finally:
        os.close(fd)


def open_regular(name: str, dir_fd: int | None, where: str) -> int:
    """Descriptor of a regular file, read-only; symbolic links are followed (hub caches consist of them).

    Raises FileNotFoundError as it is (the caller knows what a missing file means) and FailedError for
    everything that is not a regular file. O_NONBLOCK is why opening a FIFO without a writer does not wait for
    ever.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=dir_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _cannot_open(where, error, "Check its permissions and links.") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kinds = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISDIR, "a folder"), (stat.S_ISCHR, "a device"))
        kind = next((label for test, label in kinds if test(mode)), "a special file")
        raise FailedError(f"{where}: is {kind}, not a regular file. Replace it by the real file.")
    return fd


def _cannot_open(where: str, error: OSError, advice: str) -> FailedError:
    """`advice` is for errors of the file; a lack of descriptors is none, and has its own."""
    return FailedError(
        f"{where}: cannot be opened: {error.strerror}. {_NO_DESCRIPTOR.get(error.errno or 0, advice)}"
    )


def read_exactly(fd: int, buffer: memoryview, offset: int, where: str) -> None:
    """Fill `buffer` from `offset`; short reads and EINTR are continued, an early end of file is a
    FailedError.
    """
    done = 0
    while done < len(buffer):
        try:
            count = SYSCALLS.pread(fd, buffer[done:], offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            raise FailedError(
                f"{where}: reading {len(buffer)} bytes at offset {offset} failed at offset {offset + done}: "
                f"{error.strerror}. Check the disk, then fetch the file again."
            ) from error
        if count <= 0:
            raise FailedError(
                f"{where}: truncated: the file ends at byte {offset + done}, bytes up to "
                f"{offset + len(buffer)} were wanted. Somebody shortened it after it was opened, or it is "
                "damaged: fetch it again."
            )
        done += count


def write_all(fd: int, data: bytes | memoryview, path: Path, need_bytes: int | None = None) -> None:
    """Write every byte at the descriptor's position; a full disk names the file and `need_bytes` (default:
    the data).
    """
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        try:
            done += SYSCALLS.write(fd, view[done:])
        except InterruptedError:
            continue
        except OSError as error:
            raise io_failure(error, path, len(view) if need_bytes is None else need_bytes, "write") from error


def io_failure(error: OSError, path: Path, need_bytes: int | None, verb: str) -> FailedError:
    """What a failed write means to the person who started it; `need_bytes` None where it is not known."""
    if error.errno in NO_SPACE:
        needed = "" if need_bytes is None else f"{need_bytes} bytes are needed and "
        return FailedError(
            f"{path}: no space left on the device: {needed}{free_bytes(path)} bytes are free. Free some "
            "space or choose an output on another disk, then run the command again."
        )
    return FailedError(
        f"{path}: {verb} failed: {error.strerror or error}. Check the disk and the folder's permissions."
    )


def free_bytes(path: Path) -> int:
    """Bytes an unprivileged user may still write where `path` is or will be."""
    existing = Path(os.path.abspath(path))
    while not existing.exists():
        existing = existing.parent
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize
