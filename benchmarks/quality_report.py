"""How a `quality` result reads: its tables, and what they come to, in sentences made from their numbers."""

from __future__ import annotations

from typing import Any

from elo_engine.benchmarks.quality_costs import (
    MODES,
    BreakEven,
    Spread,
    at_equal_cost,
    break_even,
    by_name,
    clear,
    cost,
    end_spread,
    is_full,
    paired,
    seconds_per_token,
)
from elo_engine.report import markdown_table

KEPT_NATS = 0.03  # how much a source language's loss may rise and still count as kept


def _range(found: Spread | None, digits: int = 3, sign: str = "") -> str:
    """`2.551 (2.540 to 2.562)`; of one seed the value alone."""
    if found is None:
        return ""
    middle = f"{found.mean:{sign}.{digits}f}"
    if found.count < 2:
        return middle
    return f"{middle} ({found.low:{sign}.{digits}f} to {found.high:{sign}.{digits}f})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _called(method: dict[str, Any]) -> str:
    return f"({method['letter']}) {method['label']}"


def quality_tables(result: dict[str, Any]) -> list[str]:
    """Losses, differences, costs and break-even, then what they say."""
    methods, languages = by_name(result), [result["target"], *result["others"]]
    seeds = f"mean of {len(result['seeds'])} seeds (lowest to highest)" if len(result["seeds"]) > 1 else "one seed"
    blocks = [f"Held-out loss of the whole model at the end, nats/token, {seeds}. Change: against the base model."]
    header = ["", "method", "tokens shallow + whole", *(f"{name}, nats/token" for name in languages),
              *(f"{name}, change" for name in languages), *(f"{name}, bits/byte" for name in languages),
              "reattached, unaligned"]  # fmt: skip
    base = result["base"]
    rows = [["", "base model", "", *(f"{base[name]['loss_nats']:.3f}" for name in languages), *([""] * len(languages)),
             *(f"{base[name]['bits_per_byte']:.3f}" for name in languages), ""]]  # fmt: skip
    for method in methods.values():
        spreads = [end_spread(method, name) for name in languages]
        changes = [found.mean - base[name]["loss_nats"] for found, name in zip(spreads, languages, strict=True)]
        rows.append([
            f"({method['letter']})", method["label"],
            f"{method['tokens']['shallow']:,} + {method['tokens']['whole']:,}",
            *(_range(found) for found in spreads), *(f"{change:+.3f}" for change in changes),
            *(f"{end_spread(method, name, 'bits_per_byte').mean:.3f}" for name in languages),
            _range(_reattached(method, result["target"])),
        ])  # fmt: skip
    blocks.append(markdown_table(header, rows))
    for method in result["methods"]:
        blocks += [f"{_called(method)}, seed {one['seed']}: failed: {one['why']}" for one in method["failed"]]
    blocks += _differences(result, methods)
    blocks += _costs(result, methods)
    said = verdicts(result)
    return [*blocks, "\n".join(f"* {line}" for line in said)] if said else blocks


def _reattached(method: dict[str, Any], target: str) -> Spread | None:
    points = [point for run in method["runs"] for point in run["points"] if point["moment"] == "reattached"]
    return Spread.of([point["loss_nats"][target] for point in points])


def _differences(result: dict[str, Any], methods: dict[str, Any]) -> list[str]:
    """Against alignment alone and the paper's recipe, seed by seed."""
    over = [methods[name] for name in ("align_alone", "elo") if name in methods]
    languages = [result["target"], *result["others"]]
    header = ["method", *(f"{name}, less ({one['letter']})" for one in over for name in languages)]
    rows = []
    for method in methods.values():
        cells = [
            "" if method is one else _range(paired(method, one, name), sign="+") for one in over for name in languages
        ]
        rows.append([_called(method), *cells])
    if not over or len(methods) < 2:
        return []
    names = " and ".join(_called(one) for one in over)
    return [f"Difference to {names}, nats/token, paired by seed (below 0: better).", markdown_table(header, rows)]


def _costs(result: dict[str, Any], methods: dict[str, Any]) -> list[str]:
    target, model = result["target"], result["cost_model"]
    header = ["method", "seconds measured", "of it fitting the bridge", "ms a shallow token", "ms a whole-model token",
              f"cost on {model}, plain", "checkpointed", "loss less full CP's at that cost, plain", "checkpointed",
              "break-even r", "fit left out"]  # fmt: skip
    rows = []
    for method in methods.values():
        each, level = seconds_per_token(method), break_even(result, method)
        end, fits = method["runs"][0]["points"][-1], [run["fit_seconds"] for run in method["runs"]]
        seconds = Spread.of([run["seconds"] for run in method["runs"]])
        equal = ["" if is_full(method) else _range(at_equal_cost(result, method, mode), sign="+") for mode in MODES]
        rows.append([
            _called(method), _range(seconds, 0), _range(Spread.of(fits), 0) if any(fits) else "",
            *(_number(1e3 * each[kind]) if each[kind] else "" for kind in ("shallow", "whole")),
            *(f"{cost(method, end, mode):,.0f}" for mode in MODES), *equal,
            "" if level is None else (">= " if level.beyond else "") + _range(level.spread),
            _range(level.without_fit) if level is not None and level.fit else "",
        ])  # fmt: skip
    words = (
        f"Cost: in tokens of full continual pretraining of {model} in rows of {result['cost_length']}, by executed "
        "operations, the fit of a bridge included; plain keeps all activations, checkpointed runs the layers of a "
        f"whole model again. Break-even r: seconds of a shallow token over one of the whole model at which the method "
        f"costs what full continual pretraining (full CP) of the same {target} loss costs; at a smaller r it is the "
        "cheaper one, and an r at or below 0 means that it never is. "
        "Seconds: of training steps and of the fit of a bridge, evaluation left out."
    )
    if not any(method["full"] for method in methods.values()):
        header, rows = header[:7], [row[:7] for row in rows]
    return [words, markdown_table(header, rows)]


# -- what it comes to


def verdicts(result: dict[str, Any]) -> list[str]:
    """Sentences, each from the numbers of the result; also where ELO loses."""
    methods, target = by_name(result), result["target"]
    ours = {name: method for name, method in methods.items() if method["kind"] == "elo"}
    if not ours:
        return []
    best = min(ours.values(), key=lambda method: end_spread(method, target).mean)
    said = [f"Lowest {target} loss of the ELO recipes: {_called(best)}, {_range(end_spread(best, target))} nats/token."]
    for name in ("elo", "align_alone", "full_cp", "lora", "outer_unfrozen"):
        if name in methods and methods[name] is not best:
            said.append(_against(best, methods[name], target))
    for language in result["others"]:
        said.append(_kept(best, language, result["base"][language]["loss_nats"]))
    lost = [
        method for method in methods.values() if method["kind"] != "elo" and clear(best, method, target) > 0
    ]
    if lost:
        said.append(f"Where ELO loses on {target} at these budgets: to {', '.join(map(_called, lost))}.")
    return said + _level(result, best)


def _against(best: dict[str, Any], other: dict[str, Any], target: str) -> str:
    found = paired(best, other, target)
    if found is None:
        return f"Against {_called(other)}: no seed that both have."
    which = {
        -1: "lower by more than the spread of either over the seeds", 1: "higher by more than the spread of either "
        "over the seeds", 0: "not told apart by these seeds" if found.count > 1 else "of one seed, so without a spread",
    }[clear(best, other, target)]  # fmt: skip
    return f"Against {_called(other)}: {_range(found, sign='+')} nats/token of {target}, {which}."


def _kept(best: dict[str, Any], language: str, base: float) -> str:
    change = end_spread(best, language).mean - base
    held = "kept" if change <= KEPT_NATS else "not kept"
    return f"{language}: {change:+.3f} nats/token against the base model, {held} by the bound of {KEPT_NATS:+.2f}."


def _level(result: dict[str, Any], best: dict[str, Any]) -> list[str]:
    """The break-even in words, beside the ratios that there are."""
    level = break_even(result, best)
    if level is None:
        return []
    found, each, model = level.spread, seconds_per_token(best), result["cost_model"]
    curve = "runs of several budgets" if level.finished else (
        "the course of one run, whose learning rate had not come down at its earlier points, which favours ELO"
    )  # fmt: skip
    said = []
    if level.beyond:
        seeds = ", ".join(map(str, level.beyond))
        said.append(
            f"Full continual pretraining did not reach {_called(best)}'s loss within the measured range (seeds "
            f"{seeds}); ELO is at least level at r = {_range(found)}."
        )
    elif found.high <= 0:
        what = "its whole-model tokens and the fit of its bridge" if level.fit else "its whole-model tokens"
        said.append(
            f"Full continual pretraining reaches the loss of {_called(best)} for no more than {what} cost (break-even "
            f"r {_range(found)}; from {curve}): at this budget ELO pays at no cost ratio."
        )
    else:
        said.append(
            f"{_called(best)} draws level with full continual pretraining at r = {_range(found)} (from {curve})."
        )
    if level.fit:
        said.append(
            f"The fit of the bridge costs the same at any budget; left out, the break-even is at r = "
            f"{_range(level.without_fit)}."
        )
    if each["shallow"] and each["whole"]:
        ratio = each["shallow"] / each["whole"]
        said.append(f"Measured here: r = {ratio:.3f}, {_side(ratio, level)}.")
    for mode in MODES:
        ratio = best["cost"][mode]["shallow"]
        side = _side(ratio, level)
        said.append(f"{model} by its operations, {mode}: r = {ratio:.4f}, {side}, if losses were as here.")
    return said


def _side(ratio: float, at: BreakEven) -> str:
    level = at.spread
    if ratio < level.low:
        return "so ELO is the cheaper way to this loss"
    if at.beyond and ratio >= level.low:
        return "which is above what is shown, since full continual pretraining was not measured down to this loss"
    if ratio > level.high:
        return "so full continual pretraining is the cheaper way to this loss"
    return "within the seeds' range of the break-even"

