"""The pictures of docs/benchmarks.md, each from one result.json: opaque white cards with a thin frame, which read the
same on light and dark pages; colours of Okabe and Ito, which people who do not tell red from green can tell apart.

A picture carries, as a text chunk of the PNG, a hash of what it was drawn from, so that a stale one is seen without
drawing it again.
"""

from __future__ import annotations

import hashlib
import json
import struct
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elo_engine.benchmarks.fp8_report import draw_fp8
from elo_engine.benchmarks.loading_table import draw_loading, has_picture
from elo_engine.benchmarks.quality_plots import draw_course, draw_ends, draw_level, quality_kinds
from elo_engine.benchmarks.schemas import COMPONENTS, measured_peak
from elo_engine.benchmarks.tables import by_letter, cap_name, number
from elo_engine.errors import UsageError
from elo_engine.measure.setting import ARMS, ENGINE

DRAWN = 1  # raised when the drawing changes, so that every picture is made again
KEY = "elo-bench-input"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
INK, FAINT, WINE = "#222222", "#8a8a8a", "#882255"
ENGINE_COLOUR, OTHERS_COLOUR = VERMILION, BLUE
COMPONENT_COLOURS = dict(zip(COMPONENTS, (BLUE, SKY, GREEN, ORANGE, PURPLE, "#cccccc"), strict=True))
LETTERS: dict[str, str] = dict(zip(ARMS, "abcdefgsxk", strict=True))  # as measure/setting.py names the arms
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def kinds(result: dict[str, Any]) -> list[str]:
    """The pictures that this result has data for."""
    if result["theme"] == "speedup":
        ran = [arm for arm in result["arms"].values() if arm["status"] == "ran"]
        return ["steps", "memory"] if ran else []
    if result["theme"] == "memory":
        measured = any(point["measured_bytes"] for point in result["points"])
        return [*(["frontier"] if result["caps"] else []), *(["predicted"] if measured else [])]
    if result["theme"] == "loading":
        return ["loading"] if has_picture(result) else []
    if result["theme"] == "quality":
        return quality_kinds(result)
    if result["theme"] == "fp8":
        return ["fp8"]
    return ["loss"] if result["theme"] == "loss" and any(s["points"] for s in result["series"]) else []


def input_key(kind: str, result: dict[str, Any], caption: str) -> str:
    """Hash of all that a picture shows, and of the version that draws it."""
    content = json.dumps([DRAWN, kind, caption, result], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def key_in(path: Path) -> str | None:
    """The hash that a PNG carries; None: it is no picture of this program."""
    data = path.read_bytes()
    at = len(_SIGNATURE)
    while data.startswith(_SIGNATURE) and at + 8 <= len(data):
        length, chunk = struct.unpack_from(">I4s", data, at)
        name, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
        if chunk == b"tEXt" and name == KEY.encode():
            return text.decode("latin-1")
        at += 12 + length
    return None


def draw(kind: str, result: dict[str, Any], caption: str, path: Path) -> None:
    """Draw one picture as a PNG; the caption says under which conditions it was measured.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("the pictures need matplotlib: pip install 'elo-engine[bench]'") from None
    style = {
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.edgecolor": FAINT, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "white",
        "hatch.linewidth": 0.7, "font.family": "DejaVu Sans",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure  # without pyplot, and so without a window or a global state

        figure = Figure(layout="constrained", facecolor="white", edgecolor=FAINT, linewidth=1.5)
        _DRAW[kind](figure, result)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches, so that nothing touches the frame
        lines = textwrap.wrap(caption, int(figure.get_figwidth() * 15.5))
        figure.supxlabel("\n".join(lines), fontsize=7.5, color="#555555", x=0.015, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        writing = path.with_name(f".{path.name}.tmp")
        metadata = {KEY: input_key(kind, result, caption), "Software": None}
        figure.savefig(writing, format="png", dpi=150, edgecolor=figure.get_edgecolor(), metadata=metadata)
        writing.replace(path)


def _colour(arm: str) -> str:
    return ENGINE_COLOUR if arm in ENGINE else OTHERS_COLOUR


def _model(result: dict[str, Any]) -> str:
    return f"{result['model']['name']}, {result['device']['name']}"


def _steps(figure: Any, result: dict[str, Any]) -> None:
    """Time per 1000 tokens of each arm, median with p10 and p90."""
    arms = by_letter(result["arms"])
    figure.set_size_inches(9, 1.6 + 0.46 * len(arms))
    axis = figure.subplots()
    largest = 0.0
    slowest = max(arm["step_s"]["p90"] / arm["tokens_per_step"] for _, arm in arms if arm["status"] == "ran")
    scale, named, word = (1e6, "ms", "milliseconds") if slowest < 1e-3 else (1e3, "s", "seconds")
    for place, (name, arm) in enumerate(arms):
        if arm["status"] != "ran":
            said = textwrap.shorten(arm["why"], 70, placeholder=" ...")
            text = f" {'failed' if arm['status'] == 'failed' else 'not here'}: {said}"
            axis.annotate(text, (0, place), va="center", fontsize=8.5, color=FAINT)
            continue
        unit = scale / arm["tokens_per_step"]
        middle, low, high = (arm["step_s"][field] * unit for field in ("median", "p10", "p90"))
        whisker = {"ecolor": INK, "elinewidth": 1.2, "capsize": 3.5}
        axis.barh(place, middle, xerr=[[middle - low], [high - middle]], color=_colour(name), height=0.66,
                  error_kw=whisker)  # fmt: skip
        speed = f"{number(middle)} {named}  ({number(arm['tokens_per_s']['median'])} tokens/s)"
        axis.annotate(speed, (high, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)
        largest = max(largest, high)
    axis.set_yticks(range(len(arms)), [f"({arm['letter']}) {arm['label']}" for _, arm in arms])
    axis.invert_yaxis()
    axis.set_xlim(0, largest * 1.4)
    axis.set_xlabel(f"{word} per 1000 tokens: median step, whiskers from p10 to p90")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    figure.suptitle(f"Time of training: {_model(result)}", x=0.015, ha="left", fontsize=12, fontweight="bold")
    _key_of_colours(axis)


def _key_of_colours(axis: Any) -> None:
    """Two words in their colours above the axis, in place of a legend."""
    for words, colour, x in (("this engine", ENGINE_COLOUR, 1.0), ("transformers", OTHERS_COLOUR, 0.85)):
        axis.text(x, 1.01, words, transform=axis.transAxes, ha="right", va="bottom", color=colour, fontsize=9.5)


def _memory(figure: Any, result: dict[str, Any]) -> None:
    """Two bars an arm: predicted, stacked by component, and the measured peak, which is one number: what is counted of
    it by component is of the optimizer's step, and stands in the page's table.
    """
    arms = [(name, arm) for name, arm in by_letter(result["arms"]) if arm.get("memory")]
    figure.set_size_inches(9, 2.2 + 0.62 * len(arms))
    axis = figure.subplots()
    peaks = [arm["memory"]["predicted_bytes"] or 0 for _, arm in arms]
    unit, name = (2**30, "GiB") if max(peaks, default=0) >= 2**30 else (2**20, "MiB")
    largest, kinds_measured = 0.0, []
    for place, (_, arm) in enumerate(arms):
        memory, start = arm["memory"], 0.0
        for component, colour in COMPONENT_COLOURS.items():
            size = memory["predicted"].get(component, 0) / unit
            axis.barh(place - 0.2, size, left=start, color=colour, height=0.36, edgecolor="white", linewidth=0.6)
            start += size
        _at_end(axis, start, place - 0.2, f"{_three(start)} predicted")
        found = measured_peak(memory) if arm["status"] == "ran" else None
        if found:
            size = found[0] / unit
            axis.barh(place + 0.2, size, color="#f2f2f2", height=0.36, edgecolor=INK, linewidth=0.9, hatch="////")
            _at_end(axis, size, place + 0.2, f"{_three(size)} measured")
            start, kinds_measured = max(start, size), [*kinds_measured, found[1]]
        else:
            _at_end(axis, 0, place + 0.2, textwrap.shorten(f"not measured: {arm['why'] or 'no reading'}", 70))
        largest = max(largest, start)
    axis.set_yticks(range(len(arms)), [f"({arm['letter']}) {arm['label']}" for _, arm in arms])
    axis.invert_yaxis()
    axis.set_xlim(0, largest * 1.2)
    what = {"allocated": "peak allocated", "tensors": "peak of all tensors", "resident": "peak resident, with Python"}
    said = ", ".join(what[kind] for kind in dict.fromkeys(kinds_measured)) or "nothing"
    axis.set_xlabel(f"{name} (measured: {said})")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    figure.suptitle(f"Peak memory: {_model(result)}", x=0.015, ha="left", fontsize=12, fontweight="bold")
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, label=name) for name, colour in COMPONENT_COLOURS.items()]
    patches.append(Patch(facecolor="#f2f2f2", edgecolor=INK, hatch="////", label="measured"))
    axis.legend(handles=patches, ncols=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5,
                columnspacing=1.0, handlelength=1.2)  # fmt: skip


def _three(value: float) -> str:
    """Three digits, zeros at the end kept: 1.2 -> `1.20`."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _at_end(axis: Any, x: float, y: float, text: str) -> None:
    axis.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)


def _frontier(figure: Any, result: dict[str, Any]) -> None:
    """A grid for each cap: arms by sequence lengths, in each cell the largest micro-batch that fits."""
    caps = sorted({cap["cap_bytes"] for cap in result["caps"]})
    arms = [arm for arm in ARMS if any(cap["arm"] == arm for cap in result["caps"])]
    lengths = sorted({int(T) for cap in result["caps"] for T in cap["largest"]})
    columns = min(3, len(caps))
    rows = -(-len(caps) // columns)
    width = max(6.5, 1.9 + columns * max(1.9, 0.62 * len(lengths)))
    figure.set_size_inches(width, 1.5 + rows * (0.8 + 0.3 * len(arms)))
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    most = max((size for cap in result["caps"] for size in cap["largest"].values()), default=1)
    shades = colormaps["Blues"]
    for number_, axis in enumerate(axes.flat):
        if number_ >= len(caps):
            axis.set_visible(False)
            continue
        found = {cap["arm"]: cap["largest"] for cap in result["caps"] if cap["cap_bytes"] == caps[number_]}
        for y, arm in enumerate(arms):
            for x, T in enumerate(lengths):
                size = found.get(arm, {}).get(str(T))
                share = size.bit_length() / max(most.bit_length(), 1) if size else 0.0
                colour = shades(0.12 + 0.75 * share) if size else "#f4f4f4"
                axis.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
                ink = "white" if share > 0.62 else INK if size else FAINT
                text = "" if size is None else str(size) if size else "-"
                axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink, fontsize=9)
        axis.set(xlim=(0, len(lengths)), ylim=(len(arms), 0))
        axis.set_xticks([x + 0.5 for x in range(len(lengths))], [_short(T) for T in lengths])
        axis.set_yticks([y + 0.5 for y in range(len(arms))], [_lettered(arm) for arm in arms])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_title(cap_name(caps[number_]), fontsize=10.5, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length, tokens")
    figure.suptitle(
        f"Largest micro-batch (rows) that fits: {_model(result)}", x=0.015, ha="left", fontsize=12, fontweight="bold"
    )


def _lettered(arm: str) -> str:
    return f"({LETTERS[arm]}) {arm}" if arm in LETTERS else arm


def _short(T: int) -> str:
    return f"{T // 1024}k" if T >= 1024 and T % 1024 == 0 else str(T)


def _predicted(figure: Any, result: dict[str, Any]) -> None:
    """Predicted over measured peak against the measured one; within the band no run takes more than was promised."""
    figure.set_size_inches(8.5, 4.6)
    axis = figure.subplots()
    points = [point for point in result["points"] if point["measured_bytes"]]
    axis.axhspan(1.0, 1.08, color=GREEN, alpha=0.13, linewidth=0)
    axis.axhline(1.0, color=FAINT, linewidth=1)
    shades = (BLUE, SKY, VERMILION, PURPLE, ORANGE, GREEN, INK, WINE, YELLOW, FAINT)
    colours, marks = dict(zip(ARMS, shades, strict=True)), dict(zip(ARMS, "osDv^Xp>*<", strict=True))
    for arm in [arm for arm in ARMS if any(point["arm"] == arm for point in points)]:
        mine = [point for point in points if point["arm"] == arm]
        x = [point["measured_bytes"] / 2**30 for point in mine]
        y = [point["predicted_bytes"] / point["measured_bytes"] for point in mine]
        axis.scatter(x, y, s=38, color=colours[arm], marker=marks[arm], label=_lettered(arm),
                     edgecolors=INK, linewidths=0.5, zorder=3)  # fmt: skip
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.97), max(high, 1.11))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axis.set_xlabel(f"measured peak, GiB ({', '.join(sorted({point['measured_what'] for point in points}))})")
    axis.set_ylabel("predicted / measured")
    axis.text(0.995, 1.078, "within 8 %", transform=axis.get_yaxis_transform(), ha="right", va="top", fontsize=8.5,
              color="#00664b")  # fmt: skip
    axis.grid(alpha=0.25)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    figure.suptitle(f"Memory predicted: {_model(result)}", x=0.015, ha="left", fontsize=12, fontweight="bold")


def _loss(figure: Any, result: dict[str, Any]) -> None:
    """A panel a language: their losses lie far apart, and what matters is each one's course."""
    points = [point for series in result["series"] for point in series["points"]]
    languages = list(dict.fromkeys(point["language"] for point in points))
    longest = max(point["seconds"] for point in points) or 1.0
    unit, per = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)
    figure.set_size_inches(max(6.5, 5.2 * len(languages)), 4.3)
    axes = figure.subplots(1, len(languages), squeeze=False)[0]
    colours = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, INK)
    marks = dict(zip(dict.fromkeys(point["stage"] for point in points), "osD^vX" * 4, strict=False))
    from matplotlib.lines import Line2D

    for axis, language in zip(axes, languages, strict=True):
        for series, colour in zip(result["series"], colours * 9, strict=False):
            mine = sorted((p for p in series["points"] if p["language"] == language), key=lambda p: p["seconds"])
            if not mine:
                continue
            x, y = [p["seconds"] / per for p in mine], [p["loss_nats"] for p in mine]
            axis.plot(x, y, color=colour, linewidth=1.7)
            for point, at, loss in zip(mine, x, y, strict=True):
                axis.plot(at, loss, marker=marks[point["stage"]], color=colour, markersize=5)
            axis.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), xytext=(0, -6), textcoords="offset points", ha="center",
                          va="top", color=colour, fontsize=9)  # fmt: skip
        axis.set_xlim(0, longest / per * 1.06)
        axis.margins(y=0.12)
        axis.set_title(f"{language}, held-out", fontsize=10.5, loc="left")
        axis.set_xlabel(f"{unit} of training")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("loss of the whole model, nats/token")
    names = zip(result["series"], colours * 9, strict=False)
    handles = [Line2D([], [], color=colour, linewidth=2.2, label=series["label"]) for series, colour in names]
    if len(marks) > 1:
        style = {"color": "#555555", "linestyle": ""}
        handles += [Line2D([], [], marker=mark, label=name, **style) for name, mark in marks.items()]
    axes[-1].legend(handles=handles, frameon=False, fontsize=9, loc="upper right")
    figure.suptitle("Held-out loss against time", x=0.015, ha="left", fontsize=12, fontweight="bold")


_DRAW: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "steps": _steps, "memory": _memory, "frontier": _frontier, "predicted": _predicted, "loss": _loss,
    "loading": draw_loading, "ends": draw_ends, "course": draw_course, "level": draw_level,
    "fp8": draw_fp8,
}  # fmt: skip
