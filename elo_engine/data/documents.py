"""Input files to documents, one at a time: text, JSON lines, parquet.

Every reader streams, and every document carries the position after it, so that an interrupted run continues
there. Text reaches the tokenizer as it stands in the file: no newline translation and no Unicode
normalisation; only a byte-order mark and the line ends around a `.txt` document are taken off, because they
belong to the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from elo_engine.data import parquet
from elo_engine.errors import FailedError, UsageError

# One document is tokenised in one piece (cutting it would change the tokens at the cut), and while that lasts
# the tokenizer holds some 200 bytes for each token (tokenizers 0.23), 0.8 GB for 16 MiB of four bytes a token.
# No single work of literature is this long; a corpus in one file is.
MAX_DOCUMENT_BYTES = 16 << 20
# JSON may escape each UTF-16 unit as \uXXXX, twice the bytes of CJK text, and lines carry other fields beside
# the text.
MAX_LINE_BYTES = 4 * MAX_DOCUMENT_BYTES

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_KINDS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


class Document(NamedTuple):
    """One text with its UTF-8 length, and the reading position behind it.

    `offset` counts bytes, or rows of a parquet file; `line` is the number of the last line read. `loss`: of a
    conversation, the stretches [begin, end) of characters whose tokens carry a loss; None: all do.
    """

    text: str
    utf8_bytes: int
    offset: int
    line: int
    loss: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class InputFile:
    """A checked input: its content's hash, and the stat fields that show whether it changed meanwhile.

    `units` is the largest offset that a Document of this file can carry: its bytes, or the rows of a parquet
    file.
    """

    path: Path
    kind: str
    size: int
    units: int
    mtime_ns: int
    inode: int
    sha256: str

    def check_unchanged(self) -> None:
        """Raise FailedError when the file is no longer the one that was hashed."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise FailedError(
                f"{self.path}: vanished while it was being tokenised ({error.strerror}); restore it"
            ) from None
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (self.size, self.mtime_ns, self.inode):
            raise FailedError(
                f"{self.path}: changed while it was being tokenised, so the tokens would mix two versions; "
                "run the command again once nothing writes to the file"
            )


def inspect_inputs(paths: list[Path], text_field: str) -> list[InputFile]:
    """Check every input before the first is tokenised, and hash it: a restart recognises inputs by content.

    Raises UsageError (no inputs, no such file, a folder or device, an unknown suffix, an empty file, a file
    given twice, parquet without pyarrow or without the column) and FailedError (damaged parquet, I/O errors).
    """
    if not paths:
        raise UsageError("no input files were given; name at least one .txt, .jsonl or .parquet file")
    seen: set[Path] = set()
    for path in paths:
        try:
            info = path.stat()
        except OSError as error:
            raise UsageError(f"{path}: cannot be read as input ({error.strerror}); check the path") from None
        if not stat.S_ISREG(info.st_mode):
            raise UsageError(f"{path}: not a regular file; name the files themselves, for example {path}/*.jsonl")
        if path.suffix.lower() not in _KINDS:
            known = ", ".join(sorted(_KINDS))
            raise UsageError(f"{path}: unknown kind of input {path.suffix!r}; known suffixes are {known}")
        if info.st_size == 0:
            raise UsageError(f"{path}: the file is empty; leave it out or give a file with text")
        if path.resolve() in seen:
            raise UsageError(f"{path}: given twice; its text would count double, so name each file once")
        seen.add(path.resolve())
    return [_inspect(path, text_field) for path in paths]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailedError(
            f"{path}: cannot be read ({error.strerror or error}); check its mode and the device it is on"
        ) from error


def _inspect(path: Path, text_field: str) -> InputFile:
    kind = _KINDS[path.suffix.lower()]
    rows = parquet.count_rows(path, text_field) if kind == "parquet" else None
    digest = hashlib.sha256()
    with _reading(path), path.open("rb") as file:
        before = os.fstat(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return InputFile(
        path,
        kind,
        before.st_size,
        before.st_size if rows is None else rows,
        before.st_mtime_ns,
        before.st_ino,
        digest.hexdigest(),
    )


def read_documents(
    file: InputFile, *, text_field: str, split_blank_lines: bool, offset: int = 0, line: int = 0
) -> Iterator[Document]:
    """Documents of one file in order, from the position (`offset`, `line`) that an earlier Document carried.

    JSON lines and parquet yield empty texts too (the caller counts them); a `.txt` file never does, since
    blank stretches there are just separators. Raises UsageError (file and line or row) for a record without
    the text field or beyond the size limits, FailedError (file and byte offset) for text that is not UTF-8
    and for damaged parquet.
    """
    if file.kind == "txt":
        return _read_txt(file.path, split_blank_lines, offset, line)
    if file.kind == "jsonl":
        return _read_jsonl(file.path, text_field, offset, line)
    return _read_parquet(file.path, text_field, offset)


def _decode(path: Path, raw: bytes, begin: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = begin + error.start
        raise FailedError(
            f"{path}: byte {at} (0x{raw[error.start]:02x}) is not UTF-8 ({error.reason}); convert the file, "
            "for example with iconv -t UTF-8, or mend the place"
        ) from None


def _too_long(path: Path, where: str, limit: int, what_next: str) -> UsageError:
    return UsageError(
        f"{path}: {where} is longer than {limit >> 20} MiB, which cannot be tokenised in bounded memory; {what_next}"
    )


def _read_txt(path: Path, split_blank_lines: bool, offset: int, line: int) -> Iterator[Document]:
    with _reading(path), path.open("rb") as file:
        if offset == 0 and file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK:
            offset = len(_BYTE_ORDER_MARK)
        file.seek(offset)
        begin, parts, size = offset, [], 0
        while True:
            raw = file.readline(MAX_DOCUMENT_BYTES + 1)
            offset, line = offset + len(raw), line + 1
            ends = not raw or raw.rstrip(b"\r\n") == b"\f" or (split_blank_lines and not raw.strip())
            if not ends:
                parts.append(raw)
                size += len(raw)
                if size > MAX_DOCUMENT_BYTES:
                    raise _too_long(
                        path,
                        f"the document that begins at byte {begin}",
                        MAX_DOCUMENT_BYTES,
                        "separate documents by a line with only a form feed, or pass --split-blank-lines",
                    )
                continue
            text = _decode(path, b"".join(parts), begin).strip("\r\n")
            if text and not text.isspace():
                yield Document(text, len(text.encode()), offset, line)
            if not raw:
                return
            begin, parts, size = offset, [], 0


def _read_jsonl(path: Path, text_field: str, offset: int, line: int) -> Iterator[Document]:
    for record, end, number in read_records(path, offset, line):
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            raise UsageError(f"{path}, line {number}: {_lacks_text(record, text_field)}")
        yield make_document(path, f"line {number}", record[text_field], end, number)


def read_records(path: Path, offset: int, line: int) -> Iterator[tuple[object, int, int]]:
    """(value, offset behind it, number of its line) for each line of JSON from a position on; blank lines are passed
    over. Raises as `read_documents`.
    """
    with _reading(path), path.open("rb") as file:
        if offset == 0 and file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK:
            offset = len(_BYTE_ORDER_MARK)
        file.seek(offset)
        while raw := file.readline(MAX_LINE_BYTES + 1):
            begin, offset, line = offset, offset + len(raw), line + 1
            if len(raw) > MAX_LINE_BYTES:
                raise _too_long(path, f"line {line}", MAX_LINE_BYTES, "split the document")
            if not raw.strip():
                continue
            try:
                record = json.loads(_decode(path, raw, begin))
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"{path}, line {line}: not JSON ({error}); every line must be one JSON object"
                ) from None
            yield record, offset, line


def _lacks_text(record: object, text_field: str) -> str:
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__} where an object with the field {text_field!r} is needed"
    if text_field in record:
        kind = type(record[text_field]).__name__
        return f"the field {text_field!r} is a {kind} and not a string; remove the line or name another field"
    keys = ", ".join(repr(key) for key in list(record)[:10]) or "none"
    return f"no field {text_field!r} (fields here: {keys}); name the field that holds the text"


def make_document(path: Path, where: str, text: str, offset: int, line: int) -> Document:
    """A document of a text that has to be text and within the size limit; UsageError naming file and place."""
    try:
        utf8_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{path}, {where}: character {error.start} of the text is half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}) and stands for no character; mend or remove the record"
        ) from None
    if utf8_bytes > MAX_DOCUMENT_BYTES:
        raise _too_long(path, f"the text in {where}", MAX_DOCUMENT_BYTES, "split the document")
    return Document(text, utf8_bytes, offset, line)


def _read_parquet(path: Path, text_field: str, offset: int) -> Iterator[Document]:
    for row, text in parquet.read_texts(path, text_field, offset):
        yield make_document(path, f"row {row}", text, row, row)
