"""Which engine aligns the whole model (`align.engine`), and how it keeps what is not on the device: chosen from what is
predicted and from what the machine has, with the reason in one line.

What the configuration says is honoured, whether it fits or not; a plan then refuses it by name. Of what it leaves open:
* the whole model stays on the device where its predicted peak fits, else a few layers at a time do;
* the vocabulary comes whole where it fits, for then a step is the resident one to the bit in fp32; else in slices;
* the layers' inputs stay on the device where they fit, else they go to the host;
* the model's store is host memory where there is room for it, else a file on the output's disk.
Of several processes none streams: what is left open spreads the model over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, Literal, get_args

from elo_engine.config import RunConfig, StreamConfig
from elo_engine.levers import stage_setting
from elo_engine.measure.expected import Needs
from elo_engine.measure.machine import Room
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.planner import STREAMED
from elo_engine.measure.setting import ALONE, Processes, Setting, Streaming
from elo_engine.model.spec import ModelSpec

EngineName = Literal["resident", "sharded", "streamed"]
Inputs = Literal["device", "host"]
Vocabulary = Literal["whole", "sliced"]
StoreName = Literal["memory", "disk"]


@dataclass(frozen=True)
class EngineChoice:
    """What alignment will use.

    Attributes:
        streaming: None for the whole model on the device, or spread over the devices of several processes.
        setting: as the counts and the memory planner take it.
        why: one line with numbers. resident_bytes: what the whole model would need of the device, where that decided.
    """

    engine: EngineName
    streaming: Streaming | None
    setting: Setting
    why: str
    resident_bytes: int | None = None


class Predictions:
    """`Needs.of`, asked once for each setting of one model."""

    def __init__(self) -> None:
        self._found: dict[Any, Needs] = {}

    def __call__(self, setting: Setting) -> Needs:
        """What the setting needs."""
        spec = setting.spec  # has no hash
        key = tuple(getattr(setting, field.name) for field in fields(setting) if field.name != "spec")
        found = self._found.get((id(spec), *key))
        if found is None:
            found = self._found[id(spec), *key] = Needs.of(setting)
        return found


@dataclass(frozen=True)
class Rooms:
    """What a machine has; None: not known, so nothing is left out for it."""

    device: Room | None = None
    host: Room | None = None
    disk: Room | None = None

    def shortage(self, needs: Needs) -> str | None:
        """What does not fit, with numbers; None where all does."""
        for name, need, room in (
            ("device memory", needs.device, self.device), ("host memory", needs.host, self.host),
            ("disk", needs.disk, self.disk),
        ):  # fmt: skip
            if room is not None and need > room.bytes:
                return f"{human_bytes(need)} of {name} of the {human_bytes(room.bytes)} {room.what}"
        return None

    def has_device(self, needs: Needs) -> bool:
        """Whether the device's part fits."""
        return self.device is None or needs.device <= self.device.bytes


def choose(
    config: RunConfig,
    spec: ModelSpec,
    device: str,
    auto_dtype: str,
    device_room: Room | None,
    host_room: Room | None,
    disk_room: Room | None,
    *,
    processes: Processes = ALONE,
    needs_of: Callable[[Setting], Needs] = Needs.of,
) -> EngineChoice:
    """The engine of a run's alignment.

    Args:
        device: cuda or cpu; on a CPU `device_room` and `host_room` are the same memory.
        auto_dtype: what `dtype: auto` means there.
        processes: of the run. needs_of: where predictions come from, for a caller that asks for many and keeps them.
    """
    resident = stage_setting(config, "align", spec, device, auto_dtype, processes)
    wanted, rooms = config.align.engine, Rooms(device_room, host_room, disk_room)
    if resident.turns is not None and not rooms.has_device(needs_of(resident)):
        resident = _fewer_graphs(config, resident, needs_of)
    if wanted == "resident":
        return EngineChoice("resident", None, resident, "as align.engine says")
    if processes.count > 1:  # `ranks.refuse_what_needs_one_process` is for those who ask for another
        setting = replace(resident, sharded=True)
        each = human_bytes(needs_of(setting).memory.peak_bytes)
        why = f"the whole model is spread over {processes.count} processes"
        return EngineChoice("sharded", None, setting, f"{why}, and each needs {each} of its device")
    said, resident_bytes = "as align.engine says", None
    if wanted == "auto":
        needs = needs_of(resident)
        resident_bytes = needs.device
        takes = f"resident needs {human_bytes(needs.device)}"
        if device_room is None:
            why = f"{takes}, and nothing is known of the device's memory"
            return EngineChoice("resident", None, resident, why, resident_bytes)
        there = f"{takes}, and there are {human_bytes(device_room.bytes)} ({device_room.what})"
        if rooms.has_device(needs):
            return EngineChoice("resident", None, resident, there, resident_bytes)
        said = f"{there}: streamed"
    streaming, rest = _streaming(config.align.stream, resident, rooms, needs_of)
    setting = streamed_setting(resident, streaming)
    return EngineChoice("streamed", streaming, setting, f"{said}, {rest}", resident_bytes)


def streamed_setting(resident: Setting, streaming: Streaming) -> Setting:
    """The same alignment with a few layers on the device; they are always run again in the backward pass."""
    return replace(_without_graphs(resident), arm=STREAMED, streaming=streaming, recompute="layer")


def _fewer_graphs(config: RunConfig, setting: Setting, needs_of: Callable[[Setting], Needs]) -> Setting:
    """Steps in turns without the graphs that may go, where they need less memory so: what graphs of one kind hold
    between their steps is memory that launched steps of the other kind cannot have, but those of the other kind can.
    """
    assert setting.turns is not None
    turns = replace(setting.turns, graph=setting.turns.graph and config.pretrain.graph == "on")
    fewer = replace(setting, turns=turns, graph=setting.graph and config.align.graph == "on")
    return min(setting, fewer, key=lambda one: needs_of(one).device)


def _without_graphs(setting: Setting) -> Setting:
    turns = None if setting.turns is None else replace(setting.turns, graph=False)
    return replace(setting, graph=False, turns=turns)


def _streaming(
    config: StreamConfig, resident: Setting, rooms: Rooms, needs_of: Callable[[Setting], Needs]
) -> tuple[Streaming, str]:
    """How it is streamed, and a few words. Where nothing fits: what fits the device, in memory if that is open; and
    where that is nothing either, what takes the least of it.
    """
    inputs: tuple[Inputs, ...] = get_args(Inputs) if config.inputs == "auto" else (config.inputs,)
    stores: tuple[StoreName, ...] = get_args(StoreName) if config.store == "auto" else (config.store,)
    vocabularies: tuple[Vocabulary, ...] = get_args(Vocabulary) if config.vocabulary == "auto" else (config.vocabulary,)
    if config.update == "at_once":
        vocabularies = ("whole",)
    tried = []
    for vocabulary, where, store in product(vocabularies, inputs, stores):
        streaming = Streaming(store, where, config.update, vocabulary)
        needs = needs_of(streamed_setting(resident, streaming))
        tried.append((streaming, needs))
        if rooms.shortage(needs) is None:
            return streaming, _words(streaming, resident.device)
    on_device = [streaming for streaming, needs in tried if rooms.has_device(needs)]
    streaming = on_device[0] if on_device else min(tried, key=lambda item: item[1].device)[0]
    return streaming, f"{_words(streaming, resident.device)}, which is too large as well"


def _words(streaming: Streaming, device: str) -> str:
    on_disk = streaming.store == "disk"
    kept = "on the disk" if on_disk else "in host memory" if device == "cuda" else "in memory"
    inputs = "device" if streaming.inputs == "device" else "disk" if on_disk else "host"
    sliced = ", the vocabulary in slices" if streaming.vocabulary == "sliced" else ""
    return f"the model {kept}, layers' inputs on the {inputs}{sliced}"
