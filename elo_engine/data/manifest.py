"""What a token folder is: its files, and the manifest that describes them.

    tokens-00000.bin     ids of whole documents one after the other, little-endian; uint16 for a vocabulary
                         of up to 65536, else uint32
    documents-00000.bin  int64 [documents, 2], little-endian: end offset of the document in its shard, and the
                         UTF-8 bytes of its text
    manifest.json        what the tokens were made from, and the size and hash of every file; written last

A document never spans two shards. File names follow from the shard's number and are never taken from the
manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from elo_engine.errors import FailedError, UsageError

FORMAT: Final = 1
MANIFEST = "manifest.json"


def tokens_file(shard: int) -> str:
    return f"tokens-{shard:05d}.bin"


def documents_file(shard: int) -> str:
    return f"documents-{shard:05d}.bin"


class Record(BaseModel):
    """A part of a JSON file here: no conversion between types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Sha256 = Field(pattern="^[0-9a-f]{64}$")


class InputRecord(Record):
    """One input file: name without its folder, size, sha256 of the content."""

    name: str
    bytes: int = Field(ge=1)
    sha256: str = _Sha256


class Recipe(Record):
    """Everything that decides the content of a token folder; equal recipes give byte-identical folders.

    `bos_id` is the id in front of every document, None where the tokenizer adds none; `eos_id` closes every
    document.
    """

    tokenizer_sha256: str = _Sha256
    vocab_size: int = Field(ge=1, le=1 << 31)
    dtype: Literal["uint16", "uint32"]
    eos_id: int = Field(ge=0)
    bos_id: int | None = Field(ge=0)
    text_field: str
    split_blank_lines: bool
    shard_tokens: int = Field(ge=1)
    inputs: tuple[InputRecord, ...]


class ShardRecord(Record):
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    text_bytes: int = Field(ge=1)
    tokens_sha256: str = _Sha256
    documents_sha256: str = _Sha256


class Totals(Record):
    """`tokens` counts begin and end tokens too; `empty_documents` had no text and were left out."""

    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    text_bytes: int = Field(ge=1)
    empty_documents: int = Field(ge=0)


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
        return manifest

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


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
