"""Whether the steps of a stage are CUDA graphs (`pretrain.graph`, `align.graph`), and why not.

What the configuration and the model's shapes say is known to a plan, for any card; what this machine has only to the
stage when it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from elo_engine.config import RunConfig, StageConfig
from elo_engine.errors import RefusedError, UsageError
from elo_engine.measure.memory_shapes import step_buffer_bytes
from elo_engine.measure.planner import STREAMED
from elo_engine.measure.setting import Setting
from elo_engine.model import ops
from elo_engine.model.decoder import Decoder
from elo_engine.model.spec import ModelSpec
from elo_engine.train import world
from elo_engine.train.graphed import CudaCaptures, GraphedEngine, Graphing
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

Stage = Literal["pretrain", "align"]

LAYER_BY_LAYER = "the streamed engine brings layer after layer to the device, as the host tells it"
BESIDE_STREAMED = "a streamed whole-model step needs the memory that graphs would hold between their steps"
NO_ROOM = "what graphs would hold beside the other kind of steps does not fit"
SEVERAL = "several processes add up their gradients between the passes and the update"


def _section(config: RunConfig, stage: Stage) -> StageConfig:
    section: StageConfig = getattr(config, stage)
    return section


def _refusal(stage: Stage, reason: str) -> str:
    return f"{stage}.graph: on, but {reason}; set {stage}.graph: off, or auto"


def why_not(config: RunConfig, stage: Stage, spec: ModelSpec, device: str, auto_dtype: str) -> str | None:
    """What keeps a step from being captured on any machine with such a device; None: nothing.

    auto_dtype: what `dtype: auto` means there.
    """
    T, bf16 = config.data.sequence_length, (auto_dtype if config.dtype == "auto" else config.dtype) == "bf16"
    if device != "cuda":
        return f"CUDA graphs are of GPUs, and this is for {device}"
    if not bf16:
        return "flash attention takes bf16, and in fp32 attention goes document by document, as the host tells it"
    if stage == "align" and config.align.engine == "streamed":
        return LAYER_BY_LAYER
    if config.align.when == "interleaved" and config.align.engine == "streamed":
        return BESIDE_STREAMED
    if stage == "pretrain" and config.pretrain.embedding == "host":
        return "pretrain.embedding: host would need the rows of a whole step on the device at once"
    if _section(config, stage).optimizer.kept_master(bf16=True) == "24":
        return "optimizer.master: 24 draws its random numbers on the host, piece by piece"
    if any(rope.kind == "longrope" and rope.short < T for rope in spec.ropes):
        return "longrope chooses its angles by the length of each document, on the host"
    return None


def planned(config: RunConfig, stage: Stage, spec: ModelSpec, device: str, auto_dtype: str) -> bool:
    """Whether steps will be graphs, as far as a plan can know: of alignment, where the whole model is on the device.

    Raises:
        UsageError: `graph: on` where they cannot be.
    """
    how = _section(config, stage).graph
    if how == "off":
        return False
    reason = why_not(config, stage, spec, device, auto_dtype)
    if reason is not None and how == "on":
        raise UsageError(_refusal(stage, reason))
    return reason is None


def graph_plan(config: RunConfig, stage: Stage, setting: Setting, align: Setting) -> dict[str, Any]:
    """For a plan: whether steps are graphs as far as it can know, the buffers they are fed from, which are among the
    activations, why not, and what is refused: graphs that must be, of an engine that was chosen because of the memory.

    Args:
        setting: of the stage. align: of alignment, in whose turns the stage may be.
    """
    how = _section(config, stage).graph
    memory = _of_memory(stage, setting, align)
    why = f"{stage}.graph: off" if how == "off" else None
    several = SEVERAL if setting.processes.count > 1 else None
    why = why or why_not(config, stage, setting.spec, setting.device, setting.dtype) or memory or several
    refusal = None
    if memory is not None and how == "on":
        refusal = _refusal(stage, f"{memory}, and the whole model does not fit")
    elif several is not None and how == "on":
        refusal = _refusal(stage, several)
    if align.turns is not None and stage == "pretrain":  # both kinds of steps are one stage, which refuses for either
        refusal = None
    elif align.turns is not None and refusal is None and config.pretrain.graph == "on":
        beside = _of_memory("pretrain", align, align)
        refusal = None if beside is None else _refusal("pretrain", f"{beside}, and the whole model does not fit")
    return {"used": setting.graph, "buffer_bytes": step_buffer_bytes(setting), "why_not": why, "refusal": refusal}


def _of_memory(stage: Stage, setting: Setting, align: Setting) -> str | None:
    """What of a choice that was made because of the memory keeps the steps of a stage from being graphs."""
    if align.turns is None:
        return LAYER_BY_LAYER if setting.arm == STREAMED else None
    if align.arm == STREAMED:
        return LAYER_BY_LAYER if stage == "align" else BESIDE_STREAMED
    return None if (align.graph if stage == "align" else align.turns.graph) else NO_ROOM


def launched(
    config: RunConfig, stage: Stage, reason: str | None, device: torch.device, say: Callable[[str], None]
) -> None:
    """The steps of a stage are launched kernel by kernel, for this reason: said where graphs were wanted.

    Raises:
        RefusedError: `graph: on`, and there is a reason.
    """
    how = _section(config, stage).graph
    if how == "on" and reason is not None:
        raise RefusedError(_refusal(stage, reason))
    if how == "auto" and device.type == "cuda" and reason is not None:
        say(f"{stage}: steps are launched kernel by kernel: {reason}")


def resident_engine(
    config: RunConfig, stage: Stage, model: Decoder, optimizer: MasterAdamW, say: Callable[[str], None]
) -> ResidentEngine:
    """The engine of a stage whose model is on the device, graphs or not, and why on a GPU not.

    Raises:
        RefusedError: `graph: on`, and this machine cannot.
    """
    section = _section(config, stage)
    making = graphing(config, stage, model, say)
    if making is None:
        return ResidentEngine(model, optimizer, section.rows_at_once)
    return GraphedEngine(model, optimizer, section.rows_at_once, making)


def graphing_turns(
    config: RunConfig, model: Decoder, say: Callable[[str], None], setting: Setting
) -> tuple[Graphing | None, Graphing | None]:
    """How shallow and whole-model steps that take turns become graphs, in one memory.

    Args:
        setting: of the alignment, as `engine_choice.choose` found room for it.

    Raises:
        RefusedError: as `graphing`.
    """
    assert setting.turns is not None
    shallow = graphing(config, "pretrain", model, say, room=setting.turns.graph)
    return shallow, graphing(config, "align", model, say, room=setting.graph, beside=shallow)


def graphing(
    config: RunConfig, stage: Stage, model: Decoder, say: Callable[[str], None], *, room: bool = True,
    beside: Graphing | None = None,
) -> Graphing | None:  # fmt: skip
    """How the steps of a stage become graphs; None where they are launched, and then on a GPU it is said why.

    Args:
        room: there is memory for what graphs hold beside another kind of step. beside: of that kind, which they share
            their memory with.

    Raises:
        RefusedError: `graph: on`, and this machine cannot.
    """
    how, dtype = _section(config, stage).graph, "bf16" if model.dtype == torch.bfloat16 else "fp32"
    reason = why_not(config, stage, model.spec, model.device.type, dtype) or why_not_here(model)
    reason = reason or (None if room else NO_ROOM)
    launched(config, stage, reason, model.device, say)
    if how == "off" or reason is not None:
        return None

    def told(text: str) -> None:
        say(f"{stage}: {text}")

    if beside is not None:
        return beside.beside(told, how == "on", f"{stage}.graph")
    return Graphing(CudaCaptures(model.device), told, how == "on", f"{stage}.graph")


def why_not_here(model: Decoder) -> str | None:
    """What keeps a step from being captured on this machine, in this process."""
    if world.size() > 1:
        return SEVERAL
    return ops.why_not_padded(model.dtype, model.spec.E, model.spec.softcap)
