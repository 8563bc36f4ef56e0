"""One trial of `elo search`: ELO pretraining of some layers, a short alignment of the whole model, held-out losses. All
in memory; each number is the one that `elo run` with the same configuration gives.

The base model is on the device for the whole search and nothing changes it: embedding, norm and head serve every trial
as they are, and what a trial trains are copies. So ELO pretraining takes a copy of the detached layers, and alignment a
copy of the whole model: the search needs the base model's weights once more than an alignment alone does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from elo_engine import console
from elo_engine.calibrate import Calibration, calibrate, calibration_rows
from elo_engine.config import RunConfig
from elo_engine.corpora import Heldout
from elo_engine.data import Mixture
from elo_engine.detach import Source
from elo_engine.errors import FailedError, RefusedError
from elo_engine.evaluate import Stopped, batch_tokens, evaluate_all
from elo_engine.levers import stage_setting
from elo_engine.measure.expected import Needs
from elo_engine.measure.flops import arm_flops, calibration_flops
from elo_engine.measure.machine import device_room, give_back_freed_memory
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.setting import Setting
from elo_engine.model import names
from elo_engine.model.bridge import gaps
from elo_engine.model.decoder import Batch, Decoder
from elo_engine.model.full import load_full
from elo_engine.model.spec import ModelSpec
from elo_engine.stream.reading import CheckpointWeights
from elo_engine.stream.scoring import whole_bytes
from elo_engine.train.loop import Hooks, Progress, micro_batches, to_batch, train
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

Part = Literal["fit", "pretrain", "reattached", "align", "aligned"]
Layers = tuple[int, ...]  # of a trial; () detaches none: alignment alone


@dataclass(frozen=True)
class Shared:
    """What every trial uses and none changes."""

    source: Source
    base: Decoder  # whole, frozen, on the device
    heldout: Heldout

    @classmethod
    def load(cls, source: Source, heldout: Heldout) -> Shared:
        """Read the checkpoint, once for the whole search."""
        with console.bytes_bar("load the base model") as progress:
            base, _ = load_full(
                source.index, source.spec, device=source.device, dtype=source.dtype, train=False, progress=progress
            )
        return cls(source, base, heldout)


# -- what it takes


def trial_setting(source: Source, config: RunConfig, stage: Literal["pretrain", "align"]) -> Setting:
    """A stage of a trial, as the counts and the memory planner take it; alignment has the whole model on the device."""
    dtype = "bf16" if source.dtype.itemsize == 2 else "fp32"
    return stage_setting(config, stage, source.spec, source.device.type, dtype)


def trial_flops(source: Source, config: RunConfig, layers: Layers, heldout_tokens: int) -> dict[Part, float]:
    """Operations of each part of a trial, in their order: the shares of its progress."""
    align = trial_setting(source, config, "align")
    score = heldout_tokens * arm_flops(align).model.total / 3  # forward alone
    found: dict[Part, float] = {}
    if layers:
        pretrain = trial_setting(source, config, "pretrain")
        if pretrain.bridges:
            found["fit"] = calibration_flops(pretrain, sum(calibration_rows(config)) * pretrain.sequence_length)
        found["pretrain"] = arm_flops(pretrain).executed.total * pretrain.tokens_per_step * config.steps("pretrain")
        found["reattached"] = score
    found["align"] = arm_flops(align).executed.total * align.tokens_per_step * config.steps("align")
    return found | {"aligned": score}


def require_room(source: Source, trials: Mapping[Layers, RunConfig]) -> int:
    """What the search takes of the device at most, in bytes, before the base model is loaded.

    Raises:
        RefusedError: more than there is, with the numbers, and the way that needs less.
    """
    spec, width = source.spec, source.dtype.itemsize
    give_back_freed_memory(source.device)
    room, base = device_room(source.device), whole_bytes(spec, source.dtype)
    most = 0
    for layers, config in trials.items():
        shared = width * (spec.V * spec.D * (1 if spec.tied else 2) + spec.D)  # planned, and there already
        needs = {"alignment": Needs.of(trial_setting(source, config, "align")).device}
        if layers:
            needs["ELO pretraining"] = Needs.of(trial_setting(source, config, "pretrain")).device - shared
        what, need = max(needs.items(), key=lambda item: item[1])
        if base + need > room.bytes:
            of = f"layers {', '.join(map(str, layers))}" if layers else "alignment alone"
            raise RefusedError(
                f"elo search does not fit: the base model, which all trials share, takes {human_bytes(base)}, and "
                f"{what} of a trial ({of}) {human_bytes(need)} beside it; there are {human_bytes(room.bytes)} "
                f"({room.what}). A smaller micro_batch, recompute: layer or optimizer.state: 8bit need less; or run "
                "each candidate by itself, whose alignment can be streamed: elo run CONFIG detach.layers=[...] "
                "output=..., and compare their results.json"
            )
        most = max(most, base + need)
    return most


# -- the trial


def run_trial(
    shared: Shared,
    config: RunConfig,
    layers: Layers,
    mixture: Mixture,
    *,
    told: Callable[[Part, float], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Train and score; returns held-out evaluations by moment and language, the bridge's fit and seconds by stage.

    Every trial of one seed reads the same rows: ELO pretraining from the first on, alignment those after them, also
    where no layer is detached, so that it differs from the others in nothing but ELO pretraining.

    Args:
        told: called with the share of a part that is done.

    Raises:
        Stopped: `should_stop` said so; nothing is kept. FailedError: losses or gradients are not finite. UsageError,
        RefusedError: the bridge cannot be fitted to so few tokens, or has no room.
    """
    found: dict[str, Any] = {"evaluations": {}, "seconds": {}, "bridge": []}
    trained: dict[str, Tensor] = {}

    def score(model: Decoder, moment: Part) -> None:
        scored = {name: asdict(one) for name, one in evaluate_all(model, shared.heldout, should_stop).items()}
        for language, one in scored.items():
            if not math.isfinite(one["loss_nats"]):
                raise FailedError(f"the {moment} model's held-out loss of {language} is not finite")
        found["evaluations"][moment] = scored
        told(moment, 1.0)

    if layers:
        began = time.perf_counter()
        fitted = _fit(shared, config, layers, mixture, told, should_stop)
        if fitted is not None:
            found["bridge"] = [one.to_json() for one in fitted.fits]
            found["seconds"]["fit"] = time.perf_counter() - began
        began = time.perf_counter()
        trained = _pretrain(shared, config, layers, mixture, fitted, told, should_stop)
        found["seconds"]["pretrain"] = time.perf_counter() - began
    give_back_freed_memory(shared.source.device)  # before what takes the most
    model = _whole(shared, trained, config)
    del trained
    if layers:
        score(model, "reattached")
    began = time.perf_counter()
    _align(shared, config, model, mixture, told, should_stop)
    found["seconds"]["align"] = time.perf_counter() - began
    score(model, "aligned")
    return found


def score_base(shared: Shared, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """The base model's evaluations, in the form of a trial's."""
    scored = {name: asdict(one) for name, one in evaluate_all(shared.base, shared.heldout, should_stop).items()}
    return {"evaluations": {"base": scored}, "seconds": {}, "bridge": []}


def _fit(
    shared: Shared, config: RunConfig, layers: Layers, mixture: Mixture, told: Callable[[Part, float], None],
    should_stop: Callable[[], bool],
) -> Calibration | None:  # fmt: skip
    """As `calibrate.obtain_bridge`, from the model in memory; None where the trial has no bridge."""
    source, base, T = shared.source, shared.base, config.data.sequence_length
    if config.detach.bridge == "none" or not gaps(source.spec.layers, layers):
        return None
    weights = CheckpointWeights(
        source.index, source.spec, source.device, source.dtype,
        layers=dict(zip(base.layer_indices, base.layers, strict=True)),
        outer={"embedding": base.embedding_VD, "norm": base.norm_D, "head": base.head_VD},
    )  # fmt: skip
    rows, held = calibration_rows(config)

    def batches(first: int, count: int) -> list[Batch]:
        pieces = micro_batches(mixture.rows(first, count), max(1, batch_tokens(T) // T))
        return [to_batch(piece, source.device) for piece in pieces]

    def progress(share: float) -> None:
        if should_stop():
            raise Stopped
        told("fit", share)

    return calibrate(weights, layers, batches(0, rows), batches(rows, held), config.detach.ridge, progress)


def _hooks(part: Part, steps: int, told: Callable[[Part, float], None], should_stop: Callable[[], bool]) -> Hooks:
    return Hooks(on_step=lambda at, metrics: told(part, at.step / steps), should_stop=should_stop)


def _pretrain(
    shared: Shared, config: RunConfig, layers: Layers, mixture: Mixture, fitted: Calibration | None,
    told: Callable[[Part, float], None], should_stop: Callable[[], bool],
) -> dict[str, Tensor]:  # fmt: skip
    """The detached layers after ELO pretraining, by checkpoint name, as reattaching would write them."""
    section, spec, steps = config.pretrain, shared.source.spec, config.steps("pretrain")
    tensors, own = shared.base.frozen(), {name for layer in layers for name in names.layer_names(spec, layer)}
    tensors = {name: t.clone() if name in own else t for name, t in tensors.items() if name in own | _outer(spec)}
    model = Decoder(
        spec, tensors, layers, train_outer=False, recompute=section.runs_again,
        bridges=None if fitted is None else fitted.bridges,
    )  # fmt: skip
    del tensors
    optimizer = MasterAdamW(model, section.optimizer, seed=config.seed)
    finished = train(
        ResidentEngine(model, optimizer, section.rows_at_once), mixture, section, steps=steps,
        sequence_length=config.data.sequence_length, progress=Progress(),
        hooks=_hooks("pretrain", steps, told, should_stop),
    )  # fmt: skip
    if not finished:
        raise Stopped
    return {name: _as_written(shared.source, name, tensor) for name, tensor in optimizer.weights().items()}


def _outer(spec: ModelSpec) -> set[str]:
    return set(names.outer_names(spec))


def _whole(shared: Shared, trained: Mapping[str, Tensor], config: RunConfig) -> Decoder:
    """A copy of the base model with the trained layers in it, to be aligned."""
    spec, tensors = shared.source.spec, shared.base.frozen()
    copies = {name: trained.get(name, tensor).clone() for name, tensor in tensors.items()}
    every = tuple(range(spec.layers))
    return Decoder(spec, copies, every, train_outer=True, recompute=config.align.runs_again)


def _align(
    shared: Shared, config: RunConfig, model: Decoder, mixture: Mixture, told: Callable[[Part, float], None],
    should_stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Train the whole model, and leave its weights as a checkpoint of it would be read."""
    section, steps, T = config.align, config.steps("align"), config.data.sequence_length
    optimizer = MasterAdamW(model, section.optimizer, seed=config.seed)
    finished = train(
        ResidentEngine(model, optimizer, section.rows_at_once), mixture, section, steps=steps, sequence_length=T,
        progress=Progress(), hooks=_hooks("align", steps, told, should_stop),
        first_row=config.steps("pretrain") * config.pretrain.tokens_per_step // T,
    )  # fmt: skip
    if not finished:
        raise Stopped
    optimizer.zero_grad()
    live = model.trainable()
    for name, tensor in optimizer.weights().items():
        live[name].copy_(_as_written(shared.source, name, tensor))


def _as_written(source: Source, name: str, tensor: Tensor) -> Tensor:
    """A trained tensor rounded to the checkpoint's type, as it would be on the disk, in the type that computes."""
    return tensor.detach().to(source.device, source.index.entry(name).torch_dtype).to(source.dtype)
