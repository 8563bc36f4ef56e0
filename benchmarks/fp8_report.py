"""Tables and the picture of an `fp8` result (benchmarks/fp8.py)."""

from __future__ import annotations

import statistics
from typing import Any

from elo_engine.report import markdown_table

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"


def fp8_tables(result: dict[str, Any]) -> list[str]:
    """Training curves, held-out losses, and what the check before the first step found."""
    rows = [
        [
            arm["arm"], str(arm["seeds"]), f"{arm['mean_difference_nats']:+.4f}",
            f"{arm['largest_difference_nats']:.4f}", f"{arm['last_difference_nats']:+.4f}",
            f"{arm['mean_spread_nats']:.4f}", f"{arm['last_spread_nats']:.4f}", f"{100 * arm['within']:.0f} %",
        ]
        for arm in result["compared"]
    ]  # fmt: skip
    header = ["training loss, nats/token", "seeds", "mean difference", "largest", "at the end", "spread of seeds",
              "at the end", "points within it"]  # fmt: skip
    made = [markdown_table(header, rows)]
    rows = [
        [arm["arm"], one["language"], f"{one['bf16_nats']:.4f}", f"{one['mean_difference_nats']:+.4f}",
         f"{one['largest_difference_nats']:.4f}", f"{one['spread_nats']:.4f}"]
        for arm in result["compared"] for one in arm["heldout"]
    ]  # fmt: skip
    header = ["held-out loss, scored in bf16", "language", "bf16", "mean difference", "largest", "spread of seeds"]
    made.append(markdown_table(header, rows))
    rows = [
        [one["arm"], str(one["seed"]), f"{one['loss_bf16_nats']:.4f}", f"{one['loss_fp8_nats']:.4f}",
         f"{one['relative']:.3f}", f"{one['cosine']:.4f}", f"{one['worst']}, {one['worst_relative']:.3f}"]
        for one in result["checks"]
    ]  # fmt: skip
    header = ["before training", "seed", "loss, bf16", "fp8", "gradient off by", "cosine", "most in"]
    return [*made, markdown_table(header, rows)]


def draw_fp8(figure: Any, result: dict[str, Any]) -> None:
    """Losses, and beside them how far each 8-bit curve is from bf16's with the same seed, on the seeds' spread."""
    figure.set_size_inches(10.5, 4.3)
    left, right = figure.subplots(1, 2)
    curves = result["curves"]
    arms = list(dict.fromkeys(curve["arm"] for curve in curves))
    colours = dict(zip(arms, (BLUE, VERMILION, GREEN), strict=False))
    base = {curve["seed"]: curve for curve in curves if curve["arm"] == arms[0]}
    at = curves[0]["step"]
    spread = [statistics.stdev(curve["loss_nats"][i] for curve in base.values()) for i in range(len(at))]
    right.fill_between(at, [-s for s in spread], spread, color="#dddddd", label="bf16, one deviation of its seeds")
    for curve in curves:
        first = curve["seed"] == min(one["seed"] for one in curves if one["arm"] == curve["arm"])
        colour, label = colours[curve["arm"]], curve["arm"] if first else None
        left.plot(curve["step"], curve["loss_nats"], color=colour, linewidth=1.2, label=label)
        if curve["arm"] != arms[0]:
            apart = [a - b for a, b in zip(curve["loss_nats"], base[curve["seed"]]["loss_nats"], strict=True)]
            right.plot(curve["step"], apart, color=colour, linewidth=1.2, label=label)
    left.set_title("training loss, nats/token; a line a seed", fontsize=10.5, loc="left")
    right.set_title("difference from bf16 with the same seed", fontsize=10.5, loc="left")
    right.axhline(0.0, color="#555555", linewidth=0.8)
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
    how = "emulated on a CPU: rounded to 8 bits, multiplied in bf16" if result["emulated"] else "on a card"
    figure.suptitle(f"8-bit operands against bf16, {how}", x=0.015, ha="left", fontsize=12, fontweight="bold")
