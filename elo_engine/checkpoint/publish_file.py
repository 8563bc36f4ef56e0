"""One file that is absent or complete: what `publish` does for a folder.

The file is written under a temporary name beside its target and locked, synced, and renamed without replacing
anything. The lock (flock) dies with its process, so the next writer for the same target can tell a leftover from
a neighbour at work.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elo_engine.checkpoint.commit import sync_folder
from elo_engine.checkpoint.publish import make_parents, refuse_existing, try_lock
from elo_engine.checkpoint.syscalls import SYSCALLS, io_failure
from elo_engine.errors import FailedError, UsageError


@contextmanager
def publish_file(target: Path) -> Iterator[tuple[int, Path]]:
    """Yield the descriptor, to write, and the temporary path of a new file with the umask's mode; on a clean exit it
    becomes `target`, otherwise it is removed.

    Parents of `target` are made. Raises RefusedError when `target` exists (before the body, or because another
    writer was faster), FailedError on I/O errors and a full disk. After a FailedError from the last step, the sync
    of the parent folder, `target` is complete.
    """
    target = Path(os.path.abspath(target))
    if not target.name:
        raise UsageError(f"{target} cannot be an output file: give the name of a file that does not exist yet.")
    refuse_existing(target)
    made = make_parents(target.parent)
    temporary: Path | None = None
    fd = -1
    renamed = False
    try:
        _remove_stale(target)
        fd, temporary = _locked_file(target)
        yield fd, temporary
        SYSCALLS.fsync(fd)
        try:
            SYSCALLS.rename(str(temporary), str(target))
        except FileExistsError:
            refuse_existing(target)
            raise
        renamed = True
        for folder in [target.parent, *(parent.parent for parent in made)]:
            sync_folder(folder)
    except OSError as error:
        if renamed:
            raise FailedError(
                f"{target}: is complete, but the disk did not confirm that it would survive a power loss: {error}. "
                "Check the disk, then the file."
            ) from error
        raise io_failure(error, target, None, "nothing was written: an operation on it") from error
    finally:
        if not renamed:
            _discard(temporary, made)
        if fd >= 0:
            os.close(fd)


def _locked_file(target: Path) -> tuple[int, Path]:
    for _ in range(100):
        path = target.parent / f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        except OSError as error:
            raise io_failure(error, path, None, "creating the temporary file") from error
        # Between the two calls another writer may have taken it for a leftover.
        if try_lock(fd) is not False and os.fstat(fd).st_nlink > 0:
            return fd, path
        os.close(fd)
    raise FailedError(f"{target}: no temporary file beside it could be locked. Is another program deleting them?")


def _remove_stale(target: Path) -> None:
    """Remove temporary files that dead writers left for this very target, and nothing else."""
    ours = re.compile(re.escape(f".{target.name}.tmp-") + r"[0-9]+-[0-9a-f]{8}")
    for name in os.listdir(target.parent):
        path = target.parent / name
        if not ours.fullmatch(name):
            continue
        try:  # to write as well: on NFS an exclusive lock needs that
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:  # a link is not a writer's file, and a vanished one needs no removal
            continue
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and try_lock(fd) is True:
                path.unlink()
        except OSError as error:
            warnings.warn(f"{path}: a leftover of an interrupted run could not be removed: {error}", stacklevel=2)
        finally:
            os.close(fd)


def _discard(temporary: Path | None, made: list[Path]) -> None:
    try:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    except OSError as error:  # the error that led here matters more; the next run tries again
        warnings.warn(f"{temporary}: the temporary file could not be removed: {error}", stacklevel=2)
    for parent in made:
        with suppress(OSError):  # something else lives there by now
            parent.rmdir()
