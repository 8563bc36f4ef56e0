"""Why a plan cannot fit, in the words of a person who has to change something."""

from __future__ import annotations

from typing import Any, get_args

from elo_engine.config import RunConfig
from elo_engine.errors import RefusedError
from elo_engine.fp8_plan import fp8_refusals
from elo_engine.levers import StageName
from elo_engine.measure.expected import Rate
from elo_engine.measure.meter import human_bytes

STAGES: tuple[StageName, ...] = get_args(StageName)
_ELSEWHERE = "run it on a larger machine: the run folder can be moved"


def all_refusals(config: RunConfig, plan: dict[str, Any], rate: Rate | None) -> list[str]:
    """Of both stages, of a card of this rate, and of the disk."""
    found = [text for stage in STAGES if (text := stage_refusal(plan, stage))] + fp8_refusals(config, rate)
    need, disk = plan["disk"]["total_bytes"], plan["room"]["disk"]
    if disk is not None and need > disk["bytes"]:
        spared = (config.snapshot.keep - 1) * sum(plan[stage]["snapshot_bytes"] for stage in STAGES)
        levers = f"snapshot.keep=1 saves up to {human_bytes(spared)}; " if spared else ""
        found.append(
            f"the run takes up to {human_bytes(need)} of disk and there are {human_bytes(disk['bytes'])} "
            f"({disk['what']}). {levers}or choose an output on another disk"
        )
    return found


def stage_refusal(plan: dict[str, Any], stage: StageName) -> str | None:
    """Why a stage fits its device, its host or its disk not, and what to do; None where it does or nothing is known."""
    part, rooms = plan[stage], plan["room"]
    engine = part.get("engine")
    streamed = engine is not None and engine["name"] == "streamed"
    first = ""
    if streamed:  # what a person did not ask for is explained
        resident = engine["resident_bytes"]
        first = "streamed, " if resident is None else f"resident it takes {human_bytes(resident)}, and streamed "
    if part["fits"] is False:
        room, memory, need = rooms["device"], part["memory"], part["device_bytes"]
        rest = need - memory["peak_bytes"]
        beside = f", and {human_bytes(rest)} besides for the process, reading and snapshots" if rest else ""
        if rest and streamed and engine["store"] == "memory":
            beside = f", and {human_bytes(rest)} besides for the model's store, the process, reading and snapshots"
        return (
            f"{stage} does not fit: {first}its tensors take {human_bytes(memory['peak_bytes'])} "
            f"({memory['moment']}){beside}; "
            f"there are {human_bytes(room['bytes'])} ({room['what']}). {part['advice']['text']}; or {_ELSEWHERE}"
        )
    if part["host_fits"] is False:
        room = rooms["host"]
        what = "with reading and saving snapshots it takes"
        if streamed:
            parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in part["host_parts"].items() if size)
            what = f"{first}with {parts} it takes"
        return (
            f"{stage} does not fit: {what} {human_bytes(part['host_bytes'])} of host memory; there are "
            f"{human_bytes(room['bytes'])} ({room['what']}). {part['advice']['text']}; or {_ELSEWHERE}"
        )
    if rooms["disk"] is not None and part["store_disk_bytes"] > rooms["disk"]["bytes"]:
        return (
            f"{stage} does not fit: {first}its model takes {human_bytes(part['store_disk_bytes'])} of the disk; "
            f"there are {human_bytes(rooms['disk']['bytes'])} ({rooms['disk']['what']}). "
            "align.stream.store=memory takes none; or choose an output on another disk"
        )
    refusal: str | None = part.get("graph", {}).get("refusal")  # of an engine that was chosen because of the memory
    return refusal


def refusals(plan: dict[str, Any], stage: str | None = None) -> list[str]:
    """Why a plan cannot fit, or with `stage` (pretrain, align) why that stage alone cannot, as it is refused when it
    begins; empty where all can.
    """
    own = [text for name in STAGES if name == stage and (text := stage_refusal(plan, name))]
    return list(plan["refusals"]) if stage is None else own


def require_fit(plan: dict[str, Any], stage: str | None = None) -> None:
    """Raises RefusedError when anything of the plan, or of one stage of it, cannot fit, naming all of it."""
    if found := refusals(plan, stage):
        raise RefusedError("\n".join(found))
