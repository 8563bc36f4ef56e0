"""Outputs that are absent, or complete and verifiable: whatever kills the process, at whatever moment.

A folder is built under a temporary name beside its target, every file is synced and hashed, COMMIT.json is
written last, and one rename that cannot replace anything makes it visible. The lock (flock on the temporary
folder itself) dies with its process, so the next writer for the same target can tell a leftover from a
neighbour at work.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elo_engine.checkpoint.commit import COMMIT_NAME, sync_folder, write_commit
from elo_engine.checkpoint.syscalls import SYSCALLS, free_bytes, io_failure
from elo_engine.errors import FailedError, RefusedError, UsageError


@contextmanager
def publish(target: Path, extra: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill; on a clean exit it becomes `target`, otherwise it is removed.

    extra: JSON values for COMMIT.json, looked at on exit, so the body may still add to it. Parents of
    `target` are made. Raises RefusedError when `target` exists (before the body, or because another writer
    was faster), FailedError on I/O errors and a full disk. After a FailedError from the last step, the sync
    of the parent folder, `target` is complete.
    """
    target = Path(os.path.abspath(target))
    if not target.name:
        raise UsageError(f"{target} cannot be an output folder: give a folder that does not exist yet.")
    refuse_existing(target)
    made = make_parents(target.parent)
    temporary: Path | None = None
    lock = -1
    renamed = False
    try:
        _remove_stale(target)
        temporary, lock = _locked_folder(target)
        yield temporary
        write_commit(temporary, extra if extra is not None else {})
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
                f"{target}: is complete, but the disk did not confirm that it would survive a power loss: "
                f"{error}. Check the disk, then the output with its {COMMIT_NAME}."
            ) from error
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else target
        raise io_failure(
            error, path, None, f"nothing was published as {target}: an operation on it"
        ) from error
    finally:
        if not renamed:
            _discard(temporary, made)
        if lock >= 0:
            os.close(lock)


def refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise RefusedError(
            f"{target}: the output exists, and nothing is ever written over. Move it away or choose another."
        )


def make_parents(parent: Path) -> list[Path]:
    """Create the missing parents; returns them innermost first, to be removed if no output comes about."""
    missing = []
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = parent.parent
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        _discard(None, missing)
        raise io_failure(error, folder, None, "creating the folder") from error
    return missing


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A fresh folder beside the target, and the descriptor that holds its lock."""
    for _ in range(100):
        path = target.parent / f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            path.mkdir()  # the umask's mode, which the output keeps
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileExistsError:
            continue
        except FileNotFoundError:  # another writer took it for a leftover between the two calls
            continue
        except OSError as error:
            raise io_failure(error, path, None, "creating the temporary folder") from error
        if try_lock(fd) is not False and os.fstat(fd).st_nlink > 0 and path.exists():
            return path, fd
        os.close(fd)
    raise FailedError(
        f"{target}: no temporary folder beside it could be locked. Is another program deleting them?"
    )


def try_lock(fd: int) -> bool | None:
    """True when locked, False when somebody else holds it, None where the filesystem has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_stale(target: Path) -> None:
    """Remove temporary folders that dead writers left for this very target, and no other folder."""
    remove_leftovers(target.parent, re.escape(target.name))


def remove_leftovers(parent: Path, names: str) -> None:
    """Remove the temporary folders that dead writers left in `parent` for targets whose names match this regular
    expression, and no other folder.
    """
    ours = re.compile(rf"\.(?:{names})\.tmp-[0-9]+-[0-9a-f]{{8}}")
    for name in os.listdir(parent):
        path = parent / name
        if not ours.fullmatch(name):
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # a file or a link is not a writer's folder, and a vanished one needs no removal
            continue
        try:
            if os.fstat(fd).st_uid == os.geteuid() and try_lock(fd) is True:
                shutil.rmtree(path)
        except OSError as error:
            warnings.warn(
                f"{path}: a leftover of an interrupted run could not be removed: {error}", stacklevel=2
            )
        finally:
            os.close(fd)


def _discard(temporary: Path | None, made: list[Path]) -> None:
    try:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)
    except OSError as error:  # the error that led here matters more; the next run tries again
        warnings.warn(f"{temporary}: the temporary folder could not be removed: {error}", stacklevel=2)
    for parent in made:
        with suppress(OSError):  # something else lives there by now
            parent.rmdir()


def preflight_space(target: Path, need_bytes: int) -> None:
    """RefusedError, with the numbers, unless `need_bytes` are free where `target` will be."""
    free = free_bytes(target)
    if need_bytes > free:
        raise RefusedError(
            f"{target}: {need_bytes} bytes ({need_bytes / 1e9:.2f} GB) are needed and {free} "
            f"({free / 1e9:.2f} GB) are free. Free some space or choose an output on another disk."
        )
