"""Two `quality` records against each other: losses of the methods that both have, paired by seed."""

from __future__ import annotations

from typing import Any

from elo_engine.benchmarks.quality_costs import Spread, by_name, end_spread, ends
from elo_engine.errors import UsageError

_SAME = ("model", "dtype", "sequence_length", "target", "others")


def compare_quality(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Lines for a person: B's loss less A's, by method and language.

    Raises:
        UsageError: the losses are not of one model on one held-out text, or the two have no method in common.
    """
    differing = [key for key in _SAME if first[key] != second[key]]
    for language in first["base"]:
        if first["base"][language] != second["base"].get(language):
            differing.append(f"the base model's {language} loss (other held-out text, or another model)")
    if differing:
        raise UsageError(f"the two records' losses cannot be compared; they differ in {', '.join(differing)}")
    ours, theirs = by_name(first), by_name(second)
    both = [name for name in ours if name in theirs]
    if not both:
        raise UsageError(f"no method in common: {', '.join(ours)} and {', '.join(theirs)}")
    lines = []
    if first["conditions"] != second["conditions"]:
        lines += ["Conditions differ:", f"  A: {first['conditions']}", f"  B: {second['conditions']}"]
    lines.append("B's loss at the end less A's, nats/token, paired by seed (below 0: B is better):")
    for name in both:
        for language in (first["target"], *first["others"]):
            lines.append(f"  {name}, {language}: {_verdict(ours[name], theirs[name], language)}")
    lines += [f"  {name}: only in A" for name in ours if name not in theirs]
    return lines + [f"  {name}: only in B" for name in theirs if name not in ours]


def _verdict(a: dict[str, Any], b: dict[str, Any], language: str) -> str:
    before, after = ends(a, language), ends(b, language)
    found = Spread.of([after[seed] - before[seed] for seed in after if seed in before])
    tokens = "" if a["tokens"] == b["tokens"] else " (of other numbers of tokens)"
    if found is None:
        return f"no seed that both have{tokens}"
    said = f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}){tokens}"
    if found.low == found.high == 0.0:
        return f"{said}: the same numbers"
    if found.count < 2:
        return f"{said}: of one seed, so without a spread"
    widest = max(end_spread(a, language).width, end_spread(b, language).width)
    if abs(found.mean) <= widest:
        return f"{said}: not told apart from the spread over the seeds"
    return f"{said}: {'B is better' if found.mean < 0 else 'A is better'}, by more than the spread over the seeds"
