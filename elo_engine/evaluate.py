"""Held-out loss, perplexity and bits per byte of a model, per language.

Every document is scored once, in rows of the given length; a document that spans rows loses its earlier context
there, like in training. The first token of a document is not predicted unless the tokenizer puts a bos token before
it, so bits per byte counts a document's bytes in full against one prediction fewer.

A model that is on the device as a whole is scored batch by batch; one of which only a few layers are there at a time
takes batches in groups (`stream/scoring.py`). Losses, and the order in which they are added, are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from elo_engine import console
from elo_engine.checkpoint import CheckpointIndex, open_checkpoint, resolve_model
from elo_engine.corpora import Heldout, open_tokens, require_folder
from elo_engine.data import TokenStore, sequential_rows
from elo_engine.errors import UsageError
from elo_engine.measure.environment import choose_device, choose_dtype
from elo_engine.measure.machine import give_back_freed_memory
from elo_engine.measure.meter import human_bytes
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.full import load_full
from elo_engine.model.spec import ModelSpec, read_spec
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.stream.scoring import LayerMajorScorer, batch_bytes, free_bytes, whole_bytes
from elo_engine.train.loop import to_batch

TOKENS_AT_ONCE = 2048  # keeps the activations of an evaluation small on any device
EngineName = Literal["auto", "resident", "streamed"]
_MARGIN = 1.1  # of what a model is expected to take: allocators round up and leave gaps


class GroupScorer(Protocol):
    """Whoever scores several batches together."""

    @property
    def device(self) -> torch.device:
        """Where the batches should be."""

    @property
    def tokens_at_once(self) -> int:
        """Tokens of the group that suits it now; a single batch may have more."""

    def losses_of(self, batches: Sequence[Batch], progress: Callable[[float], None]) -> list[Tensor]:
        """Cross-entropy of every token of each batch in nats, fp32 [N], 0 where there is no label.

        progress: to be called with the share of the work that is done; what it raises ends the work.
        """


Scorer = Decoder | GroupScorer


class Stopped(Exception):
    """`should_stop` ended an evaluation early."""


@dataclass(frozen=True)
class Evaluation:
    """One language's result; losses in nats per predicted token."""

    loss_nats: float
    perplexity: float
    bits_per_byte: float
    tokens_loss: int
    text_bytes: int


def batch_tokens(sequence_length: int) -> int:
    """Tokens of a batch: whole rows."""
    return max(1, TOKENS_AT_ONCE // sequence_length) * sequence_length


def evaluate_store(
    scorer: Scorer,
    store: TokenStore,
    sequence_length: int,
    tokens: int | None = None,
    title: str = "evaluate",
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Score one held-out set. With a cap, the first rows are scored and the bytes taken in proportion to their
    tokens.

    Raises:
        Stopped: when `should_stop` says so, asked between the parts of the work.
    """
    per_batch = batch_tokens(sequence_length)
    wanted = store.tokens_total if tokens is None else min(tokens, store.tokens_total)
    batches = max(1, math.ceil(wanted / per_batch))
    at_once = 1 if isinstance(scorer, Decoder) else max(1, scorer.tokens_at_once // per_batch)
    total, count, seen, done = 0.0, 0, 0, 0
    coming = islice(sequential_rows(store, sequence_length, per_batch // sequence_length), batches)
    with console.progress_bar(title, batches) as bar:
        while group := list(islice(coming, at_once)):

            def told(share: float, before: int = done, size: int = len(group)) -> None:
                if should_stop():
                    raise Stopped
                bar(before + int(share * size), "")

            moved = [to_batch(rows, scorer.device) for rows in group]
            for rows, losses_N in zip(group, _losses(scorer, moved, told), strict=True):
                total += float(losses_N.double().sum())
                count += int((rows.labels_BT >= 0).sum())
                seen += rows.ids_BT.size
            done += len(group)
            told(0.0, done)
    share = min(1.0, seen / store.tokens_total)
    loss = total / max(1, count)
    text_bytes = round(store.text_bytes * share)
    return Evaluation(loss, math.exp(min(loss, 700.0)), total / math.log(2) / max(1, text_bytes), count, text_bytes)


def _losses(scorer: Scorer, batches: Sequence[Batch], told: Callable[[float], None]) -> list[Tensor]:
    if isinstance(scorer, Decoder):
        return [scorer.token_losses(batch) for batch in batches]
    return scorer.losses_of(batches, told)


def evaluate_all(
    scorer: Scorer, heldout: Heldout, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Evaluation]:
    """Every language of a held-out set; raises as `evaluate_store`."""
    return {
        language: evaluate_store(
            scorer, store, heldout.sequence_length, heldout.tokens, f"evaluate {language}", should_stop
        )
        for language, store in heldout.stores.items()
    }


def choose_engine(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, sequence_length: int, wanted: EngineName = "auto"
) -> tuple[EngineName, str]:
    """`resident` where the whole model fits the memory that the device has free now, else `streamed`; and why."""
    if wanted != "auto":
        return wanted, "asked for"
    need = int(_MARGIN * (whole_bytes(spec, dtype) + batch_bytes(spec, batch_tokens(sequence_length))))
    room = free_bytes(device)
    why = f"the whole model takes {human_bytes(need)} in evaluation and {human_bytes(room)} are free on the"
    return ("resident" if need <= room else "streamed"), f"{why} {device.type}"


def open_scorer(
    index: CheckpointIndex, spec: ModelSpec, engine: EngineName, *, device: torch.device, dtype: torch.dtype
) -> Scorer:
    """A whole checkpoint on the device, or to be read layer by layer; what a hub has not sent yet is fetched first."""
    if engine == "resident":
        with console.bytes_bar("load") as progress:
            return load_full(index, spec, device=device, dtype=dtype, train=False, progress=progress)[0]
    weights = CheckpointWeights(index, spec, device, dtype)
    with console.bytes_bar("fetch") as progress:
        weights.fetch(progress)
    return LayerMajorScorer(weights)


def evaluate_folder(
    folder: Path,
    heldout: Heldout,
    *,
    device: torch.device,
    dtype: torch.dtype,
    engine: EngineName = "auto",
    say: Callable[[str], None] = lambda text: console.err.print(text, markup=False),
) -> dict[str, Evaluation]:
    """Score a whole checkpoint, on the device as a whole or a few layers at a time; says which, and why."""
    index = open_checkpoint(folder)
    spec = read_spec(index.config)
    give_back_freed_memory(device)
    chosen, why = choose_engine(spec, device, dtype, heldout.sequence_length, engine)
    say(f"evaluate {folder}: {chosen}, {why}")
    return evaluate_all(open_scorer(index, spec, chosen, device=device, dtype=dtype), heldout)


def evaluate_command(
    model: str, tokens: list[Path], sequence_length: int, device: str, dtype: str, engine: str = "auto", *,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`elo eval`: a model against token folders, tokenizer and ids checked; results by folder name.

    Unless `quiet`, says which engine is used and why.

    Raises:
        UsageError: no token folder, or a device, dtype or engine that does not exist. RefusedError: another tokenizer.
    """
    if not tokens:
        raise UsageError("elo eval: no token folder given; use --tokens DIR, made by elo data")
    if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "bf16", "fp32"):
        raise UsageError(f"elo eval: --device {device} --dtype {dtype}: use auto, cpu or cuda, and auto, bf16 or fp32")
    if engine not in get_args(EngineName):
        raise UsageError(f"elo eval: --engine {engine}: use {', '.join(get_args(EngineName))}")
    for path in tokens:
        require_folder(path)
    folder = resolve_model(model)
    where = choose_device(device)  # type: ignore[arg-type]
    width, _ = choose_dtype(dtype, where)  # type: ignore[arg-type]
    spec = read_spec(open_checkpoint(folder).config)
    stores = open_tokens({str(path): str(path) for path in tokens}, folder, spec.V)
    more: dict[str, Any] = {"say": lambda text: None} if quiet else {}
    found = evaluate_folder(
        folder, Heldout(stores, sequence_length), device=where, dtype=width, engine=engine, **more  # type: ignore[arg-type]
    )
    return {name: asdict(result) for name, result in found.items()}
