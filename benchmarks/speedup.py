"""`elo bench speedup`: seconds per token of every arm, interleaved, and from them the pipeline speedup.

Pipeline speedup = T(full CP on all tokens) / (T(ELO pretraining on 90 %) + T(alignment on 10 %)), from measured seconds
per token of the same run: against the transformers Trainer (a), the same with Liger (b), and this engine's own full CP
(c). What an arm trains, how many tokens pass and what changes is watched from outside and held against its claim.

Where the streamed alignment (s) ran, the pipeline is also given with it in place of (g), and its seconds per token over
those of a resident arm that runs its layers again as (s) does: (g) where it recomputes, else (c), the same training.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elo_engine import console
from elo_engine.benchmarks import graph_arms
from elo_engine.benchmarks import rounds as measuring
from elo_engine.benchmarks.contestants import (
    BASELINES,
    DEFAULT_SIZE,
    LABELS,
    LETTERS,
    Contestant,
    Size,
    choose,
    default_arms,
    together_fit,
)
from elo_engine.benchmarks.intervals import pipeline_speedup, stage_ratio
from elo_engine.benchmarks.models import open_model
from elo_engine.benchmarks.processes import ceilings_of
from elo_engine.benchmarks.schemas import measured_peak
from elo_engine.errors import FailedError, Interrupted, UsageError
from elo_engine.fp8_check import fp8_sizes
from elo_engine.measure.components import by_component
from elo_engine.measure.environment import choose_device, choose_dtype, device_name
from elo_engine.measure.flops import arm_flops
from elo_engine.measure.machine import device_room
from elo_engine.measure.meter import spread
from elo_engine.measure.planner import STREAMED, predict_memory
from elo_engine.measure.setting import SHALLOW, ArmName, Setting
from elo_engine.model import ops
from elo_engine.model.spec import ModelSpec

SPLIT = 0.9  # of the tokens, in ELO pretraining (paper section 4)
LEARNING_RATE = 1e-4
# Relative differences of two arms on the same weights and rows: of their first losses, and, of arms that train the
# same, of the norms of their first gradients. In fp32 hardly more than rounding; in bf16 not yet seen on a card.
SAME_LOSS = {"fp32": 2e-5, "bf16": 1e-3}
SAME_NORM = {"fp32": 1e-3, "bf16": 3e-2}


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None, and no arms: by the device."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    sequence_length: int | None = None
    rows: int | None = None
    elo_micro_batch: int | None = None
    micro_batch: int = 1
    state: str | None = None
    arms: tuple[ArmName, ...] = ()
    minutes: float = 9.0
    rounds: int = 9
    steps: int = 3
    align_recompute: str = "auto"
    streamed_inputs: str = "auto"
    fp8: str = "none"
    graph: str = "off"


def size_of(options: Options) -> Size:
    """The size that the options mean on this machine: the paper's 4 rows of 8192 tokens and 8-bit state on a GPU; 2
    rows of 512 and fp32 state on a CPU, where five rounds of anything larger do not end within ten minutes.
    """
    device = choose_device(options.device)  # type: ignore[arg-type]
    dtype, _ = choose_dtype(options.dtype, device)  # type: ignore[arg-type]
    gpu = device.type == "cuda"
    length, rows = DEFAULT_SIZE[device.type]
    rows = options.rows or rows
    return Size(
        device=device.type,
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        sequence_length=options.sequence_length or length,
        rows=rows,
        elo_micro_batch=options.elo_micro_batch or min(4, rows),
        whole_micro_batch=options.micro_batch,
        state=options.state or ("8bit" if gpu else "fp32"),
        memory_bytes=device_room(device).bytes,
        align_recompute=options.align_recompute,
        streamed_inputs=options.streamed_inputs,
        fp8=options.fp8,
        graph=options.graph,
    )


def measure(options: Options, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """-> result, raw, settings, as `recording.write_record` keeps them.

    Raises:
        UsageError, RefusedError: options that nothing can be made of, or that this machine or model cannot have.
        FailedError: an arm is not what it claims, arms of one model do not start at one loss, or neither ELO
            pretraining nor a baseline could be measured.
    """
    began = time.monotonic()
    model, size = open_model(options.model), size_of(options)
    spec = model.spec
    if 0 < spec.max_positions < size.sequence_length:
        raise UsageError(f"--sequence-length {size.sequence_length}: {model.name} has {spec.max_positions} positions")
    layers = (0, spec.layers - 1)
    contestants = choose(model, layers, size, options.arms or default_arms(size.device))
    _require_fp8(size, spec)
    if size.graph == "on":
        graph_arms.require([one.setting for one in contestants])
    say(f"{model.name}, {size.device}, {size.dtype}, rows of {size.sequence_length}: measuring the ceilings")
    ceilings = ceilings_of(size.device, size.dtype)
    together = together_fit(contestants, size.memory_bytes)
    left = 60 * options.minutes - (time.monotonic() - began)
    schedule = measuring.Schedule(options.rounds, left, steps=options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        run = measuring.run(
            contestants, options.model, LEARNING_RATE, schedule, together=together, scratch=Path(scratch), say=say
        )  # fmt: skip
    raw = {"rounds": run.rounds,
           "losses": {name: taken.losses for name, taken in run.taken.items()},
           "gradient_norms": {name: taken.norms for name, taken in run.taken.items()},
           "evidence": {name: taken.last.get("evidence") for name, taken in run.taken.items()}}  # fmt: skip
    settings = {
        "weights": "random" if model.folder is None else "of the checkpoint", "rows_a_step": size.rows,
        "state": size.state, "learning_rate": LEARNING_RATE, "arms_alive_together": together,
        "steps_a_visit": None if together else options.steps, "interrupted": run.interrupted,
        "align_recompute": size.align_recompute, "streamed_inputs": size.streamed_inputs,
        "fp8": size.fp8, "graph": size.graph,
    }  # fmt: skip
    if not any(run.rounds) and not run.refused:
        if run.interrupted:
            raise Interrupted("interrupted before the first round was measured; nothing is kept")
        raise FailedError("no round was measured; " + "; ".join(f"{k}: {v.failed}" for k, v in run.taken.items()))
    try:
        checks = check_starts(contestants, run, size.dtype)
    except FailedError as error:
        run.refused = run.refused or str(error)
    if run.refused:
        return {"schema": 1, "theme": "speedup", "refused": run.refused}, raw, settings
    result = {
        "schema": 1, "theme": "speedup",
        "model": model_json(model.name, spec),
        "device": {"type": size.device, "name": device_name(size.device)},
        "dtype": size.dtype, "sequence_length": size.sequence_length,
        "micro_batch": {
            "elo_pretrain": size.elo_micro_batch, "transformers_shallow": size.elo_micro_batch,
            "others": size.whole_micro_batch,
        },
        "split": SPLIT, "rounds": len(run.rounds), "warmup_steps": run.warmup_steps, "ceilings": ceilings,
        "peak_flop_per_s": datasheet_peak(size),
        "arms": {one.name: arm_result(one, run, ceilings, datasheet_peak(size)) for one in contestants},
        **ratios(contestants, run), "checks": checks,
    }  # fmt: skip
    return result, raw, settings


def _require_fp8(size: Size, spec: ModelSpec) -> None:
    """RefusedError where (f) is to multiply 8-bit operands and cannot, before any process is started."""
    if size.fp8 != "none":
        dtype = torch.bfloat16 if size.dtype == "bf16" else torch.float32
        ops.require_fp8(size.fp8, torch.device(size.device), dtype, fp8_sizes(size.fp8, spec))  # type: ignore[arg-type]


def model_json(name: str, spec: ModelSpec) -> dict[str, Any]:
    """A model's shapes in a result."""
    return {
        "name": name, "parameters": spec.parameters, "layers": spec.layers, "V": spec.V, "D": spec.D, "F": spec.F,
        "H": spec.H, "K": spec.K, "E": spec.E, "tied": spec.tied,
    }  # fmt: skip


def check_starts(contestants: list[Contestant], run: measuring.Run, dtype: str) -> list[str]:
    """Arms on the same weights and rows start at the same loss, and those that train the same at the same gradient:
    whole models among themselves, shallow ones among theirs (which differ from the whole and are never compared with
    it). Losses and gradients of arms that take several rows at a time are means over the same rows.

    Raises:
        FailedError: two do not.
    """
    # 8-bit operands round, and what that does to a loss is for `elo_engine/fp8_check.py`
    there = [
        one.name
        for one in contestants
        if not one.why_not and run.taken[one.name].losses and one.setting.fp8 == "none"
    ]
    said = []
    for what, group in (
        ("whole model", [arm for arm in there if arm not in SHALLOW]),
        ("shallow model", [arm for arm in there if arm in SHALLOW]),
    ):
        alike = [arm for arm in group if arm not in ("lora", "outer_unfrozen")]
        losses = _apart(what, "loss", {arm: run.taken[arm].losses[0] for arm in group}, SAME_LOSS[dtype])
        norms = _apart(what, "gradient norm", {arm: run.taken[arm].norms[0] for arm in alike}, SAME_NORM[dtype])
        said += [f"{what}: {part}" for part in (losses, norms) if part]
    shown = [arm for arm in there if run.taken[arm].last]
    if shown:
        said.append(f"tokens, labels, runs of layers, gradients and changed tensors of {len(shown)} arms as they claim")
    return said


def _apart(what: str, of: str, found: dict[ArmName, float], most: float) -> str:
    """How far apart these numbers are, in words; raises FailedError when that is more than `most`, relative."""
    if not found:
        return ""
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    finite = all(math.isfinite(value) for value in found.values())  # min and max pass over what is not a number
    if not finite or found[high] - found[low] > most * abs(found[low]):
        raise FailedError(
            f"{what}: {low} starts at a {of} of {found[low]:.6g} and {high} at {found[high]:.6g} on the same weights "
            "and rows; they do not compute the same, so they are not compared"
        )
    apart = (found[high] - found[low]) / abs(found[low])
    return f"{len(found)} arms start at a {of} of {found[low]:.5g}, {apart:.1e} apart at most"


def arm_result(one: Contestant, run: measuring.Run, ceilings: dict[str, float], peak: float | None) -> dict[str, Any]:
    """One arm's row."""
    row: dict[str, Any] = {"letter": LETTERS[one.name], "label": LABELS[one.name]}
    taken = run.taken.get(one.name)
    seconds = [s for turn in run.rounds for s in turn.get(one.name, {}).get("seconds", [])]
    setting = one.setting
    options = {
        "recompute": setting.recompute, "state": setting.state, "micro_batch": setting.micro_batch,
        "micro_batches": setting.micro_batches, "layers": list(setting.layers), "fp8": setting.fp8,
    }  # fmt: skip
    if setting.graph:
        options |= {"graph": "on", "warmup_steps": graph_arms.warmup_steps(setting, run.warmup_steps)}
        options["graphs"] = taken.last["evidence"]["captured"] if taken is not None and taken.last else None
    if one.name == STREAMED:
        options["streaming"] = dict(vars(setting.streaming))
    if taken is None or taken.failed or not seconds:
        status = "not here" if taken is None else "failed"
        why = one.why_not if taken is None else taken.failed or "interrupted before its first timed step"
        return row | {"status": status, "why": why, "options": options}
    times = spread(seconds)
    assert times is not None
    tokens, flops = setting.tokens_per_step, arm_flops(setting)
    rate = tokens / times.median
    energy = taken.energy_j
    return row | {
        "status": "ran", "why": "", "tokens_per_step": tokens, "step_s": vars(times),
        "tokens_per_s": {"median": rate, "p10": tokens / times.p90, "p90": tokens / times.p10},
        "model_gflop_per_token": flops.model.total / 1e9, "executed_gflop_per_token": flops.executed.total / 1e9,
        "mfu": flops.model.total * rate / peak if peak else None,
        "ceiling_share": flops.model.total * rate / ceilings["matmul_flop_per_s"],
        "memory": arm_memory(setting, taken),
        "energy_j_per_token": statistics.fmean(energy) / tokens if energy else None,
        "loss_first": taken.losses[0], "loss_last": taken.losses[-1],
        "clocks": taken.last.get("clocks") or None,
        "parameters_trained": sum(taken.last["evidence"]["gradients"].values()) if taken.last else 0,
        "options": options | taken.described,
    }  # fmt: skip


def arm_memory(setting: Setting, taken: measuring.Taken) -> dict[str, Any]:
    """One arm's peaks, predicted and measured, and both by component where the arm has counted its own."""
    plan = predict_memory(setting)
    fields = ("peak_allocated_bytes", "peak_reserved_bytes", "host_peak_bytes")
    found: dict[str, Any] = {field: taken.last.get(field) for field in fields}
    found |= {
        "tensor_peak_bytes": taken.tensor_peak_bytes, "predicted_bytes": plan.peak_bytes, "predicted": plan.components,
    }  # fmt: skip
    held, peak = taken.last.get("evidence", {}).get("held"), measured_peak(found)
    if held and peak is not None:
        found["components"] = by_component(setting, plan.peak_bytes, held, peak[0], peak[1])
    return found


def ratios(contestants: list[Contestant], run: measuring.Run) -> dict[str, Any]:
    """Stage ratio and pipeline speedup against each baseline that ran, with what the operations alone allow."""
    ran = {one.name: one.setting for one in contestants if any(one.name in turn for turn in run.rounds)}
    ran = {name: setting for name, setting in ran.items() if not run.taken[name].failed}
    # Whole rounds: the steps of a visit share its process and are not independent of each other.
    rounds = [{name: taken["seconds"] for name, taken in turn.items()} for turn in run.rounds]
    tokens = {name: setting.tokens_per_step for name, setting in ran.items()}
    stage, pipeline = {}, {}
    for base in BASELINES:
        if base not in ran or "elo_pretrain" not in ran:
            continue
        stage[base] = stage_ratio(rounds, tokens, base).to_json()
        if "elo_align" in ran:
            pipeline[base] = pipeline_speedup(rounds, tokens, base, SPLIT).to_json() | {"ideal": ideal(ran, base)}
    found = {"stage_ratio": stage, "pipeline_speedup": pipeline}
    return found | ({"streamed": streamed_ratios(ran, rounds, tokens)} if STREAMED in ran else {})


def streamed_ratios(
    ran: dict[ArmName, Setting], rounds: list[dict[ArmName, list[float]]], tokens: dict[ArmName, int]
) -> dict[str, Any]:
    """What (s) costs over a resident arm that recomputes as it does, where one ran; and the pipeline with it."""
    pipeline, over = {}, {}
    for base in BASELINES:
        if base in ran and "elo_pretrain" in ran:
            speedup = pipeline_speedup(rounds, tokens, base, SPLIT, STREAMED).to_json()
            pipeline[base] = speedup | {"ideal": ideal(ran, base, STREAMED)}
    alike: tuple[ArmName, ...] = ("elo_align", "engine_full")
    if resident := next((arm for arm in alike if arm in ran and ran[arm].recompute == "layer"), None):
        over = {"over_resident": stage_ratio(rounds, tokens, resident, STREAMED).to_json() | {"resident": resident}}
    return {"pipeline": pipeline} | over


def ideal(ran: dict[ArmName, Setting], base: ArmName, align: ArmName = "elo_align") -> float:
    """The pipeline speedup if every operation that is executed took the same time."""
    full, elo, aligned = (arm_flops(ran[name]).executed.total for name in (base, "elo_pretrain", align))
    return full / (SPLIT * elo + (1 - SPLIT) * aligned)


def datasheet_peak(size: Size) -> float | None:
    """Dense bf16 FLOP/s of a named card; None for a CPU, an unknown card, or fp32."""
    if size.device != "cuda" or size.dtype != "bf16":
        return None
    from elo_engine.measure.cards import card_of_device

    card = card_of_device(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory)
    return None if card is None else card.flop_per_s


def run_command(
    options: Options, records: Path | None, command: list[str]
) -> tuple[dict[str, Any], Path | None, bool]:
    """Measure, and keep the record where one is wanted; and whether Ctrl-C ended it early."""
    from elo_engine.benchmarks.recording import card_name, write_record
    from elo_engine.measure.environment import describe_environment

    device = choose_device(options.device)  # type: ignore[arg-type]
    result, raw, settings = measure(options, lambda line: console.err.print(line, markup=False))
    environment = describe_environment()
    if "refused" in result:
        kept = "" if records is None else f". What was measured is kept in {_keep_refused(records, result, raw)}"
        raise FailedError(result["refused"] + kept)
    if records is None:
        return result, None, settings["interrupted"]
    path = write_record(
        records, card=card_name(device.type, environment), result=result, raw=raw, environment=environment,
        settings=settings, command=command, name=f"speedup-{slug(result['model']['name'])}",
    )  # fmt: skip
    return result, path, settings["interrupted"]


def _keep_refused(records: Path, result: dict[str, Any], raw: dict[str, Any]) -> Path:
    """Raw steps of a comparison that is no result, where no table looks."""
    folder = records / f"refused-{time.strftime('%Y-%m-%dT%H-%M-%S')}"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"# Not a result\n\n{result['refused']}\n", encoding="utf-8")
    (folder / "raw.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def slug(name: str) -> str:
    """A model's name as part of a record's."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in name.lower()).strip("-.")

