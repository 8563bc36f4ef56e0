"""The figures that `elo bench card` takes from the records of other benchmarks: by name, and why one is missing."""

from __future__ import annotations

from typing import Any

from elo_engine.benchmarks.schemas import measured_peak

Figures = dict[str, float]
Notes = dict[str, str]  # of a figure that is not there, why
_OURS = ("engine", "cce, filtered")  # arms that an engine's is not held against: its own, and one that leaves out terms
GIB = 2**30
FEWEST_STEPS = 10  # for a p90: of a few steps it is the longest, of one the median


def figures_of(result: dict[str, Any]) -> tuple[Figures, Notes]:
    """Figures of a `speedup`, `memory` or `kernels` result."""
    made = {"speedup": _speedup, "memory": _memory, "kernels": _kernels}
    return made[result["theme"]](result)


def _speedup(result: dict[str, Any]) -> tuple[Figures, Notes]:
    arms, figures, notes = result["arms"], Figures(), Notes()
    ours, align, trainer = (arms.get(name) for name in ("elo_pretrain", "elo_align", "transformers_full"))

    def why(*wanted: tuple[str, dict[str, Any] | None]) -> str:
        said = (f"{name}: {arm['why'] if arm else 'not asked for'}" for name, arm in wanted if not _ran(arm))
        return "; ".join(said)

    if _ran(ours):
        assert ours is not None
        step = ours["step_s"]
        figures |= {
            "tokens_per_s": ours["tokens_per_s"]["median"], "ceiling_share": ours["ceiling_share"],
            "steps": step["count"], "executed_gflop_per_token": ours["executed_gflop_per_token"],
            "matmul_tflop_per_s": result["ceilings"]["matmul_flop_per_s"] / 1e12,
        }  # fmt: skip
        if rows := ours["options"].get("micro_batch"):  # the oldest records have none
            figures["micro_batch"] = rows
        if (peak := measured_peak(ours["memory"])) is not None and peak[2]:
            figures["predicted_over_measured"] = ours["memory"]["predicted_bytes"] / peak[0]
        if step["count"] >= FEWEST_STEPS:
            figures["p90_over_p50"] = step["p90"] / step["median"]
        else:
            notes["p90_over_p50"] = f"{step['count']} steps were timed, and a p90 is of {FEWEST_STEPS} at least"
        if ours.get("mfu") is not None:
            figures["mfu"] = ours["mfu"]
        else:
            notes["mfu"] = "no dense bf16 peak is published for this device, or it computed in fp32"
    else:
        said = why(("elo_pretrain", ours))
        notes |= dict.fromkeys(("tokens_per_s", "ceiling_share", "p90_over_p50", "mfu"), said)
    for base, name in (("transformers_full", "pipeline"), ("engine_full", "pipeline_over_engine")):
        if found := result["pipeline_speedup"].get(base):
            figures |= {name: found["median"], f"{name}_ideal": found["ideal"]}
        else:
            notes[name] = why((base, arms.get(base)), ("elo_pretrain", ours), ("elo_align", align))
    if _ran(align) and _ran(trainer):
        assert align is not None and trainer is not None
        ours_s, theirs_s = align["tokens_per_s"]["median"], trainer["tokens_per_s"]["median"]
        figures |= {"align_over_trainer": ours_s / theirs_s, "trainer_tokens_per_s": theirs_s, "split": result["split"]}
    else:
        notes["align_over_trainer"] = why(("elo_align", align), ("transformers_full", trainer))
    return figures, notes


def _ran(arm: dict[str, Any] | None) -> bool:
    return arm is not None and arm["status"] == "ran"


def _memory(result: dict[str, Any]) -> tuple[Figures, Notes]:
    """The peak without a cap, predicted and measured, and whether a run under a cap ends."""
    figures, notes = Figures(), Notes()
    points = [point for point in result["points"] if point["arm"] == "elo_pretrain"]
    for point in points:
        if point.get("cap_bytes"):
            if point["status"] in ("ran", "out of memory"):  # whatever else befell it says nothing of memory
                figures["under_cap"] = float(point["status"] == "ran")
            if point["measured_bytes"] is not None:
                figures["under_cap_gib"] = point["measured_bytes"] / GIB
            if point["status"] != "ran":
                notes["under_cap"] = point.get("why") or point["status"]
            continue
        figures["predicted_gib"] = point["predicted_bytes"] / GIB
        if point["measured_bytes"] is not None:
            figures |= {
                "measured_gib": point["measured_bytes"] / GIB,
                "predicted_over_measured": point["predicted_bytes"] / point["measured_bytes"],
            }
        else:
            notes |= dict.fromkeys(("measured_gib", "predicted_over_measured"), point.get("why") or point["status"])
    if "under_cap" not in figures and "under_cap" not in notes:
        notes["under_cap"] = (
            "a cap is tried on a GPU that has more than it free, and this run had no such GPU or no time for it"
        )
    return figures, notes


def _kernels(result: dict[str, Any]) -> tuple[Figures, Notes]:
    """By how much the engine is ahead of the fastest other arm, in the contest where it is least so."""
    leads, skipped = dict[str, float](), list[str]()
    for contest in result["contests"]:
        arms = contest["arms"]
        times = {name: row["median_ms"] for name, row in arms.items() if "median_ms" in row}
        skipped += [f"{contest['contest']}, {name}: {row['skipped']}" for name, row in arms.items() if "skipped" in row]
        ours = times.get("engine", times.get("engine, fp8"))
        others = [ms for name, ms in times.items() if not name.startswith(_OURS)]
        if ours is not None and others:
            leads[contest["contest"]] = min(others) / ours
    figures = {f"lead, {name}": lead for name, lead in leads.items()}
    notes = {"skipped": "; ".join(skipped)} if skipped else {}
    if leads:
        return figures | {"least_lead": min(leads.values())}, notes
    return figures, notes | {"least_lead": notes.get("skipped", "no contest of this op is of this device")}
