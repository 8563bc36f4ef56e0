"""What a result.json holds, one schema a theme, and how it reads as Markdown.

Themes: `speedup` (the arms' steps), `memory` (predicted and measured peaks, the frontier under caps), `kernels` (the
contests of contest.py), `loading` (as bench_loading.py writes it), `loss` (held-out loss of the whole model against
seconds of training).
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from elo_engine.benchmarks.contestants import BASELINES
from elo_engine.benchmarks.intervals import USUAL, percent
from elo_engine.errors import FailedError
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.setting import ARMS, ArmName
from elo_engine.report import markdown_table

SCHEMA = 1
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "loss workspace", "slack")

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


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
_ARM_MEMORY = _part(
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
_POINT = _part(
    {"cap_bytes": int, "why": str},  # the cap it ran under; why it failed
    arm=ArmName, sequence_length=int, micro_batch=int, predicted_bytes=int, predicted=dict[str, int],
    measured_bytes=int | None, measured_what=Literal["traced tensor bytes", "max_memory_allocated"] | None,
    status=Literal["ran", "out of memory", "not run", "failed"], recompute=bool, state=Literal["fp32", "8bit"],
)  # fmt: skip
_CAP = _part(cap_bytes=int, arm=ArmName, largest=dict[str, int])
_CONTEST = _part(
    contest=str, shape=str, flops=float, bytes=float, floor_ms=float, rounds=int, arms=dict[str, dict[str, Any]]
)
_LOSS_POINT = _part(seconds=float, tokens=int, language=str, loss_nats=float, stage=str)

SCHEMAS = {
    "speedup": _part(
        model=_MODEL, device=_DEVICE, dtype=str, sequence_length=int,
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
        conditions=str, series=list[_part(label=str, points=list[_LOSS_POINT])]
    ),
}  # fmt: skip


def _speedup_faults(result: dict[str, Any]) -> list[str]:
    faults = []
    arms = result["arms"]
    for name, arm in arms.items():
        if arm["status"] == "ran":
            missing = [field for field in _NEEDED if arm.get(field) is None]
            faults += [f"arms.{name}: it ran, so it needs {', '.join(missing)}"] if missing else []
        elif not arm["why"]:
            faults.append(f"arms.{name}: its status is {arm['status']!r}, and `why` says nothing")
        for field in ("step_s", "tokens_per_s"):
            spread = arm.get(field)
            if spread and not 0 < spread["p10"] <= spread["median"] <= spread["p90"]:
                faults.append(f"arms.{name}.{field}: 0 < p10 <= median <= p90 does not hold")
    over = {name: "stage_ratio" for name in result["stage_ratio"]}
    over |= {name: "pipeline_speedup" for name in result["pipeline_speedup"]}
    faults += [f"{field}.{name}: that arm did not run" for name, field in over.items() if not _ran(arms, name)]
    if over and not _ran(arms, "elo_pretrain"):
        faults.append("ratios are given, and elo_pretrain did not run")
    return faults


def _ran(arms: dict[str, Any], name: str) -> bool:
    return name in arms and arms[name]["status"] == "ran"


def _memory_faults(result: dict[str, Any]) -> list[str]:
    return [
        f"points.{number}: measured_bytes and measured_what come together"
        for number, point in enumerate(result["points"])
        if (point["measured_bytes"] is None) != (point["measured_what"] is None)
    ]


def _kernel_faults(result: dict[str, Any]) -> list[str]:
    needed = {"median_ms", "p20_ms", "p80_ms", "floor_share", "raw_ms"}
    return [
        f"contests.{number}.arms.{name}: neither its times nor `skipped`"
        for number, contest in enumerate(result["contests"])
        for name, row in contest["arms"].items()
        if "skipped" not in row and not needed <= row.keys()
    ]


_FAULTS = {"speedup": _speedup_faults, "memory": _memory_faults, "kernels": _kernel_faults}


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


def cap_name(cap_bytes: int) -> str:
    """`8 GB` or `8 GiB`, as it was meant."""
    for unit, name in ((10**9, "GB"), (2**30, "GiB")):
        if cap_bytes % unit == 0:
            return f"{cap_bytes // unit} {name}"
    return human_bytes(cap_bytes)


def times(interval: dict[str, Any], digits: int = 2, header: float = USUAL) -> str:
    """`6.51x (6.32 to 6.70)`, with its confidence where the header states another; without an interval it says so."""
    text = f"{interval['median']:.{digits}f}x"
    if interval["low"] is None or interval["high"] is None:
        return f"{text} (too few rounds for an interval)"
    other = f", {percent(interval['confidence'])}" if interval["confidence"] != header else ""
    return f"{text} ({interval['low']:.{digits}f} to {interval['high']:.{digits}f}{other})"


def number(value: float) -> str:
    """Three significant digits: 1234.5 -> `1,234`, 0.12 -> `0.120`."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def by_letter(arms: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The arms in the order of their letters."""
    return sorted(arms.items(), key=lambda item: (item[1]["letter"], ARMS.index(item[0])))


def measured_peak(memory: dict[str, Any]) -> tuple[int, str, bool] | None:
    """(bytes, what they are, whether the prediction is of the same thing) of an arm; None when nothing was measured."""
    for field, what, same in (
        ("peak_allocated_bytes", "allocated", True),
        ("tensor_peak_bytes", "tensors", True),
        ("host_peak_bytes", "resident", False),
    ):
        if memory[field] is not None:
            return memory[field], what, same
    return None


def _memory_cell(memory: dict[str, Any] | None) -> str:
    if memory is None:
        return ""
    found, predicted = measured_peak(memory), memory["predicted_bytes"]
    said = f"predicted {human_bytes(predicted)}" if predicted is not None else ""
    if found is None:
        return said
    peak, what, same = found
    text = f"{human_bytes(peak)} {what}"
    if memory["peak_reserved_bytes"] is not None:
        text += f", {human_bytes(memory['peak_reserved_bytes'])} reserved"
    if said:
        text += f"; {said}" + (f", ratio {predicted / peak:.3f}" if same and peak else "")
    return text


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _arm_row(arm: dict[str, Any]) -> list[str]:
    name = [f"({arm['letter']})", arm["label"]]
    if arm["status"] != "ran":
        said = _in_a_cell(arm["why"])
        return [*name, f"{'failed' if arm['status'] == 'failed' else 'not here'}: {said}", "", "", "",
                _memory_cell(arm.get("memory")), ""]  # fmt: skip
    speed, step = arm["tokens_per_s"], arm["step_s"]
    share = f"{100 * arm['ceiling_share']:.0f} %" + (f" (MFU {100 * arm['mfu']:.0f} %)" if arm.get("mfu") else "")
    energy = arm.get("energy_j_per_token")
    return [
        *name,
        f"{number(speed['median'])} ({number(speed['p10'])} to {number(speed['p90'])})",
        f"{number(1e3 * step['median'])} ({number(1e3 * step['p10'])} to {number(1e3 * step['p90'])})",
        f"{number(arm['model_gflop_per_token'])} / {number(arm['executed_gflop_per_token'])}",
        share,
        _memory_cell(arm["memory"]),
        "" if energy is None else number(energy),
    ]


def _how(arms: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What decides a ratio besides the sizes: the optimizer's state, and who computes activations a second time."""
    state = {"8bit": "8-bit", "fp32": "fp32"}.get(settings.get("state", ""))
    said = [f"{state} optimizer state"] if state else []
    known = [arm for _, arm in by_letter(arms) if "recompute" in (arm.get("options") or {}) and arm["status"] == "ran"]
    letters = ", ".join(f"({arm['letter']})" for arm in known if arm["options"]["recompute"])
    return [*said, f"checkpointed (activations recomputed): {letters or 'no arm'}"] if known else said


def conditions(result: dict[str, Any], config: dict[str, Any], environment: dict[str, Any]) -> str:
    """One paragraph: what ran on what, how long, with which versions, at which commit."""
    said = [result["conditions"]] if result["theme"] == "loss" else []
    settings = config.get("settings") or {}
    if model := result.get("model"):
        count = model["parameters"]
        size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{number(count / 1e6)} million"
        weights = {"random": ", random weights", "of the checkpoint": ", the checkpoint's weights"}
        said.append(f"{model['name']} ({size} parameters{weights.get(settings.get('weights', ''), '')})")
    if device := result.get("device"):
        cores = f", {environment.get('cpu_threads_used')} threads" if device["type"] == "cpu" else ""
        said.append(f"{device['name']}{cores}")
    if dtype := result.get("dtype"):
        said.append(dtype)
    if result["theme"] == "speedup":
        batch = dict(result["micro_batch"])
        others = batch.pop("others", None)
        rows = [f"{arm} {size}" for arm, size in batch.items()] + ([f"others {others}"] if others else [])
        step = f"{settings['rows_a_step']} rows a step, " if "rows_a_step" in settings else ""
        said.append(f"sequence length {result['sequence_length']}, {step}rows a micro-batch: {', '.join(rows)}")
        said += _how(result["arms"], settings)
        together = settings.get("arms_alive_together")
        alive = {True: " side by side", False: ", a process for each visit", None: ""}[together]
        said.append(f"{result['rounds']} rounds, arms taking turns{alive}, {result['warmup_steps']} warm-up steps each")
    if best := result.get("ceilings"):
        kind = best.get("matmul_dtype")
        text = f"this run's ceilings {number(best['matmul_flop_per_s'] / 1e12)} TFLOP/s of a large matrix product"
        text += f" in {kind}" if kind and kind != result.get("dtype") else ""
        said.append(f"{text}, {number(best['copy_bytes_per_s'] / 1e9)} GB/s of a copy (read + write)")
    if peak := result.get("peak_flop_per_s"):
        said.append(f"MFU against {number(peak / 1e12)} TFLOP/s dense bf16")
    packages = environment.get("packages", {})
    said += [f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name)]
    git = config["git"]
    commit = f"commit {git['commit'][:7]}{' with changes' if git['dirty'] else ''}" if git else "commit unknown"
    return "; ".join([*said, commit, config["created"][:10]]) + "."


def _baseline_order(name: str) -> tuple[int, str]:
    return (BASELINES.index(name) if name in BASELINES else len(BASELINES)), name


def speedup_tables(result: dict[str, Any]) -> list[str]:
    """The pipeline speedups and the arms."""
    blocks = []
    if result["pipeline_speedup"]:
        arms, split = result["arms"], result["split"]
        intervals = [*result["pipeline_speedup"].values(), *result["stage_ratio"].values()]
        usual = max((found["confidence"] for found in intervals if found["low"] is not None), default=USUAL)
        sure = f"({percent(usual)} interval)"
        header = ["pipeline over", f"speedup {sure}", "ideal, from operations", f"stage ratio r {sure}"]
        rows = []
        for name in sorted(result["pipeline_speedup"], key=_baseline_order):
            found, ratio = result["pipeline_speedup"][name], result["stage_ratio"].get(name)
            label = f"({arms[name]['letter']}) {arms[name]['label']}"
            r = times(ratio, 4, usual).replace("x", "", 1) if ratio else ""
            rows.append([label, f"**{times(found, header=usual)}**", f"{found['ideal']:.2f}x", r])
        words = f"{100 * split:g} % of the tokens in ELO pretraining, {100 * (1 - split):g} % in alignment"
        blocks += [f"Pipeline: {words}.", markdown_table(header, rows)]
    header = ["", "arm", "tokens/s (p10 to p90)", "step, ms (p10 to p90)", "GFLOP/token, model / executed",
              "of this run's matmul ceiling", "peak memory", "J/token"]  # fmt: skip
    rows = [_arm_row(arm) for _, arm in by_letter(result["arms"])]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    blocks.append(markdown_table(header, rows))
    if result["checks"]:
        blocks.append("Checked: " + "; ".join(result["checks"]) + ".")
    return blocks


def memory_tables(result: dict[str, Any]) -> list[str]:
    """Predicted against measured, then the frontier: the largest micro-batch per cap, arm and sequence length."""
    header = ["arm", "sequence length", "micro-batch", "recompute", "state", "predicted", "measured",
              "predicted / measured"]  # fmt: skip
    rows = []
    for point in result["points"]:
        measured = point["measured_bytes"]
        found = f"{human_bytes(measured)} ({point['measured_what']})" if measured is not None else point["status"]
        found += f": {_in_a_cell(point['why'])}" if point.get("why") else ""
        found += f", under a cap of {cap_name(point['cap_bytes'])}" if point.get("cap_bytes") else ""
        share = f"{point['predicted_bytes'] / measured:.3f}" if measured else ""
        size = [str(point["sequence_length"]), str(point["micro_batch"])]
        how = ["layer" if point["recompute"] else "none", point["state"]]
        rows.append([point["arm"], *size, *how, human_bytes(point["predicted_bytes"]), found, share])
    blocks = [markdown_table(header, rows)] if rows else []
    if caps := result["caps"]:
        lengths = sorted({int(T) for cap in caps for T in cap["largest"]})
        rows = [
            [cap_name(cap["cap_bytes"]), cap["arm"],
             *(str(cap["largest"].get(str(T), "") or ("-" if str(T) in cap["largest"] else "")) for T in lengths)]
            for cap in sorted(caps, key=lambda cap: (cap["cap_bytes"], ARMS.index(cap["arm"])))
        ]  # fmt: skip
        blocks.append("Largest micro-batch in rows that fits, by sequence length (-: not one row):")
        blocks.append(markdown_table(["memory cap", "arm", *(f"{T}" for T in lengths)], rows))
    return blocks


def kernel_tables(result: dict[str, Any]) -> list[str]:
    """One table of all contests."""
    rows = []
    for contest in result["contests"]:
        engine = contest["arms"].get("engine", {}).get("median_ms")
        for name, row in contest["arms"].items():
            head = [contest["contest"], contest["shape"].replace("|", "/"), name]
            if "skipped" in row:
                rows.append([*head, "not run: " + row["skipped"].replace("|", "/"), "", ""])
                continue
            against = f"{row['median_ms'] / engine:.2f}x" if engine else ""
            spread = f"{number(row['median_ms'])} ({number(row['p20_ms'])} to {number(row['p80_ms'])})"
            rows.append([*head, spread, f"{100 * row['floor_share']:.0f} %", against])
    header = ["op", "shape", "arm", "ms (p20 to p80)", "floor / time", "time / the engine's"]
    return [markdown_table(header, rows)] if rows else []


def loss_tables(result: dict[str, Any]) -> list[str]:
    """Each series' first and last held-out loss a language."""
    rows = []
    for series in result["series"]:
        for language in dict.fromkeys(point["language"] for point in series["points"]):
            points = sorted((p for p in series["points"] if p["language"] == language), key=lambda p: p["seconds"])
            first, last = points[0], points[-1]
            rows.append([series["label"], language, f"{first['loss_nats']:.4f}", f"{last['loss_nats']:.4f}",
                         f"{number(last['seconds'])} s, {last['tokens']:,} tokens"])  # fmt: skip
    header = ["training", "held-out", "first, nats/token", "last, nats/token", "after"]
    return [markdown_table(header, rows)]


def tables(result: dict[str, Any]) -> list[str]:
    """Markdown blocks of a result, whatever its theme; of `loading` none: its record has tables of its own."""
    made = {"speedup": speedup_tables, "memory": memory_tables, "kernels": kernel_tables, "loss": loss_tables}
    return made[result["theme"]](result) if result["theme"] in made else []


def subject(result: dict[str, Any]) -> str:
    """`llama-3.1-8b on NVIDIA H200`; empty where a result names neither."""
    return " on ".join(result[field]["name"] for field in ("model", "device") if field in result)


def record_readme(result: dict[str, Any], config: dict[str, Any], environment: dict[str, Any]) -> str:
    """README.md of a new record."""
    command = " ".join(config["command"])
    files = (
        "result.json has these figures, raw.json every step, config.json the settings, environment.json versions and "
        "hardware. Made when the record was written; docs/benchmarks.md shows all records with pictures."
    )
    heading = ": ".join(filter(None, (result["theme"].capitalize(), subject(result))))
    blocks = [f"# {heading}", conditions(result, config, environment), f"```\n{command}\n```"]
    return "\n\n".join([*blocks, *tables(result), files]) + "\n"
