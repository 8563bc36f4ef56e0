"""Pictures and comparison of `quality` records, on results whose answers are known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from elo_engine.benchmarks import plots
from elo_engine.benchmarks.quality_compare import compare_quality
from elo_engine.benchmarks.quality_plots import quality_kinds
from elo_engine.errors import UsageError

RECORDS = Path(__file__).parent.parent / "benchmarks" / "records"


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """A record's result."""
    (path, *_) = sorted(RECORDS.glob("*quality-smollm2-135m-instruct"))
    found: dict[str, Any] = json.loads((path / "result.json").read_text())
    return found


def test_every_picture_is_drawn_and_carries_what_it_shows(kept: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plots.kinds(kept) == ["ends", "course", "level"]
    for kind in plots.kinds(kept):
        path = tmp_path / f"{kind}.png"
        plots.draw(kind, kept, "conditions", path)
        assert plots.key_in(path) == plots.input_key(kind, kept, "conditions")
        again = tmp_path / "again.png"
        plots.draw(kind, kept, "conditions", again)
        assert path.read_bytes() == again.read_bytes()


def test_the_pictures_show_the_results_own_numbers(kept: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure()
    plots._DRAW["ends"](figure, kept)
    said = {text.get_text() for axis in figure.axes for text in axis.texts}
    for method in kept["methods"]:
        for language in ("ja", "en"):
            ends = [run["points"][-1]["loss_nats"][language] for run in method["runs"]]
            assert f"{sum(ends) / len(ends):.3f}" in said
    shown = {round(float(x), 6) for line in figure.axes[0].lines for x in line.get_xdata() if line.get_marker() == "o"}
    seeds = {round(run["points"][-1]["loss_nats"]["ja"], 6) for m in kept["methods"] for run in m["runs"]}
    assert shown == seeds, "every seed is a dot"


def test_without_full_continual_pretraining_there_is_no_level(kept: dict[str, Any]) -> None:
    less = copy.deepcopy(kept)
    less["methods"] = [method for method in less["methods"] if method["kind"] == "elo"]
    assert quality_kinds(less) == ["ends", "course"]
    for method in less["methods"]:
        method["runs"] = []
    assert quality_kinds(less) == []


def moved(result: dict[str, Any], by: float) -> dict[str, Any]:
    other = copy.deepcopy(result)
    for method in other["methods"]:
        for run in method["runs"]:
            run["points"][-1]["loss_nats"]["ja"] += by
    return other


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (0.0, "the same numbers"), (0.001, "not told apart"), (-0.5, "B is better, by more"),
        (0.5, "A is better, by more"),
    ],
)  # fmt: skip
def test_a_difference_is_claimed_beyond_the_spread(kept: dict[str, Any], by: float, said: str) -> None:
    lines = [line for line in compare_quality(kept, moved(kept, by)) if ", ja:" in line]
    assert len(lines) == len(kept["methods"]) and all(said in line for line in lines)


def test_losses_that_cannot_be_compared_are_refused(kept: dict[str, Any]) -> None:
    other = copy.deepcopy(kept)
    other["base"]["ja"]["loss_nats"] += 0.1
    with pytest.raises(UsageError, match="base model's ja loss"):
        compare_quality(kept, other)
    with pytest.raises(UsageError, match="differ in sequence_length"):
        compare_quality(kept, kept | {"sequence_length": 1})
    nothing = copy.deepcopy(kept)
    for method in nothing["methods"]:
        method["name"] += "_else"
    with pytest.raises(UsageError, match="no method in common"):
        compare_quality(kept, nothing)
