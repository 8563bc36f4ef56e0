"""Fit the bridge of ELO pretraining: one pass of the base model over rows of the training mixture, layer by layer with
two layers on the device at most, and a least-squares problem for every gap between the detached layers.

The rows are the first that training itself will read, in its own mixture and order; training on the same rows later is
no harm, for the fit sees hidden states and no labels. The last tenth of them is held out: the fit is tested on it. Done
once a run, before its first step: `RUN/pretrain/bridge.safetensors` holds the fp32 maps and the numbers of the fit, and
whoever resumes the run reads them there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from elo_engine import console
from elo_engine.checkpoint import write_safetensors
from elo_engine.checkpoint.commit import sync_folder
from elo_engine.config import RunConfig
from elo_engine.data import Mixture
from elo_engine.detach import Source
from elo_engine.errors import FailedError, Interrupted, RefusedError, UsageError
from elo_engine.evaluate import Stopped, batch_tokens
from elo_engine.measure.machine import give_back_freed_memory
from elo_engine.measure.meter import human_bytes
from elo_engine.model.bridge import Bridge, Collector, Fit, Gap, GapStatistics, Observer, gaps
from elo_engine.model.decoder import Batch
from elo_engine.model.layers import RopeTable, decoder_layer, scale_embedded
from elo_engine.model.spec import ModelSpec
from elo_engine.run_dir import RunDir
from elo_engine.stage import snapshot_identity
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.stream.scoring import batch_bytes, free_bytes, layer_elements
from elo_engine.train.loop import StopSignal, micro_batches, to_batch

_HIDDEN_SHARE = 4  # the hidden states of a pass take at most one over this of what is free
_HELD_OUT = 10  # one row of so many, and one at least


@dataclass(frozen=True)
class GapFit:
    """The fit of one gap, and how it does on rows that it was not fitted to; see `bridge.Fit`."""

    gap: Gap
    fit: Fit
    held_r2_change: float
    held_r2_output: float
    held_tokens: float

    def to_json(self) -> dict[str, Any]:
        """The numbers; one that is not finite is null."""
        fit = self.fit
        found = {
            "r2_change": fit.r2_change, "r2_output": fit.r2_output, "tokens": fit.tokens, "left_out": fit.left_out,
            "held_r2_change": self.held_r2_change, "held_r2_output": self.held_r2_output,
            "held_tokens": self.held_tokens,
        }  # fmt: skip
        return {"gap": list(self.gap)} | {name: x if math.isfinite(x) else None for name, x in found.items()}

    @classmethod
    def of(cls, numbers: Mapping[str, Any], bridge: Bridge) -> GapFit:
        """What `to_json` gave, with the map."""
        a, b = numbers["gap"]
        known = {name: math.nan if x is None else float(x) for name, x in numbers.items() if name != "gap"}
        held = {name: known.pop(name) for name in ("held_r2_change", "held_r2_output", "held_tokens")}
        return cls((a, b), Fit(bridge, **known), **held)

    def describe(self, layers: int) -> str:
        """In one line."""
        (a, b), fit = self.gap, self.fit
        start = "the embedding" if a < 0 else f"layer {a}"
        end = "the final norm" if b == layers else f"layer {b}"
        return (
            f"bridge from {start} to {end}: R2 of the change {fit.r2_change:.3f}, {self.held_r2_change:.3f} on "
            f"held-out rows, of the state {fit.r2_output:.3f} and {self.held_r2_output:.3f}; {fit.tokens:,.0f} tokens, "
            f"{fit.left_out:,.0f} left out for massive activations"
        )


@dataclass(frozen=True)
class Calibration:
    """The fitted gaps in order, and what they were fitted to: {} where that was not kept."""

    fits: tuple[GapFit, ...]
    statistics: dict[Gap, GapStatistics]

    @property
    def bridges(self) -> dict[Gap, Bridge]:
        """The maps in fp32, as `load_shallow` and `Decoder` take them."""
        return {found.gap: found.fit.bridge for found in self.fits}


def calibration_rows(config: RunConfig) -> tuple[int, int]:
    """Rows of `detach.bridge_tokens`, two at least: those that the bridge is fitted to, and those held out after them.
    """
    rows = max(2, math.ceil(config.detach.bridge_tokens / config.data.sequence_length))
    held = math.ceil(rows / _HELD_OUT)
    return rows - held, held


def calibrate(
    weights: CheckpointWeights,
    layers: tuple[int, ...],
    fitted: Sequence[Batch],
    held: Sequence[Batch],
    ridge: float,
    progress: Callable[[float], None],
) -> Calibration:
    """Run the base model over the batches and fit a map for every gap between the detached `layers`.

    progress: called with the share of the pass that is done; what it raises ends it.

    Raises:
        UsageError, FailedError: see `GapStatistics.fit`; a checkpoint that cannot be read. RefusedError: no room.
    """
    spec, device = weights.spec, weights.device
    wanted, batches = gaps(spec.layers, layers), [*fitted, *held]
    _require_room(weights, wanted, max(len(batch.ids_N) for batch in batches))
    collectors = [Collector({gap: GapStatistics(spec.D, device) for gap in wanted}) for _ in range(2)]
    watch = [collectors[0].observers] * len(fitted) + [collectors[1].observers] * len(held)
    # two states of a token are there at a time: the present one, and the one at the nearer end of a gap
    tokens = free_bytes(device) // _HIDDEN_SHARE // (2 * spec.D * weights.dtype.itemsize)
    per_sweep = max(1, tokens // max(len(batch.ids_N) for batch in batches))
    sweeps = range(0, len(batches), per_sweep)
    for number, begin in enumerate(sweeps):

        def told(share: float, before: int = number) -> None:
            progress((before + share) / len(sweeps))

        group = slice(begin, begin + per_sweep)
        _pass(weights, batches[group], watch[group], wanted[-1][1], told)
    known, unseen = (collector.statistics for collector in collectors)
    fits = []
    for gap in wanted:
        fit = known[gap].fit(ridge)
        fits.append(GapFit(gap, fit, *unseen[gap].r2(fit.bridge), unseen[gap].tokens))
    return Calibration(tuple(fits), known)


@torch.no_grad()
def _pass(
    weights: CheckpointWeights, batches: Sequence[Batch], watch: Sequence[Mapping[int, Observer]], last: int,
    progress: Callable[[float], None],
) -> None:  # fmt: skip
    """The model up to what enters layer `last`, for all batches layer by layer; each has its own observers of what
    enters a layer. The operations on a batch and their order are those of `Decoder.hidden_states`.
    """
    spec, table = weights.spec, RopeTable(weights.spec, weights.device)
    ropes = [table.gather(batch.packing, batch.longest) for batch in batches]
    with weights.sweep() as units:
        with units.embedding() as unit:
            hidden = [scale_embedded(spec, F.embedding(batch.ids_N, unit["embedding"])) for batch in batches]
            unit.clear()
        for number in range(last + 1):
            for observers, states_ND in zip(watch, hidden, strict=True):
                if number in observers:
                    observers[number](states_ND)
            if number == last:
                return
            with units.layer(number) as unit:
                for m, (batch, rope) in enumerate(zip(batches, ropes, strict=True)):
                    hidden[m] = decoder_layer(spec, number, unit, hidden[m], rope, batch.packing)
                    progress((number * len(batches) + m + 1) / (last * len(batches)))
                unit.clear()


def calibration_bytes(spec: ModelSpec, dtype: torch.dtype, gap_count: int, tokens: int) -> int:
    """At most what a pass in batches of `tokens` takes of the device besides the hidden states between layers: two
    units, a batch, two sets of sums and what solving for one gap takes, in fp64.
    """
    layer = layer_elements(spec)
    units = dtype.itemsize * (layer + max(layer, spec.V * spec.D))
    return units + batch_bytes(spec, tokens) + 16 * spec.D**2 * (2 * gap_count + 3)


def _require_room(weights: CheckpointWeights, wanted: Sequence[Gap], tokens: int) -> None:
    need = calibration_bytes(weights.spec, weights.dtype, len(wanted), tokens)
    room = free_bytes(weights.device)
    if need > room * (_HIDDEN_SHARE - 1) // _HIDDEN_SHARE:
        raise RefusedError(
            f"bridge: the pass of the base model takes {human_bytes(need)} on the {weights.device.type} beside its "
            f"hidden states, and {human_bytes(room)} are free. Free some memory, or use device: cpu, or "
            "detach.bridge: none"
        )


# -- of a run


def bridge_path(run: RunDir) -> Path:
    """`RUN/pretrain/bridge.safetensors`."""
    return run.folder("pretrain") / "bridge.safetensors"


def obtain_bridge(
    run: RunDir, source: Source, mixture: Mixture, *, keep_statistics: bool = False
) -> Calibration | None:
    """The bridge of this run: fitted and saved by whoever comes first, read by all others. None where the configuration
    wants none, or no layer is missing.

    keep_statistics: also save what it was fitted to, which a later fit can go on from.

    Raises:
        UsageError, RefusedError, FailedError: too few tokens, no room, or a file that is damaged, of another run, or
            gone although the run has trained with it. Interrupted: a signal came; nothing is kept.
    """
    config, path = run.config, bridge_path(run)
    if config.detach.bridge == "none":
        return None
    if not gaps(source.spec.layers, source.layers):
        run.say("bridge: every layer is detached, so there is no gap to bridge")
        return None
    about = snapshot_identity(run, "pretrain", source.index, config) | {
        "layers": list(source.layers), "bridge_tokens": config.detach.bridge_tokens, "ridge": config.detach.ridge,
        "sequence_length": config.data.sequence_length,
    }  # fmt: skip
    if path.exists():
        found = _read(path, about, source, keep_statistics)
        run.say(f"bridge: read from {path}")
        for one in found.fits:
            run.say(f"  {one.describe(source.spec.layers)}")
        return found
    if any(step for stage in ("pretrain", "align") for step in run.folder(stage).glob("step-*")):
        raise FailedError(
            f"{path}: is gone although this run has trained with it, and another fit would be another model; put the "
            "file back, or start a new run in another output folder"
        )
    return _fit(run, source, mixture, about, keep_statistics)


def _fit(
    run: RunDir, source: Source, mixture: Mixture, about: dict[str, Any], keep_statistics: bool
) -> Calibration:
    config, spec, began = run.config, source.spec, time.perf_counter()
    rows, held = calibration_rows(config)
    T = config.data.sequence_length
    if rows * T < spec.D + 1:  # said before the model is read
        raise UsageError(
            f"detach.bridge_tokens {config.detach.bridge_tokens}: {rows} rows of {T} tokens, less those held out, "
            f"cannot determine a map of {spec.D} features; give several times {spec.D} tokens, the default is 32768"
        )
    weights = CheckpointWeights(source.index, spec, source.device, source.dtype)
    with console.bytes_bar("fetch the whole model for its bridge") as fetched:
        weights.fetch(fetched)
    give_back_freed_memory(source.device)

    def batches(first: int, count: int) -> list[Batch]:
        pieces = micro_batches(mixture.rows(first, count), max(1, batch_tokens(T) // T))
        return [to_batch(piece, source.device) for piece in pieces]

    run.status(state="running", stage="fit the bridge")
    stop = StopSignal()
    with stop.installed(), console.progress_bar("fit the bridge", 1000) as bar:

        def told(share: float) -> None:
            if stop():
                raise Stopped
            bar(int(1000 * share), "")

        try:
            found = calibrate(
                weights, source.layers, batches(0, rows), batches(rows, held), config.detach.ridge, told
            )
        except Stopped:
            raise Interrupted(
                "interrupted while the bridge was fitted, before the first step; nothing of it is kept. Begin again "
                "with --resume auto"
            ) from None
        _save(bridge_path(run), found, about, keep_statistics)
    if stop():
        raise Interrupted("interrupted after the bridge was fitted, before the first step; continue with --resume auto")
    seconds = time.perf_counter() - began
    run.say(
        f"bridge: fitted to rows 0 to {rows - 1} of the training mixture in {seconds:.1f} s, tested on the {held} "
        f"after them; {human_bytes(bridge_path(run).stat().st_size)} in {bridge_path(run)}"
    )
    for one in found.fits:
        run.say(f"  {one.describe(spec.layers)}")
    run.metric(
        {
            "event": "bridge",
            "rows": rows,
            "rows_held_out": held,
            "ridge": config.detach.ridge,
            "seconds": seconds,
            "gaps": [one.to_json() for one in found.fits],
        }
    )
    give_back_freed_memory(source.device)
    return found


# -- the file


def _save(path: Path, found: Calibration, about: dict[str, Any], keep_statistics: bool) -> None:
    """Whole or not at all; the run's lock keeps other writers away."""
    tensors: dict[str, Tensor] = {}
    for gap, bridge in found.bridges.items():
        name = f"{gap[0]}.{gap[1]}"
        tensors |= {f"{name}.matrix": bridge.matrix_DD, f"{name}.bias": bridge.bias_D}
        if keep_statistics:
            state = found.statistics[gap].state()
            tensors |= {f"{name}.statistics.{key}": total for key, total in state.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = {"identity": about, "gaps": [one.to_json() for one in found.fits], "sha256": _hash(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    write_safetensors(temporary, tensors, {"elo_bridge": json.dumps(content)})
    os.replace(temporary, path)
    sync_folder(path.parent)
    sync_folder(path.parent.parent)


def _read(path: Path, about: dict[str, Any], source: Source, keep_statistics: bool) -> Calibration:
    try:
        with safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["elo_bridge"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise FailedError(f"{path}: cannot be read as a bridge ({error}); {_RESTORE}") from error
    if _hash(tensors) != content["sha256"]:
        raise FailedError(f"{path}: its tensors are not those that were written; {_RESTORE}")
    before = content["identity"]
    different = sorted(key for key in before.keys() | about.keys() if before.get(key) != about.get(key))
    if different:
        told = "; ".join(f"{key}: then {before.get(key)!r}, now {about.get(key)!r}" for key in different)
        raise RefusedError(f"{path}: this bridge was not fitted for this run ({told}); {_RESTORE}")
    fits, statistics = [], {}
    for numbers in content["gaps"]:
        name = "{}.{}".format(*numbers["gap"])
        fits.append(GapFit.of(numbers, Bridge(tensors[f"{name}.matrix"], tensors[f"{name}.bias"])))
        if keep_statistics:
            kept = GapStatistics(source.spec.D, source.device)
            prefix = f"{name}.statistics."
            kept.load({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
            statistics[fits[-1].gap] = kept
    return Calibration(tuple(fits), statistics)


_RESTORE = "put the file that belongs to this run back, or start a new run in another output folder"


def _hash(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
