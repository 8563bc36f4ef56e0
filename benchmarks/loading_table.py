"""A record of the loading comparison: what its result.json holds, its tables and its picture."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from elo_engine.benchmarks.loading_report import conditions_text, explanation, table, verdicts
from elo_engine.errors import FailedError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Spread(_Strict):
    median: float
    p10: float
    p90: float
    count: int


class _Measurement(_Strict):
    """One process: its seconds, or why there are none. More of it is in raw.json."""

    round: int
    state: Literal["cold", "warm"]
    arm: str
    seconds: float | None = None
    failed: str | None = None


class _Figures(_Strict):
    """An arm in one state; `failed` alone where no process of it ended well."""

    failed: str | None = None
    seconds: _Spread | None = None
    over_engine: _Spread | None = None
    wanted_bytes_per_s: float | None = None
    call_bytes_over_wanted: float | None = None
    disk_bytes_over_wanted: float | None = None
    peak_rss_bytes: float | None = None
    peak_gpu_bytes: float | None = None
    mapped: bool | None = None
    keeps: bool | None = None
    partly_failed: str | None = None


class _Results(_Strict):
    model: str
    device: str
    device_name: str
    peers: dict[str, str]
    rounds: int
    seed: int
    ceiling_threads: int
    memory_primed: bool
    filesystem: str
    shards: int
    checkpoint_bytes: int
    wanted_bytes: int
    tensors: int
    ranges: int
    summary: dict[Literal["cold", "warm"], dict[str, _Figures]]
    measurements: list[_Measurement]


def make_result(
    described: dict[str, Any], summary: dict[str, dict[str, Any]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """A `loading` result as result.json has it.

    Raises:
        FailedError: a field is missing, too many, or of another kind.
    """
    kept = ("round", "state", "arm", "seconds", "failed")
    measurements = [{key: row[key] for key in kept if key in row} for row in rows]
    results = described | {"summary": summary, "measurements": measurements}
    try:
        _Results.model_validate(results)
    except ValidationError as error:
        said = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5]]
        raise FailedError(f"the loading result does not fit its schema: {'; '.join(said)}") from error
    return {"schema": 1, "theme": "loading", "results": results}


def loading_tables(result: dict[str, Any]) -> list[str]:
    """What was loaded, and a table with verdicts for each state; nothing for a result that has no figures."""
    results = result["results"]
    if "summary" not in results:
        return []
    blocks = [conditions_text(results)]
    for state, figures in results["summary"].items():
        if figures:
            lines = "\n".join(f"* {line}" for line in verdicts(state, figures, results["device"]))
            blocks += [f"{state.capitalize()}:", table(figures), lines]
    return [*blocks, explanation(results)]


def has_picture(result: dict[str, Any]) -> bool:
    """Whether there are seconds to draw."""
    states = result["results"].get("summary", {}).values()
    return any("seconds" in row for figures in states for row in figures.values())


def draw_loading(figure: Any, result: dict[str, Any]) -> None:
    """Bars of the medians with p10 and p90, a panel a state: the engine, its peers, the machine's ceilings."""
    results = result["results"]
    summary = {state: figures for state, figures in results["summary"].items() if figures}
    drawn = {
        state: {arm: row["seconds"] for arm, row in figures.items() if "seconds" in row}
        for state, figures in summary.items()
    }
    drawn = {state: ran for state, ran in drawn.items() if ran}
    figure.set_size_inches(6.0 * len(drawn), 1.4 + 0.3 * max(len(ran) for ran in drawn.values()))
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axis, (state, ran) in zip(axes, drawn.items(), strict=True):
        arms = sorted(ran, key=lambda arm: ran[arm]["median"], reverse=True)
        middles = [ran[arm]["median"] for arm in arms]
        errors = [
            [ran[arm]["median"] - ran[arm]["p10"] for arm in arms],
            [ran[arm]["p90"] - ran[arm]["median"] for arm in arms],
        ]
        colours = ["#c4c4c4" if a.startswith("ceiling") else "#D55E00" if a.startswith("engine") else "#0072B2"
                   for a in arms]  # fmt: skip
        axis.barh(arms, middles, xerr=errors, color=colours, height=0.66, error_kw={"elinewidth": 1.2, "capsize": 3})
        for arm, value in zip(arms, middles, strict=True):
            end = (ran[arm]["p90"], arm)
            text = f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"
            axis.annotate(text, end, xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5)
        axis.set_xlim(0, 1.2 * max(ran[arm]["p90"] for arm in arms))
        axis.set_xlabel("seconds: median, whiskers from p10 to p90")
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", alpha=0.25)
        axis.set_axisbelow(True)
        axis.set_title(state, fontsize=10.5, loc="left")
    size = f"{results['wanted_bytes'] / 1e9:.2f} GB of {results['model']} to {results['device']}"
    title = f"Loading: {size}, {results['device_name']}"
    figure.suptitle(title, x=0.015, ha="left", fontsize=12, fontweight="bold")
