"""`elo plan`: what a run will take, before it takes it, and a refusal with ways out where it cannot fit.

Everything is counted from the model's shapes: peak memory by component (`measure.planner`), operations
(`measure.flops`), seconds, disk and host memory (`measure.expected`). `plan.json` of a run, `--dry-run` and `elo plan`
are the same numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from elo_engine.checkpoint import CheckpointIndex, open_checkpoint, resolve_model
from elo_engine.checkpoint.syscalls import free_bytes
from elo_engine.config import RunConfig, load_config
from elo_engine.detach import Source
from elo_engine.engine_choice import EngineChoice, Predictions, Rooms, choose
from elo_engine.errors import RefusedError, UsageError
from elo_engine.fitting import Fitted, fitted, is_open, set_key
from elo_engine.fp8_plan import fp8_warnings
from elo_engine.graphs import graph_plan
from elo_engine.levers import StageName, advise, bridge_file_bytes, bridge_plan, stage_setting
from elo_engine.measure import expected
from elo_engine.measure.cards import CONTEXT_BYTES, Card, card_of_device, find_card, parse_memory
from elo_engine.measure.environment import choose_device, choose_dtype
from elo_engine.measure.flops import arm_flops, bridge_step, ideal_speedup, ideal_speedups
from elo_engine.measure.machine import Room, device_room, give_back_freed_memory, host_room, resident_bytes
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.planner import sums_bytes
from elo_engine.measure.setting import ALONE, Processes, Setting
from elo_engine.model.presets import preset_spec
from elo_engine.model.spec import ModelSpec, read_spec
from elo_engine.plan_refusals import all_refusals, stage_refusal
from elo_engine.ranks import refuse_what_needs_one_process
from elo_engine.run_dir import RunDir, pinned
from elo_engine.train import world

STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True)
class Subject:
    """The model of a plan: its shapes, the bytes of its checkpoint, and how many of them a hub still has."""

    spec: ModelSpec
    checkpoint_bytes: int
    fetch_bytes: int = 0

    @classmethod
    def of(cls, index: CheckpointIndex, spec: ModelSpec) -> Subject:
        """A checkpoint whose headers are read."""
        size = sum(shard.size for shard in index.shards.values())
        return cls(spec, size, 0 if index.remote is None else max(0, size - index.remote.present_bytes))

    @classmethod
    def preset(cls, name: str) -> Subject:
        """Published shapes without a checkpoint; published weights are bf16."""
        spec = preset_spec(name)
        return cls(spec, 2 * spec.parameters)


@dataclass(frozen=True)
class Target:
    """What a plan is for; None: not known, so nothing is refused for it.

    Attributes:
        device: cuda or cpu. dtype: what `dtype: auto` means there.
        room: memory of the device. host: memory of the host. disk: where the output will be.
        rate: operations per second to count on. processes: of the run, each with such a device.
    """

    device: str
    dtype: str
    room: Room | None = None
    host: Room | None = None
    disk: Room | None = None
    rate: expected.Rate | None = None
    processes: Processes = ALONE

    @classmethod
    def here(cls, device: torch.device, output: str) -> Target:
        """This machine as it is now."""
        dtype, _ = choose_dtype("auto", device)
        card = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            card = card_of_device(properties.name, properties.total_memory)
        return cls(
            device.type, "bf16" if dtype == torch.bfloat16 else "fp32", device_room(device), host_room(),
            Room(free_bytes(Path(output)) + _stored(Path(output)), f"free at {output}, with what is stored there"),
            None if card is None else expected.card_rate(card), world.counted(),
        )  # fmt: skip

    @classmethod
    def card(cls, card: Card) -> Target:
        """A card by name, in a machine of which nothing else is known."""
        return cls("cuda", "bf16", _on_card(card.memory_bytes, card.name), rate=expected.card_rate(card))


def _stored(folder: Path) -> int:
    """Bytes of the files below a folder: what a run has made already is not needed a second time."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _on_card(memory_bytes: int, what: str) -> Room:
    return Room(max(0, memory_bytes - CONTEXT_BYTES), f"on {what}, less {human_bytes(CONTEXT_BYTES)} for CUDA itself")


def make_plan(config: RunConfig, subject: Subject, target: Target) -> dict[str, Any]:
    """The plan as JSON; `refusals` names what cannot fit and what to do, one entry each, and is empty where all can. Of
    several processes, what is on a device is of one of them, and what is on a host of all that share it.

    Raises:
        UsageError: what no run of so many processes does.
    """
    refuse_what_needs_one_process(config, target.processes.count)
    spec, planning = subject.spec, Planning(subject.spec, target)
    fit = planning.fitted(config)
    config = fit.config
    choice = planning.choice(config)
    settings = {stage: planning.setting(config, stage) for stage in STAGES}
    pretrain, align = settings["pretrain"], settings["align"]
    if target.rate is not None and target.rate.only_bf16 and pretrain.dtype != "bf16":
        target = replace(target, rate=None)
    stages = {stage: _stage(config, stage, planning, target) for stage in STAGES}
    stages["align"]["engine"] = _engine(choice)
    stages["pretrain"]["bridge"] = bridge_plan(config, pretrain)
    for stage, setting in settings.items():
        stages[stage]["graph"] = graph_plan(config, stage, setting, align)
    share = config.pretrain.tokens / (config.pretrain.tokens + config.align.tokens)
    plan: dict[str, Any] = {
        "model": {"family": spec.family, "layers": spec.layers, "parameters": spec.parameters, "tied": spec.tied},
        "device": target.device,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[pretrain.dtype],
        "processes": asdict(target.processes),
        "detached_layers": list(pretrain.layers),
        "chosen": fit.chosen,
        "pretrain": stages["pretrain"],
        "align": stages["align"],
        "disk": _disk(config, subject, settings),
        "room": {
            name: None if room is None else asdict(room)
            for name, room in (("device", target.room), ("host", target.host), ("disk", target.disk))
        },
        "rate": None if target.rate is None else target.rate.to_json(),
        "flops_ratio": arm_flops(pretrain).model.total / arm_flops(align).model.total,
        "ideal_pipeline_speedup": ideal_speedup(
            spec, pretrain.layers, pretrain.sequence_length, share, bridge_step(pretrain)
        ),
        "ideal_executed_speedup": asdict(ideal_speedups(pretrain, align, share)),
        "warnings": _warnings(config, spec) + fp8_warnings(config, target.device),
    }
    plan["refusals"] = all_refusals(config, plan, target.rate)
    return plan


class Planning:
    """Settings and needs of a configuration and of others like it, for one model and one machine."""

    def __init__(self, spec: ModelSpec, target: Target) -> None:
        self._spec, self._target, self.needs_of = spec, target, Predictions()

    def fitted(self, config: RunConfig) -> Fitted:
        """With nothing `auto` that a stage needs to know."""
        target = self._target
        rooms = Rooms(target.room, target.host, target.disk)
        return fitted(
            config, self._spec, target.device, target.dtype, rooms, processes=target.processes, needs_of=self.needs_of
        )

    def choice(self, config: RunConfig) -> EngineChoice:
        """Of the alignment."""
        target = self._target
        rooms = (target.room, target.host, target.disk)
        return choose(
            config, self._spec, target.device, target.dtype, *rooms, processes=target.processes, needs_of=self.needs_of
        )

    def setting(self, config: RunConfig, stage: StageName) -> Setting:
        """Of a stage, with the engine that it will use."""
        if stage == "align":
            return self.choice(config).setting
        target = self._target
        setting = stage_setting(config, stage, self._spec, target.device, target.dtype, target.processes)
        if setting.graph and config.align.when == "interleaved":  # whether it can be, the whole model's engine says
            turns = self.choice(config).setting.turns
            return replace(setting, graph=turns is not None and turns.graph)
        return setting

    def advice(
        self, config: RunConfig, stage: StageName, what: Literal["device", "host"], room: Room
    ) -> dict[str, Any]:
        """What would make it fit."""

        def need(changed: RunConfig) -> int:
            return int(getattr(self.needs_of(self.setting(changed, stage)), what))

        found = advise(config, stage, self.setting(config, stage), need, room.bytes)
        return {**found.to_json(), "text": found.describe()}


def _engine(choice: EngineChoice) -> dict[str, Any]:
    streaming = choice.streaming
    how = dict.fromkeys(("store", "inputs", "update", "vocabulary")) if streaming is None else asdict(streaming)
    return {"name": choice.engine, **how, "why": choice.why, "resident_bytes": choice.resident_bytes}


def _stage(config: RunConfig, stage: StageName, planning: Planning, target: Target) -> dict[str, Any]:
    setting, steps = planning.setting(config, stage), config.steps(stage)
    needs, flops = planning.needs_of(setting), arm_flops(setting)
    made: dict[str, Any] = {
        "steps": steps,
        "tokens": getattr(config, stage).tokens,
        "micro_batch": setting.micro_batch,
        "micro_batches": setting.micro_batches,
        "trainable_parameters": expected.trainable_parameters(setting),
        "flops_per_token": flops.model.total,
        "flops_per_token_executed": flops.executed.total,
        "memory": needs.memory.to_json(),
        "device_bytes": needs.device,
        "fits": None if target.room is None else needs.device <= target.room.bytes,
        "advice": None,
        "host_bytes": needs.host,
        "host_parts": expected.host_by_part(setting, needs.memory),
        "host_fits": None if target.host is None else needs.host <= target.host.bytes,
        "store_disk_bytes": needs.disk,
        "snapshot_bytes": expected.snapshot_bytes(setting),
        "seconds": None if target.rate is None else expected.stage_seconds(setting, steps, target.rate),
    }
    if made["fits"] is False:
        assert target.room is not None
        made["advice"] = planning.advice(config, stage, "device", target.room)
    elif made["host_fits"] is False:
        assert target.host is not None
        made["advice"] = planning.advice(config, stage, "host", target.host)
    return made


def _disk(config: RunConfig, subject: Subject, settings: dict[StageName, Setting]) -> dict[str, int]:
    """Bytes below the output folder, and in the hub's cache; nothing of a stage is removed when the next begins.
    Reattached and aligned models count in full, although a filesystem that shares extents takes less. While a snapshot
    is published, those to keep are still there.
    """
    once = {stage: expected.snapshot_bytes(setting) for stage, setting in settings.items()}
    bridge, together = bridge_file_bytes(settings["pretrain"]), config.align.when == "interleaved"
    if together:  # the stages are one; the bridge's file keeps what it was fitted to as well
        once["pretrain"] = 0
        bridge += sums_bytes(settings["align"])
    saves = {stage: 1 + (config.last_step(stage) - 1) // config.snapshot.every for stage in STAGES}
    kept = {stage: min(config.snapshot.keep, saves[stage]) * once[stage] for stage in STAGES}
    beside = {stage: once[stage] if saves[stage] > config.snapshot.keep else 0 for stage in STAGES}
    copy = subject.checkpoint_bytes
    store = expected.store_disk_bytes(settings["align"])  # gone when the model is written
    reattached = 0 if together else copy
    last = kept["pretrain"] + reattached + kept["align"] + max(beside["align"] + store, copy)
    return {
        "fetched_model": subject.fetch_bytes,
        **({"bridge": bridge} if bridge else {}),
        "pretrain_snapshots": kept["pretrain"],
        "reattached": reattached,
        "align_snapshots": kept["align"],
        "align_store": store,
        "model": copy,
        "total_bytes": subject.fetch_bytes + bridge + max(kept["pretrain"] + beside["pretrain"], last),
    }


def _warnings(config: RunConfig, spec: ModelSpec) -> list[str]:
    found, T = [], config.data.sequence_length
    if 0 < spec.max_positions < T:
        found.append(
            f"data.sequence_length {T} is more than the {spec.max_positions} positions this model was trained for"
        )
    if config.kernels == "reference":
        found.append("kernels: reference keeps more activations than the memory predicted here, which is for auto")
    return found


def plan(config: RunConfig, source: Source) -> dict[str, Any]:
    """The plan of a run on this machine as it is now, from the headers of its model."""
    give_back_freed_memory(source.device)
    return make_plan(config, Subject.of(source.index, source.spec), Target.here(source.device, config.output))


def settle(run: RunDir, source: Source) -> None:
    """Choose what the run's configuration leaves open (`fitting.py`), write it down and say why; rank 0 chooses for all
    processes.
    """
    if not is_open(run.config):
        return

    def choose_now() -> dict[str, Any]:
        return fitted_here(run.config, source).chosen

    chosen, config = world.first(choose_now), run.config
    for key, one in chosen.items():
        config = set_key(config, key, one["value"])
    run.settle(config, Fitted(config, chosen).lines())


def fitted_here(config: RunConfig, source: Source) -> Fitted:
    """On this machine as it is now, but what a run in its output folder has chosen already."""
    config = pinned(config)
    give_back_freed_memory(source.device)
    return Planning(source.spec, Target.here(source.device, config.output)).fitted(config)


def require_memory(config: RunConfig, source: Source, stage: StageName) -> expected.StageMemory:
    """The prediction for a stage that is about to load its model, to be held against the measurement.

    Raises:
        RefusedError: its predicted peak is more than the device has free now, with numbers and levers.
    """
    _refuse_together(stage_refusal(plan(config, source), stage))
    memory = expected.stage_memory(setting_of(config, source, stage))
    return expected.StageMemory.now(memory, source.device)


def _refuse_together(refusal: str | None) -> None:
    """RefusedError on every process where one has a reason, which rank 0 says if it has one too."""

    def mine() -> None:
        if refusal is not None:
            raise RefusedError(refusal)

    if world.agreed(refusal is not None):
        world.first(mine)
        raise RefusedError(refusal or "the share of another process does not fit its memory; it says why")


def setting_of(config: RunConfig, source: Source, stage: StageName) -> Setting:
    """A stage on this machine as it is now, as the counts and the memory planner take it."""
    planning = Planning(source.spec, Target.here(source.device, config.output))
    return planning.setting(planning.fitted(config).config, stage)


def align_engine(config: RunConfig, source: Source) -> EngineChoice:
    """What alignment will use on this machine as it is now.

    Raises:
        RefusedError: neither engine fits, or not the one that the configuration asks for, with numbers and levers.
    """
    give_back_freed_memory(source.device)
    target = Target.here(source.device, config.output)
    _refuse_together(stage_refusal(make_plan(config, Subject.of(source.index, source.spec), target), "align"))
    planning = Planning(source.spec, target)
    return planning.choice(planning.fitted(config).config)


def plan_command(
    path: Path, overrides: list[str] | None, shapes: str | None, gpu: str | None, host: str | None, measure: bool,
    processes: int | None = None,
) -> dict[str, Any]:
    """`elo plan`: for this machine, or for a card and a host that are named; for so many processes on one host, or for
    those that torchrun has started.

    Raises:
        UsageError: no such configuration, shapes, card or amount, or a rate to be measured on a card that is not here.
        RefusedError: `auto` or `device: cuda` where there is no GPU. And what opening a model raises.
    """
    config = load_config(path / "config.resolved.yaml" if path.is_dir() else path, overrides)
    if path.is_dir():
        config = config.model_copy(update={"output": str(path)})
    count = world.counted(world.wanted_size()) if processes is None else Processes(processes, processes)
    target = replace(_target(config, gpu, host, measure), processes=count)
    if shapes is not None:
        return make_plan(config, Subject.preset(shapes), target)
    config = pinned(config)
    index = open_checkpoint(resolve_model(config.model, config.revision))
    return make_plan(config, Subject.of(index, read_spec(index.config)), target)


def _target(config: RunConfig, gpu: str | None, host: str | None, measure: bool) -> Target:
    if gpu in (None, "auto"):
        wanted = "cuda" if gpu == "auto" else config.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise RefusedError(
                f"there is no GPU here to plan for ({'--gpu auto' if gpu else 'device: cuda'}); name one, such as "
                "--gpu rtx-4090, or its memory, such as --gpu 24GB"
            )
        device = choose_device(wanted)
        target = Target.here(device, config.output)
        if measure:
            dtype, _ = choose_dtype(config.dtype, device)
            target = replace(target, rate=expected.measured_rate(device, dtype))
    elif measure:
        raise UsageError(f"--measure times this machine, and --gpu {gpu} is another; leave one of the two out")
    else:
        assert gpu is not None
        card = None if gpu[:1].isdigit() else find_card(gpu)
        target = Target("cuda", "bf16", _on_card(parse_memory(gpu), gpu)) if card is None else Target.card(card)
    if host is not None:
        process = resident_bytes()
        what = f"--host {host}, less {human_bytes(process)} for the interpreter and its libraries"
        room = Room(max(0, parse_memory(host) - process), what)
        target = replace(target, host=room, room=target.room if target.device == "cuda" else room)
    return target
