"""How sure a ratio of times is: bootstrap intervals over whole rounds, and the ratios that the records report.

A round is one turn of every arm; a machine whose speed drifts drifts for all arms of a round alike, so ratios are taken
round by round and their median is reported. What is resampled is the round: its steps share a state of the machine and
are not independent of each other.

A percentile interval of a median cannot go beyond the smallest and the largest round: with n rounds it covers the truth
with a probability of at most 1 - 2 / 2^n, 75 % with 3 rounds, 93.75 % with 5, whatever confidence was asked for. The
confidence that an Interval states is therefore no more than that.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from elo_engine.errors import UsageError

R = TypeVar("R")
Round = Mapping[str, Sequence[float]]  # arm -> seconds of its steps in that round

FEWEST = 3  # rounds; of fewer, resampling says nothing
USUAL = 0.95  # confidence
FEWEST_FOR_USUAL = 6  # rounds; of fewer, an interval of a median cannot have it: 1 - 2 / 2^5 < 0.95 < 1 - 2 / 2^6


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies.

    Attributes:
        median: the statistic of the rounds as they were measured, for all of this project's ratios a median.
        low, high: ends of the percentile interval; None with fewer than FEWEST rounds.
        confidence: what was asked for, or less where the rounds are too few for it; of no interval, what was asked for.
    """

    median: float
    low: float | None
    high: float | None
    confidence: float = USUAL

    def to_json(self) -> dict[str, float | None]:
        """As result.json keeps it."""
        return asdict(self)

    def spans(self, value: float) -> bool | None:
        """Whether the value is within the interval; None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= value <= self.high


def bootstrap(
    rounds: Sequence[R],
    statistic: Callable[[Sequence[R]], float],
    *,
    draws: int = 2000,
    confidence: float = USUAL,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic, whole rounds drawn with replacement.

    The same rounds, draws and seed give the same interval. Raises UsageError: no round, a confidence outside (0, 1).
    """
    return _interval([rounds], lambda drawn: statistic(drawn[0]), draws, confidence, seed)


def bootstrap_two(
    first: Sequence[R],
    second: Sequence[R],
    statistic: Callable[[Sequence[R], Sequence[R]], float],
    *,
    draws: int = 2000,
    confidence: float = USUAL,
    seed: int = 0,
) -> Interval:
    """The same for two runs that had nothing to do with each other: each one's rounds are drawn by themselves."""
    return _interval([first, second], lambda drawn: statistic(drawn[0], drawn[1]), draws, confidence, seed)


def _interval(
    series: Sequence[Sequence[R]],
    statistic: Callable[[list[Sequence[R]]], float],
    draws: int,
    confidence: float,
    seed: int,
) -> Interval:
    if not all(series):
        raise UsageError("an interval needs at least one round; this series has none")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence {confidence} is not between 0 and 1; 0.95 is usual")
    middle = statistic(list(series))
    if min(len(rounds) for rounds in series) < FEWEST:
        return Interval(middle, None, None, confidence)
    order = random.Random(seed)
    found = sorted(statistic([order.choices(rounds, k=len(rounds)) for rounds in series]) for _ in range(draws))
    tail = (1 - confidence) / 2
    honest = min(confidence, highest_confidence(min(len(rounds) for rounds in series)))
    return Interval(middle, _quantile(found, tail), _quantile(found, 1 - tail), honest)


def percent(confidence: float) -> str:
    """`95 %`, `93.75 %`."""
    return f"{100 * confidence:.4g} %"


def highest_confidence(rounds: int) -> float:
    """The most that an interval of a median can have: that the true median is between the smallest and the largest."""
    return float(1 - 2 / 2**rounds)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def rounds_of(raw: Mapping[str, Any]) -> list[dict[str, list[float]]]:
    """Seconds by arm of each round of a speed record's raw.json."""
    return [{arm: list(steps["seconds"]) for arm, steps in turn.items()} for turn in raw["rounds"]]


def seconds_per_token(turn: Round, arm: str, tokens_per_step: Mapping[str, int]) -> float:
    """One arm in one round: its median step over the tokens of a step."""
    return statistics.median(turn[arm]) / tokens_per_step[arm]


def with_arms(rounds: Sequence[Round], arms: Sequence[str]) -> list[Round]:
    """The rounds in which all of these arms ran at least one step.

    Raises UsageError: there is none.
    """
    whole = [turn for turn in rounds if all(turn.get(arm) for arm in arms)]
    if not whole:
        raise UsageError(f"no round has steps of all of {', '.join(arms)}; a ratio of them was not measured")
    return whole


def stage_ratio(
    rounds: Sequence[Round], tokens_per_step: Mapping[str, int], baseline: str, arm: str = "elo_pretrain"
) -> Interval:
    """r: the arm's seconds a token over the baseline's."""
    ratios = [
        seconds_per_token(turn, arm, tokens_per_step) / seconds_per_token(turn, baseline, tokens_per_step)
        for turn in with_arms(rounds, (arm, baseline))
    ]
    return bootstrap(ratios, statistics.median)


def pipeline_speedup(
    rounds: Sequence[Round], tokens_per_step: Mapping[str, int], baseline: str, split: float = 0.9,
    align: str = "elo_align",
) -> Interval:  # fmt: skip
    """T(full continual pretraining on all tokens) / (T(ELO pretraining on `split`) + T(alignment on the rest)), of
    which the arm `align` does the alignment.
    """
    return bootstrap(pipeline_by_round(rounds, tokens_per_step, baseline, split, align), statistics.median)


def pipeline_by_round(
    rounds: Sequence[Round], tokens_per_step: Mapping[str, int], baseline: str, split: float = 0.9,
    align: str = "elo_align",
) -> list[float]:  # fmt: skip
    """The pipeline speedup of each round that has all three arms."""
    arms = (baseline, "elo_pretrain", align)
    speedups = []
    for turn in with_arms(rounds, arms):
        full, elo, aligned = (seconds_per_token(turn, arm, tokens_per_step) for arm in arms)
        speedups.append(full / (split * elo + (1 - split) * aligned))
    return speedups
