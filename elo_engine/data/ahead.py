"""The rows of the next step, read while this one is made."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from elo_engine.data.mixture import Mixture
from elo_engine.data.rows import RowBatch


class RowsAhead:
    """Rows of a mixture, by one thread of its own; what was not expected is read when it is asked for.

    Costs the rows of one step more in host memory: 24 bytes a token. To be closed by its block, after which no thread
    reads any more.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._thread = ThreadPoolExecutor(1, "rows")
        self._coming: tuple[tuple[int, int], Future[RowBatch]] | None = None

    def expect(self, first_row: int, count: int) -> None:
        """Begin to read rows that will be asked for next."""
        self._coming = (first_row, count), self._thread.submit(self._mixture.rows, first_row, count)

    def rows(self, first_row: int, count: int) -> RowBatch:
        """As `Mixture.rows`, and raises as that does."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == (first_row, count):
            return coming[1].result()
        return self._mixture.rows(first_row, count)

    def __enter__(self) -> RowsAhead:
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
