"""What makes a stage that does not fit smaller: each lever is an override of the configuration, and what it saves is
found by planning again with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, Literal, get_args

from elo_engine import graphs
from elo_engine.calibrate import calibration_rows
from elo_engine.config import Recompute, RunConfig, StageConfig, make_config
from elo_engine.errors import UsageError
from elo_engine.fp8_plan import fp8
from elo_engine.measure.flops import bridge_step, calibration_flops
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.planner import STREAMED
from elo_engine.measure.setting import ALONE, Processes, Setting, ShallowTurns
from elo_engine.model.bridge import gaps
from elo_engine.model.spec import ModelSpec, choose_layers

StageName = Literal["pretrain", "align"]
SHOWN = 3


def stage_setting(
    config: RunConfig, stage: StageName, spec: ModelSpec, device: str, auto_dtype: str, processes: Processes = ALONE
) -> Setting:
    """A stage of one process as the counts and the memory planner take it, the whole model in it; `auto_dtype` is what
    `dtype: auto` means there.
    """
    section: StageConfig = getattr(config, stage)
    T, layers = config.data.sequence_length, choose_layers(config.detach.layers, spec.layers)
    rows = max(1, section.tokens_per_step // T // processes.count)  # each has its share of them
    at_once = min(section.rows_at_once, rows)
    turns = None
    if stage == "align" and config.align.when == "interleaved":
        shallow = stage_setting(config, "pretrain", spec, device, auto_dtype)
        turns = ShallowTurns(**{field.name: getattr(shallow, field.name) for field in fields(ShallowTurns)})
    return Setting(
        arm="elo_pretrain" if stage == "pretrain" else "elo_align",
        spec=spec,
        layers=layers,
        sequence_length=T,
        micro_batch=at_once,
        micro_batches=-(-rows // at_once),
        dtype="bf16" if (auto_dtype if config.dtype == "auto" else config.dtype) == "bf16" else "fp32",
        state=section.optimizer.state,
        master=section.optimizer.master,
        recompute=section.runs_again,
        device="cuda" if device == "cuda" else "cpu",
        bridges=len(gaps(spec.layers, layers)) if stage == "pretrain" and config.detach.bridge == "linear" else 0,
        turns=turns,
        host_embedding=stage == "pretrain" and host_embedding(config, spec) and device == "cuda",
        graph=graphs.planned(config, stage, spec, device, auto_dtype) and processes.count == 1,
        fp8=fp8(config) if stage == "pretrain" else "none",
        processes=processes,
    )


def host_embedding(config: RunConfig, spec: ModelSpec) -> bool:
    """Whether the frozen embedding of ELO pretraining stays in host memory; on a CPU that is where it is anyway.

    Raises:
        UsageError: it is the head too, which the device needs.
    """
    if config.pretrain.embedding == "host" and spec.tied:
        raise UsageError(
            "pretrain.embedding: host is for a model with a head of its own; this one's embedding is its head, which "
            "the device needs. Set pretrain.embedding: device"
        )
    return config.pretrain.embedding == "host"


def bridge_file_bytes(setting: Setting) -> int:
    """Disk of a stage's bridges: fp32 maps."""
    return 4 * setting.bridges * (setting.spec.D + 1) * setting.spec.D


def bridge_plan(config: RunConfig, setting: Setting) -> dict[str, Any] | None:
    """The bridges of a stage, and what it takes to fit them, for a plan; None where it has none."""
    if not setting.bridges:
        return None
    tokens = sum(calibration_rows(config)) * setting.sequence_length
    return {
        "gaps": setting.bridges,
        "bytes": bridge_file_bytes(setting) // 4 * setting.width,
        "flops_per_token": bridge_step(setting),
        "calibration_tokens": tokens,
        "calibration_flops": calibration_flops(setting, tokens),
    }


@dataclass(frozen=True)
class Lever:
    """An override and the bytes that it takes off what the stage needs, alone."""

    override: str
    saves_bytes: int

    def describe(self) -> str:
        """`pretrain.micro_batch=1 saves 3.2 GiB`."""
        return f"{self.override} saves {human_bytes(self.saves_bytes)}"


@dataclass(frozen=True)
class Advice:
    """For a stage that does not fit.

    Attributes:
        levers: those that save anything, the biggest first.
        together: the smallest combination that fits, of those that leave text, context and layers as they are if there
            is one; () where none does.
        together_bytes: what the stage takes with it, or the least that any combination takes.
    """

    levers: tuple[Lever, ...]
    together: tuple[str, ...]
    together_bytes: int

    def describe(self) -> str:
        """In one sentence or two."""
        if not self.levers:
            return "No setting of this stage makes it smaller"
        biggest = "; ".join(lever.describe() for lever in self.levers[:SHOWN])
        if self.together:
            return (
                f"The biggest levers: {biggest}. With {' '.join(self.together)} it fits, at "
                f"{human_bytes(self.together_bytes)}"
            )
        return f"The biggest levers: {biggest}. No combination fits; the least is {human_bytes(self.together_bytes)}"

    def to_json(self) -> dict[str, Any]:
        """For `elo plan --json`."""
        levers = [{"override": lever.override, "saves_bytes": lever.saves_bytes} for lever in self.levers]
        return {"levers": levers, "fits_with": list(self.together), "bytes_with": self.together_bytes}


# Cost time or precision, but neither text, nor context, nor layers: a combination of these alone is named first.
_SAME_LESSON = (
    ".micro_batch", ".recompute", ".optimizer.state", ".optimizer.master", "dtype", ".engine", ".stream.store",
    ".stream.inputs", ".stream.vocabulary", ".embedding", ".fp8", ".graph",
)  # fmt: skip

_ONE_MICRO_BATCH = "one micro-batch"  # stands for a number of tokens, known once the other overrides are


def _overrides(config: RunConfig, stage: StageName, setting: Setting) -> list[tuple[str, Any]]:
    """Keys and values that could make the stage smaller."""
    found: list[tuple[str, Any]] = []
    if stage == "align" and config.align.engine == "resident":
        if setting.processes.count == 1:
            found.append(("align.engine", "streamed"))
        elif setting.state == "fp32":  # spread over them, which 8-bit state cannot be
            found.append(("align.engine", "auto"))
    if setting.arm == STREAMED:
        if setting.turns is not None:
            found.append(("align.when", "after"))  # then the shallow model is not there beside it
        if setting.streaming.store == "memory":
            found.append(("align.stream.store", "disk"))
        if setting.streaming.inputs == "device":
            found.append(("align.stream.inputs", "host"))
        if setting.streaming.update == "lazy" and setting.streaming.vocabulary == "whole":
            found.append(("align.stream.vocabulary", "sliced"))
        if setting.streaming.update == "lazy" and config.align.stream.vocabulary != "sliced":
            found.append(("align.stream.update", "at_once"))
    if setting.turns is not None and setting.turns.graph:
        found.append(("pretrain.graph", "off"))
    if setting.turns is not None and setting.graph:
        found.append(("align.graph", "off"))
    if setting.micro_batch > 1:
        found.append((f"{stage}.micro_batch", 1))
    if setting.arm != STREAMED:  # which runs every layer again
        more = get_args(Recompute)
        found += [(f"{stage}.recompute", again) for again in more[more.index(setting.recompute) + 1 :]]
    if setting.state == "fp32":
        found += [] if setting.sharded else [(f"{stage}.optimizer.state", "8bit")]
    elif setting.master_bytes:
        found += [(f"{stage}.optimizer.master", bits) for bits in ("none", "24") if bits != setting.master]
    if setting.sequence_length % 2 == 0 and setting.sequence_length >= 4:
        found.append(("data.sequence_length", setting.sequence_length // 2))
    if setting.dtype == "fp32":
        found.append(("dtype", "bf16"))
    if setting.micro_batches > 1:  # one bf16 gradient is used as it is, the sum of several is fp32; streamed, inputs of
        # layers are kept for all
        found.append((f"{stage}.tokens_per_step", _ONE_MICRO_BATCH))
    if stage == "pretrain" and len(setting.layers) > 1:
        fewer = ["last"] if len(setting.layers) == 2 else ["first", "last"]
        if config.detach.layers != fewer:
            found.append(("detach.layers", fewer))
    if setting.bridges:
        found.append(("detach.bridge", "none"))
    if setting.fp8 != "none":  # faster, at the price of a head in 8 bits, twice
        found.append(("pretrain.fp8", "none"))
    if stage == "pretrain" and setting.device == "cuda" and not (setting.spec.tied or setting.host_embedding):
        found.append(("pretrain.embedding", "host"))
    return found


@dataclass(frozen=True)
class _Changed:
    config: RunConfig
    texts: tuple[str, ...]


def _with(config: RunConfig, overrides: tuple[tuple[str, Any], ...], processes: int) -> _Changed | None:
    """The configuration with these changed, and how they are written; None where together they are none."""
    tree, texts = config.model_dump(mode="json"), []
    for key, value in sorted(overrides, key=lambda item: item[1] == _ONE_MICRO_BATCH):
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        if value == _ONE_MICRO_BATCH:
            value = node["micro_batch"] * tree["data"]["sequence_length"] * processes
        node[last] = value
        texts.append(f"{key}=[{','.join(value)}]" if isinstance(value, list) else f"{key}={value}")
    try:
        return _Changed(make_config(tree), tuple(texts))
    except UsageError:
        return None


def _whole_layers_last(found: tuple[int, tuple[str, ...]]) -> tuple[bool, int, tuple[str, ...]]:
    """Running whole layers again costs most of what leaves the lesson alone: where another combination fits, it is
    named, and of those the smallest.
    """
    total, texts = found
    return any(text.endswith(".recompute=layer") for text in texts), total, texts


def advise(
    config: RunConfig, stage: StageName, setting: Setting, need: Callable[[RunConfig], int], cap_bytes: int, *,
    combine: bool = True,
) -> Advice:  # fmt: skip
    """What would make what the stage needs of some memory fit into `cap_bytes`.

    Args:
        setting: what the configuration comes to. need: bytes of that memory, with a configuration.
        combine: whether several are tried together.
    """

    def plan_with(*overrides: tuple[str, Any]) -> tuple[int, tuple[str, ...]] | None:
        changed = _with(config, overrides, setting.processes.count)
        try:
            return None if changed is None else (need(changed.config), changed.texts)
        except UsageError:  # such as a lever that pretrain.graph: on cannot have
            return None

    now = need(config)
    alone = [(override, plan_with(override)) for override in _overrides(config, stage, setting)]
    useful = [(override, found) for override, found in alone if found is not None and found[0] < now]
    useful.sort(key=lambda item: item[1][0])
    levers = tuple(Lever(texts[0], now - total) for _, (total, texts) in useful)
    every = [override for override, _ in useful]
    gentle = [override for override in every if override[0].endswith(_SAME_LESSON)]
    least = now
    for those in (gentle, every) if combine else ():
        for count in range(1, len(those) + 1):
            groups = (group for group in combinations(those, count) if len({key for key, _ in group}) == count)
            tried = [found for group in groups if (found := plan_with(*group)) is not None]
            least = min([least, *(total for total, _ in tried)])
            if fitting := [found for found in tried if found[0] <= cap_bytes]:
                total, texts = min(fitting, key=_whole_layers_last)
                return Advice(levers, texts, total)
    return Advice(levers, (), least)
