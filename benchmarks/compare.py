"""Two records of one theme against each other: the ratio of the times of every arm that both have, with an interval; of
`quality` the losses of every method (`quality_compare.py`).

The two runs had nothing to do with each other, so each one's rounds are drawn by themselves; a machine that was slower
on one day shows as a difference, which is why the conditions that differ are stated first. Ratios of one run's own arms
(stage ratio, pipeline speedup) do not suffer from that and are compared as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elo_engine.benchmarks.intervals import (
    FEWEST_FOR_USUAL,
    USUAL,
    Interval,
    bootstrap_two,
    percent,
    pipeline_by_round,
    rounds_of,
    seconds_per_token,
    with_arms,
)
from elo_engine.benchmarks.quality_compare import compare_quality
from elo_engine.benchmarks.recording import Record, read_record
from elo_engine.errors import UsageError

Series = list[float]  # one number a round


def compare(a: Path, b: Path) -> list[str]:
    """Lines for a person: what differs in the conditions, then B over A for each arm that both records have.

    Raises:
        UsageError: a folder is no record, an earlier record, or the themes differ or have no times (`memory`, `loss`),
            or two records of `quality` cannot be compared.
        FailedError: a record's files do not fit their schema or were changed.
    """
    records = [read_record(a), read_record(b)]
    for record in records:
        if record.theme is None:
            raise UsageError(f"{record.path}: an earlier record without result.json; only its README can be read")
    first, second = records
    if first.theme != second.theme:
        raise UsageError(
            f"{a.name} is of the theme {first.theme!r}, {b.name} of {second.theme!r}: nothing in them can be compared"
        )
    if first.theme == "quality":
        assert first.result and second.result
        heading = [f"A: {a.name}", f"B: {b.name}", *_withdrawn(first), *_withdrawn(second)]
        return heading + compare_quality(first.result, second.result)
    if first.theme not in _TIMES:
        raise UsageError(
            f"records of the theme {first.theme!r} hold no times that could be compared; read their tables side by side"
        )
    lines = [f"A: {a.name}", f"B: {b.name}", *_withdrawn(first), *_withdrawn(second), *differences(first, second)]
    ours, theirs = (_TIMES[str(record.theme)](record) for record in records)
    both = [name for name in ours if name in theirs]
    if not both:
        raise UsageError(f"{a.name} and {b.name} have no arm in common: {', '.join(ours)} and {', '.join(theirs)}")
    lines.append(f"B over A, time; each interval is of {100 * USUAL:g} % by itself where it states no other:")
    lines += [f"  {name}: {verdict(ours[name], theirs[name], 'B is slower', 'B is faster')}" for name in both]
    lines += [f"  {name}: only in A" for name in ours if name not in theirs]
    lines += [f"  {name}: only in B" for name in theirs if name not in ours]
    if first.theme == "speedup":
        lines += _speedups(first, second)
    return lines


def verdict(first: Sequence[float], second: Sequence[float], more: str, less: str) -> str:
    """`1.052 (1.031 to 1.077): B is slower`, or that no difference is shown: the interval of the log-ratio spans 0.

    A difference is claimed from FEWEST_FOR_USUAL rounds of each alone: with fewer, same code "differs" far too often.
    """
    found = ratio(first, second)
    text = f"{math.exp(found.median):.3f}"
    if found.low is None or found.high is None:
        few = f"{len(first)} and {len(second)}"
        return f"{text}, no interval from {few} rounds: too few rounds to show a difference"
    other = f", {percent(found.confidence)}" if found.confidence != USUAL else ""
    text += f" ({math.exp(found.low):.3f} to {math.exp(found.high):.3f}{other})"
    if found.spans(0.0):
        return f"{text}: no difference shown"
    if min(len(first), len(second)) < FEWEST_FOR_USUAL:
        return f"{text}: too few rounds to show a difference"
    return f"{text}: {more if found.median > 0 else less}"


def ratio(first: Sequence[float], second: Sequence[float]) -> Interval:
    """log of the median of the second over the median of the first."""
    return bootstrap_two(first, second, lambda a, b: math.log(statistics.median(b) / statistics.median(a)))


def differences(first: Record, second: Record) -> list[str]:
    """The conditions in which two records differ; those that forbid taking a ratio for a change of the code come with
    a warning.
    """
    assert first.result and second.result and first.config and second.config
    environments = [record.environment or {} for record in (first, second)]

    def pairs(names: Sequence[str], left: dict[str, Any], right: dict[str, Any]) -> list[str]:
        return [
            f"  {name}: {left.get(name)} in A, {right.get(name)} in B"
            for name in names
            if left.get(name) != right.get(name)
        ]

    settings = [dict(record.result or {}) for record in (first, second)]
    for fields in settings:
        fields["model"] = fields.get("model", {}).get("name")
        fields["device"] = fields.get("device", {}).get("name")
        if loading := fields.pop("results", None):
            fields |= {name: loading.get(name) for name in ("model", "device", "wanted_bytes")}
    essential = ("model", "device", "dtype", "sequence_length", "micro_batch", "split", "wanted_bytes")
    lines = []
    if found := pairs(essential, *settings) + _options_apart(*settings):
        lines += ["NOT THE SAME SETTING: the ratios below are not of the code alone.", *found]
    shapes = [(record.result or {}).get("model") for record in (first, second)]
    if shapes[0] != shapes[1] and settings[0]["model"] == settings[1]["model"]:
        lines += ["NOT THE SAME SHAPES under one name of the model: the ratios below are not of the code alone."]
    packages = [environment.get("packages", {}) for environment in environments]
    other = pairs(sorted({*packages[0], *packages[1]}), *packages)
    other += pairs(("python", "cpu", "cpu_threads_used"), *environments)
    other += pairs(("rounds", "warmup_steps"), *settings)
    commits = [(record.config or {}).get("git") or {"commit": "unknown", "dirty": False} for record in (first, second)]
    if commits[0] != commits[1]:
        names = [f"{git['commit'][:7]}{' with changes' if git['dirty'] else ''}" for git in commits]
        other.append(f"  commit: {names[0]} in A, {names[1]} in B")
    return [*lines, *(["Also different:", *other] if other else [])]


# Options of an arm that its time is of, and what a record that says nothing of one had.
_OPTIONS = {"graph": "off", "fp8": "none", "state": None, "recompute": None}


def _options_apart(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Of the arms that both records measured."""
    lines = []
    for name, arm in (first.get("arms") or {}).items():
        other = (second.get("arms") or {}).get(name)
        if other is None or not arm["status"] == other["status"] == "ran":
            continue
        for option, before in _OPTIONS.items():
            left, right = ((one.get("options") or {}).get(option, before) for one in (arm, other))
            if left != right and None not in (left, right):
                lines.append(f"  {name}, {option}: {left} in A, {right} in B")
    return lines


def _withdrawn(record: Record) -> list[str]:
    return [f"{record.path.name} IS WITHDRAWN: {record.withdrawn}"] if record.withdrawn else []


def _tokens(record: Record) -> dict[str, int]:
    assert record.result
    return {name: arm["tokens_per_step"] for name, arm in record.result["arms"].items() if arm["status"] == "ran"}


def _speedup_times(record: Record) -> dict[str, Series]:
    rounds, tokens = rounds_of(record.raw()), _tokens(record)
    return {arm: [seconds_per_token(turn, arm, tokens) for turn in with_arms(rounds, [arm])] for arm in tokens}


def _speedups(first: Record, second: Record) -> list[str]:
    """The pipeline speedups that both records give, B's over A's."""
    assert first.result and second.result
    lines = []
    for name in first.result["pipeline_speedup"]:
        if name not in second.result["pipeline_speedup"]:
            continue
        series = []
        for record in (first, second):
            assert record.result
            series.append(pipeline_by_round(rounds_of(record.raw()), _tokens(record), name, record.result["split"]))
        lines.append(f"  pipeline over {name}: {verdict(*series, 'larger in B', 'smaller in B')}")
    return ["B over A, pipeline speedup:", *lines] if lines else []


def _kernel_times(record: Record) -> dict[str, Series]:
    assert record.result
    return {
        f"{contest['contest']} ({contest['shape']}) {arm}": row["raw_ms"]
        for contest in record.result["contests"]
        for arm, row in contest["arms"].items()
        if "skipped" not in row
    }


def _loading_times(record: Record) -> dict[str, Series]:
    assert record.result
    found: dict[str, Series] = {}
    for row in record.result["results"].get("measurements", []):
        if "failed" not in row:
            found.setdefault(f"{row['state']} {row['arm']}", []).append(row["seconds"])
    return found


_TIMES: dict[str, Callable[[Record], dict[str, Series]]] = {
    "speedup": _speedup_times, "kernels": _kernel_times, "loading": _loading_times,
}  # fmt: skip
