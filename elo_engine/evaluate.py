"""Held-out loss, perplexity, bits per byte and cloze accuracy of a model, per language.

Every document is scored once, in rows of the given length; a document that spans rows loses its earlier context
there, like in training. The first token of a document is not predicted unless the tokenizer puts a bos token before
it, so bits per byte counts a document's bytes in full against one prediction fewer.

A model that is on the device as a whole is scored batch by batch; one of which only a few layers are there at a time
takes batches in groups (`stream/scoring.py`). Losses, and the order in which they are added, are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from elo_engine import console
from elo_engine.checkpoint import CheckpointIndex, open_checkpoint, resolve_model
from elo_engine.cloze import Cloze, ClozeItems, ClozeShape
from elo_engine.corpora import Heldout, open_tokens, require_folder
from elo_engine.data import RowBatch, TokenStore, sequential_rows
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
    total, count, seen = 0.0, 0, 0
    rows_of_all = islice(sequential_rows(store, sequence_length, per_batch // sequence_length), batches)
    for rows, losses_N in _scored(scorer, rows_of_all, batches, per_batch, title, should_stop):
        total += float(losses_N.double().sum())
        count += int((rows.labels_BT >= 0).sum())
        seen += rows.ids_BT.size
    share = min(1.0, seen / store.tokens_total)
    loss = total / max(1, count)
    text_bytes = round(store.text_bytes * share)
    return Evaluation(loss, math.exp(min(loss, 700.0)), total / math.log(2) / max(1, text_bytes), count, text_bytes)


def cloze_store(
    scorer: Scorer,
    store: TokenStore,
    items: int,
    shape: ClozeShape | None = None,
    seed: int = 0,
    title: str = "cloze",
    should_stop: Callable[[], bool] = lambda: False,
) -> Cloze:
    """How often a model finds the true continuation among those of other places of one held-out set.

    Raises:
        UsageError: as `ClozeItems.draw`. Stopped: as `evaluate_store`.
    """
    drawn = ClozeItems.draw(store, items, shape, seed)
    per_batch = max(1, TOKENS_AT_ONCE // drawn.row_tokens)
    batches = math.ceil(drawn.rows / per_batch)
    sums: list[np.ndarray] = []
    scored = _scored(scorer, drawn.batches(per_batch), batches, per_batch * drawn.row_tokens, title, should_stop)
    for _, losses_N in scored:
        sums.append(losses_N.double().view(-1, drawn.row_tokens).sum(1).cpu().numpy())
    return drawn.judge(np.concatenate(sums))


def _scored(
    scorer: Scorer, coming: Iterable[RowBatch], batches: int, per_batch: int, title: str,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[RowBatch, Tensor]]:  # fmt: skip
    """Each of so many batches of at most `per_batch` tokens with its losses, taken in groups as suits the scorer."""
    at_once = 1 if isinstance(scorer, Decoder) else max(1, scorer.tokens_at_once // per_batch)
    source, done = iter(coming), 0
    with console.progress_bar(title, batches) as bar:
        while group := list(islice(source, at_once)):

            def told(share: float, before: int = done, size: int = len(group)) -> None:
                if should_stop():
                    raise Stopped
                bar(before + int(share * size), "")

            moved = [to_batch(rows, scorer.device) for rows in group]
            yield from zip(group, _losses(scorer, moved, told), strict=True)
            done += len(group)
            told(0.0, done)


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


def open_folder(
    folder: Path,
    sequence_length: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    engine: EngineName = "auto",
    say: Callable[[str], None] = lambda text: console.err.print(text, markup=False),
) -> Scorer:
    """A whole checkpoint, to be scored on the device as a whole or a few layers at a time; says which, and why."""
    index = open_checkpoint(folder)
    spec = read_spec(index.config)
    give_back_freed_memory(device)
    chosen, why = choose_engine(spec, device, dtype, sequence_length, engine)
    say(f"evaluate {folder}: {chosen}, {why}")
    return open_scorer(index, spec, chosen, device=device, dtype=dtype)


def evaluate_folder(
    folder: Path,
    heldout: Heldout,
    *,
    device: torch.device,
    dtype: torch.dtype,
    engine: EngineName = "auto",
    say: Callable[[str], None] = lambda text: console.err.print(text, markup=False),
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Evaluation]:
    """Score a whole checkpoint on every language of a held-out set; as `open_folder` and `evaluate_all`."""
    scorer = open_folder(folder, heldout.sequence_length, device=device, dtype=dtype, engine=engine, say=say)
    return evaluate_all(scorer, heldout, should_stop)


def evaluate_command(
    model: str, tokens: list[Path], sequence_length: int, device: str, dtype: str, engine: str = "auto", *,
    quiet: bool = False, cloze: int = 0, cloze_shape: str = "64,16,4",
) -> dict[str, Any]:  # fmt: skip
    """`elo eval`: a model against token folders, tokenizer and ids checked; results by folder name.

    Unless `quiet`, says which engine is used and why. With `cloze` so many questions are asked about each folder's
    text, and each result has a key `cloze`.

    Raises:
        UsageError: no token folder, or a device, dtype, engine or cloze shape that does not exist, or text that is too
        short for it. RefusedError: another tokenizer.
    """
    if not tokens:
        raise UsageError("elo eval: no token folder given; use --tokens DIR, made by elo data")
    if device not in ("auto", "cpu", "cuda") or dtype not in ("auto", "bf16", "fp32"):
        raise UsageError(f"elo eval: --device {device} --dtype {dtype}: use auto, cpu or cuda, and auto, bf16 or fp32")
    if engine not in get_args(EngineName):
        raise UsageError(f"elo eval: --engine {engine}: use {', '.join(get_args(EngineName))}")
    shape = ClozeShape.parse(cloze_shape)
    for path in tokens:
        require_folder(path)
    folder = resolve_model(model)
    where = choose_device(device)  # type: ignore[arg-type]
    width, _ = choose_dtype(dtype, where)  # type: ignore[arg-type]
    spec = read_spec(open_checkpoint(folder).config)
    heldout = Heldout(open_tokens({str(path): str(path) for path in tokens}, folder, spec.V), sequence_length)
    for store in heldout.stores.values() if cloze else ():
        ClozeItems.draw(store, 1, shape)  # text that is too short is said before the model is read
    more: dict[str, Any] = {"say": lambda text: None} if quiet else {}
    scorer = open_folder(
        folder, sequence_length, device=where, dtype=width, engine=engine, **more  # type: ignore[arg-type]
    )
    found = {name: asdict(result) for name, result in evaluate_all(scorer, heldout).items()}
    for name, store in heldout.stores.items() if cloze else ():
        found[name]["cloze"] = asdict(cloze_store(scorer, store, cloze, shape, title=f"cloze {name}"))
    return found


def describe_evaluation(name: str, result: dict[str, Any]) -> str:
    """One folder's result of `evaluate_command` for a person."""
    line = (
        f"{name}: loss {result['loss_nats']:.4f} nats/token, perplexity {result['perplexity']:.3f}, "
        f"{result['bits_per_byte']:.4f} bits/byte over {result['tokens_loss']:,} tokens"
    )
    cloze = result.get("cloze")
    if cloze is None:
        return line
    return (
        f"{line}; cloze {100 * cloze['accuracy']:.1f} % (95 %: {100 * cloze['low']:.1f} to {100 * cloze['high']:.1f}; "
        f"chance {100 * cloze['chance']:.1f}) of {cloze['items']:,} questions"
    )
