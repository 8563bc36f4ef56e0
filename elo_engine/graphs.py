"""Whether the steps of ELO pretraining are CUDA graphs (`pretrain.graph`), and why not.

What the configuration and the model's shapes say is known to a plan, for any card; what this machine has only to the
stage when it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from elo_engine.config import RunConfig
from elo_engine.errors import RefusedError, UsageError
from elo_engine.measure.memory_shapes import step_buffer_bytes
from elo_engine.measure.setting import Setting
from elo_engine.model import ops
from elo_engine.model.decoder import Decoder
from elo_engine.model.spec import ModelSpec
from elo_engine.train import world
from elo_engine.train.graphed import CudaCaptures, GraphedEngine
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

_OFF = "set pretrain.graph: off, or auto"


def why_not(config: RunConfig, spec: ModelSpec, device: str, auto_dtype: str) -> str | None:
    """What keeps a step from being captured on any machine with such a device; None: nothing.

    auto_dtype: what `dtype: auto` means there.
    """
    T, bf16 = config.data.sequence_length, (auto_dtype if config.dtype == "auto" else config.dtype) == "bf16"
    if device != "cuda":
        return f"CUDA graphs are of GPUs, and this is for {device}"
    if not bf16:
        return "flash attention takes bf16, and in fp32 attention goes document by document, as the host tells it"
    if config.align.when == "interleaved":
        return "align.when: interleaved takes turns with the whole model, whose embedding's gradient has no fixed shape"
    if config.pretrain.embedding == "host":
        return "pretrain.embedding: host would need the rows of a whole step on the device at once"
    if config.pretrain.optimizer.kept_master(bf16=True) == "24":
        return "optimizer.master: 24 draws its random numbers on the host, piece by piece"
    if any(rope.kind == "longrope" and rope.short < T for rope in spec.ropes):
        return "longrope chooses its angles by the length of each document, on the host"
    return None


def planned(config: RunConfig, spec: ModelSpec, device: str, auto_dtype: str) -> bool:
    """Whether steps will be graphs, as far as a plan can know.

    Raises:
        UsageError: `pretrain.graph: on` where they cannot be.
    """
    if config.pretrain.graph == "off":
        return False
    reason = why_not(config, spec, device, auto_dtype)
    if reason is not None and config.pretrain.graph == "on":
        raise UsageError(f"pretrain.graph: on, but {reason}; {_OFF}")
    return reason is None


def graph_plan(config: RunConfig, setting: Setting) -> dict[str, Any]:
    """For a plan: whether steps are graphs as far as it can know, the buffers they are fed from, which are among the
    activations, and why not.
    """
    off = "pretrain.graph: off" if config.pretrain.graph == "off" else None
    why = off or why_not(config, setting.spec, setting.device, setting.dtype)
    return {"used": setting.graph, "buffer_bytes": step_buffer_bytes(setting), "why_not": why}


def pretrain_engine(
    config: RunConfig, model: Decoder, optimizer: MasterAdamW, say: Callable[[str], None]
) -> ResidentEngine:
    """The engine of ELO pretraining, graphs or not, and why on a GPU not.

    Raises:
        RefusedError: `pretrain.graph: on`, and this machine cannot.
    """
    how, micro_batch = config.pretrain.graph, config.pretrain.rows_at_once
    device, dtype = model.device, "bf16" if model.dtype == torch.bfloat16 else "fp32"
    reason = why_not(config, model.spec, device.type, dtype) or why_not_here(model)
    if how == "on" and reason is not None:
        raise RefusedError(f"pretrain.graph: on, but {reason}; {_OFF}")
    if how == "off" or reason is not None:
        if how == "auto" and device.type == "cuda":
            say(f"pretrain: steps are launched kernel by kernel: {reason}")
        return ResidentEngine(model, optimizer, micro_batch)

    def told(text: str) -> None:
        say(f"pretrain: {text}")

    return GraphedEngine(model, optimizer, micro_batch, CudaCaptures(device), told, must=how == "on")


def why_not_here(model: Decoder) -> str | None:
    """What keeps a step from being captured on this machine, in this process."""
    if world.size() > 1:
        return "several processes add up their gradients between the passes and the update"
    return ops.why_not_padded(model.dtype, model.spec.E, model.spec.softcap)
