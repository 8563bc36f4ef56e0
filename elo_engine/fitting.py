"""`recompute: auto` and `micro_batch: auto`: the least recomputation that the planner says fits, then the most rows at
once.

Chosen once, before a run makes anything, and written down in its `config.resolved.yaml`: a resumed run has the same
values, however much memory is free by then, and so the same bits. First the recomputation, with one row at once where
the rows are open too, since what is run again costs operations and fewer rows at once hardly any; then the rows, as
many as fit with it, shared evenly among the step's micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from elo_engine.config import Recompute, RunConfig
from elo_engine.engine_choice import Rooms, choose
from elo_engine.levers import stage_setting
from elo_engine.measure.expected import Needs
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.setting import ALONE, Processes, Setting
from elo_engine.model.spec import ModelSpec

StageName = Literal["pretrain", "align"]

# Of a GPU's free memory a twentieth is left alone: workspaces of the libraries, loaded kernels and what the allocator
# cannot join are in no prediction, no card has held the predictions to anything yet, and a choice is for a whole run.
RESERVE = 0.05


@dataclass(frozen=True)
class Fitted:
    """A configuration in which nothing is open.

    Attributes:
        chosen: dotted key -> what it was set to and why, of those that were `auto`.
    """

    config: RunConfig
    chosen: dict[str, dict[str, Any]]

    def lines(self) -> list[str]:
        """One a key, for the log."""
        return [f"{key}: {one['value']}, {one['why']}" for key, one in self.chosen.items()]


def is_open(config: RunConfig) -> bool:
    """Whether any key is to be chosen."""
    return any("auto" in (one.recompute, one.micro_batch) for one in (config.pretrain, config.align))


def set_key(config: RunConfig, key: str, value: Any) -> RunConfig:
    """With one key of a stage set."""
    stage, name = key.split(".")
    return config.model_copy(update={stage: getattr(config, stage).model_copy(update={name: value})})


def fitted(
    config: RunConfig, spec: ModelSpec, device: str, auto_dtype: str, rooms: Rooms, *,
    processes: Processes = ALONE,
    needs_of: Callable[[Setting], Needs] = Needs.of,
) -> Fitted:  # fmt: skip
    """Choose what is open.

    Args:
        device: cuda or cpu. auto_dtype: what `dtype: auto` means there.
        rooms: what there is; where the device's is not known, whole layers are run again, one row at a time.
        processes: of the run; each has its share of a step's rows.
    """
    chosen: dict[str, dict[str, Any]] = {}
    if device == "cuda" and rooms.device is not None:
        there = rooms.device
        left = replace(there, bytes=int(there.bytes * (1 - RESERVE)), what=f"{there.what}, less {RESERVE:.0%}")
        rooms = replace(rooms, device=left)

    def found(candidate: RunConfig, stage: StageName) -> tuple[Setting, Needs]:
        if stage == "align" or candidate.align.when == "interleaved":  # one stage, which holds both
            at = rooms.device, rooms.host, rooms.disk
            setting = choose(
                candidate, spec, device, auto_dtype, *at, processes=processes, needs_of=needs_of
            ).setting
        else:
            setting = stage_setting(candidate, stage, spec, device, auto_dtype, processes)
        return setting, needs_of(setting)

    def took(key: str, value: Any, why: str) -> None:
        nonlocal config
        config, chosen[key] = set_key(config, key, value), {"value": value, "why": why}

    least = config  # the smallest that the open keys allow, so that one is chosen at a time
    for name in get_args(StageName):
        section = getattr(config, name)
        least = set_key(least, f"{name}.recompute", "layer") if section.recompute == "auto" else least
        least = set_key(least, f"{name}.micro_batch", 1) if section.micro_batch == "auto" else least
    for stage in get_args(StageName):
        section = getattr(config, stage)
        unknown = "nothing is known of the device's memory" if rooms.device is None else ""
        for key in ("recompute", "micro_batch"):
            if getattr(section, key) != "auto":
                continue
            full = f"{stage}.{key}"
            if unknown:
                took(full, getattr(getattr(least, stage), key), unknown)
                continue
            assert rooms.device is not None
            choose_one = _recompute if key == "recompute" else _rows
            value, why = choose_one(least, stage, full, found, rooms, processes.count)
            took(full, value, why)
            least = set_key(least, full, value)
    return Fitted(config, chosen)


_Found = Callable[[RunConfig, StageName], tuple[Setting, Needs]]


def _there(needs: Needs, rooms: Rooms) -> str:
    assert rooms.device is not None
    return f"{human_bytes(needs.device)} of the {human_bytes(rooms.device.bytes)} {rooms.device.what}"


def _recompute(
    config: RunConfig, stage: StageName, key: str, found: _Found, rooms: Rooms, _: int
) -> tuple[Recompute, str]:
    if stage == "align" and config.align.engine == "streamed":
        return "layer", "streamed, every layer is run again"
    too_large = ""
    for again in get_args(Recompute):
        setting, needs = found(set_key(config, key, again), stage)
        streamed = setting.arm == "elo_align_streamed"
        if not streamed and rooms.shortage(needs) is None:
            return again, f"it takes {_there(needs, rooms)}{too_large}"
        if not streamed:
            too_large += f"; {again} would take {human_bytes(needs.device)}"
    return "layer", f"nothing less fits the {human_bytes(rooms.device.bytes if rooms.device else 0)} there are" + (
        ", and streamed every layer is run again" if streamed else too_large
    )


def _rows(
    config: RunConfig, stage: StageName, key: str, found: _Found, rooms: Rooms, processes: int
) -> tuple[int, str]:
    section = getattr(config, stage)
    rows = max(1, section.tokens_per_step // config.data.sequence_length // processes)
    arm = found(set_key(config, key, 1), stage)[0].arm

    def fits(count: int) -> bool:
        setting, needs = found(set_key(config, key, count), stage)
        return setting.arm == arm and rooms.shortage(needs) is None

    if not fits(1):
        return 1, "not even one row fits"
    low, high = 1, rows + 1  # fits(low); high is too many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    even = -(-rows // -(-rows // low))  # as few micro-batches, alike
    needs = found(set_key(config, key, even), stage)[1]
    all_of_them = "all rows of a step" if low == rows else f"at most {low} of a step's {rows} rows fit"
    return even, f"{all_of_them}, and it takes {_there(needs, rooms)}"
