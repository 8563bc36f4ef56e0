"""The token shards of a run, held against the model they are fed to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elo_engine.config import RunConfig
from elo_engine.data import Mixture, TokenStore, tokenizer_hash
from elo_engine.errors import RefusedError, UsageError


@dataclass(frozen=True)
class Heldout:
    """Held-out sets by language, the row length they are scored at, and a cap on tokens per language (None: all)."""

    stores: dict[str, TokenStore]
    sequence_length: int
    tokens: int | None = None


def require_shards(config: RunConfig) -> None:
    """Raises UsageError naming the first folder that holds no token shards; said before anything heavy is read."""
    for where, shards in (("data", config.data.shards), ("evaluate", config.evaluate.shards)):
        for language, folder in shards.items():
            require_folder(Path(folder), f"{where}.shards.{language}: ")


def require_folder(folder: Path, where: str = "") -> None:
    """Raises UsageError when a folder holds no token shards."""
    if not (folder / "manifest.json").exists():
        raise UsageError(
            f"{where}{folder} holds no token shards; make them with elo data TEXT --tokenizer MODEL --out {folder}"
        )


def open_tokens(shards: dict[str, str], source: Path, vocabulary: int) -> dict[str, TokenStore]:
    """Open token shards and hold them against the model in `source`.

    Raises:
        RefusedError: made with another tokenizer. FailedError: damaged, or an id outside the vocabulary.
    """
    stores: dict[str, TokenStore] = {}
    for language, folder in shards.items():
        store = TokenStore(Path(folder))
        expected = tokenizer_hash(source)
        if store.tokenizer_sha256 != expected:
            raise RefusedError(
                f"{folder}: these token shards were made with another tokenizer (sha256 "
                f"{store.tokenizer_sha256[:12]}) than the "
                f"one in {source} ({expected[:12]}); make them again with elo data --tokenizer {source}"
            )
        store.check_ids(vocabulary)
        stores[language] = store
    return stores


def make_mixture(config: RunConfig, source: Path, vocabulary: int) -> Mixture:
    """The training mixture of a run; without `data.mix`, corpora are mixed in proportion to their tokens."""
    stores = open_tokens(config.data.shards, source, vocabulary)
    mix = config.data.mix or _by_size(stores)
    return Mixture(stores, mix, config.data.sequence_length, config.seed, config.data.packing)


def _by_size(stores: dict[str, TokenStore]) -> dict[str, float]:
    """Whole percents, because the mixture is exact over blocks of rows; every language keeps at least one."""
    total = sum(store.tokens_total for store in stores.values())
    return {language: float(max(1, round(100 * store.tokens_total / total))) for language, store in stores.items()}


def describe_corpora(config: RunConfig) -> list[str]:
    """Tokens at hand against tokens asked for, per language."""
    asked = config.pretrain.tokens + config.align.tokens
    stores = {language: TokenStore(Path(folder)) for language, folder in config.data.shards.items()}
    mix = config.data.mix or _by_size(stores)
    whole = sum(mix.values())
    return [
        f"data {language}: {store.tokens_total:,} tokens in {store.documents:,} documents, read "
        f"{asked * mix[language] / whole / store.tokens_total:.2f} times"
        for language, store in stores.items()
    ]


def open_heldout(config: RunConfig, source: Path, vocabulary: int) -> Heldout:
    """The held-out sets of a run."""
    stores = open_tokens(config.evaluate.shards, source, vocabulary)
    return Heldout(stores, config.data.sequence_length, config.evaluate.tokens)
