"""Detach: from a checkpoint on disk to the shallow model in memory, reading nothing but what it needs (paper section
3.1).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from elo_engine import console
from elo_engine.checkpoint import CheckpointIndex, open_checkpoint, resolve_model
from elo_engine.checkpoint.hub import commit_of
from elo_engine.config import Recompute, RunConfig
from elo_engine.measure.environment import choose_device, choose_dtype
from elo_engine.measure.meter import human_bytes
from elo_engine.model import ops
from elo_engine.model.bridge import Bridge, Gap
from elo_engine.model.decoder import Decoder
from elo_engine.model.shallow import load_shallow
from elo_engine.model.spec import ModelSpec, choose_layers, read_spec
from elo_engine.run_dir import RunDir, pinned
from elo_engine.stage import log_model


@dataclass(frozen=True)
class Source:
    """The checkpoint a stage starts from, and on what it computes."""

    folder: Path
    index: CheckpointIndex
    spec: ModelSpec
    layers: tuple[int, ...]  # those to detach
    device: torch.device
    dtype: torch.dtype
    reasons: tuple[str, ...]  # why this device, dtype and these kernels, one line each
    revision: str | None = None  # the commit of a hub's model; None: a folder


def open_source(config: RunConfig, folder: Path | None = None) -> Source:
    """Headers and configuration of the model of a run, or of `folder` in its place; no weights are read.

    Of a hub's model a run that is there already has one commit, whatever its branch is by now.

    Raises:
        UsageError, RefusedError, FailedError: no such model, not supported, or damaged; see `open_checkpoint`,
        `read_spec`.
    """
    config = pinned(config)
    folder = folder or resolve_model(config.model, config.revision)
    index = open_checkpoint(folder)
    spec = read_spec(index.config)
    layers = choose_layers(config.detach.layers, spec.layers)
    device = choose_device(config.device)
    dtype, why = choose_dtype(config.dtype, device)
    reasons = (why, ops.configure(config.kernels, device))
    return Source(folder, index, spec, layers, device, dtype, reasons, commit_of(config.model, folder))


def detach(
    source: Source, run: RunDir, *, recompute: Recompute = "none", bridges: Mapping[Gap, Bridge] | None = None
) -> Decoder:
    """Read the detached layers, embedding, final norm and head, and say what trains, what is frozen and what is
    absent. `bridges` take the place of what is absent at their gaps.
    """
    began = time.perf_counter()
    with console.bytes_bar("detach") as progress:
        model, taken = load_shallow(
            source.index,
            source.spec,
            source.layers,
            device=source.device,
            dtype=source.dtype,
            recompute=recompute,
            bridges=bridges,
            progress=run.beating("loading", progress),
            host_embedding=run.config.pretrain.embedding == "host",
        )
    seconds = time.perf_counter() - began
    run.say(f"detach: layers {list(source.layers)} of {source.spec.layers} from {source.folder}")
    log_model(run, set(model.trainable()), set(model.frozen()), source.index)
    if bridges:
        run.say(
            f"  in place of what is absent: {len(bridges)} frozen affine maps, "
            f"{human_bytes(sum(tensor.nbytes for tensor in model.bridge_tensors))}"
        )
    wanted = source.index.bytes_of([*model.trainable(), *model.frozen()])
    run.say(
        f"  read {human_bytes(taken)} for {human_bytes(wanted)} of wanted tensors, "
        f"{human_bytes(source.index.total_bytes)} in all, {taken / 1e9 / seconds:.2f} GB/s"
    )
    run.metric(
        {
            "event": "detached",
            "bytes_read": taken,
            "bytes_wanted": wanted,
            "bytes_total": source.index.total_bytes,
            "seconds": seconds,
        }
    )
    return model
