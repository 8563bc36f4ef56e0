"""What a result.json and the raw steps beside it hold: one schema a theme, and what must hold among its fields.

Themes: `speedup` (the arms' steps), `memory` (predicted and measured peaks, the frontier under caps), `kernels` (the
contests of contest.py), `loading` (as bench_loading.py writes it), `loss` (held-out loss of the whole model against
seconds of training), `quality` (held-out loss of methods side by side, over seeds), `fp8` (8-bit operands against
bf16), `card` (every figure asked of a GPU, with bound and verdict).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from elo_engine.benchmarks.card_table import wrong_verdicts
from elo_engine.config import Recompute
from elo_engine.errors import FailedError
from elo_engine.measure.components import PeakWhat, component_faults
from elo_engine.measure.planner import STREAMED
from elo_engine.measure.setting import GRAPHED, ArmName

SCHEMA = 1
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss workspace", "slack")
# `measured_what` of a point -> `peak` of its components
MEASURED_WHAT: dict[str | None, PeakWhat] = {"traced tensor bytes": "tensors", "max_memory_allocated": "allocated"}

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def said_recompute(recorded: Any) -> str:
    """`recompute` of an arm or point in words; records from before there was a third have a truth value."""
    return recorded if isinstance(recorded, str) else "layer" if recorded else "none"


def _part(optional: dict[str, Any] | None = None, /, **fields: Any) -> type[BaseModel]:
    """An object with exactly these fields; `optional` ones may be left out and are then null."""
    required = {name: (kind, ...) for name, kind in fields.items()}
    maybe = {name: (kind | None, None) for name, kind in (optional or {}).items()}
    return create_model("Part", __config__=_STRICT, **required, **maybe)  # type: ignore[no-any-return,call-overload]


_DEVICE = _part(type=Literal["cpu", "cuda"], name=str)
_MODEL = _part(name=str, parameters=int, layers=int, V=int, D=int, F=int, H=int, K=int, E=int, tied=bool)
_CEILINGS = _part({"matmul_dtype": str}, matmul_flop_per_s=float, copy_bytes_per_s=float)
_STEPS = _part(median=float, p10=float, p90=float, count=int)
_SPEED = _part({"count": int}, median=float, p10=float, p90=float)
_COMPONENTS = _part(predicted=dict[str, int], measured=dict[str, int], peak=PeakWhat)  # components.by_component
_ARM_MEMORY = _part(
    {"components": _COMPONENTS},
    peak_allocated_bytes=int | None, peak_reserved_bytes=int | None, host_peak_bytes=int | None,
    tensor_peak_bytes=int | None, predicted_bytes=int | None, predicted=dict[str, int],
)  # fmt: skip
_NEEDED = {
    "tokens_per_step": int, "step_s": _STEPS, "tokens_per_s": _SPEED, "model_gflop_per_token": float,
    "executed_gflop_per_token": float, "ceiling_share": float, "memory": _ARM_MEMORY, "parameters_trained": int,
}  # fmt: skip  # of an arm that ran
_ARM = _part(
    _NEEDED | {"mfu": float, "energy_j_per_token": float, "loss_first": float, "loss_last": float,
               "options": dict[str, Any], "clocks": dict[str, Any]},
    letter=str, label=str, status=Literal["ran", "failed", "not here"], why=str,
)  # fmt: skip
_INTERVAL = _part(median=float, low=float | None, high=float | None, confidence=float)
_SPEEDUP = _part(median=float, low=float | None, high=float | None, confidence=float, ideal=float)
_STREAMED = _part(  # over_resident: seconds a token over those of `resident`, which runs its layers again as well
    {"over_resident": _part(median=float, low=float | None, high=float | None, confidence=float, resident=ArmName)},
    pipeline=dict[ArmName, _SPEEDUP],
)
_POINT = _part(
    # the cap it ran under; why it failed; of the streamed arm, where its layers' inputs are
    {"cap_bytes": int, "why": str, "components": _COMPONENTS, "inputs": Literal["device", "host"]},
    arm=ArmName, sequence_length=int, micro_batch=int, predicted_bytes=int, predicted=dict[str, int],
    measured_bytes=int | None, measured_what=Literal["traced tensor bytes", "max_memory_allocated"] | None,
    status=Literal["ran", "out of memory", "not run", "failed"], recompute=bool | Recompute,
    state=Literal["fp32", "8bit"],
)  # fmt: skip
_CAP = _part(cap_bytes=int, arm=ArmName, largest=dict[str, int])
_CONTEST = _part(
    contest=str, shape=str, flops=float, bytes=float, floor_ms=float, rounds=int, arms=dict[str, dict[str, Any]]
)
_STAGE_MEMORY = _part(label=str, stage=str, predicted_bytes=int, measured_bytes=int, components=_COMPONENTS)
_LOSS_POINT = _part(seconds=float, tokens=int, language=str, loss_nats=float, stage=str)
_BY_KIND = _part(shallow=float | None, whole=float | None)
_QUALITY_POINT = _part(
    moment=Literal["base", "training", "reattached", "end"], shallow=int, whole=int, seconds=float,
    loss_nats=dict[str, float], bits_per_byte=dict[str, float],
)  # fmt: skip
_QUALITY_RUN = _part(
    seed=int, seconds=float, fit_seconds=float, steps=_part(shallow=int, whole=int), seconds_per_token=_BY_KIND,
    points=list[_QUALITY_POINT],
)  # fmt: skip
_QUALITY_METHOD = _part(
    {"lr": float},  # peak learning rate of whole-model steps
    letter=str, name=str, label=str, kind=Literal["elo", "whole", "lora", "outer"], full=bool, overrides=list[str],
    tokens=_part(shallow=int, whole=int, fit=int), runs=list[_QUALITY_RUN], failed=list[_part(seed=int, why=str)],
    cost=dict[Literal["plain", "checkpointed"], _part(shallow=float, whole=float, fit=float)],
)  # fmt: skip
_FP8_HELDOUT = _part(
    language=str, bf16_nats=float, spread_nats=float, mean_difference_nats=float, largest_difference_nats=float
)
_FP8_ARM = _part(
    arm=str, seeds=int, mean_difference_nats=float, largest_difference_nats=float, last_difference_nats=float,
    mean_spread_nats=float, last_spread_nats=float, within=float, heldout=list[_FP8_HELDOUT],
)  # fmt: skip
_FP8_CHECK = _part(
    arm=str, seed=int, loss_bf16_nats=float, loss_fp8_nats=float, relative=float, cosine=float, worst=str,
    worst_relative=float,
)  # fmt: skip
_CARD_PART = _part(
    {"allowed_s": float, "exit_status": int, "record": str},
    part=str, group=str, status=Literal["ran", "failed", "timed out", "cannot run", "not run", "interrupted"], why=str,
    seconds=float, figures=dict[str, float], notes=dict[str, str],
)  # fmt: skip
_CARD_ASKED = _part(
    {"least": float, "most": float, "measured": float}, part=str, figure=str, label=str, bound_from=str, whole=bool,
    verdict=Literal["met", "not met", "not run", "not judged"], why=str,
)

SCHEMAS = {
    "speedup": _part(
        {"streamed": _STREAMED}, model=_MODEL, device=_DEVICE, dtype=str, sequence_length=int,
        micro_batch=dict[str, int], split=float, rounds=int, warmup_steps=int, ceilings=_CEILINGS,
        peak_flop_per_s=float | None, arms=dict[ArmName, _ARM], stage_ratio=dict[ArmName, _INTERVAL],
        pipeline_speedup=dict[ArmName, _SPEEDUP], checks=list[str],
    ),
    "memory": _part(
        {"dtype": str}, device=_DEVICE, model=_MODEL, points=list[_POINT], caps=list[_CAP]
    ),
    "kernels": _part({"dtype": str}, device=_DEVICE, ceilings=_CEILINGS, contests=list[_CONTEST]),
    "loading": _part(results=dict[str, Any]),
    "loss": _part(
        {"memory": list[_STAGE_MEMORY]}, conditions=str, series=list[_part(label=str, points=list[_LOSS_POINT])]
    ),
    "quality": _part(
        conditions=str, model=_MODEL, device=_DEVICE, dtype=str, sequence_length=int, target=str, others=list[str],
        seeds=list[int], base=dict[str, _part(loss_nats=float, bits_per_byte=float)], cost_model=str, cost_length=int,
        methods=list[_QUALITY_METHOD],
    ),
    "fp8": _part(
        conditions=str, device=_DEVICE, emulated=bool, compared=list[_FP8_ARM], checks=list[_FP8_CHECK],
        curves=list[_part(arm=str, seed=int, step=list[int], loss_nats=list[float])],
    ),
    "card": _part(
        {"headline": str}, device=_DEVICE, scale=Literal["full", "tiny"], minutes=float, free_bytes=int,
        parts=list[_CARD_PART], asked=list[_CARD_ASKED],
    ),
}  # fmt: skip


def _speedup_faults(result: dict[str, Any]) -> list[str]:
    faults = []
    arms = result["arms"]
    for name, arm in arms.items():
        if arm["status"] == "ran":
            missing = [field for field in _NEEDED if arm.get(field) is None]
            faults += [f"arms.{name}: it ran, so it needs {', '.join(missing)}"] if missing else []
            faults += _graph_faults(name, arm.get("options") or {})
        elif not arm["why"]:
            faults.append(f"arms.{name}: its status is {arm['status']!r}, and `why` says nothing")
        for field in ("step_s", "tokens_per_s"):
            spread = arm.get(field)
            if spread and not 0 < spread["p10"] <= spread["median"] <= spread["p90"]:
                faults.append(f"arms.{name}.{field}: 0 < p10 <= median <= p90 does not hold")
        memory = arm.get("memory") or {}
        peak = measured_peak(memory) if memory else None
        measured, what = (None, None) if peak is None else peak[:2]
        faults += _component_faults(f"arms.{name}.memory", memory, measured, what)
    over = {name: "stage_ratio" for name in result["stage_ratio"]}
    over |= {name: "pipeline_speedup" for name in result["pipeline_speedup"]}
    faults += [f"{field}.{name}: that arm did not run" for name, field in over.items() if not _ran(arms, name)]
    if over and not _ran(arms, "elo_pretrain"):
        faults.append("ratios are given, and elo_pretrain did not run")
    return faults + list(_streamed_faults(result.get("streamed"), arms))


def _graph_faults(name: str, options: dict[str, Any]) -> Iterator[str]:
    """What is said of an arm with CUDA graphs, which earlier records have not."""
    if options.get("graph", "off") == "off":
        return
    if name not in GRAPHED:
        yield f"arms.{name}: it has no steps that are graphs, and options.graph is {options['graph']!r}"
    elif options.get("graphs", 0) == 0:  # None: it was interrupted before it told
        yield f"arms.{name}: options.graph is {options['graph']!r}, and none was captured"
    elif not isinstance(options.get("warmup_steps"), int):
        yield f"arms.{name}: options.graph is {options['graph']!r}, and options.warmup_steps no number"


def _streamed_faults(streamed: dict[str, Any] | None, arms: dict[str, Any]) -> Iterator[str]:
    """What is said of (s) needs it and what it is held against; a resident arm that recomputes, as it does."""
    if streamed is None:
        return
    needed = {STREAMED, *streamed["pipeline"], *(["elo_pretrain"] if streamed["pipeline"] else [])}
    if over := streamed.get("over_resident"):
        needed.add(over["resident"])
        if said_recompute((arms.get(over["resident"], {}).get("options") or {}).get("recompute")) != "layer":
            yield f"streamed.over_resident: {over['resident']} does not recompute, as the streamed arm does"
    missing = sorted(name for name in needed if not _ran(arms, name))
    if missing:
        yield f"streamed: it needs {', '.join(missing)}, which did not run"


def _component_faults(where: str, beside: dict[str, Any], measured: int | None, what: str | None) -> Iterator[str]:
    """`components` of an object against the peaks: its `predicted_bytes`, and `measured` bytes, which are `what`."""
    found = beside.get("components")
    if not found:
        return
    if found["peak"] != what:
        yield f"{where}.components: they are of {found['peak']} bytes, and the peak is {what or 'not measured'}"
    for fault in component_faults(found, beside["predicted_bytes"], measured):
        yield f"{where}.components: {fault}"


def _ran(arms: dict[str, Any], name: str) -> bool:
    return name in arms and arms[name]["status"] == "ran"


def _memory_faults(result: dict[str, Any]) -> list[str]:
    faults = []
    for number, point in enumerate(result["points"]):
        measured, what = point["measured_bytes"], point["measured_what"]
        if (measured is None) != (what is None):
            faults.append(f"points.{number}: measured_bytes and measured_what come together")
        faults += _component_faults(f"points.{number}", point, measured, MEASURED_WHAT.get(what))
    return faults


def _loss_faults(result: dict[str, Any]) -> list[str]:
    faults = []
    for number, stage in enumerate(result.get("memory") or []):
        # a stage's peak is resident memory on a CPU and allocated memory on a GPU, and a loss record names no device
        what = stage["components"]["peak"]
        faults += _component_faults(f"memory.{number}", stage, stage["measured_bytes"], what)
    return faults


def _kernel_faults(result: dict[str, Any]) -> list[str]:
    needed = {"median_ms", "p20_ms", "p80_ms", "floor_share", "raw_ms"}
    return [
        f"contests.{number}.arms.{name}: neither its times nor `skipped`"
        for number, contest in enumerate(result["contests"])
        for name, row in contest["arms"].items()
        if "skipped" not in row and not needed <= row.keys()
    ]


def _quality_faults(result: dict[str, Any]) -> Iterator[str]:
    """Every run of a method spent the same tokens, began at the one base model and was scored in every language."""
    languages = {result["target"], *result["others"]}
    if set(result["base"]) != languages:
        yield f"base: scored in {sorted(result['base'])}, and the languages are {sorted(languages)}"
        return
    for method in result["methods"]:
        where = f"methods.{method['name']}"
        if not method["runs"] and not method["failed"]:
            yield f"{where}: neither ran nor failed"
        for run in method["runs"]:
            points, at = run["points"], f"{where}.runs, seed {run['seed']}"
            if len(points) < 2 or points[0]["moment"] != "base" or points[-1]["moment"] != "end":
                yield f"{at}: its points do not go from base to end"
                continue
            spent = {kind: points[-1][kind] for kind in ("shallow", "whole")}
            if spent != {kind: method["tokens"][kind] for kind in spent}:
                yield f"{at}: ends after {spent} tokens, and the method's are {method['tokens']}"
            if any(set(point[what]) != languages for point in points for what in ("loss_nats", "bits_per_byte")):
                yield f"{at}: a point is not scored in every language"
            elif any(points[0]["loss_nats"][name] != result["base"][name]["loss_nats"] for name in languages):
                yield f"{at}: does not begin at the base model's losses"
            if run["seed"] not in result["seeds"]:
                yield f"{at}: is none of the seeds {result['seeds']}"


def _quality(result: dict[str, Any]) -> list[str]:
    return list(_quality_faults(result))


def _card(result: dict[str, Any]) -> list[str]:
    return list(wrong_verdicts(result))


_FAULTS = {
    "speedup": _speedup_faults, "memory": _memory_faults, "kernels": _kernel_faults, "loss": _loss_faults,
    "quality": _quality, "card": _card,
}  # fmt: skip


def check_raw(theme: str, raw: Any, where: str) -> None:
    """Raises FailedError unless raw steps have the form that intervals are computed from; more fields may be there."""
    if theme != "speedup":
        return
    rounds = raw.get("rounds") if isinstance(raw, dict) else None
    if not isinstance(rounds, list) or not rounds:
        raise FailedError(f"{where}: has no list `rounds`")
    for number_, turn in enumerate(rounds):
        for arm, steps in turn.items() if isinstance(turn, dict) else [("?", None)]:
            seconds = steps.get("seconds") if isinstance(steps, dict) else None
            if not isinstance(seconds, list) or not all(isinstance(s, int | float) and s > 0 for s in seconds):
                raise FailedError(f"{where}: rounds.{number_}.{arm} has no list `seconds` of positive numbers")


def check_result(result: Any, where: str) -> None:
    """Raises FailedError naming the fields that do not fit the schema of the result's theme, or contradict others."""
    theme = result.get("theme") if isinstance(result, dict) else None
    if theme not in SCHEMAS:
        raise FailedError(f"{where}: theme {theme!r} is none of {', '.join(SCHEMAS)}")
    if result.get("schema") != SCHEMA:
        raise FailedError(f"{where}: schema {result.get('schema')!r}; this version reads {SCHEMA}")
    fields = {name: value for name, value in result.items() if name not in ("schema", "theme")}
    try:
        SCHEMAS[theme].model_validate_json(json.dumps(fields))
        said = _FAULTS[theme](result) if theme in _FAULTS else []
    except ValidationError as error:
        said = [f"{'.'.join(map(str, e['loc'])) or 'as a whole'}: {e['msg']}" for e in error.errors()]
    if said:
        more = f" (and {len(said) - 5} more)" if len(said) > 5 else ""
        raise FailedError(f"{where} does not fit the schema of {theme!r}: {'; '.join(said[:5])}{more}")


def measured_peak(memory: dict[str, Any]) -> tuple[int, PeakWhat, bool] | None:
    """(bytes, what they are, whether the prediction is of the same thing) of an arm; None when nothing was measured."""
    fields: tuple[tuple[str, PeakWhat, bool], ...] = (
        ("peak_allocated_bytes", "allocated", True),
        ("tensor_peak_bytes", "tensors", True),
        ("host_peak_bytes", "resident", False),
    )
    for field, what, same in fields:
        if memory[field] is not None:
            return memory[field], what, same
    return None
