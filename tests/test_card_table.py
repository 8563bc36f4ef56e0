"""What is asked of a card: plans for cards of all sizes, figures out of records, and verdicts, also just beyond bounds.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from test_compare import kernels, memory, speedup

from elo_engine.benchmarks.card_figures import FEWEST_STEPS, figures_of
from elo_engine.benchmarks.card_plan import (
    GROUPS,
    LENGTH,
    MODELS,
    ROWS,
    Machine,
    elo_rows,
    headline,
    parse_groups,
    plan,
)
from elo_engine.benchmarks.card_process import Part, row_of
from elo_engine.benchmarks.card_table import Asked, asked, card_tables, judged, with_ratios, wrong_verdicts
from elo_engine.benchmarks.contestants import Size, choose, needed_bytes
from elo_engine.benchmarks.models import open_model
from elo_engine.benchmarks.schemas import check_result
from elo_engine.errors import FailedError, UsageError
from elo_engine.measure.cards import CONTEXT_BYTES

GIB = 2**30
H200 = Machine("cuda", "NVIDIA H200", "h200", 139 * GIB)
SMALL = {24: "llama-3.2-1b", 8: "smollm2-135m", 2: None}


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    return plan(H200, "full", GROUPS)


@pytest.fixture(scope="module")
def wanted(parts: list[Part]) -> list[Asked]:
    return asked([part.name for part in parts], headline(H200, "full"), H200.card)


def rows_with(wanted: list[Asked], parts: list[Part], value: dict[int, float]) -> list[dict[str, Any]]:
    """Rows of parts that ran, with these values of the figures of `wanted` by their place."""
    rows = [row_of(part, "ran", "") for part in parts]
    by_part = {row["part"]: row for row in rows}
    for place, one in enumerate(wanted):
        if place in value:
            by_part[one.part]["figures"] = by_part[one.part]["figures"] | {one.figure: value[place]}
    return rows


def test_parts_come_in_the_order_of_what_matters(parts: list[Part]) -> None:
    groups = [part.group for part in parts]
    assert list(dict.fromkeys(groups)) == list(GROUPS)
    assert len({part.name for part in parts}) == len({part.slug for part in parts}) == len(parts)
    assert [part.name for part in parts][1:3] == ["speedup llama-3.1-8b", "pretrain llama-3.1-8b"]
    assert not any(part.why_not for part in parts)
    names = [part.name for part in parts]
    place = names.index("pretrain smollm2-135m")
    assert names[place + 1] == "pretrain smollm2-135m, graph" and parts[place + 1].group == "speedup"
    launched, graph = (parts[at].command for at in (place, place + 1))
    differ = [pair for pair in zip(launched, graph, strict=True) if pair[0] != pair[1]]
    assert differ == [("off", "on")] and graph[graph.index("--graph") + 1] == "on", "the same sizes, beside each other"
    assert [part.name for part in plan(Machine("cpu", "a CPU", "", GIB), "tiny", ("speedup",))][-1].endswith(", graph")
    assert {part.name for part in plan(H200, "full", ("compile", "bias"))} == {"bias", "compile llama-3.1-8b"}
    assert parse_groups("compile, correct") == ("correct", "compile")
    with pytest.raises(UsageError, match="no such part: all"):
        parse_groups("correct,all")


@pytest.mark.parametrize("gib", SMALL)
def test_a_small_card_compares_a_smaller_model(gib: int) -> None:
    machine = Machine("cuda", "a card", "", gib * GIB)
    assert headline(machine, "full") == SMALL[gib]
    found = {part.name: part for part in plan(machine, "full", ("speedup",))}
    assert bool(found["pretrain llama-3.1-8b"].why_not) == (gib == 2), "ELO pretraining of the 8B fits 8 GB"
    if gib == 2:
        assert "no model of" in found["speedup"].why_not
        assert found["pretrain smollm2-135m"].why_not == "not one row of 8192 tokens fits 0.8 GiB"


def test_rows_of_a_part_with_graphs_are_those_whose_graphs_fit() -> None:
    """On a card that has just the room of launched steps, with nothing made again."""
    size = Size("cuda", "bf16", LENGTH, rows=ROWS, memory_bytes=2**40)
    model = open_model(MODELS[-1])
    (one,) = choose(model, (0, model.spec.layers - 1), size, ("elo_pretrain",))
    machine = Machine("cuda", "a card", "", needed_bytes(one.setting) + 2 * CONTEXT_BYTES)
    assert elo_rows(MODELS[-1], machine) == 4 and elo_rows(MODELS[-1], machine, graph="on") == 2
    found = {part.name: part.command for part in plan(machine, "full", ("speedup",))}
    rows = {name: words[words.index("--elo-micro-batch") + 1] for name, words in found.items() if MODELS[-1] in name}
    assert rows[f"pretrain {MODELS[-1]}"] == "4" and rows[f"pretrain {MODELS[-1]}, graph"] == "2"


def test_every_bound_is_met_at_itself_and_not_just_beyond(wanted: list[Asked], parts: list[Part]) -> None:
    bounded = [(place, one) for place, one in enumerate(wanted) if (one.least, one.most) != (None, None)]
    assert len(bounded) >= 30
    for place, one in bounded:
        for bound, beyond in ((one.least, -math.inf), (one.most, math.inf)):
            if bound is None:
                continue
            for value, verdict in ((bound, "met"), (math.nextafter(bound, beyond), "not met")):
                found = judged(wanted, rows_with(wanted, parts, {place: value}), "full")
                assert (found[place]["verdict"], found[place]["measured"]) == (verdict, value), one.label
    assert Asked("", "", "", least=1.0).verdict(math.nan) == "not met"


def test_the_figures_that_were_asked_for_are_there(wanted: list[Asked]) -> None:
    """By name, with the bounds that the paper, the pages and the planner give."""
    found = {(one.part, one.figure): (one.least, one.most) for one in wanted}
    assert len(found) == len(wanted)
    big = "pretrain llama-3.1-8b"
    for key, bounds in {
        ("correct", "failed"): (None, 0), ("correct", "passed"): (1, None),
        ("speedup llama-3.1-8b", "pipeline"): (8.0, None), (big, "mfu"): (0.60, None),
        (big, "tokens_per_s"): (117_000.0, None), (big, "p90_over_p50"): (None, 1.03),
        (f"{big}, fp8 head", "over_bf16"): (1.16, None), (f"{big}, fp8 all", "over_bf16"): (1.49, None),
        (f"{big}, fp8 all", "pipeline"): (9.0, None), (f"{big}, fp8 head", "pipeline"): (None, None),
        ("speedup llama-3.1-8b", "align_over_trainer"): (1.3, None),
        ("compile llama-3.1-8b", "first_step_s"): (None, 60.0), ("memory llama-3.1-8b", "under_cap"): (1, 1),
        ("memory llama-3.1-8b", "measured_gib"): (None, 7.2),
    }.items():  # fmt: skip
        assert found[key] == bounds, key
    for model in ("llama-3.1-8b", "llama-3.2-1b", "smollm2-135m"):
        assert found[f"pretrain {model}", "ceiling_share"][0] is not None
    small, graph = "pretrain smollm2-135m", "pretrain smollm2-135m, graph"
    for figure in ("tokens_per_s", "ceiling_share", "p90_over_p50"):
        assert found[graph, figure] == found[small, figure], "the same bounds, each judged by itself"
    assert found[graph, "predicted_over_measured"] == (1.0, 1.10), "no other part has a graph's memory"
    assert found[graph, "over_launched"] == (None, None) and (small, "over_launched") not in found
    assert asked(["pretrain llama-3.1-8b"], None, "rtx-3060")[0].least is None, "a rate is of a card that is named"


def test_what_was_not_measured_says_why(wanted: list[Asked], parts: list[Part]) -> None:
    rows = {row["part"]: row for row in rows_with(wanted, parts, {})}
    rows["graph"] = row_of(next(p for p in parts if p.name == "graph"), "timed out", "ended at its limit of 75 s")
    rows["bias"]["notes"] = {"llama-3.1-8b, share_of_bound": "out of memory: tried to allocate"}
    del rows["compile llama-3.1-8b"]
    found = {(one["part"], one["figure"]): one for one in judged(wanted, list(rows.values()), "full")}
    assert {one["verdict"] for one in found.values()} == {"not run"} and all(one["why"] for one in found.values())
    assert found["graph", "smollm2-135m small, launched over graph"]["why"] == "ended at its limit of 75 s"
    assert found["bias", "llama-3.1-8b, share_of_bound"]["why"].startswith("out of memory")
    assert found["compile llama-3.1-8b", "first_step_s"]["why"] == "the run ended before it"
    assert found["correct", "failed"]["why"] == "it ran and left no such figure"


def test_failures_are_named_beside_the_verdict(wanted: list[Asked], parts: list[Part]) -> None:
    rows = rows_with(wanted, parts, {0: 2.0})
    rows[0]["notes"] = {"failed": "test_swiglu.py::test_a[cuda], test_b"}
    found = judged(wanted, rows, "full")[0]
    assert (found["verdict"], found["why"]) == ("not met", "test_swiglu.py::test_a[cuda], test_b")
    assert judged(wanted, rows, "tiny")[0]["verdict"] == "not judged"


def test_of_tests_that_were_cut_short_none_having_failed_says_nothing(wanted: list[Asked], parts: list[Part]) -> None:
    for count, verdict in ((0.0, "not run"), (1.0, "not met")):
        rows = rows_with(wanted, parts, {0: count, 1: 10.0})
        rows[0] |= {"status": "failed", "why": "killed by SIGSEGV: Fatal Python error"}
        found = judged(wanted, rows, "full")
        assert (found[0]["verdict"], found[0]["measured"]) == (verdict, count)
        assert found[0]["why"] == ("not all of it: killed by SIGSEGV: Fatal Python error" if count == 0 else "")
        assert found[1]["verdict"] == "met", "that ten passed is so all the same"
        assert list(wrong_verdicts(result_of(wanted, parts, rows))) == []


def test_eight_bits_are_held_against_bf16_of_the_same_run() -> None:
    def row(name: str, rate: float | None) -> dict[str, Any]:
        figures = {} if rate is None else {"tokens_per_s": rate}
        return row_of(Part(name, "speedup", (), 0, 0), "ran", "", figures=figures)

    rows = [row("pretrain x", 100.0), row("pretrain x, fp8 head", 120.0), row("pretrain x, fp8 all", None)]
    found = with_ratios(rows)
    assert [one["figures"].get("over_bf16") for one in found] == [None, 1.2, None]
    (alone,) = with_ratios([row("pretrain x, fp8 head", 120.0)])
    assert alone["notes"] == dict.fromkeys(("over_bf16", "pipeline"), "pretrain x was not measured")
    assert "over_bf16" not in alone["figures"]


def test_graphs_are_held_against_launched_steps_of_the_same_run() -> None:
    def row(name: str, **figures: float) -> dict[str, Any]:
        return row_of(Part(name, "speedup", (), 0, 0), "ran", "", figures=figures)

    launched = row("pretrain x", tokens_per_s=100.0, ceiling_share=0.40)
    graph = row("pretrain x, graph", tokens_per_s=130.0, ceiling_share=0.52)
    found = with_ratios([launched, graph])
    assert found[0] == launched and found[1]["figures"] == graph["figures"] | {"over_launched": 1.3}
    (alone,) = with_ratios([graph])
    assert alone["notes"] == {"over_launched": "pretrain x was not measured"} and alone["figures"] == graph["figures"]


@pytest.mark.parametrize(("way", "over"), [("graph", ["over_launched"]), ("fp8 head", ["over_bf16", "pipeline"])])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"micro_batch": 2.0}, "not of the same work: 2 rows at once here, 4 in pretrain x"),
        ({"executed_gflop_per_token": 1.2}, "not of the same work: 1.2 GFLOP a token with what is made again here, 0.9 "
         "in pretrain x"),
        ({}, ""),
    ],
)  # fmt: skip
def test_parts_that_fit_in_other_sizes_have_no_ratio(
    way: str, over: list[str], changed: dict[str, float], said: str
) -> None:
    """On a small card one way takes fewer rows at once, or makes layers again: a row says so in place of a figure."""
    figures = {"tokens_per_s": 100.0, "micro_batch": 4.0, "executed_gflop_per_token": 0.9}
    parts = [("pretrain x", figures), (f"pretrain x, {way}", figures | {"tokens_per_s": 130.0} | changed)]
    plain, other = with_ratios([row_of(Part(name, "speedup", (), 0, 0), "ran", "", figures=found)
                                for name, found in parts])  # fmt: skip
    assert plain["notes"] == {} and (over[0] in other["figures"]) is not bool(said)
    if said:
        assert other["notes"] == dict.fromkeys(over, said) and "pipeline" not in other["figures"]
        (one,) = judged([Asked(f"pretrain x, {way}", over[0], "a ratio", 1.0)], [plain, other], "full")
        assert (one["verdict"], one["why"]) == ("not run", said)


def test_either_way_of_the_smallest_model_is_judged_by_itself() -> None:
    """Neither stands in for the other: a user has launched steps unless graphs are asked for."""
    names = ["pretrain smollm2-135m", "pretrain smollm2-135m, graph"]
    wanted = asked(names, None, "h200")
    for shares in ((0.45, 0.47), (0.47, 0.45)):
        rows = [row_of(Part(name, "speedup", (), 0, 0), "ran", "", figures={"ceiling_share": share})
                for name, share in zip(names, shares, strict=True)]  # fmt: skip
        verdicts = [one["verdict"] for one in judged(wanted, rows, "full") if one["figure"] == "ceiling_share"]
        assert verdicts == ["met" if share >= 0.46 else "not met" for share in shares]


def test_the_pipeline_of_eight_bits_is_that_of_bf16_with_a_faster_pretraining() -> None:
    """At the same speed it is the same pipeline, but for medians of rounds; pretraining twice as fast, by hand."""
    result, _ = speedup(device="cuda")
    figures, _ = figures_of(result)
    assert figures["split"] == 0.9 and figures["trainer_tokens_per_s"] > 0
    for ratio in (1.0, 2.0):
        rows = [row_of(Part(name, "speedup", (), 0, 0), "ran", "", figures=of) for name, of in (
            ("speedup x", figures), ("pretrain x", {"tokens_per_s": 50.0}),
            ("pretrain x, fp8 all", {"tokens_per_s": 50.0 * ratio}),
        )]  # fmt: skip
        found = with_ratios(rows)[2]
        seconds = {name: 1 / result["arms"][name]["tokens_per_s"]["median"] for name in
                   ("transformers_full", "elo_pretrain", "elo_align")}  # fmt: skip
        by_hand = seconds["transformers_full"] / (0.9 * seconds["elo_pretrain"] / ratio + 0.1 * seconds["elo_align"])
        assert found["figures"]["pipeline"] == pytest.approx(by_hand, rel=1e-12)
    alone = with_ratios(rows[1:])[1]
    assert alone["notes"] == {"pipeline": "speedup x was not measured"} and "pipeline" not in alone["figures"]


def test_figures_of_a_comparison() -> None:
    result, _ = speedup(device="cuda")
    figures, notes = figures_of(result)
    arms = result["arms"]
    ours, trainer = arms["elo_pretrain"], arms["transformers_full"]
    assert figures["pipeline"] == result["pipeline_speedup"]["transformers_full"]["median"]
    assert figures["mfu"] == 0.31 and figures["ceiling_share"] == 0.4 and notes == {}
    assert figures["p90_over_p50"] == ours["step_s"]["p90"] / ours["step_s"]["median"]
    kept = ours["memory"]
    assert figures["predicted_over_measured"] == kept["predicted_bytes"] / kept["peak_allocated_bytes"]
    assert figures["executed_gflop_per_token"] == 2.7 and "micro_batch" not in figures
    kept |= {"peak_allocated_bytes": None}  # of the whole process nothing is predicted
    ours["options"]["micro_batch"] = 4
    figures, _ = figures_of(result)
    assert "predicted_over_measured" not in figures and figures["micro_batch"] == 4
    for count in (FEWEST_STEPS, FEWEST_STEPS - 1):
        arms["elo_pretrain"] = ours | {"step_s": ours["step_s"] | {"count": count}}
        few, why = figures_of(result)
        assert ("p90_over_p50" in few) == (count == FEWEST_STEPS)
    assert why == {"p90_over_p50": "9 steps were timed, and a p90 is of 10 at least"} and few["tokens_per_s"] > 0
    rates = arms["elo_align"]["tokens_per_s"]["median"], trainer["tokens_per_s"]["median"]
    assert figures["align_over_trainer"] == rates[0] / rates[1]
    arms["transformers_full"] = arms["liger_full"] | {"why": "bitsandbytes is not installed"}
    del result["pipeline_speedup"]["transformers_full"]
    figures, notes = figures_of(result)
    assert "pipeline" not in figures and notes["pipeline"] == "transformers_full: bitsandbytes is not installed"
    assert notes["align_over_trainer"] == notes["pipeline"] and figures["tokens_per_s"] > 0
    arms["elo_pretrain"] = arms["outer_unfrozen"]
    figures, notes = figures_of(result)
    assert notes["mfu"] == "elo_pretrain: out of memory" and "tokens_per_s" not in figures


def test_figures_of_memory_and_of_kernels() -> None:
    result = memory()
    template = result["points"][0] | {"arm": "elo_pretrain", "predicted_bytes": 8 * GIB}
    free = template | {"measured_bytes": 7 * GIB, "status": "ran"}
    free.pop("cap_bytes", None)
    capped = template | {"cap_bytes": 8 * GIB, "status": "out of memory", "measured_bytes": None}
    figures, notes = figures_of(result | {"points": [free, capped]})
    assert figures["predicted_over_measured"] == 8 / 7 and figures["under_cap"] == 0.0
    assert notes == {"under_cap": "out of memory"}
    figures, _ = figures_of(result | {"points": [capped | {"status": "ran", "measured_bytes": 7 * GIB}]})
    assert figures["under_cap"] == 1.0 and figures["under_cap_gib"] == 7.0
    assert "under_cap" in figures_of(result | {"points": [free]})[1]
    broken = capped | {"status": "failed", "why": "no compiler"}  # says nothing of memory
    figures, notes = figures_of(result | {"points": [free, broken]})
    assert "under_cap" not in figures and notes == {"under_cap": "no compiler"}
    contests = kernels()["contests"]
    arms = {"torch": {"median_ms": 3.0}, "liger": {"median_ms": 2.0}, "engine": {"median_ms": 1.6},
            "engine, fp8": {"median_ms": 1.0}, "cce": {"skipped": "not installed"}}  # fmt: skip
    figures, notes = figures_of({"theme": "kernels", "contests": [contests[0] | {"contest": "head", "arms": arms}]})
    assert figures == {"lead, head": 1.25, "least_lead": 1.25} and "cce: not installed" in notes["skipped"]


def result_of(wanted: list[Asked], parts: list[Part], rows: list[dict[str, Any]]) -> dict[str, Any]:
    kept = ("part", "group", "status", "why", "seconds", "allowed_s", "exit_status", "record", "figures", "notes")
    return {
        "schema": 1, "theme": "card", "device": {"type": "cuda", "name": "NVIDIA H200"}, "scale": "full",
        "minutes": 10.0, "headline": "llama-3.1-8b", "free_bytes": 139 * GIB,
        "parts": [{name: row[name] for name in kept} for row in rows], "asked": judged(wanted, rows, "full"),
    }  # fmt: skip


def test_a_record_whose_verdict_does_not_follow_is_refused(wanted: list[Asked], parts: list[Part]) -> None:
    result = result_of(wanted, parts, rows_with(wanted, parts, {0: 0.0, 1: 312.0, 3: 5.5}))
    check_result(result, "planted")
    assert list(wrong_verdicts(result)) == []
    text = "\n".join(card_tables(result))
    assert "| at least 8 (the paper's best is 6.46) | 5.50 | not met |" in text and "2 met, 1 not met" in text
    for change in ({"verdict": "met"}, {"measured": 6.0}, {"least": 5.0}):
        wrong = result | {"asked": [*result["asked"][:3], result["asked"][3] | change, *result["asked"][4:]]}
        with pytest.raises(FailedError, match="does not fit the schema of 'card'"):
            check_result(wrong, "planted")
    silent = result | {"parts": [result["parts"][0] | {"status": "failed"}, *result["parts"][1:]]}
    with pytest.raises(FailedError, match="`why` says nothing"):
        check_result(silent, "planted")
