"""Text to token shards: bounded memory, restartable, published in one rename.

Work happens in `.NAME.partial` beside the output, held by a lock. After each complete shard a small progress
file says where in the inputs the next one begins; a later call with the same recipe (inputs by content,
tokenizer, options) continues there, and any other call starts afresh. Tokens of a document depend on nothing
but its text, and shards are cut by token counts alone, so a continued folder is byte-identical to one written
in a single call.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from elo_engine.data.chat import MESSAGES, ChatEncoder, chat_encoder, require_jsonl
from elo_engine.data.documents import Document, InputFile, inspect_inputs, read_documents
from elo_engine.data.manifest import (
    MANIFEST,
    InputRecord,
    Manifest,
    Recipe,
    Record,
    ShardRecord,
    file_sha256,
    shard_hashes,
)
from elo_engine.data.store import TokenStore
from elo_engine.data.tokenizer import Encoder, encoder_of, load_tokenizer, tokenizer_hash
from elo_engine.data.writing import NEW, ShardWriter, locked, naming, sync_folder, write_file
from elo_engine.errors import EloError, RefusedError, UsageError

__all__ = ["Manifest", "TokenStore", "build_tokens", "tokenizer_hash"]

log = logging.getLogger(__name__)

# One call of the tokenizer: enough texts for its threads, and little enough that its objects (some 100 bytes
# a token) stay small.
_BATCH_TEXT_BYTES = 512 << 10
_BATCH_DOCUMENTS = 1024

_PROGRESS = "progress.json"
_SHARD_FILE = re.compile(r"(tokens|documents|loss)-\d{5,}\.bin")


class _Progress(Record):
    """progress.json: the complete shards, and where the document after them is read.

    `input` is the number of the input file, `offset` and `line` its reader's position, `empty_documents` how
    many were left out of all inputs so far.
    """

    recipe: Recipe
    shards: tuple[ShardRecord, ...] = ()
    input: int = 0
    offset: int = 0
    line: int = 0
    empty_documents: int = 0
    seal: str = ""

    def sealed(self) -> _Progress:
        """With a sha256 over the rest, so that a place which a damaged digit names is never taken for one."""
        plain = self.model_copy(update={"seal": ""}).model_dump_json().encode()
        return self.model_copy(update={"seal": hashlib.sha256(plain).hexdigest()})


def build_tokens(
    inputs: list[Path],
    tokenizer_folder: Path,
    out: Path,
    *,
    text_field: str = "text",
    shard_tokens: int = 1 << 24,
    split_blank_lines: bool = False,
    chat: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Tokenise .txt, .jsonl and .parquet files, in the order given, into the token folder `out`.

    A .txt file is one document, cut at lines that hold only a form feed, and with `split_blank_lines` at
    blank lines too. JSON lines and parquet give one document for each record's `text_field`; records without
    text are counted and left out. Every document is [bos if the tokenizer adds one] + ids + [eos]; the name
    of a special token inside a text becomes that token, as the tokenizer has it. A shard holds at most
    `shard_tokens` tokens, or one document that is longer. `progress(bytes_done, bytes_total)` is called after
    each batch of texts.

    chat: the inputs are JSON lines of conversations (see `chat`), rendered with the tokenizer's chat template, and the
    folder has a loss mask: only what the assistant writes carries a loss.

    Raises UsageError (inputs, records, options), RefusedError (`out` exists, another process writes it, the
    tokenizer needs its own code), FailedError (text that is not UTF-8, a file that changed meanwhile, an I/O
    error).
    """
    if shard_tokens < 1:
        raise UsageError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    out = Path(os.path.abspath(out))
    _refuse_existing(out)
    tokenizer_folder = Path(tokenizer_folder)
    tokenizer_hash(tokenizer_folder)  # a missing tokenizer is reported before the inputs are read through
    files = inspect_inputs([Path(path) for path in inputs], text_field)
    tokenizer = load_tokenizer(tokenizer_folder)
    encoder, conversations = encoder_of(tokenizer_folder, tokenizer), None
    if chat:
        require_jsonl(files)
        conversations = chat_encoder(tokenizer_folder, tokenizer)
    recipe = Recipe(
        tokenizer_sha256=encoder.sha256,
        vocab_size=encoder.vocab_size,
        dtype="uint16" if encoder.vocab_size <= 1 << 16 else "uint32",
        eos_id=encoder.eos_id,
        bos_id=encoder.bos_id,
        text_field=MESSAGES if chat else text_field,
        split_blank_lines=split_blank_lines,
        shard_tokens=shard_tokens,
        chat_template_sha256=None if conversations is None else conversations.template_sha256,
        inputs=tuple(InputRecord(name=file.path.name, bytes=file.size, sha256=file.sha256) for file in files),
    )
    work = out.with_name(f".{out.name}.partial")
    with locked(work):
        _refuse_existing(out)
        _refuse_foreign(work)
        if not _is_complete(work, recipe):
            start = _resume(work, recipe)
            _Builder(files, conversations or _Texts(encoder, recipe), work, start, progress).run()
        # The manifest marks the folder complete: after a crash from here on only these lines run again.
        manifest = Manifest.load(work)
        _clear(work, {MANIFEST, *_files_of(manifest.shards)})
        with naming(out):
            os.rename(work, out)  # refuses a folder with content; the lock keeps out writers of the same name
            sync_folder(out.parent)
    return manifest


class _Texts:
    """Plain texts to documents and ids, as `ChatEncoder` does it for conversations."""

    def __init__(self, encoder: Encoder, recipe: Recipe) -> None:
        self.encoder, self.recipe = encoder, recipe

    def read(self, file: InputFile, offset: int, line: int) -> Iterator[Document]:
        text_field, split = self.recipe.text_field, self.recipe.split_blank_lines
        return read_documents(file, text_field=text_field, split_blank_lines=split, offset=offset, line=line)

    def encode(self, documents: list[Document]) -> Iterator[tuple[np.ndarray, None]]:
        """Ids with begin and end, int64; none at all for a text that is blank."""
        front = [] if self.recipe.bos_id is None else [self.recipe.bos_id]
        for document, ids in zip(documents, self.encoder.encode([d.text for d in documents]), strict=True):
            whole = [] if not ids or document.text.isspace() else [*front, *ids, self.recipe.eos_id]
            yield np.array(whole, dtype=np.int64), None


class _Builder:
    """One pass over the inputs from where `start` says; the counters are those of `_Progress`."""

    def __init__(
        self,
        files: list[InputFile],
        source: _Texts | ChatEncoder,
        work: Path,
        start: _Progress,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.files, self.source, self.work, self.progress = files, source, work, progress
        self.recipe, self.shards = start.recipe, start.shards
        self.input, self.offset, self.line = start.input, start.offset, start.line
        self.empty_documents = start.empty_documents
        self.writer = self._next_shard()

    def run(self) -> None:
        """Write what is missing of the shards, then the manifest."""
        try:
            while self.input < len(self.files):
                self._tokenise_input(self.files[self.input])
                self.input, self.offset, self.line = self.input + 1, 0, 0
                self._report()
            if self.writer.tokens:
                self._finish_shard()
        finally:
            self.writer.close()
        for file in self.files:
            file.check_unchanged()
        write_file(self.work / MANIFEST, Manifest.make(self.recipe, self.shards, self.empty_documents).to_bytes())

    def _tokenise_input(self, file: InputFile) -> None:
        documents = self.source.read(file, self.offset, self.line)
        taken = 0  # after a restart too: a shard ends where a further document is at hand, which is read again
        for batch in _batches(documents):
            for document, (ids, loss) in zip(batch, self.source.encode(batch), strict=True):
                taken += self._add(document, ids, loss)
            self._report()
        if not taken:
            raise UsageError(
                f"{file.path}: no text in this file, only blank records; leave it out or give one with text"
            )

    def _add(self, document: Document, ids: np.ndarray, loss: np.ndarray | None) -> bool:
        """Append a document to the shards; False when it has no text, or nothing in it carries a loss."""
        empty = not len(ids) or document.utf8_bytes == 0 or (loss is not None and not loss.any())
        if empty:
            self.empty_documents += 1
        else:
            if self.writer.tokens and self.writer.tokens + len(ids) > self.recipe.shard_tokens:
                self._finish_shard()
                self.writer = self._next_shard()
            self.writer.add(ids, document.utf8_bytes, loss)
        self.offset, self.line = document.offset, document.line
        return not empty

    def _next_shard(self) -> ShardWriter:
        masked = self.recipe.chat_template_sha256 is not None
        return ShardWriter(self.work, len(self.shards), self.recipe.dtype, masked=masked)

    def _finish_shard(self) -> None:
        """Complete the current shard; the progress file then points at the document after its last."""
        self.shards = (*self.shards, self.writer.finish())
        state = _Progress(
            recipe=self.recipe,
            shards=self.shards,
            input=self.input,
            offset=self.offset,
            line=self.line,
            empty_documents=self.empty_documents,
        )
        write_file(self.work / _PROGRESS, state.sealed().model_dump_json(indent=1).encode())

    def _report(self) -> None:
        if self.progress is None:
            return
        done = sum(file.size for file in self.files[: self.input])
        if self.input < len(self.files):
            file = self.files[self.input]
            done += file.size * self.offset // file.units
        self.progress(done, sum(file.size for file in self.files))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += max(document.utf8_bytes, len(document.text))  # of a conversation the bytes are only a part
        if size >= _BATCH_TEXT_BYTES or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise RefusedError(f"{out}: exists already and nothing is written over; choose another --out or remove it")


def _refuse_foreign(work: Path) -> None:
    for path in sorted(work.iterdir()):
        if path.name not in (_PROGRESS, MANIFEST, NEW) and not _SHARD_FILE.fullmatch(path.name):
            raise RefusedError(f"{path}: is not from here; move it away or choose another --out")


def _files_of(shards: tuple[ShardRecord, ...]) -> list[str]:
    return [name for number, shard in enumerate(shards) for name in shard_hashes(number, shard)]


def _clear(work: Path, keep: set[str]) -> None:
    with naming(work):
        for path in list(work.iterdir()):
            if path.name not in keep:
                path.unlink()


def _is_complete(work: Path, recipe: Recipe) -> bool:
    """Whether an earlier call with this recipe finished everything but the rename."""
    if not (work / MANIFEST).exists():
        return False
    try:
        manifest = Manifest.load(work)
    except EloError:
        return False
    return manifest.recipe == recipe and _shards_intact(work, manifest.shards)


def _resume(work: Path, recipe: Recipe) -> _Progress:
    """The state to continue from, with every file that does not belong to it removed."""
    state = _Progress(recipe=recipe)
    if (work / _PROGRESS).exists():
        try:
            found = _Progress.model_validate_json((work / _PROGRESS).read_bytes())
        except ValidationError:
            found = None
        if found and found == found.sealed() and found.recipe == recipe and _shards_intact(work, found.shards):
            state = found
        else:
            log.warning("%s: starting afresh, the unfinished folder is damaged or of another recipe", work)
    _clear(work, {*([_PROGRESS] if state.shards else []), *_files_of(state.shards)})
    return state


def _shards_intact(work: Path, shards: tuple[ShardRecord, ...]) -> bool:
    for number, record in enumerate(shards):
        for name, sha256 in shard_hashes(number, record).items():
            if not (work / name).is_file() or file_sha256(work / name) != sha256:
                return False
    return True
