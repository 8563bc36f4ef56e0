"""`elo profile`: one steady optimizer step of a stage, taken apart.

The step is that of train/loop.py, made of the same pieces: rows of the mixture, micro-batches, forward, loss,
backward, AdamW. Only the loss is called here in its two halves, hidden states and head, so that each has a range in
the trace. Nothing is written but the new folder: a run's own folder stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from elo_engine.checkpoint import open_checkpoint
from elo_engine.config import AlignConfig, RunConfig, StageConfig, apply_override, load_config, make_config
from elo_engine.corpora import make_mixture, require_shards
from elo_engine.data import NO_LABEL, RowBatch
from elo_engine.detach import open_source
from elo_engine.errors import RefusedError, UsageError
from elo_engine.fp8_check import refuse_without_fp8
from elo_engine.measure.breakdown import HIDDEN_GRADIENT, NATIVE
from elo_engine.measure.environment import choose_device, choose_dtype
from elo_engine.measure.machine import device_room, give_back_freed_memory
from elo_engine.measure.profiler import (
    Conditions,
    analyse,
    capture,
    describe,
    memory_snapshot,
    new_folder,
    part,
    refuse_existing,
    time_step,
    write_files,
)
from elo_engine.measure.roofline import StepShapes, attention_pairs, engine_work, measure_ceilings
from elo_engine.model import cpu_native, names, ops
from elo_engine.model.bridge import Bridge, Gap, gaps
from elo_engine.model.decoder import Decoder
from elo_engine.model.full import load_full
from elo_engine.model.presets import preset_spec
from elo_engine.model.shallow import load_shallow, shallow_names
from elo_engine.model.spec import ModelSpec, choose_layers
from elo_engine.plan import Planning, Target, fitted_here, make_plan, require_memory
from elo_engine.plan import Subject as Planned
from elo_engine.plan_refusals import stage_refusal
from elo_engine.train.loop import micro_batches, to_batch
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import check_first_gradients
from elo_engine.train.schedule import learning_rate

StageName = Literal["pretrain", "align"]
NATIVE_OPS = ("attention_forward", "attention_backward", "frozen_head", "softmax_tile", "adamw_8bit")


@dataclass
class Subject:
    """A stage, ready to take its steps from the first on."""

    name: str  # of the model
    config: RunConfig
    stage: StageName
    model: Decoder
    optimizer: MasterAdamW
    rows: Callable[[int], RowBatch]  # of a step
    reasons: tuple[str, ...]  # why this dtype and these kernels

    @property
    def section(self) -> StageConfig:
        """The stage's configuration."""
        return self.config.pretrain if self.stage == "pretrain" else self.config.align


def _blank_bridges(config: RunConfig, spec: ModelSpec, layers: tuple[int, ...]) -> dict[Gap, Bridge] | None:
    """Maps of zeros: they cost what fitted ones do."""
    if config.detach.bridge == "none":
        return None
    return {gap: Bridge(torch.zeros(spec.D, spec.D), torch.zeros(spec.D)) for gap in gaps(spec.layers, layers)}


def open_subject(config: RunConfig, stage: StageName) -> Subject:
    """The model, optimizer and rows with which the stage of a run would begin. The alignment begins with what the run
    has reattached, or else with the source model, which is then full continual pretraining.
    """
    require_shards(config)
    source = open_source(config)
    config = fitted_here(_resident(config), source).config
    mixture = make_mixture(config, source.folder, source.spec.V)
    require_memory(config, source, stage)
    section: StageConfig = getattr(config, stage)
    rows_per_step = section.tokens_per_step // config.data.sequence_length
    recompute, first_row = section.runs_again, 0
    if stage == "pretrain":
        refuse_without_fp8(config, source.spec, source.device, source.dtype)
        model, _ = load_shallow(
            source.index, source.spec, source.layers, device=source.device, dtype=source.dtype, recompute=recompute,
                bridges=_blank_bridges(config, source.spec, source.layers),
                host_embedding=config.pretrain.embedding == "host",
        )
        model.use_fp8(config.pretrain.fp8)
    else:
        reattached = Path(config.output) / "reattached"
        index = open_checkpoint(reattached) if reattached.exists() else source.index
        model, _ = load_full(index, source.spec, device=source.device, dtype=source.dtype, recompute=recompute)
        if reattached.exists():
            first_row = config.steps("pretrain") * config.pretrain.tokens_per_step // config.data.sequence_length
    optimizer = MasterAdamW(model, section.optimizer, seed=config.seed)

    def rows(step: int) -> RowBatch:
        return mixture.rows(first_row + step * rows_per_step, rows_per_step)

    return Subject(source.folder.name, config, stage, model, optimizer, rows, source.reasons)


def _resident(config: RunConfig) -> RunConfig:
    """A profile takes a resident step, whatever engine the run would have."""
    return config.model_copy(update={"align": config.align.model_copy(update={"engine": "resident"})})


def shapes_config(name: str, stage: StageName, overrides: list[str]) -> RunConfig:
    """A configuration for shapes without a checkpoint: one micro-batch a step unless the overrides say otherwise."""
    tree: dict[str, Any] = {"model": name, "output": name, "data": {"shards": {"random": "random"}}}
    for override in overrides:
        apply_override(tree, override)
    T = tree["data"].get("sequence_length", 8192) if isinstance(tree["data"], dict) else None
    for section, default in (("pretrain", StageConfig()), ("align", AlignConfig())):
        entry = tree.setdefault(section, {})
        if isinstance(entry, dict) and isinstance(T, int):
            size = entry.get("micro_batch", default.micro_batch)
            entry.setdefault("tokens_per_step", size * T if isinstance(size, int) else T)
    return make_config(tree, f"--shapes {name}")


def require_room(
    name: str, config: RunConfig, stage: StageName, device: torch.device, dtype: torch.dtype
) -> RunConfig:
    """The configuration with nothing left open.

    Raises RefusedError when a stage of published shapes is predicted to take more than the device has free now; no
    host memory is asked for beside a GPU's, since a profile writes no snapshots.
    """
    give_back_freed_memory(device)
    target = Target(device.type, "bf16" if dtype == torch.bfloat16 else "fp32", device_room(device))
    config = Planning(preset_spec(name), target).fitted(_resident(config)).config
    refusal = stage_refusal(make_plan(config, Planned.preset(name), target), stage)
    if refusal is not None:
        raise RefusedError(f"--shapes {name}: {refusal}")
    return config


def random_subject(name: str, config: RunConfig, stage: StageName) -> Subject:
    """Random weights of published shapes, made on the device, and random rows of one document each.

    Raises:
        RefusedError: they do not fit; none are made.
    """
    spec = preset_spec(name)
    device = choose_device(config.device)
    dtype, why = choose_dtype(config.dtype, device)
    config = require_room(name, config, stage, device, dtype)
    reasons = (why, ops.configure(config.kernels, device))
    whole, section = stage == "align", config.pretrain if stage == "pretrain" else config.align
    layers = tuple(range(spec.layers)) if whole else choose_layers(config.detach.layers, spec.layers)
    shapes = names.expected_shapes(spec)
    generator = torch.Generator(device).manual_seed(config.seed)
    tensors = {
        wanted: _random_weight(shapes[wanted], device, dtype, generator) for wanted in shallow_names(spec, layers)
    }
    bridges = None if whole else _blank_bridges(config, spec, layers)
    model = Decoder(
        spec, tensors, layers, train_outer=whole, recompute=section.runs_again, bridges=bridges
    )
    if not whole:
        refuse_without_fp8(config, spec, device, dtype)
        model.use_fp8(config.pretrain.fp8)
    count, T = section.tokens_per_step // config.data.sequence_length, config.data.sequence_length

    def rows(step: int) -> RowBatch:
        ids_BT = np.random.default_rng([config.seed, step]).integers(0, spec.V, (count, T), dtype=np.int64)
        labels_BT = np.concatenate((ids_BT[:, 1:], np.full((count, 1), NO_LABEL)), axis=1)
        positions_BT = np.tile(np.arange(T, dtype=np.int64), (count, 1))
        return RowBatch(ids_BT, labels_BT, positions_BT, np.arange(count + 1) * T, ("random",) * count)

    optimizer = MasterAdamW(model, section.optimizer, seed=config.seed)
    return Subject(f"{name} (random weights)", config, stage, model, optimizer, rows, reasons)


def _random_weight(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=dtype)  # a norm; presets have no biases
    return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, 0.02, generator=generator)


def take_step(subject: Subject, step: int) -> float:
    """The optimizer step of train/loop.py with ranges around its parts; returns the mean loss in nats."""
    model, optimizer, section = subject.model, subject.optimizer, subject.section
    with part("step"):
        with part("data"):
            rows = subject.rows(step)
            tokens_loss = int((rows.labels_BT >= 0).sum())
        with part("optimizer"):
            optimizer.zero_grad()
            model.begin_step(torch.from_numpy(rows.ids_BT))
        loss_sum = torch.zeros((), dtype=torch.float32, device=model.device)
        pieces = micro_batches(rows, section.rows_at_once)
        for _ in range(-(-len(rows.ids_BT) // section.rows_at_once)):
            with part("data"):
                batch = to_batch(next(pieces), model.device, model.host_embedding_VD)
            with part("forward"):
                hidden_ND = model.hidden_states(batch)
                hidden_ND.register_hook(_mark_hidden_gradient)
            with part("head"):
                loss = model.head_loss(hidden_ND, batch.labels_N)
            del hidden_ND, batch  # as in the loop, which holds neither while the backward pass runs
            with part("backward"):
                (loss / max(1, tokens_loss)).backward()
            loss_sum += loss.detach()
        with part("optimizer"):
            optimizer.take(model.outer_gradients(1 / max(1, tokens_loss)))
        if step == 0:
            check_first_gradients(model, optimizer)
        with part("optimizer"):
            lr = learning_rate(step, subject.config.steps(subject.stage), section.optimizer.lr, section.schedule)
            result = optimizer.step(lr)
            total = torch.stack((loss_sum, result.norm, result.updated)).tolist()[0]  # the step's wait for the device
    return float(total) / max(1, tokens_loss)


def _mark_hidden_gradient(gradient: Tensor) -> None:
    """The head's backward pass is done; the layers' begins."""
    with record_function(HIDDEN_GRADIENT):
        pass


class _Recorded:
    """The C++ extension with a named range around each of its ops, which the profiler could not see otherwise."""

    def __init__(self, native: ModuleType) -> None:
        self._native = native

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._native, name)
        if name not in NATIVE_OPS:
            return function

        def call(*arguments: Any) -> Any:
            with record_function(NATIVE + name):
                return function(*arguments)

        return call


@contextmanager
def native_ranges() -> Iterator[None]:
    """Calls into the C++ extension have names in the trace inside the block."""
    module: Any = cpu_native
    before = module._csrc
    if before is not None:
        module._csrc = _Recorded(before)
    try:
        yield
    finally:
        module._csrc = before


def held_bytes(subject: Subject) -> dict[str, int]:
    """Bytes of the tensors between two steps, gradients dropped: weights in the model, and what AdamW keeps besides."""
    model, optimizer = subject.model, subject.optimizer
    weights = [*model.trainable().values(), *model.frozen().values()]
    made_now = ("names.", "attempts", "master")  # by `moments` itself
    state = {name: tensor for name, tensor in optimizer.moments().items() if not name.startswith(made_now)}
    sizes = _storages(weights)
    kept = _storages([*(master for _, master in optimizer.masters), *optimizer.lower_bits, *state.values()])
    return {"weights": sum(sizes.values()), "optimizer state": sum(kept[at] for at in kept.keys() - sizes.keys())}


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Address -> bytes of each memory block, however many views it has."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def step_shapes(subject: Subject, step: int) -> StepShapes:
    """What the kernels see in this step, for their FLOPs and bytes."""
    model, section, rows = subject.model, subject.section, subject.rows(step)
    several = rows.ids_BT.shape[0] > section.rows_at_once
    width = model.embedding_VD.element_size()
    starts = [int(start) for start in rows.segment_starts]
    windows = [model.spec.kind(index).window for index in model.layer_indices]
    return StepShapes(
        layers=len(model.layers),
        tokens=rows.ids_BT.size,
        labelled=rows.tokens_loss,
        pairs=sum(attention_pairs(starts, window) for window in windows) // len(windows),
        trained=sum(leaf.tensor.numel() for leaf in model.leaves),
        width=width,
        gradient_width=4 if several else width,
        recompute=model.recompute == "layer",
        eight_bit=section.optimizer.state == "8bit",
    )


def conditions(subject: Subject, labelled: int, unprofiled_ms: list[float]) -> Conditions:
    """What the figures are of; `labelled`: tokens with a loss in the step."""
    model, section, T = subject.model, subject.section, subject.config.data.sequence_length
    spec: ModelSpec = model.spec
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    threads = "" if model.device.type == "cuda" else f", {torch.get_num_threads()} threads"
    trained = sum(leaf.tensor.numel() for leaf in model.leaves)
    facts = {
        "model": f"{subject.name}, {len(model.layers)} of {spec.layers} layers, {trained / 1e6:.1f}M parameters learn",
        "stage": subject.stage,
        "sequence length": T,
        "micro-batch": section.rows_at_once,
        "micro-batches a step": -(-section.tokens_per_step // (section.rows_at_once * T)),
        "tokens a step": section.tokens_per_step,
        "of them with a loss": labelled,
        "dtype": str(model.dtype).removeprefix("torch."),
        "optimizer state": section.optimizer.state,
        "recompute": section.runs_again,
        "device": device + threads,
        "kernels": subject.reasons[-1].removeprefix("kernels: "),
        "step": f"number {len(unprofiled_ms) + 1} of this process",
    }
    title = f"{subject.name}, {subject.stage}, {section.rows_at_once} x {T} tokens on {device}"
    return Conditions(title, facts, unprofiled_ms)


def profile_subject(subject: Subject, warmup: int, folder: Path) -> dict[str, Any]:
    """Take `warmup` steps and profile the next one. The trace goes to `folder`; returns what `write_files` writes."""
    model, optimizer, device = subject.model, subject.optimizer, subject.model.device
    unprofiled = [time_step(partial(take_step, subject, step), device) for step in range(warmup)]
    optimizer.zero_grad()
    with native_ranges():
        found = capture(partial(take_step, subject, warmup), device, held_bytes(subject), folder / "trace.json.gz")
    if device.type == "cuda":
        memory_snapshot(partial(take_step, subject, warmup + 1), device, folder / "memory_snapshot.pickle")
        optimizer.zero_grad()
        torch.cuda.empty_cache()
    optimizer.zero_grad()
    shapes = step_shapes(subject, warmup)
    ceilings, work = measure_ceilings(device, model.dtype), engine_work(model.spec, shapes)
    return analyse(found, ceilings, work, conditions(subject, shapes.labelled, unprofiled))


def profile_command(
    arguments: list[str],
    *,
    stage: str = "pretrain",
    shapes: str | None = None,
    out: Path | None = None,
    sequence_length: int | None = None,
    micro_batch: int | None = None,
    warmup: int = 2,
) -> list[str]:
    """Profile one step and write a new folder; returns lines to print.

    Args:
        arguments: a configuration file or run folder and overrides, or with `shapes` overrides alone.

    Raises:
        UsageError: no configuration, an unknown stage or shape. RefusedError: the folder exists, or the model does not
        fit.
    """
    if stage not in ("pretrain", "align"):
        raise UsageError(f"--stage {stage}: use pretrain or align")
    chosen: StageName = "pretrain" if stage == "pretrain" else "align"
    flags = [] if sequence_length is None else [f"data.sequence_length={sequence_length}"]
    flags += [] if micro_batch is None else [f"{stage}.micro_batch={micro_batch}"]
    if shapes is not None:
        preset_spec(shapes)  # named wrongly, it is said before an override is
        if arguments and "=" not in arguments[0]:
            raise UsageError(f"{arguments[0]}: give a configuration or --shapes {shapes}, not both")
        config = shapes_config(shapes, chosen, [*arguments, *flags])
        target = out or Path("runs") / f"profile-{shapes}-{stage}"
    else:
        if not arguments:
            raise UsageError("elo profile needs a configuration file, or --shapes with the name of published shapes")
        path = Path(arguments[0])
        run = path if path.is_dir() else None
        config = load_config(path / "config.resolved.yaml" if run else path, [*arguments[1:], *flags])
        if run:
            config = config.model_copy(update={"output": str(run)})
        target = out or Path(f"{config.output}-profile-{stage}")
    refuse_existing(target)
    subject = random_subject(shapes, config, chosen) if shapes else open_subject(config, chosen)
    with new_folder(target) as folder:
        report = profile_subject(subject, warmup, folder)
        write_files(folder, report)
    return [*describe(report), f"written to {target}"]
