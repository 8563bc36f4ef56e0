"""Bootstrap intervals cover the truth as often as they say, and the ratios are taken round by round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import pytest

from elo_engine.benchmarks import intervals
from elo_engine.benchmarks.intervals import Interval, bootstrap, bootstrap_two
from elo_engine.errors import UsageError

TOKENS = {"elo_pretrain": 4096, "elo_align": 1024, "transformers_full": 1024}


def drifting_rounds(order: random.Random, count: int) -> list[dict[str, list[float]]]:
    """A machine that is up to three times slower in some rounds; per token, full CP takes 10, alignment 8, ELO 1."""
    rounds = []
    for _ in range(count):
        drift = order.uniform(1, 3)
        per_token = {"transformers_full": 10.0, "elo_align": 8.0, "elo_pretrain": 1.0}
        rounds.append(
            {
                arm: [drift * value * TOKENS[arm] * order.lognormvariate(0, 0.05) for _ in range(3)]
                for arm, value in per_token.items()
            }
        )
    return rounds


def covered(statistic: str, repeats: int = 200, rounds: int = 12) -> float:
    """Share of the repeats whose interval holds the truth of synthetic rounds."""
    order, hits = random.Random(1), 0
    for number in range(repeats):
        if statistic == "pipeline":
            sample = drifting_rounds(order, 9)
            turns = [{arm: [statistics.median(steps)] for arm, steps in turn.items()} for turn in sample]
            found = bootstrap(turns, _pipeline, draws=300, seed=number)
            hits += found.spans(10 / (0.9 * 1 + 0.1 * 8)) is True
        else:
            values = [order.lognormvariate(0, 0.3) for _ in range(rounds)]
            found = bootstrap(values, statistics.median, draws=300, seed=number)
            hits += found.spans(1.0) is True
    return hits / repeats


def _pipeline(turns: Sequence[dict[str, list[float]]]) -> float:
    return statistics.median(
        (turn["transformers_full"][0] / 1024)
        / (0.9 * turn["elo_pretrain"][0] / 4096 + 0.1 * turn["elo_align"][0] / 1024)
        for turn in turns
    )


@pytest.mark.parametrize("statistic", ["median", "pipeline"])
def test_the_interval_covers_the_truth_as_often_as_it_says(statistic: str) -> None:
    assert 0.90 <= covered(statistic) <= 0.99


def test_an_interval_that_is_too_narrow_would_be_seen() -> None:
    order = random.Random(2)
    samples = [[order.lognormvariate(0, 0.3) for _ in range(12)] for _ in range(200)]
    narrow = [bootstrap(values, statistics.median, draws=300, confidence=0.6) for values in samples]
    assert sum(found.spans(1.0) is True for found in narrow) / 200 < 0.85


def test_the_drift_of_a_round_cancels() -> None:
    rounds = [
        {"transformers_full": [10.24 * slow], "elo_align": [8.192 * slow], "elo_pretrain": [4.096 * slow]}
        for slow in (1.0, 7.0, 2.0, 3.0)
    ]
    found = intervals.pipeline_speedup(rounds, TOKENS, "transformers_full")
    truth = 10 / (0.9 * 1 + 0.1 * 8)
    assert found.median == pytest.approx(truth)
    assert found.low == pytest.approx(truth) and found.high == pytest.approx(truth)
    ratio = intervals.stage_ratio(rounds, TOKENS, "transformers_full")
    assert ratio.median == pytest.approx(0.1) and ratio.high == pytest.approx(0.1)
    aligned = intervals.pipeline_speedup(rounds, TOKENS, "transformers_full", split=0.0)
    assert aligned.median == pytest.approx(10 / 8)


def test_few_rounds_have_a_figure_and_no_interval() -> None:
    assert bootstrap([1.0, 3.0], statistics.mean) == Interval(2.0, None, None, 0.95)
    assert bootstrap([1.0, 3.0], statistics.mean).spans(2.0) is None
    assert bootstrap([1.0, 2.0, 3.0], statistics.median).low is not None
    assert bootstrap_two([1.0] * 9, [2.0] * 2, lambda a, b: b[0] / a[0]) == Interval(2.0, None, None)
    with pytest.raises(UsageError, match="at least one round"):
        bootstrap([], statistics.median)
    with pytest.raises(UsageError, match="not between 0 and 1"):
        bootstrap([1.0], statistics.median, confidence=95)


@pytest.mark.parametrize(("rounds", "stated"), [(3, 0.75), (4, 0.875), (5, 0.9375), (6, 0.95), (12, 0.95)])
def test_an_interval_states_no_more_than_its_rounds_can_give(rounds: int, stated: float) -> None:
    values = [float(value) for value in range(rounds)]
    assert bootstrap(values, statistics.median).confidence == stated
    assert bootstrap(values, statistics.median, confidence=0.5).confidence == 0.5
    for first, second in ((values, values * 5), (values * 5, values)):
        found = bootstrap_two(first, second, lambda a, b: statistics.median(b) - statistics.median(a))
        assert found.confidence == stated, "the smaller of the two runs decides"


@pytest.mark.parametrize("rounds", [3, 4, 5])
def test_the_stated_confidence_of_few_rounds_is_the_share_that_holds_the_truth(rounds: int) -> None:
    order, found = random.Random(4), []
    for _ in range(600):
        found.append(bootstrap([order.gauss(0, 1) for _ in range(rounds)], statistics.median, draws=300))
    share = sum(one.spans(0.0) is True for one in found) / len(found)
    assert share == pytest.approx(found[0].confidence, abs=0.045)  # 2.5 standard deviations of 600 with 75 %


def test_the_same_rounds_give_the_same_interval_and_another_seed_another() -> None:
    order = random.Random(3)
    values = [order.gauss(10, 1) for _ in range(8)]
    assert bootstrap(values, statistics.mean) == bootstrap(values, statistics.mean)
    assert bootstrap(values, statistics.mean) != bootstrap(values, statistics.mean, seed=1)


def test_two_runs_are_drawn_by_themselves() -> None:
    """Rounds of independent runs are no pairs: both runs' spread has to show."""
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 10.0]
    found = bootstrap_two(first, second, lambda a, b: statistics.median(b) / statistics.median(a))
    assert found.median == 2.0 and found.low is not None and found.high is not None
    assert found.low < 1.2 and found.high > 3.3


def test_rounds_in_which_an_arm_failed_are_left_out() -> None:
    rounds = intervals.rounds_of(
        {"rounds": [{"a": {"seconds": [1.0], "losses": [2.0]}, "b": {"seconds": [2.0]}}, {"a": {"seconds": [1.0]}}]}
    )
    assert intervals.with_arms(rounds, ("a", "b")) == rounds[:1]
    assert len(intervals.with_arms(rounds, ("a",))) == 2
    with pytest.raises(UsageError, match="no round has steps of all of a, c"):
        intervals.with_arms(rounds, ("a", "c"))


def test_an_interval_as_json_is_read_back_whole() -> None:
    found = Interval(6.5, 6.2, 6.8, 0.95)
    assert found.to_json() == {"median": 6.5, "low": 6.2, "high": 6.8, "confidence": 0.95}
    assert Interval(**found.to_json()) == found  # type: ignore[arg-type]
    assert found.spans(6.2) and not found.spans(6.9)
