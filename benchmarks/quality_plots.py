"""The pictures of a `quality` record: where each method ends, its course against cost and time, and where ELO would
draw level with full continual pretraining.

Methods keep one colour through all pictures; a dot is a seed, a bar the mean, a line from the lowest to the highest.
"""

from __future__ import annotations

from typing import Any

from elo_engine.benchmarks.quality_costs import (
    MODES,
    break_even,
    by_name,
    cost,
    end_spread,
    ends,
    is_full,
    seconds_per_token,
)

PICTURES = ("ends", "course", "level")
_COLOURS = ("#D55E00", "#CC79A7", "#E69F00", "#882255", "#56B4E9", "#999933")  # ELO's recipes, then the peers
_FULL, _INK, _FAINT = "#0072B2", "#222222", "#8a8a8a"


def quality_kinds(result: dict[str, Any]) -> list[str]:
    """The pictures that this result has data for."""
    methods = by_name(result)
    if not methods:
        return []
    level = any(break_even(result, method) for method in methods.values())
    return [kind for kind in PICTURES if kind != "level" or level]


def _colours(result: dict[str, Any]) -> dict[str, str]:
    """By method; full continual pretraining of every budget has one."""
    names = [name for name, method in by_name(result).items() if not is_full(method)]
    names.sort(key=lambda name: by_name(result)[name]["kind"] != "elo")
    found = dict(zip(names, _COLOURS * 9, strict=False))
    return {name: found.get(name, _FULL) for name in by_name(result)}


def _title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.015, ha="left", fontsize=12, fontweight="bold")


def draw_ends(figure: Any, result: dict[str, Any]) -> None:
    """Held-out loss at the end, a panel a language, every seed visible; the base model as a line."""
    methods, colours = by_name(result), _colours(result)
    languages = [result["target"], *result["others"]]
    figure.set_size_inches(4.6 + 3.4 * len(languages), 1.7 + 0.5 * len(methods))
    axes = figure.subplots(1, len(languages), sharey=True, squeeze=False)[0]
    order = sorted(methods.values(), key=lambda method: -end_spread(method, result["target"]).mean)
    for axis, language in zip(axes, languages, strict=True):
        base = result["base"][language]["loss_nats"]
        axis.axvline(base, color=_INK, linewidth=1.2, linestyle=(0, (4, 3)))
        for place, method in enumerate(order):
            spread, colour = end_spread(method, language), colours[method["name"]]
            axis.plot((spread.low, spread.high), (place, place), color=colour, linewidth=2)
            axis.plot(list(ends(method, language).values()), [place] * spread.count, "o", color=colour, markersize=4.5,
                      markerfacecolor="white")  # fmt: skip
            axis.plot(spread.mean, place, "|", color=colour, markersize=15, markeredgewidth=2.6)
            axis.annotate(f"{spread.mean:.3f}", (spread.mean, place), xytext=(0, 8), textcoords="offset points",
                          ha="center", fontsize=8.5, color=colour)  # fmt: skip
        axis.set_ylim(-0.6, len(order) - 0.3)
        axis.margins(x=0.12)
        axis.set_title(f"{language}: base model {base:.3f} (dashed)", fontsize=10, loc="left")
        axis.set_xlabel("held-out loss, nats/token (lower is better)")
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(order)), [_named(method) for method in order], fontsize=9)
    _title(figure, "Held-out loss of the whole model at the end")


def _named(method: dict[str, Any]) -> str:
    tokens = method["tokens"]
    words = f"{tokens['shallow']:,} + {tokens['whole']:,}" if tokens["shallow"] else f"{tokens['whole']:,}"
    return f"{_called(method)}\n{words} tokens"


def _called(method: dict[str, Any]) -> str:
    """One's own by the name, which the table beside the picture explains."""
    own = method["letter"].startswith("x")
    return f"({method['letter']}) {method['name' if own else 'label']}"


def draw_course(figure: Any, result: dict[str, Any]) -> None:
    """Target loss against what it would cost on the larger model, and against the seconds measured."""
    figure.set_size_inches(11, 5.6)
    left, right = figure.subplots(1, 2, sharey=True)
    methods, colours, model = by_name(result), _colours(result), result["cost_model"]
    for method in methods.values():
        costs = [[cost(method, point, "plain") / 1000 for point in run["points"]] for run in method["runs"]]
        _courses(left, method, costs, result["target"], colours[method["name"]])
        seconds = [[point["seconds"] for point in run["points"]] for run in method["runs"]]
        _courses(right, method, seconds, result["target"], colours[method["name"]])
    left.set_xlabel(f"cost on {model}, in 1000 tokens of full continual pretraining", fontsize=9)
    right.set_xlabel(f"seconds of training on {result['device']['name']}", fontsize=9)
    left.set_ylabel(f"{result['target']}, held-out loss, nats/token")
    for axis in (left, right):
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", frameon=False, fontsize=8.5, ncols=2)
    _title(figure, "Target loss against cost: lower and further left is better")


def _courses(axis: Any, method: dict[str, Any], xs: list[list[float]], target: str, colour: str) -> None:
    """A line a seed, thin, and the mean of the ends with its range."""
    for run, x in zip(method["runs"], xs, strict=True):
        axis.plot(x, [point["loss_nats"][target] for point in run["points"]], color=colour, linewidth=0.8, alpha=0.55)
    spread = end_spread(method, target)
    x = sum(each[-1] for each in xs) / len(xs)
    errors = [[spread.mean - spread.low], [spread.high - spread.mean]]
    mark = "s" if is_full(method) and not method["full"] else "o"  # its smaller budgets
    axis.errorbar(x, spread.mean, yerr=errors, fmt=mark, color=colour, markersize=6, capsize=3,
                  label=_called(method))  # fmt: skip


def draw_level(figure: Any, result: dict[str, Any]) -> None:
    """The cost ratio at which each ELO recipe costs what full continual pretraining of the same loss costs."""
    levels = [(method, found) for method in by_name(result).values() if (found := break_even(result, method))]
    colours = _colours(result)
    figure.set_size_inches(10, 2.2 + 0.55 * len(levels))
    axis = figure.subplots()
    for place, (method, found) in enumerate(levels):
        for spread, offset, filled in ((found.spread, 0.12, True), (found.without_fit, -0.12, False)):
            if not filled and not found.fit:
                continue
            colour, at = colours[method["name"]], place + offset
            axis.plot((spread.low, spread.high), (at, at), color=colour, linewidth=2)
            axis.plot(spread.mean, at, "o", color=colour, markersize=7, markerfacecolor=colour if filled else "white")
            said = f"{spread.mean:.3f}{' at least' if found.beyond else ''}{'' if filled else ' without the fit'}"
            axis.annotate(said, (spread.high, at), xytext=(7, 0), textcoords="offset points", va="center",
                          fontsize=8.5, color=colour, bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
    method = levels[0][0]
    lines = [(method["cost"][mode]["shallow"], f"{result['cost_model']}, {mode}") for mode in MODES]
    measured = [each["shallow"] / each["whole"] for each in (seconds_per_token(one) for one, _ in levels)
                if each["shallow"] and each["whole"]]  # fmt: skip
    if measured:
        lines.append((sum(measured) / len(measured), f"measured, {result['device']['name']}"))
    for number, (ratio, name) in enumerate(sorted(lines)):
        style = ("-", "--", ":")[number % 3]
        axis.axvline(ratio, color=_FAINT, linewidth=1.2, linestyle=style, label=f"{ratio:.3f} {name}", zorder=0)
    axis.axvline(0, color=_INK, linewidth=1)
    axis.set_yticks(range(len(levels)), [_named(method) for method, _ in levels], fontsize=9)
    axis.set_ylim(-0.7, len(levels) - 0.3)
    axis.margins(x=0.25)
    axis.set_xlabel("cost of a shallow token over one of the whole model; ELO pays where a line lies left of its dot")
    axis.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="cost ratios there are")
    _title(figure, "Break-even with full continual pretraining")
