"""Held-out loss, perplexity and bits per byte of a model, per language.

Every document is scored once, in rows of the given length; a document that spans rows loses its earlier context
there, like in training. The first token of a document is not predicted unless the tokenizer puts a bos token before
it, so bits per byte counts a document's bytes in full against one prediction fewer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from elo_engine import console
from elo_engine.checkpoint import open_checkpoint, resolve_model
from elo_engine.corpora import Heldout, open_tokens, require_folder
from elo_engine.data import TokenStore, sequential_rows
from elo_engine.errors import UsageError
from elo_engine.measure.environment import choose_device, choose_dtype
from elo_engine.model.decoder import Decoder
from elo_engine.model.full import load_full
from elo_engine.model.spec import read_spec
from elo_engine.train.loop import to_batch

TOKENS_AT_ONCE = 2048  # keeps the activations of an evaluation small on any device


@dataclass(frozen=True)
class Evaluation:
    """One language's result; losses in nats per predicted token."""

    loss_nats: float
    perplexity: float
    bits_per_byte: float
    tokens_loss: int
    text_bytes: int


def evaluate_store(
    model: Decoder,
    store: TokenStore,
    sequence_length: int,
    tokens: int | None = None,
    title: str = "evaluate",
) -> Evaluation:
    """Score one held-out set. With a cap, the first rows are scored and the bytes taken in proportion to their
    tokens.
    """
    batch_rows = max(1, TOKENS_AT_ONCE // sequence_length)
    wanted = store.tokens_total if tokens is None else min(tokens, store.tokens_total)
    batches = max(1, math.ceil(wanted / sequence_length / batch_rows))
    total, count, seen = 0.0, 0, 0
    with console.progress_bar(title, batches) as bar:
        for number, rows in enumerate(islice(sequential_rows(store, sequence_length, batch_rows), batches)):
            losses_N = model.token_losses(to_batch(rows, model.device))
            total += float(losses_N.double().sum())
            count += int((rows.labels_BT >= 0).sum())
            seen += rows.ids_BT.size
            bar(number + 1, "")
    share = min(1.0, seen / store.tokens_total)
    loss = total / max(1, count)
    text_bytes = round(store.text_bytes * share)
    return Evaluation(loss, math.exp(min(loss, 700.0)), total / math.log(2) / max(1, text_bytes), count, text_bytes)


def evaluate_all(model: Decoder, heldout: Heldout) -> dict[str, Evaluation]:
    """Every language of a held-out set."""
    return {
        language: evaluate_store(model, store, heldout.sequence_length, heldout.tokens, f"evaluate {language}")
        for language, store in heldout.stores.items()
    }


def evaluate_folder(
    folder: Path, heldout: Heldout, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Evaluation]:
    """Load a whole checkpoint without gradients and score it."""
    index = open_checkpoint(folder)
    with console.bytes_bar("load") as progress:
        model, _ = load_full(index, read_spec(index.config), device=device, dtype=dtype, train=False, progress=progress)
    return evaluate_all(model, heldout)


def evaluate_command(model: str, tokens: list[Path], sequence_length: int, device: str, dtype: str) -> dict[str, Any]:
    """`elo eval`: a model against token folders, tokenizer and ids checked; results by folder name.

    Raises:
        UsageError: no token folder, or a device or dtype that does not exist. RefusedError: another tokenizer.
    """
    if not tokens:
        raise UsageError("elo eval: no token folder given; use --tokens DIR, made by elo data")
    if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "bf16", "fp32"):
        raise UsageError(f"elo eval: --device {device} --dtype {dtype}: use auto, cpu or cuda, and auto, bf16 or fp32")
    for path in tokens:
        require_folder(path)
    folder = resolve_model(model)
    where = choose_device(device)  # type: ignore[arg-type]
    width, _ = choose_dtype(dtype, where)  # type: ignore[arg-type]
    spec = read_spec(open_checkpoint(folder).config)
    stores = open_tokens({str(path): str(path) for path in tokens}, folder, spec.V)
    found = evaluate_folder(folder, Heldout(stores, sequence_length), device=where, dtype=width)
    return {name: asdict(result) for name, result in found.items()}
