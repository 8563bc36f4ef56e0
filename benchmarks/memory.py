"""`elo bench memory`: peak memory of every arm over a grid of sequence length x micro-batch, predicted and measured,
and the frontier: the most rows that fit under a cap.

Measured is, on a CPU, every byte of torch's allocator in a steady step; on a GPU `max_memory_allocated` of a process of
its own, without a cap wherever the prediction is within what the card has free. On a GPU the frontier itself is
measured too, and first: the most rows that are predicted to fit are run under each cap, in up to half of the minutes.
Caps are sizes of cards, of which CUDA takes `CONTEXT_BYTES` before the first tensor: tensors, predicted or measured,
get the rest of a cap, and results name the whole of it. On a CPU tensors get all of it. A cap on a large card shows
what fits, not how fast a small one is, so no speed is reported.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from elo_engine import console
from elo_engine.benchmarks.contestants import (
    Contestant,
    host_shortage,
    missing,
    most_rows,
    needed_bytes,
    with_inputs,
)
from elo_engine.benchmarks.models import open_model
from elo_engine.benchmarks.processes import ArmFailed, ArmProcess, spec_of
from elo_engine.benchmarks.schemas import MEASURED_WHAT
from elo_engine.benchmarks.speedup import Options as SpeedOptions
from elo_engine.benchmarks.speedup import model_json, size_of, slug
from elo_engine.config import Recompute
from elo_engine.errors import Interrupted
from elo_engine.measure.cards import CONTEXT_BYTES
from elo_engine.measure.components import by_component
from elo_engine.measure.environment import choose_device, device_name
from elo_engine.measure.machine import device_room
from elo_engine.measure.planner import STREAMED, predict_memory
from elo_engine.measure.setting import ENGINE, SHALLOW, ArmName, Setting

ALLOWANCE = 600_000_000  # of a process beside its tensors on a CPU: interpreter, torch, transformers
MEASURED: tuple[ArmName, ...] = (
    "transformers_full", "liger_full", "engine_full", "lora", "outer_unfrozen", "elo_pretrain", "elo_align",
    "elo_align_streamed",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None: by the device."""

    model: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: str = "auto"
    sequence_lengths: tuple[int, ...] | None = None
    micro_batches: tuple[int, ...] = (1, 2, 4)
    caps: tuple[int, ...] = tuple(gb * 2**30 for gb in (8, 12, 16, 24, 80))
    arms: tuple[ArmName, ...] = MEASURED
    state: str | None = None
    minutes: float = 9.0
    predict_only: bool = False


def settings_of(options: Options) -> list[Setting]:
    """Every arm once, with one row of the first length; prediction alone needs no such device."""
    model = open_model(options.model)
    if options.predict_only and options.device == "cuda":
        device, dtype, state = "cuda", "bf16" if options.dtype == "auto" else options.dtype, options.state or "8bit"
    else:
        size = size_of(SpeedOptions(options.model, options.device, options.dtype, state=options.state))
        device, dtype, state = size.device, size.dtype, size.state
    spec = model.spec
    return [
        Setting(
            arm=arm, spec=spec, layers=(0, spec.layers - 1), sequence_length=1, micro_batch=1, dtype=dtype,  # type: ignore[arg-type]
            state=state, device=device, recompute="none" if arm in SHALLOW or arm == "elo_align" else "layer",  # type: ignore[arg-type]
        )
        for arm in options.arms
    ]  # fmt: skip


def lengths_of(options: Options, device: str) -> tuple[int, ...]:
    """The rows' lengths: given, or those of the device."""
    return options.sequence_lengths or ((2048, 4096, 8192) if device == "cuda" else (128, 256, 512))


def tensor_bytes(cap_bytes: int, device: str) -> int:
    """What tensors get of a cap: on a GPU all but what CUDA itself takes."""
    return max(0, cap_bytes - CONTEXT_BYTES) if device == "cuda" else cap_bytes


def with_recompute(setting: Setting, cap_bytes: int) -> tuple[Setting, int]:
    """The most rows under a cap. This engine's arms recompute where nothing fits without, and the streamed one keeps
    its layers' inputs where more rows fit: its model is on the host, which a card's cap says nothing of.
    """
    room = tensor_bytes(cap_bytes, setting.device)
    chosen, rows = most_rows(setting, room)
    if rows == 0 and setting.arm in ENGINE and setting.recompute == "none":
        for again in get_args(Recompute)[1:]:
            chosen, rows = most_rows(replace(setting, recompute=again), room)
            if rows:
                break
    return chosen, rows


def frontier(settings: list[Setting], lengths: tuple[int, ...], caps: tuple[int, ...]) -> list[dict[str, Any]]:
    """`caps` of the result: by cap and arm, length -> the most rows predicted to fit."""
    found = []
    for cap in caps:
        for setting in settings:
            largest = {str(T): with_recompute(replace(setting, sequence_length=T), cap)[1] for T in lengths}
            found.append({"cap_bytes": cap, "arm": setting.arm, "largest": largest})
    return found


def point(setting: Setting) -> dict[str, Any]:
    """A point that was predicted and not run."""
    plan = predict_memory(setting)
    inputs = {"inputs": setting.streaming.inputs} if setting.arm == STREAMED else {}
    return inputs | {
        "arm": setting.arm, "sequence_length": setting.sequence_length, "micro_batch": setting.micro_batch,
        "predicted_bytes": plan.peak_bytes, "predicted": plan.components, "measured_bytes": None,
        "measured_what": None, "status": "not run", "recompute": setting.recompute, "state": setting.state,
    }  # fmt: skip


def measure_point(setting: Setting, model: str, cap_bytes: int | None, scratch: Path) -> dict[str, Any]:
    """Two steps in a fresh process, the second of them measured; whatever becomes of it is the point's status."""
    found = point(setting)
    why = missing(setting.arm, size_of(SpeedOptions(model, setting.device, setting.dtype, state=setting.state)))
    if why or host_shortage(setting):
        return found
    contestant = Contestant(setting)
    allowed = None if cap_bytes is None else tensor_bytes(cap_bytes, setting.device)
    spec = spec_of(contestant, model, 1e-4, allowed)
    try:
        with ArmProcess(contestant, spec, scratch) as process:
            process.described()
            process.step()
            traced = process.step("trace")
            last = process.finish()
    except ArmFailed as error:
        if error.out_of_memory:
            return found | {"status": "out of memory"}
        return found | {"status": "failed", "why": str(error)}
    if setting.device == "cuda":
        measured, what = last["peak_allocated_bytes"], "max_memory_allocated"
    else:
        measured, what = traced["tensor_peak_bytes"], "traced tensor bytes"
    found |= {"status": "ran", "measured_bytes": measured, "measured_what": what}
    if held := last["evidence"]["held"]:
        found["components"] = by_component(setting, found["predicted_bytes"], held, measured, MEASURED_WHAT[what])
    return found


def grid(settings: list[Setting], lengths: tuple[int, ...], options: Options) -> Iterator[Setting]:
    """Small points first, every arm at each, so that a budget that ends early cuts all arms alike."""
    sizes = sorted(((T, B) for T in lengths for B in options.micro_batches), key=lambda size: size[0] * size[1])
    for T, B in sizes:
        for setting in settings:
            yield replace(setting, sequence_length=T, micro_batch=B)


def measure(options: Options, say: Callable[[str], None]) -> tuple[dict[str, Any], bool]:
    """A `memory` result, and whether Ctrl-C ended it early. What does not fit this machine, or the minutes, is
    predicted and marked as not run.

    Raises:
        Interrupted: Ctrl-C before the first point was measured.
    """
    began = time.monotonic()
    model, settings = open_model(options.model), settings_of(options)
    kind = settings[0].device
    lengths = lengths_of(options, kind)
    room = 0 if options.predict_only else device_room(choose_device(options.device)).bytes
    # of a process beside its tensors; on a GPU the room is free beside the context of this process, not the arm's
    allowance = ALLOWANCE if kind == "cpu" else CONTEXT_BYTES
    points: list[dict[str, Any]] = []
    under_caps: list[dict[str, Any]] = []
    wanted, interrupted = list(grid(settings, lengths, options)), False
    with tempfile.TemporaryDirectory() as folder:
        try:
            if kind == "cuda" and not options.predict_only:
                half = began + 60 * options.minutes / 2
                for found in _under_caps(settings, max(lengths), options, room, half, Path(folder)):
                    say(_describe(found))
                    under_caps.append(found)
            with console.progress_bar("memory", len(wanted)) as update:
                for setting in wanted:
                    late = time.monotonic() - began > 60 * options.minutes
                    if not options.predict_only:
                        setting = with_inputs(setting, room - allowance)
                    if options.predict_only or late or needed_bytes(setting) > room - allowance:
                        points.append(point(setting))
                    else:
                        points.append(measure_point(setting, options.model, None, Path(folder)))
                    if points[-1]["status"] == "failed":
                        say(_describe(points[-1]))
                    update(len(points), f"{setting.arm} {setting.micro_batch} x {setting.sequence_length}")
        except KeyboardInterrupt:
            if all(found["status"] == "not run" for found in (*under_caps, *points)):
                raise Interrupted("interrupted before the first point was measured; nothing is kept") from None
            interrupted = True
    points += [point(setting) for setting in wanted[len(points) :]]
    result = {
        "schema": 1, "theme": "memory", "dtype": settings[0].dtype,
        "device": {"type": kind, "name": "not run" if options.predict_only else device_name(kind)},
        "model": model_json(model.name, model.spec), "points": points + under_caps,
        "caps": frontier(settings, lengths, options.caps),
    }  # fmt: skip
    return result, interrupted


def _under_caps(
    settings: list[Setting], T: int, options: Options, room: int, until: float, scratch: Path
) -> Iterator[dict[str, Any]]:
    """The frontier's own points, each under its cap: what is said to fit must run. Small caps first, and ELO
    pretraining first under each, until `until` (time.monotonic); caps above `room`, the bytes free on the card, cannot
    be tried on it.
    """
    first = sorted(settings, key=lambda setting: setting.arm != "elo_pretrain")  # the others in their order
    for cap in sorted(cap for cap in options.caps if cap <= room):
        for setting in first:
            if time.monotonic() > until:
                return
            chosen, rows = with_recompute(replace(setting, sequence_length=T), cap)
            if rows > 0:
                found = measure_point(replace(chosen, micro_batch=rows), options.model, cap, scratch)
                if found["status"] != "not run":  # an arm that this machine lacks
                    yield found | {"cap_bytes": cap}


def _describe(found: dict[str, Any]) -> str:
    cap = f" under {found['cap_bytes'] / 2**30:.0f} GiB" if "cap_bytes" in found else ""
    why = f": {found['why']}" if "why" in found else ""
    return f"{found['arm']}, {found['micro_batch']} x {found['sequence_length']}{cap}: {found['status']}{why}"


def run_command(
    options: Options, records: Path | None, command: list[str]
) -> tuple[dict[str, Any], Path | None, bool]:
    """Measure, and keep the record where one is wanted; and whether Ctrl-C ended it early."""
    from elo_engine.benchmarks.recording import card_name, write_record
    from elo_engine.measure.environment import describe_environment

    result, interrupted = measure(options, lambda line: console.err.print(line, markup=False))
    if records is None:
        return result, None, interrupted
    environment = describe_environment()
    card = "predicted" if options.predict_only else card_name(result["device"]["type"], environment)
    settings = {"minutes": options.minutes, "predict_only": options.predict_only, "interrupted": interrupted}
    path = write_record(
        records, card=card, result=result, raw={"points": result["points"]}, environment=environment,
        settings=settings, command=command, name=f"memory-{slug(result['model']['name'])}",
    )  # fmt: skip
    return result, path, interrupted
