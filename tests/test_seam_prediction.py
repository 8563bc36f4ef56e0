"""Rank correlations of seams with aligned losses, on orders whose answers are known."""

from __future__ import annotations

from typing import Any

import pytest

from elo_engine.errors import UsageError
from elo_engine.seam_prediction import by_chance, describe_prediction, predict, spearman


def run_of(cka: float, loss: float, **more: Any) -> dict[str, Any]:
    seam = {"model": "reattached", "language": "ja", "boundary": 1, "rms_ratio": 1.0, "cosine": None, "cka": cka}
    return {
        "layers": [0, 4], "layers_total": 5, "models": {"reattached": "a", "aligned": "b"},
        "seams": [seam, seam | {"model": "aligned", "cka": 0.1}],
        "loss_nats": {"ja": {"base": 4.0, "aligned": loss}},
    } | more  # fmt: skip


def test_ranks_are_those_of_the_textbook() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # scipy.stats.spearmanr
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert by_chance([1, 2, 3, 4], [1, 2, 3, 4]) == pytest.approx(2 / 24)
    assert by_chance(list(range(9)), list(range(9))) < 0.002


def test_a_seam_that_orders_the_runs_is_found() -> None:
    runs = [(f"run {n}", run_of(1 - n / 10, 2 + n / 100)) for n in range(7)]
    (row,) = predict(runs)["correlations"]  # the RMS ratio is the same everywhere, the cosine not known
    assert row["measure"] == "cka" and row["rho"] == pytest.approx(1) and row["p"] < 0.001
    assert "at least one of them predicts it" in describe_prediction(predict(runs))[-1]


def test_a_seam_that_does_not_is_said_to_show_nothing() -> None:
    losses = (2.3, 2.1, 2.4, 2.2, 2.25)
    runs = [(f"run {n}", run_of(1 - n / 10, loss)) for n, loss in enumerate(losses)]
    assert "none of them is shown to predict it" in describe_prediction(predict(runs))[-1]


def test_what_says_nothing_is_refused_by_name() -> None:
    runs = [(f"run {n}", run_of(0.9, 2.0)) for n in range(4)]
    with pytest.raises(UsageError, match="3 runs; an order of fewer than 4"):
        predict(runs[:3])
    for change, said in (
        ({"layers": [0, 1]}, r"run 3: detached layers \[0, 1\]"), ({"models": {"aligned": "b"}}, "no reattached model"),
        ({"loss_nats": {"ja": {"base": 1.0}}}, "no aligned loss of ja"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            predict([*runs[:3], ("run 3", run_of(0.9, 2.0, **change))])
