"""Token folders for tests, written straight from lists of ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elo_engine.data.manifest import MANIFEST, InputRecord, Manifest, Recipe, ShardRecord
from elo_engine.data.writing import ShardWriter, write_file


def make_store_folder(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = 320,
    shard_documents: int = 1_000_000,
    tokenizer_sha256: str = "0" * 64,
) -> Path:
    """Write a token folder holding `documents` as they are, `shard_documents` to a shard."""
    import numpy as np

    folder.mkdir(parents=True)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    shards: list[ShardRecord] = []
    for begin in range(0, len(documents), shard_documents):
        writer = ShardWriter(folder, len(shards), dtype)
        for ids in documents[begin : begin + shard_documents]:
            writer.add(np.array(ids, dtype=np.int64), text_bytes=3 * len(ids))
        shards.append(writer.finish())
    recipe = Recipe(
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=vocab_size,
        dtype=dtype,  # type: ignore[arg-type]
        eos_id=0,
        bos_id=None,
        text_field="text",
        split_blank_lines=False,
        shard_tokens=1 << 24,
        inputs=(InputRecord(name="fixture.txt", bytes=1, sha256="1" * 64),),
    )
    write_file(folder / MANIFEST, Manifest.make(recipe, tuple(shards), empty_documents=0).to_bytes())
    return folder
