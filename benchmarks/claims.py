"""Who does what, where several processes share work: a file that only one of them can make."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def take_claim(path: Path) -> bool:
    """Whether this process now has the claim; that of a process of this machine that is gone is taken over."""
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{os.uname().nodename} {os.getpid()}\n")
            return True
        except FileExistsError:
            host, _, process = _read_claim(path).partition(" ")
            if host != os.uname().nodename or not process or _alive(int(process)):
                return False
            with suppress(FileNotFoundError):
                path.unlink()
    return False


def _read_claim(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
