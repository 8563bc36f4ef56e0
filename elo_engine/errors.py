"""Typed errors and the exit status each one means at the command line.

Every message names what went wrong, where, why, and what to do next. `UsageError` is a `ValueError` too, so that code
which calls the package as a library can catch what it would expect.
"""

from __future__ import annotations

import reprlib

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 80, 80


def shown(value: object) -> str:
    """A foreign value as a message shows it: short, whatever it is. `repr` alone can be endless (lists that share
    parts), and fails for what is nested deeply and for integers of thousands of digits.
    """
    try:
        return _BRIEF.repr(value)
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__} that is too large to show"


class EloError(Exception):
    """Base of every error this package raises on purpose; `exit_status` is what `elo` exits with."""

    exit_status = 1


class FailedError(EloError):
    """Something broke that should have worked: damaged files, I/O errors, non-finite numbers."""

    exit_status = 1


class NonFiniteError(FailedError):
    """The loss or the gradient was no number on the first step, or too many times in a row; no such step was kept. The
    message names the step and the rows and documents it was made of.
    """

    exit_status = 4


class OutOfMemory(FailedError):
    """The device or the host had no memory left, although the plan fitted; the message has the plan against what was
    measured, and what would take less.
    """

    exit_status = 1


class UsageError(EloError, ValueError):
    """The configuration or an argument cannot be meant: no such file, unknown key, out of range, empty text."""

    exit_status = 2


class RefusedError(EloError):
    """Understood but declined: unsupported family, pickle-only weights, an existing output, a plan that does not fit.
    """

    exit_status = 3


class Interrupted(EloError):
    """Stopped by a signal after a clean snapshot."""

    exit_status = 130


class Elsewhere(EloError):
    """Another process of the same run failed and has said so; this one ends with the same exit status, silently."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status
