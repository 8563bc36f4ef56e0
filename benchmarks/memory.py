"""`elo bench memory`: peak memory of every arm over a grid of sequence length x micro-batch, predicted and measured,
and the frontier: the most rows that fit under a cap.

Measured is, on a CPU, every byte of torch's allocator in a steady step; on a GPU `max_memory_allocated` of a process
that may take no more than the largest cap, and then the frontier itself: the most rows that are predicted to fit are
run under each cap. A cap on a large card shows what fits, not how fast a small one is, so no speed is reported.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from elo_engine import console
from elo_engine.benchmarks.contestants import Contestant, missing
from elo_engine.benchmarks.models import open_model
from elo_engine.benchmarks.processes import ArmFailed, ArmProcess, spec_of
from elo_engine.benchmarks.speedup import Options as SpeedOptions
from elo_engine.benchmarks.speedup import model_json, size_of, slug
from elo_engine.measure.environment import choose_device, device_name
from elo_engine.measure.machine import device_room
from elo_engine.measure.planner import fits, largest_micro_batch, predict_memory
from elo_engine.measure.setting import ENGINE, SHALLOW, ArmName, Setting

ALLOWANCE = 600_000_000  # of a process beside its tensors on a CPU: interpreter, torch, transformers
MEASURED: tuple[ArmName, ...] = (
    "transformers_full", "liger_full", "engine_full", "lora", "outer_unfrozen", "elo_pretrain", "elo_align",
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
            state=state, device=device, recompute=arm not in SHALLOW and arm != "elo_align",  # type: ignore[arg-type]
        )
        for arm in options.arms
    ]  # fmt: skip


def lengths_of(options: Options, device: str) -> tuple[int, ...]:
    """The rows' lengths: given, or those of the device."""
    return options.sequence_lengths or ((2048, 4096, 8192) if device == "cuda" else (128, 256, 512))


def with_recompute(setting: Setting, cap_bytes: int) -> tuple[Setting, int]:
    """The most rows under a cap. This engine's arms recompute where nothing fits without."""
    rows = largest_micro_batch(setting, cap_bytes)
    if rows == 0 and setting.arm in ENGINE and not setting.recompute:
        setting = replace(setting, recompute=True)
        rows = largest_micro_batch(setting, cap_bytes)
    return setting, rows


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
    return {
        "arm": setting.arm, "sequence_length": setting.sequence_length, "micro_batch": setting.micro_batch,
        "predicted_bytes": plan.peak_bytes, "predicted": plan.components, "measured_bytes": None,
        "measured_what": None, "status": "not run", "recompute": setting.recompute, "state": setting.state,
    }  # fmt: skip


def measure_point(setting: Setting, model: str, cap_bytes: int | None, scratch: Path) -> dict[str, Any]:
    """Two steps in a fresh process, the second of them measured."""
    found = point(setting)
    why = missing(setting.arm, size_of(SpeedOptions(model, setting.device, setting.dtype, state=setting.state)))
    if why:
        return found
    contestant = Contestant(setting)
    spec = spec_of(contestant, model, 1e-4, cap_bytes)
    try:
        with ArmProcess(contestant, spec, scratch) as process:
            process.described()
            process.step()
            traced = process.step("trace")
            last = process.finish()
    except ArmFailed as error:
        if "memory" not in str(error):
            raise
        return found | {"status": "out of memory"}
    if setting.device == "cuda":
        measured, what = last["peak_allocated_bytes"], "max_memory_allocated"
    else:
        measured, what = traced["tensor_peak_bytes"], "traced tensor bytes"
    return found | {"status": "ran", "measured_bytes": measured, "measured_what": what}


def grid(settings: list[Setting], lengths: tuple[int, ...], options: Options) -> Iterator[Setting]:
    """Small points first, every arm at each, so that a budget that ends early cuts all arms alike."""
    sizes = sorted(((T, B) for T in lengths for B in options.micro_batches), key=lambda size: size[0] * size[1])
    for T, B in sizes:
        for setting in settings:
            yield replace(setting, sequence_length=T, micro_batch=B)


def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """A `memory` result. What does not fit this machine, or the minutes, is predicted and marked as not run."""
    began = time.monotonic()
    model, settings = open_model(options.model), settings_of(options)
    kind = settings[0].device
    lengths = lengths_of(options, kind)
    room = 0 if options.predict_only else device_room(choose_device(options.device)).bytes
    points = []
    wanted = list(grid(settings, lengths, options))
    with tempfile.TemporaryDirectory() as folder, console.progress_bar("memory", len(wanted)) as update:
        for number, setting in enumerate(wanted):
            late = time.monotonic() - began > 60 * options.minutes
            allowance = ALLOWANCE if kind == "cpu" else 0
            if options.predict_only or late or not fits(setting, room - allowance):
                points.append(point(setting))
            else:
                cap = max(options.caps) if kind == "cuda" else None
                points.append(measure_point(setting, options.model, cap, Path(folder)))
            update(number + 1, f"{setting.arm} {setting.micro_batch} x {setting.sequence_length}")
        if kind == "cuda" and not options.predict_only:
            points += list(_under_caps(settings, lengths, options, began, Path(folder), say))
    return {
        "schema": 1, "theme": "memory", "dtype": settings[0].dtype,
        "device": {"type": kind, "name": "not run" if options.predict_only else device_name(kind)},
        "model": model_json(model.name, model.spec), "points": points,
        "caps": frontier(settings, lengths, options.caps),
    }  # fmt: skip


def _under_caps(
    settings: list[Setting], lengths: tuple[int, ...], options: Options, began: float, scratch: Path,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The frontier's own points, each under its cap: what is said to fit must run."""
    total = torch.cuda.get_device_properties(0).total_memory
    for cap in sorted(options.caps):
        for setting in settings:
            chosen, rows = with_recompute(replace(setting, sequence_length=max(lengths)), cap)
            if rows == 0 or cap > total or time.monotonic() - began > 60 * options.minutes:
                continue
            found = measure_point(replace(chosen, micro_batch=rows), options.model, cap, scratch)
            say(f"{setting.arm}, {rows} x {max(lengths)} under {cap / 2**30:.0f} GiB: {found['status']}")
            yield found | {"cap_bytes": cap}


def run_command(
    options: Options, records: Path | None, command: list[str]
) -> tuple[dict[str, Any], Path | None]:
    """Measure, and keep the record where one is wanted."""
    from elo_engine.benchmarks.recording import card_name, write_record
    from elo_engine.measure.environment import describe_environment

    result = measure(options, lambda line: console.err.print(line, markup=False))
    if records is None:
        return result, None
    environment = describe_environment()
    card = "predicted" if options.predict_only else card_name(result["device"]["type"], environment)
    settings = {"minutes": options.minutes, "predict_only": options.predict_only}
    path = write_record(
        records, card=card, result=result, raw={"points": result["points"]}, environment=environment,
        settings=settings, command=command, name=f"memory-{slug(result['model']['name'])}",
    )  # fmt: skip
    return result, path
