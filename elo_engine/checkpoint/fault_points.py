"""Faults at exact system calls of any `elo` process, asked for by the environment: for trying out what a disk that
fails, or a process that dies, does to a setting of one's own. docs/reliability.md shows how.

`ELO_FAULT=CALL:NTH:WHAT[,CALL:NTH:WHAT...]`. CALL: a name of the table `SYSCALLS` (pread, pwrite, write, fsync, rename,
ficlone, copy_range), or `native`: a read or write of csrc's table. NTH: counted from 1; `*`: each one. WHAT: `KILL`
(SIGKILL), `SHORT` (one byte is moved; pread, pwrite, write, native), or the name of an errno such as ENOSPC or EIO.
Where the variable is not set, nothing is looked up, wrapped or counted.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from elo_engine.errors import UsageError

VARIABLE = "ELO_FAULT"
_SHORT = ("pread", "pwrite", "write")
_NO_LIMIT = 2**62


class Point(NamedTuple):
    """One fault. nth: 0 is every call."""

    call: str
    nth: int
    what: str


def parse(text: str, calls: tuple[str, ...]) -> list[Point]:
    """The faults of the variable's text. Raises UsageError: what cannot be read, with what could be."""
    points = []
    for part in text.split(","):
        fields = part.strip().split(":")
        if len(fields) != 3 or fields[0] not in (*calls, "native"):
            raise UsageError(
                f"{VARIABLE}={text}: {part!r} is not CALL:NTH:WHAT with CALL one of {', '.join(calls)}, native"
            )
        call, nth, what = fields
        if nth != "*" and not (nth.isascii() and nth.isdigit() and int(nth) > 0):
            raise UsageError(f"{VARIABLE}={text}: {nth!r} is no number of a call; count from 1, or use * for each one")
        if what == "SHORT" and call not in (*_SHORT, "native"):
            raise UsageError(f"{VARIABLE}={text}: {call} moves no bytes, so it cannot be SHORT")
        if what not in ("KILL", "SHORT") and what not in errno.errorcode.values():
            raise UsageError(f"{VARIABLE}={text}: {what!r} is neither KILL, SHORT nor an errno such as ENOSPC")
        points.append(Point(call, 0 if nth == "*" else int(nth), what))
    return points


def arm(table: Any, text: str) -> tuple[tuple[int, int, int], ...]:
    """Put the faults into a table of Python's calls; returns those for csrc's table: (call from 0 or -1, errno or
    negative signal, bytes at most).
    """
    points = parse(text, tuple(table.__slots__))
    for call in {point.call for point in points} - {"native"}:
        mine = [point for point in points if point.call == call]
        setattr(table, call, _faulty(call, getattr(table, call), mine))
    return tuple(
        (
            point.nth - 1,
            {"KILL": -signal.SIGKILL, "SHORT": 0}.get(point.what, getattr(errno, point.what, 0)),
            1 if point.what == "SHORT" else _NO_LIMIT,
        )
        for point in points
        if point.call == "native"
    )


def _faulty(call: str, plain: Callable[..., Any], points: list[Point]) -> Callable[..., Any]:
    count = 0

    def faulty(*args: Any) -> Any:
        nonlocal count
        count += 1
        for point in points:
            if point.nth not in (0, count):
                continue
            if point.what == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            elif point.what == "SHORT":
                args = (args[0], args[1][:1], *args[2:])
            else:
                number = getattr(errno, point.what)
                raise OSError(number, os.strerror(number))
        return plain(*args)

    return faulty
