"""`elo bench quality`: methods and their overrides, shared jobs, and what a result says, on a tiny real checkpoint."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from elo_engine.benchmarks import quality, quality_costs
from elo_engine.benchmarks.claims import take_claim
from elo_engine.benchmarks.quality_methods import choose_methods
from elo_engine.benchmarks.quality_report import verdicts
from elo_engine.benchmarks.schemas import check_result
from elo_engine.benchmarks.tables import tables
from elo_engine.errors import RefusedError, UsageError

SYLLABLES = list("かきくけこさしすせそたちつてとなにぬねの")
WORDS = ("light", "water", "earth", "heaven", "day", "night", "man", "woman", "tree", "fruit", "river", "stone")
METHODS = "full_cp,lora,outer_unfrozen,align_alone,elo,elo_interleaved"


def write_text(path: Path, words: Any, glue: str) -> Path:
    paragraphs = [glue.join(words[(start + 7 * step) % len(words)] for step in range(60)) for start in range(80)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def options(tied: Path, folder: Path, **more: Any) -> quality.Options:
    ja, en = write_text(folder / "ja.txt", SYLLABLES, ""), write_text(folder / "en.txt", WORDS, " ")
    return quality.Options(**{
        "work": folder / "work", "model": str(tied), "texts": (f"ja={ja}", f"en={en}"), "sequence_length": 32,
        "seeds": 2, "methods": METHODS, "pretrain_tokens": 768, "align_tokens": 256, "whole_tokens": 512,
        "heldout_tokens": 256, "pretrain_step_tokens": 128, "align_step_tokens": 64, "lora_rank": 2,
        "evaluations": 1, "overrides": ("detach.bridge_tokens=512",), "device": "cpu", "dtype": "fp32",
    } | more)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[quality.Options, dict[str, Any], Any]:
    chosen = options(tied, tmp_path_factory.mktemp("quality"))
    result, raw, missing = quality.measure(chosen)
    assert missing == 0
    return chosen, result, raw


def test_every_method_ran_on_its_tokens_from_one_base(measured: Any) -> None:
    _, result, _ = measured
    check_result(result, "here")
    assert [method["name"] for method in result["methods"]] == METHODS.split(",")
    spent = {method["name"]: (method["tokens"]["shallow"], method["tokens"]["whole"]) for method in result["methods"]}
    assert spent["full_cp"] == spent["lora"] == spent["outer_unfrozen"] == (0, 512)
    assert spent["align_alone"] == (0, 256) and spent["elo"] == spent["elo_interleaved"] == (768, 256)
    for method in result["methods"]:
        assert not method["failed"] and [run["seed"] for run in method["runs"]] == [1, 2]
        for run in method["runs"]:
            first, last = run["points"][0], run["points"][-1]
            assert first["loss_nats"] == {name: one["loss_nats"] for name, one in result["base"].items()}
            assert last["loss_nats"]["ja"] < first["loss_nats"]["ja"], (method["name"], "learns something")
        losses = {run["points"][-1]["loss_nats"]["ja"] for run in method["runs"]}
        assert len(losses) == 2, "another seed reads other rows"
    moments = {method["name"]: {p["moment"] for p in method["runs"][0]["points"]} for method in result["methods"]}
    assert "reattached" in moments["elo"] and "reattached" not in moments["elo_interleaved"]


def test_a_result_reads_as_tables_and_sentences(measured: Any) -> None:
    _, result, _ = measured
    text = "\n".join(tables(result))
    for method in result["methods"]:
        assert method["label"] in text
    assert "Lowest ja loss of the ELO recipes" in text and "break-even" in text


def test_done_jobs_are_not_done_again_and_other_settings_are_refused(measured: Any) -> None:
    chosen, result, _ = measured
    times = {path: path.stat().st_mtime_ns for path in (chosen.work / "results").glob("*.json")}
    again, _, missing = quality.measure(quality.Options(**(vars(chosen) | {"resume": True})))
    assert missing == 0 and again["methods"] == result["methods"]
    assert times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(RefusedError, match="go on with it by --resume"):
        quality.measure(chosen)
    with pytest.raises(RefusedError, match="measured with other settings"):
        quality.measure(quality.Options(**(vars(chosen) | {"resume": True, "align_lr": 1e-3})))
    assert not list((chosen.work / "runs").glob("*/model")), "weights are let go"


def test_a_job_of_a_living_process_is_left_to_it(measured: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.claim"
    assert take_claim(path) and not take_claim(path)
    path.write_text(path.read_text().split()[0] + " 999999999\n")  # of a process that is gone
    assert take_claim(path)
    path.write_text("")  # of one that was cut while it wrote
    assert take_claim(path) and not take_claim(path)


def test_the_base_models_losses_are_of_these_settings(measured: Any) -> None:
    """Also for a method that has not been run, whose own result could not refuse."""
    chosen, _, _ = measured
    changed = {"resume": True, "methods": "full_cp_half", "sequence_length": 16}
    with pytest.raises(RefusedError, match=r"base\.json: was measured with other settings"):
        quality.measure(quality.Options(**(vars(chosen) | changed)))


def test_another_learning_rate_is_another_curve() -> None:
    """Alignment alone is a point of full continual pretraining only where it learns at the same rate."""
    result = result_of(2.4)
    alone = course("whole", {1: (0, 50, 2.0), 2: (0, 50, 2.0)}, name="align_alone")
    result["methods"].append(alone | {"lr": 1e-4})
    before = quality_costs.full_curve(result_of(2.4), 1)
    for method in result["methods"][:-1]:
        method["lr"] = 3e-4
    assert quality_costs.full_curve(result, 1) == before
    alone["lr"] = 3e-4
    result["methods"][-1] = alone
    assert quality_costs.full_curve(result, 1) != before


def test_contradictions_of_a_result_are_found(measured: Any) -> None:
    _, result, _ = measured
    for change, said in (
        (lambda r: r["methods"][0]["runs"][0]["points"][-1].update(whole=1), "ends after"),
        (lambda r: r["methods"][0]["runs"][0]["points"][0]["loss_nats"].update(ja=9.0), "does not begin at the base"),
        (lambda r: r["base"].pop("en"), "base: scored in"),
        (lambda r: r["methods"][0].update(runs=[]), "neither ran nor failed"),
    ):
        wrong = copy.deepcopy(result)
        change(wrong)
        with pytest.raises(Exception, match=said):
            check_result(wrong, "here")


@pytest.mark.parametrize(
    ("wanted", "own", "match"),
    [
        ("nothing", [], "is none of"),
        (None, ["elo=detach.bridge=linear"], "every name may be given once"),
        (None, ["=x"], "use NAME=key=value"),
    ],
)
def test_methods_that_cannot_be_meant(wanted: str | None, own: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        choose_methods(wanted, own)


def test_a_method_of_ones_own() -> None:
    _, found = choose_methods("elo", ["wide=detach.layers=[0,1,28,29],detach.bridge=linear"])
    assert found.letter == "x1"
    assert found.overrides == ("detach.layers=[0,1,28,29]", "detach.bridge=linear") and found.kind == "elo"


# -- the arithmetic, on numbers made for it


def course(kind: str, ends: dict[int, tuple[int, int, float]], **more: Any) -> dict[str, Any]:
    cost = {mode: {"shallow": 0.1, "whole": 1.0, "fit": 0.0} for mode in quality_costs.MODES}
    shallow, whole, _ = ends[1]
    runs = [
        {"seed": seed, "seconds": 1.0, "fit_seconds": 0.0, "steps": {"shallow": 1, "whole": 1},
         "seconds_per_token": {"shallow": 0.1, "whole": 1.0},
         "points": [{"moment": "base", "shallow": 0, "whole": 0, "seconds": 0.0, "loss_nats": {"ja": 4.0},
                     "bits_per_byte": {"ja": 4.0}},
                    {"moment": "end", "shallow": s, "whole": w, "seconds": 1.0, "loss_nats": {"ja": loss},
                     "bits_per_byte": {"ja": loss}}]}
        for seed, (s, w, loss) in ends.items()
    ]  # fmt: skip
    return {
        "letter": "q", "name": "q", "label": "q", "kind": kind, "full": False, "overrides": [], "failed": [],
        "tokens": {"shallow": shallow, "whole": whole, "fit": 0}, "runs": runs, "cost": cost,
    } | more  # fmt: skip


def result_of(loss: float) -> dict[str, Any]:
    """Full CP falls from 4 to 2 over 1000 tokens in a straight line; ELO spends 500 shallow and 100 whole tokens."""
    return {
        "target": "ja", "others": [], "cost_model": "m", "cost_length": 1, "seeds": [1, 2],
        "base": {"ja": {"loss_nats": 4.0, "bits_per_byte": 4.0}},
        "methods": [
            course("whole", {1: (0, 1000, 2.0), 2: (0, 1000, 2.0)}, name="full_cp", letter="a", full=True),
            course("elo", {1: (500, 100, loss), 2: (500, 100, loss)}, name="elo", letter="g"),
        ],
    }  # fmt: skip


def test_break_even_is_where_costs_are_equal() -> None:
    """A loss of 3.4 takes full CP 300 tokens: 500 r + 100 = 300."""
    result = result_of(3.4)
    found = quality_costs.break_even(result, result["methods"][1])
    assert found is not None and found.spread.mean == pytest.approx(0.4) and not found.beyond
    assert any("r = 0.100, so ELO is the cheaper way" in line for line in verdicts(result))
    worse = result_of(3.9)  # 50 tokens of full CP, fewer than ELO's own whole-model tokens
    found = quality_costs.break_even(worse, worse["methods"][1])
    assert found is not None and found.spread.high < 0
    assert any("pays at no cost ratio" in line for line in verdicts(worse))
    better = result_of(1.5)
    found = quality_costs.break_even(better, better["methods"][1])
    assert found is not None and found.beyond == (1, 2) and found.spread.mean == pytest.approx((1000 - 100) / 500)
    for method in better["methods"]:  # a ratio above what was measured is no proof against ELO either
        for run in method["runs"]:
            run["seconds_per_token"] = {"shallow": 2.0, "whole": 1.0}
    (said,) = [line for line in verdicts(better) if line.startswith("Measured here: r = 2.000")]
    assert "above what is shown" in said and "cheaper" not in said


def test_a_difference_counts_only_beyond_the_spread() -> None:
    near = course("elo", {1: (1, 1, 2.0), 2: (1, 1, 2.2)})
    for gap, expected in ((0.1, 0), (0.5, -1), (-0.5, 1)):
        other = course("elo", {1: (1, 1, 2.0 + gap), 2: (1, 1, 2.2 + gap)})
        assert quality_costs.clear(near, other, "ja") == expected
    one = course("elo", {1: (1, 1, 1.0)})
    assert quality_costs.clear(one, near, "ja") == 0, "one seed has no spread"
    assert json.dumps(one)
