"""The two pictures of a profile: where the time of a step goes, and what its tensors hold meanwhile.

Dark text on an opaque light card, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

CARD, INK, FAINT = "#f6f7f9", "#20242a", "#c9ced6"
COLOURS = {
    "data": "#7d6b3f",
    "forward": "#3a6fb0",
    "head": "#c8682b",
    "backward": "#5b4a9c",
    "optimizer": "#2f8560",
    "other": "#8a9099",
    "gaps": "#b9314f",
}
KERNELS_SHOWN = 10
POINTS = 4000  # a longer timeline is drawn by the largest of neighbours


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor=CARD, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes: Any) -> None:
    axes.set_facecolor(CARD)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8)


def _caption(figure: Any, report: dict[str, Any], more: str) -> None:
    facts = report["conditions"]
    shown = ("model", "stage", "sequence length", "micro-batch", "micro-batches a step", "dtype", "optimizer state",
             "recompute", "device")  # fmt: skip
    text = "; ".join(f"{name} {facts[name]}" for name in shown if name in facts)
    lines = textwrap.wrap(f"{more} Conditions: {text}.", 180)
    figure.supxlabel("\n".join(lines), fontsize=7, color=INK, ha="left", x=0.01)


def plot_time(report: dict[str, Any], path: Path) -> None:
    """Parts of the step in ms with their shares, and the top kernels with their share of roofline."""
    figure = _figure(11.0, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    parts = [entry for entry in report["parts"] if entry["share"] >= 0.0005]
    _bars(
        left,
        [entry["part"] for entry in parts],
        [{entry["part"]: entry["ms"]} for entry in parts],
        [f"{_ms(entry['ms'])}, {100 * entry['share']:.1f} %" for entry in parts],
    )
    left.set_title("where the step's time goes", color=INK, fontsize=10, loc="left")
    rows = report["kernels"][:KERNELS_SHOWN]
    notes = [
        _ms(row["ms"])
        + ("" if row["roofline_share"] is None else f", {100 * row['roofline_share']:.0f} % of roofline")
        for row in rows
    ]
    labels = [_label(row["name"]) + f" ({row['calls']})" for row in rows]
    _bars(right, labels, [row["ms_by_part"] for row in rows], notes)
    right.set_title(f"top {report['rows']} (calls), coloured by part", color=INK, fontsize=10, loc="left")
    _caption(figure, report, f"One optimizer step, {_ms(report['step_ms'])} under torch's profiler.")
    figure.savefig(path, facecolor=CARD)


def _bars(axes: Any, labels: list[str], bars: list[dict[str, float]], notes: list[str]) -> None:
    """One bar a label, each of stretches by part."""
    _dress(axes)
    for y, (bar, note) in enumerate(zip(bars, notes, strict=True)):
        reached = 0.0
        for name in (name for name in COLOURS if name in bar):
            axes.barh(y, bar[name], left=reached, color=COLOURS[name], height=0.7)
            reached += bar[name]
        axes.annotate(
            note, (reached, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(sum(bar.values()) for bar in [*bars, {"": 1e-9}]))  # room for the notes
    axes.set_xlabel("ms", color=INK, fontsize=8)


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def _label(name: str, most: int = 34) -> str:
    name = name.removeprefix("void ").replace("autograd::engine::evaluate_function: ", "engine: ")
    return name if len(name) <= most else name[: most - 3] + "..."


def plot_memory(report: dict[str, Any], path: Path) -> None:
    """Bytes in tensors over the step, above what was there when it began, coloured by the part that runs."""
    from matplotlib.patches import Patch

    memory = report["memory"]
    timeline = _thinned(memory["timeline"])
    unit, scale = ("GiB", 2.0**30) if memory["peak_bytes"] >= 2**30 else ("MiB", 2.0**20)
    figure = _figure(11.0, 4.2)
    axes = figure.subplots()
    _dress(axes)
    base, floor, greys = memory["base_bytes"], 0.0, ("#aab1bb", "#c6ccd4", "#dde1e6")
    handles = []
    for (name, size), grey in zip(base.items(), greys, strict=False):
        axes.axhspan(floor / scale, (floor + size) / scale, color=grey, lw=0)
        handles.append(Patch(color=grey, label=f"{name}, {size / scale:.3g} {unit}"))
        floor += size
    for name, group in _stretches(timeline):
        times, held = [entry[0] for entry in group], [entry[1] / scale for entry in group]
        # from what is permanent up; a dip below it shows as such
        axes.fill_between(times, floor / scale, held, step="post", color=COLOURS[name], alpha=0.85, lw=0)
    times, held = [entry[0] for entry in timeline], [entry[1] / scale for entry in timeline]
    axes.step(times, held, where="post", color=INK, lw=0.7)
    seen = {entry[3] for entry in timeline}
    handles += [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in seen]
    peak_ms, peak = memory["peak_ms"], memory["peak_bytes"] / scale
    axes.annotate(
        f"peak {peak:.4g} {unit}, in {memory['peak_part']}", (peak_ms, peak), xytext=(0, 8),
        textcoords="offset points", ha="center" if 0.15 < peak_ms / report["step_ms"] < 0.85 else "left", fontsize=8,
        color=INK,
    )  # fmt: skip
    axes.set_xlim(0, report["step_ms"])
    axes.set_ylim(0, 1.12 * peak)
    axes.set_xlabel("ms since the step began", color=INK, fontsize=8)
    axes.set_ylabel(f"{unit} in tensors", color=INK, fontsize=8)
    axes.legend(
        handles=handles, fontsize=7.5, frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    _caption(figure, report, f"Memory of one optimizer step: {memory['what']}.")
    figure.savefig(path, facecolor=CARD)


Entry = tuple[float, int, int, str]


def _thinned(timeline: list[Entry]) -> list[Entry]:
    """At most about POINTS entries: the largest of each group, so that no peak is lost."""
    size = -(-len(timeline) // POINTS)
    groups = [timeline[at : at + size] for at in range(0, len(timeline), size)]
    return [max(group, key=lambda entry: entry[1]) for group in groups[:-1]] + groups[-1][-1:]


def _stretches(timeline: list[Entry]) -> list[tuple[str, list[Entry]]]:
    """Runs of one part, each reaching to where the next begins."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(timeline), 1) if a[3] != b[3]), len(timeline)]
    runs = []
    for begin, end in pairwise(starts):
        group = list(timeline[begin:end])
        if end < len(timeline):
            group.append((timeline[end][0], group[-1][1], 0, group[-1][3]))
        runs.append((group[0][3], group))
    return runs
