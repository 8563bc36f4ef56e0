"""What a token folder is: its files, and the manifest that describes them.

    tokens-00000.bin     ids of whole documents one after the other, little-endian; uint16 for a vocabulary
                         of up to 65536, else uint32
    documents-00000.bin  int64 [documents, 2], little-endian: end offset of the document in its shard, and the
                         UTF-8 bytes of its text
    loss-00000.bin       of conversations alone: uint8, one a token; 1 where the token is predicted with a loss, 0
                         where it is only read. Of these the bytes are those of the assistant's text
    manifest.json        what the tokens were made from, and the size and hash of every file; written last

A document never spans two shards. File names follow from the shard's number and are never taken from the
manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from elo_engine.errors import FailedError, UsageError

FORMAT: Final = 1
MANIFEST = "manifest.json"


def tokens_file(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def documents_file(shard: int) -> str:
    return f"documents-{shard:05d}.bin"


def loss_file(shard: int) -> str:
    return f"loss-{shard:05d}.bin"


class Record(BaseModel):
    """A part of a JSON file here: no conversion between types, no unknown keys.

    `only_chat` names the fields that only conversations have. Of other folders they are None and not written, so that
    those stay what they were before; and a version that does not know them refuses a masked folder, where to
    train on every token would be the silent alternative.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    only_chat: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if value is not None or key not in self.only_chat}


_Sha256 = Field(pattern="^[0-9a-f]{64}$")
_MOST = 1 << 50  # of whatever is counted: sums stay far inside 64 bits


class InputRecord(Record):
    """One input file: name without its folder, size, sha256 of the content."""

    name: str
    bytes: int = Field(ge=1, le=_MOST)
    sha256: str = _Sha256


class Recipe(Record):
    """Everything that decides the content of a token folder; equal recipes give byte-identical folders.

    `bos_id` is the id in front of every document, None where the tokenizer adds none; `eos_id` closes every
    document. chat_template_sha256: the template that conversations were rendered with, None for text; a rendered
    conversation is a document as it stands, with neither of the two ids around it.
    """

    only_chat = frozenset({"chat_template_sha256"})

    tokenizer_sha256: str = _Sha256
    vocab_size: int = Field(ge=1, le=1 << 31)
    dtype: Literal["uint16", "uint32"]
    eos_id: int = Field(ge=0, le=_MOST)
    bos_id: int | None = Field(ge=0, le=_MOST)
    text_field: str
    split_blank_lines: bool
    shard_tokens: int = Field(ge=1, le=_MOST)
    chat_template_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    inputs: tuple[InputRecord, ...]


class ShardRecord(Record):
    """One shard; `loss_tokens` counts the tokens that carry a loss, None where all do."""

    only_chat = frozenset({"loss_tokens", "loss_sha256"})

    tokens: int = Field(ge=1, le=_MOST)
    documents: int = Field(ge=1, le=_MOST)
    text_bytes: int = Field(ge=1, le=_MOST)
    tokens_sha256: str = _Sha256
    documents_sha256: str = _Sha256
    loss_tokens: int | None = Field(default=None, ge=1, le=_MOST)
    loss_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")


class Totals(Record):
    """`tokens` counts begin and end tokens too; `empty_documents` had no text and were left out. `loss_tokens`: as
    in `ShardRecord`.
    """

    only_chat = frozenset({"loss_tokens"})

    tokens: int = Field(ge=1, le=_MOST)
    documents: int = Field(ge=1, le=_MOST)
    text_bytes: int = Field(ge=1, le=_MOST)
    empty_documents: int = Field(ge=0, le=_MOST)
    loss_tokens: int | None = Field(default=None, ge=1, le=_MOST)


class Manifest(Record):
    """manifest.json; `checksum` is the sha256 of all the rest, so that a damaged digit is no valid value."""

    format: Literal[1]
    recipe: Recipe
    shards: tuple[ShardRecord, ...] = Field(min_length=1)
    totals: Totals
    checksum: str = _Sha256

    @classmethod
    def make(cls, recipe: Recipe, shards: tuple[ShardRecord, ...], empty_documents: int) -> Manifest:
        totals = Totals(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            text_bytes=sum(shard.text_bytes for shard in shards),
            empty_documents=empty_documents,
            loss_tokens=sum(shard.loss_tokens or 0 for shard in shards) if recipe.chat_template_sha256 else None,
        )
        return cls(
            format=FORMAT,
            recipe=recipe,
            shards=shards,
            totals=totals,
            checksum=_checksum(recipe, shards, totals),
        )

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check the manifest of `folder`; UsageError (no token folder), FailedError (damaged)."""
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise UsageError(f"{folder}: not a token folder (no {MANIFEST}); write one with `elo data`") from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path and its mode") from None
        try:
            manifest = cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            raise FailedError(f"{path}: damaged at {key} ({first['msg']}); write the folder again") from None
        if manifest != cls.make(manifest.recipe, manifest.shards, manifest.totals.empty_documents):
            raise FailedError(f"{path}: checksum or totals do not match the content; write the folder again")
        if any((shard.loss_sha256 is not None) != manifest.masked for shard in manifest.shards):
            raise FailedError(f"{path}: some shards have a loss mask and others none; write the folder again")
        return manifest

    @property
    def masked(self) -> bool:
        """Whether the shards say which tokens carry a loss."""
        return self.recipe.chat_template_sha256 is not None

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def shard_hashes(number: int, record: ShardRecord) -> dict[str, str]:
    """The files of one shard by name, and what they have to hash to."""
    hashes = {tokens_file(number): record.tokens_sha256, documents_file(number): record.documents_sha256}
    return hashes | ({loss_file(number): record.loss_sha256} if record.loss_sha256 is not None else {})


def _checksum(recipe: Recipe, shards: tuple[ShardRecord, ...], totals: Totals) -> str:
    parts = [
        FORMAT,
        recipe.model_dump(mode="json"),
        [s.model_dump(mode="json") for s in shards],
        totals.model_dump(mode="json"),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
