"""The seam meter: how far a changed model's hidden states have moved from the base model's where layers were detached.

A seam is a place between two layers beside a detached one, or before the final norm; it is named by the layer that the
hidden state enters. Detached layers learn without what stood between them, so that is where a reattached model may not
fit together. Both models are taken through the device layer by layer, side by side: of each there is at most the
layer in use and the one that comes, whatever its size.

Three numbers a seam, over the tokens that carry a loss: the ratio of root mean squares (scale), the mean cosine of the
two states of a token (direction), and linear CKA (Kornblith et al. 2019, arXiv 1905.00414), which no rotation and no
common factor changes: whether the tokens still lie the same way to each other. docs/evaluation.md has their limits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine import console
from elo_engine.checkpoint import CheckpointIndex, open_checkpoint, resolve_model
from elo_engine.config import load_config
from elo_engine.corpora import open_tokens, require_folder
from elo_engine.data import TokenStore, sequential_rows
from elo_engine.detach import open_source
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.evaluate import batch_tokens
from elo_engine.measure.environment import choose_device, choose_dtype
from elo_engine.model.decoder import Batch
from elo_engine.model.layers import RopeTable, decoder_layer, scale_embedded
from elo_engine.model.spec import choose_layers, read_spec
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.train.loop import to_batch

# A token whose state in the base model is this many times as long as the median is left out: the few with massive
# activations (Sun et al. 2024, arXiv 2402.17762), mostly the first of a row, would be all that is measured.
MASSIVE = 6.0
_PIECE = 1024  # tokens that are in float64 at once


# -- two sets of hidden states


@dataclass(frozen=True)
class Likeness:
    """What `HiddenSums` found; None where it is not defined: no tokens, states of zero, or all tokens alike (CKA)."""

    tokens: int
    rms_ratio: float | None
    cosine: float | None
    cka: float | None


class HiddenSums:
    """Running sums over pairs of hidden states [N, D], in float64 on their device: 24 D^2 bytes whatever N."""

    def __init__(self, D: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens = 0
        self._x_D, self._y_D, self._cosine = zeros(D), zeros(D), zeros()
        self._xx_DD, self._yy_DD, self._xy_DD = zeros(D, D), zeros(D, D), zeros(D, D)

    def add(self, x_ND: Tensor, y_ND: Tensor) -> None:
        """States of the same tokens, the base's first."""
        for narrow_x, narrow_y in zip(x_ND.split(_PIECE), y_ND.split(_PIECE), strict=True):
            x, y = narrow_x.double(), narrow_y.double()
            self.tokens += len(x)
            self._x_D += x.sum(0)
            self._y_D += y.sum(0)
            self._xx_DD.addmm_(x.T, x)
            self._yy_DD.addmm_(y.T, y)
            self._xy_DD.addmm_(x.T, y)
            self._cosine += F.cosine_similarity(x, y, dim=1, eps=1e-30).sum()

    def result(self) -> Likeness:
        """CKA is |cov(x, y)|^2 / (|cov(x, x)| |cov(y, y)|) in Frobenius norms: the form over features of the paper's
        equation for centred Gram matrices.
        """
        n, squares_x, squares_y = self.tokens, float(self._xx_DD.trace()), float(self._yy_DD.trace())
        if not n or squares_x == 0 or squares_y == 0:
            return Likeness(n, None, None, None)

        def centred(products_DD: Tensor, left_D: Tensor, right_D: Tensor) -> float:
            return float((products_DD - torch.outer(left_D, right_D) / n).norm())

        own_x, own_y = centred(self._xx_DD, self._x_D, self._x_D), centred(self._yy_DD, self._y_D, self._y_D)
        cka = None
        if own_x > 1e-12 * squares_x and own_y > 1e-12 * squares_y:  # below it the difference is rounding
            cka = centred(self._xy_DD, self._x_D, self._y_D) ** 2 / (own_x * own_y)
        return Likeness(n, math.sqrt(squares_y / squares_x), float(self._cosine) / n, cka)


def compare_hidden(x_ND: Tensor, y_ND: Tensor) -> Likeness:
    """Two matrices of hidden states of the same tokens, the base's first."""
    sums = HiddenSums(x_ND.shape[1], x_ND.device)
    sums.add(x_ND, y_ND)
    return sums.result()


# -- two models


@dataclass(frozen=True)
class Seam:
    """One language at one seam: `boundary` is the layer that the state enters, the number of layers for the final
    norm; `left_out` counts tokens with massive activations, which are not among `tokens`.
    """

    language: str
    boundary: int
    tokens: int
    left_out: int
    rms_ratio: float | None
    cosine: float | None
    cka: float | None


def seams_of(layers: Sequence[int], of: int) -> tuple[int, ...]:
    """Before and after each detached layer, and before the final norm, of a model with so many layers."""
    return tuple(sorted({*layers, *(layer + 1 for layer in layers), of}))


@torch.no_grad()
def seam_meter(
    base: CheckpointWeights,
    changed: CheckpointWeights,
    batches: Mapping[str, Sequence[Batch]],
    boundaries: Sequence[int],
    *,
    massive: float | None = MASSIVE,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Seam]:
    """Compare two models at every boundary and in every language, in the order of the model.

    One pass over each, up to the last boundary. Takes, besides four layers at most, the hidden states of all batches
    in both models and 24 D^2 bytes.

    Args:
        batches: by language; tokens without a label are run and not counted.
        massive: leave out tokens whose state in the base is more than so many times as long as the median of their
            language at that seam; None: none.

    Raises:
        RefusedError: the models have other shapes. UsageError: a boundary that does not exist, or no token to count.
        FailedError: a checkpoint cannot be read, or a hidden state is not finite.
    """
    spec, other = base.spec, changed.spec
    if (spec.layers, spec.D, spec.V) != (other.layers, other.D, other.V):
        raise RefusedError(
            f"{changed.index.folder}: {other.layers} layers, D={other.D}, V={other.V}, and {base.index.folder} has "
            f"{spec.layers}, D={spec.D}, V={spec.V}; give the base that this model was made from"
        )
    wrong = [boundary for boundary in boundaries if not 0 <= boundary <= spec.layers]
    if wrong or not boundaries:
        raise UsageError(f"seams {list(boundaries)}: a model of {spec.layers} layers has seams 0 to {spec.layers}")
    flat = [batch for group in batches.values() for batch in group]
    kept = {language: [batch.labels_N >= 0 for batch in group] for language, group in batches.items()}
    empty = [language for language, group in kept.items() if not any(bool(keep.any()) for keep in group)]
    if empty or not flat:
        raise UsageError(f"seams: no token of {empty[0] if empty else 'any language'} has a successor; give more text")
    found: list[Seam] = []
    last = max(boundaries)
    with ExitStack() as stack:
        sides = [_Side(weights, flat, stack) for weights in (base, changed)]
        for boundary in range(last + 1):
            for side in sides:
                side.advance_to(boundary)
            if boundary in boundaries:
                first = 0
                for language, keeps in kept.items():
                    here = slice(first, first + len(keeps))
                    pairs = (sides[0].hidden[here], sides[1].hidden[here])
                    found.append(_seam(language, boundary, pairs, keeps, massive, changed.index.folder))
                    first += len(keeps)
            progress((boundary + 1) / (last + 1))
    return found


class _Side:
    """One model on its way through all batches."""

    def __init__(self, weights: CheckpointWeights, batches: list[Batch], stack: ExitStack) -> None:
        self.spec, self.batches = weights.spec, batches
        rope = RopeTable(weights.spec, weights.device)
        self._ropes = [rope.gather(batch.packing, batch.longest) for batch in batches]
        self._units = stack.enter_context(weights.sweep())
        self.hidden: list[Tensor] = []

    def advance_to(self, boundary: int) -> None:
        """From the state that enters the layer before to the one that enters this; to 0 from the token ids."""
        block = self._units.embedding() if boundary == 0 else self._units.layer(boundary - 1)
        with block as weights:
            if boundary == 0:
                table_VD = weights["embedding"]
                self.hidden = [
                    scale_embedded(self.spec, F.embedding(batch.ids_N, table_VD)) for batch in self.batches
                ]
                del table_VD
            for m, batch in enumerate(self.batches if boundary else ()):
                self.hidden[m] = decoder_layer(
                    self.spec, boundary - 1, weights, self.hidden[m], self._ropes[m], batch.packing
                )
            weights.clear()


def _seam(
    language: str, boundary: int, states: tuple[list[Tensor], list[Tensor]], keeps: list[Tensor],
    massive: float | None, folder: Path,
) -> Seam:  # fmt: skip
    lengths = [x_ND.float().norm(dim=1) for x_ND in states[0]]
    kept_lengths_N = torch.cat([length_N[keep_N] for length_N, keep_N in zip(lengths, keeps, strict=True)])
    limit = math.inf if massive is None else massive * float(kept_lengths_N.median())
    sums = HiddenSums(states[0][0].shape[1], states[0][0].device)
    for x_ND, y_ND, length_N, keep_N in zip(*states, lengths, keeps, strict=True):
        inside_N = keep_N & (length_N <= limit)
        sums.add(x_ND[inside_N], y_ND[inside_N])
    likeness = sums.result()
    numbers = [number for number in (likeness.rms_ratio, likeness.cosine, likeness.cka) if number is not None]
    if not all(map(math.isfinite, (*numbers, limit if massive is not None else 0.0))):
        raise FailedError(
            f"{folder}: the hidden states at seam {boundary} ({language}) are not finite in it or in its base, so the "
            "weights below are damaged or too large for this type; try --dtype fp32, and elo inspect --verify"
        )
    return Seam(language, boundary, left_out=len(kept_lengths_N) - likeness.tokens, **asdict(likeness))


# -- `elo seams`


def seams_command(
    target: str, base: str | None, tokens: list[Path], *, layers: str | None = None,
    sequence_length: int | None = None, max_tokens: int = 8192, device: str | None = None, dtype: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`elo seams`: a run before and after its alignment, or any changed model, against its base.

    Of a run, its configuration says everything that is not given; held-out losses of the base, the reattached and the
    aligned model are put beside the seams, from its results.

    Raises:
        UsageError: neither a run nor a model, something that has to be given and is not, or values that do not exist.
        RefusedError: other shapes, or token shards of another tokenizer.
    """
    if device not in (None, "auto", "cpu", "cuda") or dtype not in (None, "auto", "bf16", "fp32"):
        raise UsageError(f"elo seams: --device {device} --dtype {dtype}: use auto, cpu or cuda, and auto, bf16 or fp32")
    if max_tokens < 1:
        raise UsageError(f"elo seams: --max-tokens {max_tokens}: at least 1 token a text is needed")
    given = None if layers is None else [item.strip() for item in layers.split(",")]
    losses: dict[str, dict[str, float]] = {}
    run = Path(target)
    if (run / "config.resolved.yaml").exists():
        config = load_config(run / "config.resolved.yaml")
        asked = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
        config = config.model_copy(update={"output": str(run), **asked})
        models = {"reattached": run / "reattached", "aligned": run / "model"}
        models = {name: folder for name, folder in models.items() if folder.exists()}
        if not models:
            raise UsageError(f"{run}: this run has neither reattached/ nor model/ yet; continue it with elo run")
        source = open_source(config, resolve_model(base) if base else None)
        index, where, width = source.index, source.device, source.dtype
        chosen = source.layers if given is None else choose_layers([*given], source.spec.layers)
        shards = {str(path): str(path) for path in tokens} or dict(config.evaluate.shards)
        length = sequence_length or config.data.sequence_length
        losses = _losses(run, shards)
    else:
        if base is None:
            raise UsageError(f"elo seams: {target} is not a run folder, so --base MODEL has to say what it came from")
        models = {"model": resolve_model(target)}
        index = open_checkpoint(resolve_model(base))
        where = choose_device(device or "auto")  # type: ignore[arg-type]
        width, _ = choose_dtype(dtype or "auto", where)  # type: ignore[arg-type]
        chosen = choose_layers([*(given or ["first", "last"])], read_spec(index.config).layers)
        shards, length = {str(path): str(path) for path in tokens}, sequence_length or 2048
    if not shards:
        raise UsageError("elo seams: no held-out text; use --tokens DIR, made by elo data")
    for path in shards.values():
        require_folder(Path(path))
    return _measure(index, models, chosen, shards, length, max_tokens, where, width) | {"loss_nats": losses}


def _measure(
    index: CheckpointIndex, models: dict[str, Path], layers: tuple[int, ...], shards: dict[str, str], length: int,
    max_tokens: int, device: torch.device, dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    spec = read_spec(index.config)
    stores = open_tokens(shards, index.folder, spec.V)
    batches = {name: _batches(store, length, max_tokens, device) for name, store in stores.items()}
    base = _weights(index, device, dtype)
    boundaries, rows = seams_of(layers, spec.layers), []
    for name, folder in models.items():
        changed = _weights(open_checkpoint(folder), device, dtype)
        with console.progress_bar(f"seams {name}", 100) as bar:

            def told(share: float, bar: Callable[[int, str], None] = bar) -> None:
                bar(int(100 * share), "")

            found = seam_meter(base, changed, batches, boundaries, progress=told)
        rows += [{"model": name, **asdict(seam)} for seam in found]
    return {
        "base": str(index.folder),
        "models": {name: str(folder) for name, folder in models.items()},
        "layers": list(layers),
        "layers_total": spec.layers,
        "D": spec.D,
        "seams": rows,
    }


def _weights(index: CheckpointIndex, device: torch.device, dtype: torch.dtype) -> CheckpointWeights:
    weights = CheckpointWeights(index, read_spec(index.config), device, dtype)
    with console.bytes_bar("fetch") as progress:
        weights.fetch(progress)
    return weights


def _batches(store: TokenStore, length: int, max_tokens: int, device: torch.device) -> list[Batch]:
    per_batch = batch_tokens(length)
    wanted = max(1, math.ceil(min(max_tokens, store.tokens_total) / per_batch))
    return [to_batch(rows, device) for rows in islice(sequential_rows(store, length, per_batch // length), wanted)]


def _losses(run: Path, shards: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Language -> moment -> held-out loss in nats a token, as far as the run has it."""
    path = run / "results.json"
    if not path.exists():
        return {}
    evaluations = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
    found = {
        language: {moment: by[language]["loss_nats"] for moment, by in evaluations.items() if language in by}
        for language in shards
    }
    return {language: moments for language, moments in found.items() if moments}


def describe_seams(found: dict[str, Any]) -> list[str]:
    """What `seams_command` returns, for a person."""
    total, wide = found["layers_total"], max([8, *(len(row["language"]) for row in found["seams"])])
    lines = [
        f"{', '.join(found['models'].values())} against {found['base']}, detached layers {found['layers']} of {total}",
        f"{'model':<11} {'text':<{wide}} {'seam':<20} {'RMS ratio':>9} {'cosine':>7} {'CKA':>7} {'tokens':>8} left out",
    ]

    def number(value: float | None, width: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.4f}"

    for row in found["seams"]:
        entered = "final norm" if row["boundary"] == total else f"layer {row['boundary']}"
        lines.append(
            f"{row['model']:<11} {row['language']:<{wide}} {'into ' + entered:<20} {number(row['rms_ratio'], 9)} "
            f"{number(row['cosine'], 7)} {number(row['cka'], 7)} {row['tokens']:>8,} {row['left_out']:,}"
        )
    for language, moments in found["loss_nats"].items():
        shown = ", ".join(f"{moment} {loss:.4f}" for moment, loss in moments.items())
        lines.append(f"held-out loss of {language}, nats/token: {shown}")
    if any(row["tokens"] < 2 * found["D"] for row in found["seams"]):
        lines.append(
            f"CKA is too high where tokens are few: it wants well over twice the model's width, {2 * found['D']:,}"
        )
    return lines
