"""TokenStore: a token folder (see `manifest`), memory-mapped and checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from elo_engine.data.manifest import (
    Manifest,
    ShardRecord,
    documents_file,
    file_sha256,
    loss_file,
    shard_hashes,
    tokens_file,
)
from elo_engine.errors import FailedError

_DOCUMENT_RECORD_BYTES = 16
# Scanning in pieces keeps the temporary arrays of a check in the processor's cache.
_SCAN_TOKENS = 1 << 20
_MOST_TEXT = 1 << 32  # bytes of one document: above what `elo data` takes, and sums stay inside 64 bits


class TokenStore:
    """A token folder, memory-mapped read-only.

    Opening reads the manifest and the document tables (16 bytes a document) and compares the size of every
    file; it does not touch the tokens. Raises UsageError (not a token folder), FailedError (damaged,
    truncated).

    A folder of conversations has a loss mask beside its tokens (`masked`): `gather_loss` reads it.

    Attributes: `lengths` int64 [documents], tokens of each document; `text_bytes_by_doc` int64 [documents].
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.dtype = np.dtype(self.manifest.recipe.dtype).newbyteorder("<")
        self._shards: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []  # of a masked folder
        self._stats: list[tuple[Path, int, int, int]] = []
        tables = [self._open_shard(number, record) for number, record in enumerate(self.manifest.shards)]
        self.lengths = np.concatenate([np.diff(table[:, 0], prepend=0) for table in tables])
        self.text_bytes_by_doc = np.concatenate([table[:, 1] for table in tables])
        self._begins = np.concatenate([table[:, 0] for table in tables]) - self.lengths
        counts = np.array([len(table) for table in tables], dtype=np.int64)
        self._first_document = np.cumsum(counts) - counts

    def _open_shard(self, number: int, record: ShardRecord) -> np.ndarray:
        """Map one shard's tokens and return its document table, int64 [documents, 2]."""
        tokens_path, table_path = self.folder / tokens_file(number), self.folder / documents_file(number)
        self._check_size(tokens_path, record.tokens * self.dtype.itemsize)
        self._check_size(table_path, record.documents * _DOCUMENT_RECORD_BYTES)
        try:
            table = np.fromfile(table_path, dtype="<i8").reshape(-1, 2).astype(np.int64, copy=False)
            mapped = np.memmap(tokens_path, dtype=self.dtype, mode="r")
            if self.masked:
                loss_path = self.folder / loss_file(number)
                self._check_size(loss_path, record.tokens)
                self._losses.append(np.asarray(np.memmap(loss_path, dtype=np.uint8, mode="r")))
        except OSError as error:
            raise FailedError(
                f"{tokens_path}: cannot be read ({error.strerror or error}); check the mode and the device"
            ) from error
        ends, text_bytes = table[:, 0], table[:, 1]
        # Compared and not subtracted: a difference of hostile numbers can leave 64 bits and come back in as a good one.
        if ends[-1] != record.tokens or ends[0] < 1 or (ends[1:] <= ends[:-1]).any():
            raise FailedError(f"{table_path}: document ends do not lead up to {record.tokens} tokens; write it again")
        within = (text_bytes >= 1).all() and (text_bytes <= min(record.text_bytes, _MOST_TEXT)).all()
        if not within or int(text_bytes.sum()) != record.text_bytes:
            raise FailedError(f"{table_path}: text bytes do not sum to {record.text_bytes}; write it again")
        # A plain view of the mapping: slicing numpy.memmap itself costs microseconds for each document.
        self._shards.append(np.asarray(mapped))
        return table

    def _check_size(self, path: Path, expected: int) -> None:
        try:
            info = path.stat()
        except OSError as error:
            raise FailedError(f"{path}: cannot be opened ({error.strerror}); copy or write the folder again") from None
        if info.st_size != expected:
            raise FailedError(
                f"{path}: {info.st_size} bytes where the manifest has {expected}; copy or write the folder again"
            )
        self._stats.append((path, info.st_size, info.st_mtime_ns, info.st_ino))

    @property
    def tokens_total(self) -> int:
        return self.manifest.totals.tokens

    @property
    def masked(self) -> bool:
        """Whether only some tokens carry a loss."""
        return self.manifest.masked

    @property
    def documents(self) -> int:
        return self.manifest.totals.documents

    @property
    def text_bytes(self) -> int:
        return self.manifest.totals.text_bytes

    @property
    def vocab_size(self) -> int:
        return self.manifest.recipe.vocab_size

    @property
    def tokenizer_sha256(self) -> str:
        return self.manifest.recipe.tokenizer_sha256

    @property
    def identity(self) -> str:
        """Hash over every token and the way they were made: equal for equal data wherever the folder is."""
        return self.manifest.checksum

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, a read-only view [length] in the stored dtype. Raises IndexError."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents} in {self.folder}")
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        begin = int(self._begins[index])
        return self._shards[shard][begin : begin + int(self.lengths[index])]

    def place(self, index: int) -> tuple[str, int]:
        """Where a document's tokens are: the name of their file, and the number of the first one in it."""
        shard = int(np.searchsorted(self._first_document, index, side="right")) - 1
        return tokens_file(shard), int(self._begins[index])

    def gather(self, documents: np.ndarray, begins: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
        """Copy tokens begins[i]..ends[i] (offsets in the document) of each documents[i] to `out`, joined."""
        self._gather(self._shards, documents, begins, ends, out)

    def gather_loss(self, documents: np.ndarray, begins: np.ndarray, ends: np.ndarray, out: np.ndarray) -> None:
        """As `gather`, of a masked folder's flags: 1 where the token carries a loss."""
        self._gather(self._losses, documents, begins, ends, out)

    def _gather(
        self, files: list[np.ndarray], documents: np.ndarray, begins: np.ndarray, ends: np.ndarray, out: np.ndarray
    ) -> None:
        shards = np.searchsorted(self._first_document, documents, side="right") - 1
        base = self._begins[documents]
        at = 0
        # One slice copy a document: faster than one gather over all tokens as long as documents have a few
        # tokens.
        pieces = zip(shards.tolist(), (base + begins).tolist(), (base + ends).tolist(), strict=True)
        for shard, begin, end in pieces:
            out[at : at + end - begin] = files[shard][begin:end]
            at += end - begin

    def check_unchanged(self) -> None:
        """Raise FailedError when a file was truncated or replaced since opening.

        Touching a mapping beyond the end of its file kills the process, so readers of many tokens ask before
        they read.
        """
        for path, size, mtime_ns, inode in self._stats:
            try:
                now = path.stat()
            except OSError as error:
                raise FailedError(f"{path}: vanished while in use ({error.strerror}); restore it and resume") from None
            if (now.st_size, now.st_mtime_ns, now.st_ino) != (size, mtime_ns, inode):
                raise FailedError(f"{path}: changed while in use; restore the folder and resume")

    def check_ids(self, vocab_size: int) -> None:
        """Raise FailedError with the first position whose id is not below `vocab_size`; reads every token
        once.
        """
        for number, tokens in enumerate(self._shards):
            for begin in range(0, len(tokens), _SCAN_TOKENS):
                piece = tokens[begin : begin + _SCAN_TOKENS]
                if int(piece.max()) < vocab_size:
                    continue
                offset = int(np.argmax(piece >= vocab_size))
                self._raise_bad_id(number, begin + offset, int(piece[offset]), vocab_size)

    def _raise_bad_id(self, number: int, position: int, token: int, vocab_size: int) -> None:
        first = int(self._first_document[number])
        begins = self._begins[first : first + self.manifest.shards[number].documents]
        index = int(np.searchsorted(begins, position, side="right")) - 1
        raise FailedError(
            f"{self.folder / tokens_file(number)}: token {position} (document {first + index}, position "
            f"{position - int(begins[index])}) has id {token}, outside the vocabulary of {vocab_size}; "
            "tokenise with the tokenizer of this model, or write the folder again if it should fit"
        )

    def verify(self) -> None:
        """Compare every file with the sha256 in the manifest; raises FailedError naming the first that
        differs.
        """
        for number, record in enumerate(self.manifest.shards):
            for name, expected in shard_hashes(number, record).items():
                path = self.folder / name
                try:
                    found = file_sha256(path)
                except OSError as error:
                    raise FailedError(
                        f"{path}: cannot be read ({error.strerror or error}); copy or write the folder again"
                    ) from error
                if found != expected:
                    raise FailedError(f"{path}: content differs from the manifest; copy or write the folder again")
