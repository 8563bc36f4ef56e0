"""What a layer search found: the ranking, what it says about the paper's finding, the table and the plot.

The paper's finding (arXiv 2601.03648, section 3.1) is that the first and the last layer are the best two to detach.
The test is of whole ranges over the seeds, lowest to highest: one candidate is told apart from another where their
ranges do not overlap. docs/search.md says how weak that is with few seeds.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["base", "alone", "candidate"]  # alone: alignment with nothing detached
Verdict = Literal["confirmed", "contradicted", "not told apart", "not tested"]
COLOURS = ("#3366cc", "#cc6633", "#338855", "#7744aa")


@dataclass(frozen=True)
class Spread:
    """Over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of no value."""
        return cls(sum(values) / len(values), min(values), max(values)) if values else None

    def show(self) -> str:
        """`2.612 (2.601 to 2.630)`."""
        return f"{self.mean:.4f} ({self.low:.4f} to {self.high:.4f})"


def label_of(layers: Sequence[int], of: int) -> str:
    """`layers 0, 29`."""
    ends = " (first and last)" if tuple(layers) == ends_of(of) else ""
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}{ends}"


def ends_of(layers: int) -> tuple[int, ...]:
    """First and last of so many."""
    return tuple(sorted({0, layers - 1}))


# -- the result


def make_result(
    conditions: dict[str, Any],
    costs: Mapping[tuple[int, ...], float],
    results: Sequence[tuple[Kind, tuple[int, ...], int, dict[str, Any]]],
) -> dict[str, Any]:
    """What `search.json` holds.

    Args:
        conditions: `target`, `layers_total`, `tokens` and what else is to be kept.
        costs: of a token of ELO pretraining, by candidate, over that of first and last.
        results: kind, layers and seed with what the job found; one is of the base model.
    """
    base = next(found for kind, _, _, found in results if kind == "base")["evaluations"]["base"]
    losses = {language: one["loss_nats"] for language, one in base.items()}
    tokens, of = conditions["tokens"], conditions["layers_total"]

    def entry(layers: tuple[int, ...]) -> dict[str, Any]:
        mine = [(seed, found) for kind, own, seed, found in results if kind != "base" and own == layers]
        runs = [
            {
                "seed": seed,
                "loss_nats": {
                    moment: {language: one["loss_nats"] for language, one in by.items()}
                    for moment, by in found["evaluations"].items()
                },
                "bridge": found["bridge"],
                "seconds": found["seconds"],
            }
            for seed, found in mine
            if found["failed"] is None
        ]
        spreads = {}
        for moment in ("reattached", "aligned"):
            of_moment = [run["loss_nats"][moment] for run in runs if moment in run["loss_nats"]]
            if of_moment:
                spreads[moment] = {name: asdict(_spread([one[name] for one in of_moment])) for name in losses}
        return {
            "layers": list(layers),
            "label": label_of(layers, of) if layers else "alignment alone",
            "cost": costs[layers] if layers else None,
            "tokens": {"shallow": tokens["shallow"] if layers else 0, "whole": tokens["whole"]},
            "loss_nats": spreads,
            "change_nats": {
                name: one["mean"] - losses[name] for name, one in spreads.get("aligned", {}).items()
            },
            "runs": runs,
            "failed": [{"seed": seed, "why": found["failed"]} for seed, found in mine if found["failed"] is not None],
        }  # fmt: skip

    found = conditions | {"seeds": sorted({seed for kind, _, seed, _ in results if kind != "base"}), "base": losses}
    found["candidates"] = rank([entry(layers) for layers in costs], conditions["target"])
    found["controls"] = [entry(())]
    return found | {"finding": finding(found)}


def _spread(values: Sequence[float]) -> Spread:
    found = Spread.of(values)
    assert found is not None
    return found


def rank(candidates: list[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    """By the mean target loss after alignment; those that failed with any seed come last, for the rest of their seeds
    says less, and those that failed with all have no rank.
    """

    def key(one: dict[str, Any]) -> tuple[int, float]:
        aligned = one["loss_nats"].get("aligned")
        return (2, 0.0) if aligned is None else (int(bool(one["failed"])), aligned[target]["mean"])

    ranked = sorted(candidates, key=key)
    return [{"rank": n if one["runs"] else None} | one for n, one in enumerate(ranked, 1)]


def finding(found: dict[str, Any]) -> dict[str, str]:
    """`verdict` and `text`: whether first and last are the best of the candidates with as many layers, as the paper
    finds; by whole ranges over the seeds.
    """
    verdict, text = _judge(found)
    return {"verdict": verdict, "text": f"first and last is best (arXiv 2601.03648, section 3.1): {verdict}. {text}"}


def _judge(found: dict[str, Any]) -> tuple[Verdict, str]:
    ends, target, of = list(ends_of(found["layers_total"])), found["target"], found["layers_total"]
    ours = next((one for one in found["candidates"] if one["layers"] == ends), None)
    rivals = [one for one in found["candidates"] if one["layers"] != ends and len(one["layers"]) == len(ends)]
    whole = [one for one in rivals if not one["failed"]]
    if ours is None:
        return "not tested", f"{label_of(ends, of)} is not among the candidates."
    if not ours["runs"] or not whole:
        why = "no other candidate with as many layers has all its runs" if ours["runs"] else f"{ours['label']} failed"
        return "not tested", f"There is nothing to compare: {why}."
    others = "; ".join(_beyond(one, ours, target) for one in found["candidates"] if len(one["layers"]) > len(ends))
    others = f" {others}" if others else ""
    if len(found["seeds"]) < 2 or ours["failed"]:
        why = "one seed cannot tell" if len(found["seeds"]) < 2 else f"{ours['label']} failed with some seeds"
        best = min([ours, *whole], key=lambda one: _aligned(one, target).mean)
        return "not told apart", f"{why[0].upper()}{why[1:]}; the lowest here is {best['label']}.{others}"
    spread, seeds = _aligned(ours, target), len(found["seeds"])
    best = min(whole, key=lambda one: _aligned(one, target).mean)
    said = (
        f"Held-out {target} loss over {seeds} seeds: {ours['label']} {spread.show()}, the best other of as many "
        f"layers, {best['label']}, {_aligned(best, target).show()}."
    )
    below = [one for one in whole if _aligned(one, target).high < spread.low]
    level = [one for one in whole if one not in below and _aligned(one, target).low <= spread.high]
    if below:
        by_chance = min(1.0, len(whole) / math.comb(2 * seeds, seeds))  # of one rival, times the rivals
        return "contradicted", f"{said} Wholly below it: {_labels(below)}. {_were_all_equal(by_chance)}{others}"
    if level or len(whole) < len(rivals):
        why = f"The ranges of {_labels(level)} overlap with its own" if level else "Some of the others failed"
        return "not told apart", f"{said} {why}.{others}"
    by_chance = 1 / math.comb((len(whole) + 1) * seeds, seeds)
    return "confirmed", f"{said} Its range lies below all of theirs. {_were_all_equal(by_chance)}{others}"


def _were_all_equal(chance: float) -> str:
    """Of ranges that do not overlap: in how many of all orders of that many losses they do not."""
    return f"Were all equal and seeds independent, up to {100 * chance:.2g} % of searches would say so."


def _labels(candidates: Sequence[dict[str, Any]]) -> str:
    return "; ".join(one["label"] for one in candidates)


def _aligned(one: dict[str, Any], language: str) -> Spread:
    return Spread(**one["loss_nats"]["aligned"][language])


def _beyond(one: dict[str, Any], ours: dict[str, Any], target: str) -> str:
    """A candidate that costs more a token is not held against first and last, and is told beside."""
    if not one["runs"]:
        return f"{one['label']} failed."
    change = _aligned(one, target).mean - _aligned(ours, target).mean
    return f"At {one['cost']:.2f}x the cost a token {one['label']} ends {change:+.4f} from it."


# -- for a person


def describe(found: dict[str, Any]) -> list[str]:
    """The table and what it says, in lines."""
    target, base = found["target"], found["base"]
    others = [language for language in base if language != target]
    seeds = ", ".join(map(str, found["seeds"]))
    head = ["", "layers", "tokens", "cost", f"{target} reattached", f"{target} aligned"]
    rows = [[*head, *(f"{language} change" for language in others)]]
    for one in (*found["candidates"], *found["controls"]):
        tokens, spreads = one["tokens"], one["loss_nats"]
        row = [str(one.get("rank") or "-"), one["label"], f"{tokens['shallow']:,} + {tokens['whole']:,}"]
        row.append("-" if one["cost"] is None else f"{one['cost']:.2f}x")
        row.append(f"{spreads['reattached'][target]['mean']:.4f}" if "reattached" in spreads else "-")
        row.append(Spread(**spreads["aligned"][target]).show() if "aligned" in spreads else "failed")
        row += [f"{one['change_nats'][n]:+.4f}" if one["runs"] else "-" for n in others]
        rows.append(row)
    rows.append(["-", "base", "0 + 0", "-", "-", f"{base[target]:.4f}", *("+0.0000" for _ in others)])
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, wide, strict=True)).rstrip() for row in rows]
    lines.append(
        f"held-out loss of the whole model in nats/token, mean (lowest to highest) over seeds {seeds}; tokens: ELO "
        "pretraining + alignment; cost: FLOPs of a token of ELO pretraining over first and last's; change: against the "
        "base"
    )
    for one in (*found["candidates"], *found["controls"]):
        lines += [f"{one['label']}, seed {failed['seed']}, failed: {failed['why']}" for failed in one["failed"]]
    return [*lines, *_alone(found), found["finding"]["text"]]


def _alone(found: dict[str, Any]) -> list[str]:
    """Whether any candidate is better than no ELO pretraining at all."""
    alone, target = found["controls"][0], found["target"]
    ran = [one for one in found["candidates"] if one["runs"]]
    if not alone["runs"] or not ran:
        return []
    best, without = _aligned(ran[0], target), _aligned(alone, target)
    told = "" if best.high < without.low or best.low > without.high else ", which the seeds do not tell apart"
    return [f"{ran[0]['label']} ends {best.mean - without.mean:+.4f} nats/token from alignment alone{told}"]


def draw(found: dict[str, Any], path: Path) -> bool:
    """Bars: each candidate's change against the base after alignment, by language, with lowest and highest. False where
    matplotlib is not installed; where nothing ran, there is nothing to draw.
    """
    shown = [one for one in (*found["candidates"], *found["controls"]) if one["runs"]]
    if importlib.util.find_spec("matplotlib") is None or not shown:
        return not shown
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base, target = found["base"], found["target"]
    languages = [target, *(language for language in base if language != target)]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.45 * len(shown)), layout="constrained")
    height = 0.8 / len(languages)
    for place, language in enumerate(languages):
        spreads = [_aligned(one, language) for one in shown]
        at = [row + place * height for row in range(len(shown))]
        errors = [[one.mean - one.low for one in spreads], [one.high - one.mean for one in spreads]]
        axis.barh(
            at, [one.mean - base[language] for one in spreads], height, xerr=errors, label=language,
            color=COLOURS[place % len(COLOURS)], ecolor="#222222", capsize=2,
        )  # fmt: skip
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(shown))], [one["label"] for one in shown])
    axis.invert_yaxis()
    axis.axvline(0, color="#222222", linewidth=0.8)
    tokens = found["tokens"]
    axis.set(
        xlabel=f"change of held-out loss against the base, nats/token; {len(found['seeds'])} seed(s)",
        title=f"after {tokens['shallow']:,} tokens in the detached layers and {tokens['whole']:,} in the whole model",
    )
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, facecolor="white")
    plt.close(figure)
    return True
