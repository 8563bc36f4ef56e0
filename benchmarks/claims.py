"""Who does what, where several processes share work: a file that only one of them can make."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """One process at a time, by a lock on this file."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def take_claim(path: Path) -> bool:
    """Whether this process now has the claim; that of a process of this machine that is gone is taken over, as one that
    was cut while it was written.
    """
    with only_one(path.parent / ".claims.lock"):
        try:
            host, _, process = path.read_text(encoding="utf-8").strip().partition(" ")
        except FileNotFoundError:
            host = process = ""
        if process and (host != os.uname().nodename or _alive(int(process))):
            return False
        path.write_text(f"{os.uname().nodename} {os.getpid()}\n", encoding="utf-8")
        return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
