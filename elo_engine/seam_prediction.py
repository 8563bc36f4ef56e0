"""Does a seam before alignment say how good the aligned model will be? Rank correlations over several runs.

For every seam and measure of `seams.py`, taken of the reattached models, Spearman's rho (Spearman 1904) with the
held-out loss of the aligned ones; a permutation test says how often chance alone gives as much. Many seams times three
measures are looked at, so the smallest p among them proves nothing by itself: it is held against their number.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

from elo_engine.errors import UsageError

FEWEST = 4  # runs; with fewer no order is rarer than 1 in 6
MEASURES = ("rms_ratio", "cosine", "cka")
_ORDERS = 5040  # of 7 runs all are tried, of more so many are drawn


def predict(found: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """(run, what `seams_command` returns) -> correlations with the aligned loss, by language, seam and measure.

    Raises:
        UsageError: fewer than FEWEST runs, or one that was not reattached, aligned and scored, or of other layers.
    """
    if len(found) < FEWEST:
        raise UsageError(f"elo seams --beside: {len(found)} runs; an order of fewer than {FEWEST} says nothing")
    first = found[0][1]
    for name, one in found:
        if one["layers"] != first["layers"] or one["layers_total"] != first["layers_total"]:
            theirs = f"{one['layers']} of {one['layers_total']}"
            raise UsageError(f"{name}: detached layers {theirs}, and not those of {found[0][0]}")
        if "reattached" not in one["models"]:
            raise UsageError(f"{name}: has no reattached model, so nothing of it is from before its alignment")
        lacking = [language for language in first["loss_nats"] if "aligned" not in one["loss_nats"].get(language, {})]
        if lacking or not first["loss_nats"]:
            raise UsageError(f"{name}: its results hold no aligned loss of {', '.join(lacking) or 'any text'}")
    rows = []
    for language in first["loss_nats"]:
        losses = [one["loss_nats"][language]["aligned"] for _, one in found]
        for seam in [row for row in first["seams"] if row["model"] == "reattached" and row["language"] == language]:
            for measure in MEASURES:
                values = [_value(one, language, seam["boundary"], measure) for _, one in found]
                if any(value is None for value in values):
                    continue
                rho = spearman([float(value) for value in values if value is not None], losses)
                if rho is not None:
                    chance = by_chance([float(value) for value in values if value is not None], losses)
                    rows.append({"language": language, "boundary": seam["boundary"], "measure": measure, "rho": rho,
                                 "p": chance})  # fmt: skip
    return {"runs": [name for name, _ in found], "layers_total": first["layers_total"], "correlations": rows}


def _value(one: dict[str, Any], language: str, boundary: int, measure: str) -> float | None:
    """How far the seam has moved: less is closer to the base model."""
    row = next(
        row for row in one["seams"]
        if row["model"] == "reattached" and row["language"] == language and row["boundary"] == boundary
    )  # fmt: skip
    value = row[measure]
    if value is None:
        return None
    return abs(math.log(value)) if measure == "rms_ratio" else 1.0 - float(value)


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Correlation of the ranks, ties sharing theirs; None where one side is all alike."""
    a, b = _ranks(xs), _ranks(ys)
    mean = (len(a) + 1) / 2
    both = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return both / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    return [1 + sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def by_chance(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Share of the orders of `ys` whose rho is at least as far from 0."""
    wanted = abs(spearman(xs, ys) or 0.0) - 1e-12
    if math.factorial(len(ys)) <= _ORDERS:
        orders: list[Sequence[float]] = list(itertools.permutations(ys))
    else:
        draw = random.Random(0)
        orders = [ys, *(draw.sample(list(ys), len(ys)) for _ in range(_ORDERS - 1))]
    return sum(abs(spearman(xs, order) or 0.0) >= wanted for order in orders) / len(orders)


def describe_prediction(found: dict[str, Any]) -> list[str]:
    """What `predict` returns, for a person."""
    words = {"rms_ratio": "|log RMS ratio|", "cosine": "1 - cosine", "cka": "1 - CKA"}
    rows, total = found["correlations"], found["layers_total"]
    lines = [f"Does a seam before alignment predict the aligned loss? {len(found['runs'])} runs, Spearman's rho:"]
    for row in sorted(rows, key=lambda row: (row["language"], row["boundary"], row["measure"])):
        entered = "final norm" if row["boundary"] == total else f"layer {row['boundary']}"
        where = f"{row['language']}, into {entered}, {words[row['measure']]}"
        lines.append(f"  {where}: {row['rho']:+.2f} (by chance {row['p']:.3f})")
    if rows:
        best = min(rows, key=lambda row: row["p"])
        least = min(1.0, best["p"] * len(rows))
        said = "so at least one of them predicts it" if least <= 0.05 else "so none of them is shown to predict it"
        rarest = f"the rarest is {best['p']:.3f}, {least:.2f} for so many at once"
        lines.append(f"of {len(rows)} correlations {rarest}: {said}")
    return lines
