"""How a result.json, whose schemas are in schemas.py, reads as Markdown."""

from __future__ import annotations

from typing import Any

from elo_engine.benchmarks.card_table import card_conditions, card_tables
from elo_engine.benchmarks.contestants import BASELINES
from elo_engine.benchmarks.fp8_report import fp8_tables
from elo_engine.benchmarks.intervals import USUAL, percent
from elo_engine.benchmarks.loading_table import loading_tables
from elo_engine.benchmarks.quality_report import quality_tables
from elo_engine.benchmarks.schemas import measured_peak, said_recompute
from elo_engine.measure.meter import human_bytes
from elo_engine.measure.setting import ARMS
from elo_engine.report import components_table, markdown_table


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
    letters = ", ".join(f"({arm['letter']})" for arm in known if said_recompute(arm["options"]["recompute"]) == "layer")
    said += [f"checkpointed (activations recomputed): {letters or 'no arm'}"] if known else []
    once = [f"({arm['letter']})" for arm in known if said_recompute(arm["options"]["recompute"]) == "selective"]
    said += [f"the MLP's first product made again: {', '.join(once)}"] if once else []
    eight = [arm for arm in known if arm["options"].get("fp8", "none") != "none"]
    said += [f"({arm['letter']}) with 8-bit operands (pretrain.fp8: {arm['options']['fp8']})" for arm in eight]
    for arm in known:
        if arm["options"].get("graph", "off") != "off":
            warm = arm["options"]["warmup_steps"]
            said.append(f"({arm['letter']}) with its steps as CUDA graphs ({warm} warm-up steps)")
        if how := arm["options"].get("streaming"):
            store = "on disk" if how["store"] == "disk" else "in host memory"
            inputs = f"layers' inputs on the {how['inputs']}"
            sliced = ", the vocabulary in slices" if how.get("vocabulary") == "sliced" else ""
            said.append(f"({arm['letter']}) keeps the model {store}, {inputs}{sliced}, update {how['update']}")
    return said


def conditions(result: dict[str, Any], config: dict[str, Any], environment: dict[str, Any]) -> str:
    """One paragraph: what ran on what, how long, with which versions, at which commit."""
    said = [result["conditions"]] if result["theme"] in ("loss", "quality", "fp8") else []
    settings = config.get("settings") or {}
    said += [card_conditions(result)] if result["theme"] == "card" else []
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
    blocks += _streamed(result)
    header = ["", "arm", "tokens/s (p10 to p90)", "step, ms (p10 to p90)", "GFLOP/token, model / executed",
              "of this run's matmul ceiling", "peak memory", "J/token"]  # fmt: skip
    rows = [_arm_row(arm) for _, arm in by_letter(result["arms"])]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    blocks.append(markdown_table(header, rows))
    memories = [(arm, arm.get("memory") or {}) for _, arm in by_letter(result["arms"])]
    blocks += _components(
        ["", "arm"], [([f"({arm['letter']})", arm["label"]], memory.get("components")) for arm, memory in memories]
    )
    if result["checks"]:
        blocks.append("Checked: " + "; ".join(result["checks"]) + ".")
    return blocks


def _streamed(result: dict[str, Any]) -> list[str]:
    """The pipeline with the streamed alignment, and what streaming costs."""
    streamed, arms = result.get("streamed"), result["arms"]
    if not streamed:
        return []

    def called(name: str) -> str:
        return f"({arms[name]['letter']}) {arms[name]['label']}"

    intervals = [found for found in streamed["pipeline"].values() if found["low"] is not None]
    usual = max((found["confidence"] for found in intervals), default=USUAL)
    header = ["pipeline with (s) over", f"speedup ({percent(usual)} interval)", "ideal, from operations"]
    rows = [
        [called(name), times(found, header=usual), f"{found['ideal']:.2f}x"]
        for name, found in sorted(streamed["pipeline"].items(), key=lambda item: _baseline_order(item[0]))
    ]
    blocks = ["With the streamed alignment (s) in place of (g):", markdown_table(header, rows)] if rows else []
    if over := streamed.get("over_resident"):
        share = 100 / over["median"]
        blocks.append(
            f"(s) takes {times(over, 3)} the seconds a token of {called(over['resident'])}, which also runs its layers "
            f"again: {number(share)} % of its speed."
        )
    else:
        blocks.append("No resident arm that recomputes as (s) does was measured, so what streaming costs is not given.")
    return blocks


def _components(header: list[str], rows: list[tuple[list[str], dict[str, Any] | None]]) -> list[str]:
    """The table of memory by component, of the rows that have it; nothing where none has, as in earlier records."""
    counted = [(head, found) for head, found in rows if found]
    return [components_table(header, counted)] if counted else []


def memory_tables(result: dict[str, Any]) -> list[str]:
    """Predicted against measured, then the frontier: the largest micro-batch per cap, arm and sequence length."""
    header = ["arm", "sequence length", "micro-batch", "recompute", "state", "predicted", "measured",
              "predicted / measured"]  # fmt: skip
    rows, counted = [], []
    for point in result["points"]:
        measured = point["measured_bytes"]
        found = f"{human_bytes(measured)} ({point['measured_what']})" if measured is not None else point["status"]
        found += f": {_in_a_cell(point['why'])}" if point.get("why") else ""
        found += f", under a cap of {cap_name(point['cap_bytes'])}" if point.get("cap_bytes") else ""
        share = f"{point['predicted_bytes'] / measured:.3f}" if measured else ""
        size = [str(point["sequence_length"]), str(point["micro_batch"])]
        how = [said_recompute(point["recompute"]), point["state"]]
        arm = f"{point['arm']}, inputs on the {point['inputs']}" if point.get("inputs") else point["arm"]
        rows.append([arm, *size, *how, human_bytes(point["predicted_bytes"]), found, share])
        counted.append(([arm, *size, *how], point.get("components")))
    blocks = [markdown_table(header, rows)] if rows else []
    blocks += _components(header[:5], counted)
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
    """Each series' first and last held-out loss a language, and the memory of its stages."""
    rows = []
    for series in result["series"]:
        for language in dict.fromkeys(point["language"] for point in series["points"]):
            points = sorted((p for p in series["points"] if p["language"] == language), key=lambda p: p["seconds"])
            first, last = points[0], points[-1]
            rows.append([series["label"], language, f"{first['loss_nats']:.4f}", f"{last['loss_nats']:.4f}",
                         f"{number(last['seconds'])} s, {last['tokens']:,} tokens"])  # fmt: skip
    header = ["training", "held-out", "first, nats/token", "last, nats/token", "after"]
    stages = [([stage["label"], stage["stage"]], stage["components"]) for stage in result.get("memory") or []]
    return [markdown_table(header, rows), *_components(["training", "stage"], stages)]


def tables(result: dict[str, Any]) -> list[str]:
    """Markdown blocks of a result, whatever its theme."""
    made = {
        "speedup": speedup_tables, "memory": memory_tables, "kernels": kernel_tables, "loading": loading_tables,
        "loss": loss_tables, "quality": quality_tables, "fp8": fp8_tables,
        "card": card_tables,
    }  # fmt: skip
    return made[result["theme"]](result)


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
