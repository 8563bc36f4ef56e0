"""What a person sees: lines, tables and progress bars with ETA. Everything goes to standard error but results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)
PLAIN_INTERVAL_S = 15.0  # where no bar can be drawn (a log file, CI), a line this often says that work goes on


def format_seconds(seconds: float) -> str:
    """75 -> '1m15s'."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@contextmanager
def progress_bar(title: str, total: int, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields `update(done, note)`; a bar with ETA on a terminal, occasional lines with ETA elsewhere."""
    if err.quiet:
        yield _nothing
        return
    if not err.is_terminal:
        yield _plain(title, total, start)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=start, note="")

        def update(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield update


@contextmanager
def bytes_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields `update(done, total)` in bytes: a bar in MB with the rate.

    Another total begins another bar, as when a part of the bytes has to be fetched before it is read.
    """
    with ExitStack() as stack:
        bar, of, began = (lambda done, note: None), -1, 0.0

        def update(done: int, total: int) -> None:
            nonlocal bar, of, began
            if total != of:
                stack.close()
                bar, of, began = (
                    stack.enter_context(progress_bar(f"{title} (MB)", total // 10**6)),
                    total,
                    time.monotonic(),
                )
            seconds = time.monotonic() - began
            bar(done // 10**6, f"{done / 1e9 / seconds:.2f} GB/s" if seconds > 0 else "")

        yield update


def _nothing(done: int, note: str = "") -> None:
    """Where nothing is to be seen."""


def _plain(title: str, total: int, start: int) -> Callable[[int, str], None]:
    began = last = time.monotonic()

    def update(done: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done <= start or (now - last < PLAIN_INTERVAL_S):
            return
        last = now
        eta = (now - began) / (done - start) * (total - done)
        print(f"{title} {done}/{total} eta {format_seconds(eta)} {note}".rstrip(), file=sys.stderr, flush=True)

    return update
