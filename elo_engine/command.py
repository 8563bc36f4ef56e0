"""What every command of the command line shares: typed errors become one message and an exit status."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import typer

from elo_engine import console
from elo_engine.errors import EloError, Elsewhere

LESS_MEMORY = "a smaller micro_batch, recompute: selective or layer, or a shorter data.sequence_length need less"


GRACE_S = 5.0  # for which more signals do not disturb the cleaning up after the first


class _Unwinding:
    """SIGINT and SIGTERM outside the training loop (loading, evaluation, writing): both unwind, so that nothing is left
    behind. Another one within GRACE_S would cut that short and is let pass; a later one unwinds again.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if now - self._last >= GRACE_S:
            self._last = now
            raise KeyboardInterrupt


def verb(body: Callable[..., None]) -> Callable[..., None]:
    """Turn typed errors into one message and the right exit status."""

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> None:
        handler = _Unwinding()
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            body(*args, **kwargs)
        except EloError as error:
            console.err.quiet = isinstance(error, Elsewhere)  # that was said by whom it happened to
            console.err.print(f"error: {error}", markup=False)
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt:
            console.err.print("interrupted", markup=False)
            raise typer.Exit(130) from None
        except (MemoryError, RuntimeError) as error:
            text = str(error).lower()
            if not isinstance(error, MemoryError) and "out of memory" not in text and "allocate memory" not in text:
                raise
            console.err.print(f"error: out of memory: {str(error).split(chr(10))[0]}; {LESS_MEMORY}", markup=False)
            raise typer.Exit(1) from None
        except OSError as error:
            console.err.print(
                f"error: {error.strerror or error}: {error.filename or 'input or output failed'}", markup=False
            )
            raise typer.Exit(1) from None
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    return run
