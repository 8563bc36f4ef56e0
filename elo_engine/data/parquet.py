"""Texts of one parquet column, row by row; pyarrow is imported only when a parquet file is given."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elo_engine.errors import FailedError, UsageError

# Small, because pyarrow holds the texts of a whole batch at once.
_BATCH_ROWS = 64


@contextlib.contextmanager
def _opened(path: Path, text_field: str) -> Iterator[Any]:
    """The open ParquetFile, known to have a string column `text_field`."""
    try:
        import pyarrow  # type: ignore[import-untyped,unused-ignore]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise UsageError(
            f"{path}: reading parquet needs pyarrow, which is not installed; run `pip install pyarrow` "
            "or convert the file to .jsonl"
        ) from None
    try:
        # pre_buffer would read a whole row group ahead, and row groups of text are often hundreds of
        # megabytes.
        with ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                names = ", ".join(repr(name) for name in schema.names[:10])
                raise UsageError(f"{path}: no column {text_field!r} (columns: {names}); name the one with the text")
            kind = schema.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UsageError(f"{path}: column {text_field!r} holds {kind}, not strings; name the one with the text")
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise FailedError(f"{path}: damaged or not a parquet file ({error}); fetch or write it again") from error


def count_rows(path: Path, text_field: str) -> int:
    """Rows of the file, from its footer. Raises UsageError (no pyarrow, column or row), FailedError."""
    with _opened(path, text_field) as file:
        rows = int(file.metadata.num_rows)
    if rows == 0:
        raise UsageError(f"{path}: the file has no rows; leave it out or give a file with text")
    return rows


def read_texts(path: Path, text_field: str, first_row: int) -> Iterator[tuple[int, str]]:
    """(row, text) from behind row `first_row` on, rows counted from 1; row groups before it are not read.

    Raises UsageError for a null, FailedError for damaged pages and for text that is not UTF-8.
    """
    with _opened(path, text_field) as file:
        row = 0
        for group in range(file.num_row_groups):
            rows_in_group = file.metadata.row_group(group).num_rows
            if row + rows_in_group <= first_row:
                row += rows_in_group
                continue
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    if row > first_row:
                        yield row, _text(path, text_field, row, value)


def _text(path: Path, text_field: str, row: int, value: Any) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise FailedError(f"{path}, row {row}: byte {error.start} of the text is not UTF-8; mend the row") from None
    if text is None:
        raise UsageError(f"{path}, row {row}: column {text_field!r} is null; remove the row")
    return str(text)
