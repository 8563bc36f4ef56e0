"""`report.md`, `report.json` and the plot of a run, made from its records alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from elo_engine.console import format_seconds
from elo_engine.handoff import report_section
from elo_engine.measure.components import HELD, REST, rest_name
from elo_engine.measure.meter import human_bytes
from elo_engine.summary import read_steps

MOMENTS = ("base", "reattached", "aligned")
COLOURS = ("#3366cc", "#cc6633", "#338855", "#7744aa")


def evaluation_rows(evaluations: dict[str, Any]) -> list[list[str]]:
    """Language, then loss (and its change against the base) and bits per byte at each moment."""
    moments = [moment for moment in MOMENTS if moment in evaluations]
    languages = list(evaluations[moments[0]]) if moments else []
    rows = []
    for language in languages:
        row = [language]
        for moment in moments:
            found, base = evaluations[moment][language], evaluations[moments[0]][language]
            change = found["loss_nats"] - base["loss_nats"]
            shown = "" if moment == moments[0] else f" ({change:+.3f})"
            row.append(f"{found['loss_nats']:.3f}{shown}, {found['bits_per_byte']:.3f} bpb")
        rows.append(row)
    return rows


def stage_rows(stages: dict[str, Any]) -> list[list[str]]:
    """Stage, tokens, time, speed with spread, peak memory."""
    rows = []
    for name, summary in stages.items():
        times = summary["step_s"]
        speed = (
            f"{summary['tokens_per_s']:.0f} tokens/s (step {times['median']:.2f} s, p10 {times['p10']:.2f}, p90 "
            f"{times['p90']:.2f})"
        )
        peak = summary["peak_bytes"]  # none where steps of two kinds are one stage, which has it
        memory = f"{human_bytes(peak)} {summary['peak_what']}" if peak else "with the other steps"
        if summary.get("memory"):
            taken = summary["memory"]
            memory += (
                f"; the stage {human_bytes(taken['measured_bytes'])} for {human_bytes(taken['predicted_bytes'])} "
                f"predicted ({taken['measured_over_predicted']:.2f}x)"
            )
        rows.append([name, f"{summary['tokens_total']:,}", format_seconds(summary["seconds"]), speed, memory])
    return rows


BRIDGE_HEADER = ["gap between layers", "R2 of the change", "held out", "R2 of the state", "held out", "tokens"]
BRIDGE_SAY = (
    "Frozen affine maps stood in for the missing layers during ELO pretraining and are not part of the model. Share of "
    "the base model's variance that they explain, of the change from one end of a gap (-1: the embedding) to the "
    "other, and of the hidden state there:"
)


def bridge_rows(bridge: dict[str, Any]) -> list[list[str]]:
    """A row for each gap that was bridged."""

    def share(value: float | None) -> str:
        return "?" if value is None else f"{value:.3f}"

    rows = []
    for found in bridge["gaps"]:
        tokens = f"{found['tokens']:,.0f}, {found['left_out']:,.0f} left out"
        shares = [share(found[name]) for name in ("r2_change", "held_r2_change", "r2_output", "held_r2_output")]
        rows.append(["{} to {}".format(*found["gap"]), *shares, tokens])
    return rows


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def evaluation_header(evaluations: dict[str, Any]) -> list[str]:
    """Column titles for `evaluation_rows`."""
    return ["held-out", *(moment for moment in MOMENTS if moment in evaluations)]


COMPONENTS_SAY = (
    "Memory by component, predicted / measured (and their ratio): weights, gradients and optimizer state when the "
    "optimizer steps; activations and workspaces are what the peak is above these three, on both sides, and are not "
    "divided further. The prediction counts its slack there."
)
OF_PROCESS_SAY = (
    "The measured peak is resident memory, so its last part has the process in it: code, libraries and gaps of the "
    "heap; it is below zero where memory that the process held before served again."
)


def components_table(header: list[str], rows: list[tuple[list[str], dict[str, Any]]]) -> str:
    """What `measure.components.by_component` found, a row each behind cells of one's own, and what the columns mean."""
    said, lines = COMPONENTS_SAY, []
    for head, found in rows:
        predicted, measured, rest = found["predicted"], found["measured"], rest_name(found["peak"])
        pairs = [(predicted[name], measured[name]) for name in HELD] + [(predicted[REST], measured[rest])]
        cells = [
            f"{human_bytes(planned)} / {human_bytes(taken)}" + (f" ({planned / taken:.3f})" if taken > 0 else "")
            for planned, taken in pairs
        ]
        if found["peak"] == "resident":
            cells[-1] = f"{human_bytes(pairs[-1][0])} / {human_bytes(pairs[-1][1])} with the process"
            said = f"{COMPONENTS_SAY} {OF_PROCESS_SAY}"
        lines.append([*head, *cells])
    return f"{said}\n\n{markdown_table([*header, *HELD, REST], lines)}"


STAGE_HEADER = ["stage", "tokens", "time", "speed", "memory"]


def write_report(path: Path, results: dict[str, Any], extra_sections: list[str] | None = None) -> None:
    """Write `report.json`, `report.md` and, where matplotlib is installed, `report.png` into the run folder."""
    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    (path / "report.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    evaluations = results["evaluations"]
    gpu = environment["gpus"][0]["name"] if environment["gpus"] else "no GPU"
    lines = [
        "# ELO run",
        "",
        f"On {environment['cpu']}, {environment['cpu_threads_used']} threads, {gpu}; torch "
        f"{environment['packages']['torch']}.",
        "",
    ]
    if evaluations:
        lines += ["Loss of the whole model in nats per token (change against the base), and bits per byte:", ""]
        lines += [markdown_table(evaluation_header(evaluations), evaluation_rows(evaluations)), ""]
    if results["stages"]:
        lines += [markdown_table(STAGE_HEADER, stage_rows(results["stages"])), ""]
        memories = {name: summary.get("memory") or {} for name, summary in results["stages"].items()}
        counted = [([name], memory["components"]) for name, memory in memories.items() if "components" in memory]
        if counted:
            lines += [components_table(["stage"], counted), ""]
    bridge = results["stages"].get("pretrain", {}).get("bridge")
    if bridge:
        lines += [BRIDGE_SAY, "", markdown_table(BRIDGE_HEADER, bridge_rows(bridge)), ""]
    for section in extra_sections or []:
        lines += [section, ""]
    lines += report_section(path)
    if _plot(path, read_steps(path), evaluations):
        lines += ["![loss](report.png)", ""]
    (path / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _plot(path: Path, steps: list[dict[str, Any]], evaluations: dict[str, Any]) -> bool:
    """Training loss of the shallow and of the whole model in panels of their own (the two are not comparable), and the
    held-out loss of the whole model at each moment. False when matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # without pyplot, which takes a second to import and keeps what it draws

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {"pretrain": "ELO pretraining (shallow model)", "align": "alignment (whole model)"}
    for axis, (stage, title) in zip(axes[:2], titles.items(), strict=True):
        found = [record for record in steps if record["stage"] == stage]
        axis.plot(
            [r["tokens_total"] / 1000 for r in found], [r["loss_nats"] for r in found], color="#3366cc", linewidth=1.5
        )
        axis.set(title=title, xlabel="thousand tokens", ylabel="training loss, nats/token")
        axis.grid(alpha=0.3)
    moments = [moment for moment in MOMENTS if moment in evaluations]
    for number, language in enumerate(evaluations[moments[0]] if moments else []):
        values = [evaluations[moment][language]["loss_nats"] for moment in moments]
        lowest = min(found["loss_nats"] for found in evaluations[moments[0]].values())
        below = values[0] == lowest and len(evaluations[moments[0]]) > 1  # so that two curves' labels do not meet
        axes[2].plot(moments, values, marker="o", label=language, color=COLOURS[number % len(COLOURS)])
        for moment, value in zip(moments, values, strict=True):
            place = {"xytext": (0, -15 if below else 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes[2].annotate(f"{value:.2f}", (moment, value), **place)
    axes[2].set(title="held-out loss of the whole model", ylabel="nats/token")
    axes[2].margins(0.15, 0.2)
    axes[2].grid(alpha=0.3)
    if moments:
        axes[2].legend()
    figure.savefig(path / "report.png", dpi=120, facecolor="white")
    return True
