"""Text to rows: `tokens` writes token folders, `store` reads them, `mixture` deals out rows.

The path of a token: an input file (`documents`, `parquet`) -> the checkpoint's own tokenizer (`tokenizer`) ->
shards on disk (`tokens`, `writing`, `manifest`) -> memory-mapped (`store`) -> rows with labels, positions and
document boundaries (`rows`, `mixture`), read a step ahead (`ahead`). Conversations go by way of `chat`, and beside
their tokens lies which of them carry a loss. Nothing here imports torch.
"""

from __future__ import annotations

from elo_engine.data.ahead import RowsAhead
from elo_engine.data.manifest import Manifest
from elo_engine.data.mixture import NO_LABEL, Mixture, RowBatch, sequential_rows
from elo_engine.data.store import TokenStore
from elo_engine.data.tokenizer import tokenizer_hash
from elo_engine.data.tokens import build_tokens

__all__ = [
    "NO_LABEL",
    "Manifest",
    "Mixture",
    "RowBatch",
    "RowsAhead",
    "TokenStore",
    "build_tokens",
    "sequential_rows",
    "tokenizer_hash",
]
