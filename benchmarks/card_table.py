"""What is asked of a card: figures with their bounds, and the verdict on what was measured, as `elo bench card` prints
and keeps them.

ELO pretraining whose steps are CUDA graphs has rows of its own beside those of launched steps, with the same bounds,
and each is judged by itself: the launched ones are what runs unless a user asks otherwise (`pretrain.graph: off`), the
graphs what a user gets who asks. That a model reaches 75 % of its ceiling is so of the way whose row says it; there is
no row for the better of both, since the larger of two measurements is too large by what the noise of either gave it.
The ratio of the two stands beside them without a bound: here the host's time before a step's first launch is part of
the step, since an arm waits for every command, and `graph_turns.py` judges the ratio as training has it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from elo_engine.report import markdown_table

Verdict = Literal["met", "not met", "not run", "not judged"]
TRIAL = "a trial"
WIDEST = 160  # characters of a reason in a table; the record has all of them


@dataclass(frozen=True)
class Asked:
    """One figure.

    Attributes:
        part, figure: where it is found. label: what it is, with its unit.
        least, most: its bounds, themselves allowed; None: none on that side, and on both: it is only shown.
        why: where the bound comes from.
        whole: a part that was cut short says nothing of it: of tests that were not run none has failed.
    """

    part: str
    figure: str
    label: str
    least: float | None = None
    most: float | None = None
    why: str = ""
    whole: bool = False

    def verdict(self, value: float | None, status: str = "ran") -> Verdict:
        """On a value of a part that ended so; None: it was not measured. NaN meets nothing."""
        if value is None:
            return "not run"
        if self.whole and status != "ran" and self.verdict(value) == "met":
            return "not run"
        if self.least is None and self.most is None:
            return "not judged"
        above = self.least is None or value >= self.least
        return "met" if above and (self.most is None or value <= self.most) else "not met"


# At rows of 8192 in bf16. Llama-3.1-8B: 60 % MFU, 117,000 tokens/s on an H200, are 76 % of what large products alone
# would give (5.14 GFLOP a token, 790 TFLOP/s), where products, attention and unavoidable traffic allow 136,000. Of the
# others 75 % of such ceilings, 323,000 and 2.2 million tokens/s, of 395,000 and 3.6 million that products alone give.
GOOD = "75 % of the ceiling counted for the model: products, attention and unavoidable traffic"
RECORD = "60 % MFU on an H200, 86 % of the ceiling counted for the model"
MFU = 0.60
CEILING_SHARE = {"llama-3.1-8b": 0.76, "llama-3.2-1b": 0.61, "smollm2-135m": 0.46}
TOKENS_PER_S = {
    ("llama-3.1-8b", "h200"): 117_000.0, ("llama-3.2-1b", "h200"): 242_000.0, ("smollm2-135m", "h200"): 1_650_000.0,
    ("llama-3.1-8b", "rtx-4090"): 25_000.0,
}  # fmt: skip
PIPELINE, PIPELINE_FP8 = {"llama-3.1-8b": 8.0}, {"llama-3.1-8b": 9.0}  # the paper's best is 6.46
ALIGNMENT = 1.3  # over the Trainer's tokens/s
STEADY = 1.03  # p90 over p50 of a step's time
# Of Llama-3.1-8B, 32,768 tokens a step, products at 1.6 times bf16's rate, 1.5 ms for rounding its head (docs/fp8.md).
FP8 = {"head": 1.16, "all": 1.49}
PREDICTED = (1.0, 1.10)  # memory, over what was measured: nothing missing, and little to spare
PEAK_GIB = {"llama-3.1-8b": 7.2}  # one row of 8192, 8-bit state
FIRST_STEP_S = 60.0
GRAPH = "graph"  # behind a part's name: the same with its steps as CUDA graphs
IN_TURNS = "smollm2-135m in turns"
SMALL, USUAL = ("smollm2-135m small", "llama-3.2-1b small"), ("smollm2-135m usual", "llama-3.2-1b usual")


def asked(parts: list[str], headline: str | None, card: str) -> list[Asked]:
    """Everything that is asked of a card, of the parts that its plan has, run or not, in their order.

    Args:
        headline: the model that is compared with full continual pretraining. card: as cards.py names it.
    """
    found = []
    for part in parts:
        group, _, rest = part.partition(" ")
        makers = {
            "correct": _correct, "graph": _graph, "memory": _memory, "bias": _bias, "kernels": _kernels,
            "compile": _compile,
        }  # fmt: skip
        if group == "speedup":
            found += list(_speedup(part, headline))
        elif group == "pretrain":
            found += list(_pretrain(part, *_way(rest), card))
        else:
            found += list(makers[group](part))
    return found


def _correct(part: str) -> Iterator[Asked]:
    yield Asked(part, "failed", "tests that need a card and fail", most=0,
                why="a kernel that is wrong is not timed", whole=True)  # fmt: skip
    yield Asked(part, "passed", "tests that need a card and pass", least=1, why="else nothing was tested")
    yield Asked(part, "skipped", "tests that need a card and were skipped")


def _speedup(part: str, headline: str | None) -> Iterator[Asked]:
    model = headline or "no model"
    least = PIPELINE.get(model)
    why = "the paper's best is 6.46" if least else ""
    yield Asked(part, "pipeline", f"pipeline speedup over the Trainer, {model}", least, why=why)
    yield Asked(part, "pipeline_ideal", "what the operations alone would give")
    yield Asked(part, "pipeline_over_engine", "pipeline speedup over full CP in this engine")
    yield Asked(part, "align_over_trainer", "alignment's tokens/s over the Trainer's", ALIGNMENT)
    yield Asked(part, "tokens_per_s", "ELO pretraining beside them, tokens/s")


def _way(words: str) -> tuple[str, str, bool]:
    """`llama-3.1-8b, fp8 head` -> the model, its products of 8-bit operands, whether steps are graphs."""
    model, _, way = words.partition(", ")
    return model, way.removeprefix("fp8 ") if way.startswith("fp8 ") else "none", way == GRAPH


def _pretrain(part: str, model: str, fp8: str, graph: bool, card: str) -> Iterator[Asked]:
    what = f"ELO pretraining, {model}" + (", CUDA graphs" if graph else "")
    if fp8 != "none":
        what += f", fp8 {fp8}"
        least = FP8[fp8] if model == "llama-3.1-8b" else None
        yield Asked(part, "over_bf16", f"{what}, over bf16", least, why="predicted" if least else "")
        yield Asked(part, "tokens_per_s", f"{what}, tokens/s")
        yield Asked(part, "pipeline", f"pipeline speedup over the Trainer, {model}, fp8 {fp8}, of two runs",
                    PIPELINE_FP8.get(model) if fp8 == "all" else None)  # fmt: skip
    else:
        yield Asked(part, "tokens_per_s", f"{what}, tokens/s", TOKENS_PER_S.get((model, card)))
        if model == "llama-3.1-8b":
            yield Asked(part, "mfu", f"{what}, MFU", MFU, why=RECORD)
        yield Asked(part, "ceiling_share", f"{what}, share of this run's matmul ceiling", CEILING_SHARE.get(model),
                    why=GOOD if model in CEILING_SHARE else "")  # fmt: skip
    if graph:
        yield Asked(part, "over_launched", f"{what}, over launched steps, a wait after each")
        yield Asked(part, "predicted_over_measured", f"{what}, peak of memory, predicted over measured", *PREDICTED)
    yield Asked(part, "p90_over_p50", f"{what}, step times p90/p50, a wait after each", most=STEADY)


def _graph(part: str) -> Iterator[Asked]:
    for case in (*SMALL, *USUAL):
        small = case in SMALL
        yield Asked(part, f"{case}, launched over graph", f"launched step over graph, {case}", 1.0 if small else 0.99,
                    why="predicted 1.4 (SmolLM2)" if small else "predicted within 1 %")  # fmt: skip
        yield Asked(part, f"{case}, graph, p90/p50", f"p90/p50 of graphs, {case}", most=STEADY)
        yield Asked(part, f"{case}, launched, p90/p50", f"p90/p50 of launched steps, {case}", most=STEADY)
    what = f"{IN_TURNS}, three shallow steps and a whole-model one"
    yield Asked(part, f"{IN_TURNS}, launched over graph", f"launched steps over graphs, {what}", 1.0,
                why="predicted 3.5")  # fmt: skip
    for kind in ("graph", "launched"):  # a fit of the bridge is in each, which the host makes and waits for
        yield Asked(part, f"{IN_TURNS}, {kind}, p90/p50", f"p90/p50, {kind}, {what}")


def _memory(part: str) -> Iterator[Asked]:
    yield Asked(part, "predicted_gib", "peak of ELO pretraining, one row, predicted, GiB")
    yield Asked(part, "measured_gib", "the same measured, GiB", most=PEAK_GIB.get(part.partition(" ")[2]))
    yield Asked(part, "predicted_over_measured", "predicted over measured", *PREDICTED)
    yield Asked(part, "under_cap", "runs under a cap of 8 GiB (1: yes)", 1, 1)
    yield Asked(part, "under_cap_gib", "its peak there, GiB, beside CUDA's own", most=7.4, why="0.6 GiB are CUDA's")


def _bias(part: str) -> Iterator[Asked]:
    for model in ("llama-3.1-8b", "llama-3.2-1b", "smollm2-135m"):
        yield Asked(part, f"{model}, mean_difference_nats", f"fp8 head's loss less the emulation's, {model}, nats")
        yield Asked(part, f"{model}, share_of_bound", f"its size over the bound of docs/fp8.md, {model}", most=1.0,
                    why="2^-13 of the terms' sizes, all of one sign")  # fmt: skip


def _kernels(part: str) -> Iterator[Asked]:
    yield Asked(part, "least_lead", f"fastest other arm's time over the engine's, {part.partition(' ')[2]}, the worst "
                "contest", 1.0)  # fmt: skip


def _compile(part: str) -> Iterator[Asked]:
    yield Asked(part, "first_step_s", "first step with an empty Triton cache, s", most=FIRST_STEP_S)
    yield Asked(part, "later_step_s", "a step after it, s")


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which ELO pretraining with 8-bit operands, or with CUDA graphs, is also given over that without, where
    both ran the same rows at once and made the same again, and with 8-bit operands the pipeline: that of bf16 whose
    pretraining takes so much less.
    """
    figures = {row["part"]: row["figures"] for row in rows}
    found = []
    for row in rows:
        base, _, _ = row["part"].partition(", ")
        _, fp8, graph = _way(row["part"])
        compared = "speedup " + base.removeprefix("pretrain ")
        over = ("over_launched",) if graph else ("over_bf16", "pipeline") if fp8 != "none" else ()
        ours, plain = row["figures"].get("tokens_per_s"), figures.get(base, {}).get("tokens_per_s")
        apart = _apart(row["figures"], base, figures.get(base, {}))
        if over and ours is not None and plain is not None and apart:
            row = row | {"notes": row["notes"] | dict.fromkeys(over, apart)}
        elif over and ours is not None and plain is not None:
            ratio, beside = ours / plain, figures.get(compared, {})
            row = row | {"figures": row["figures"] | {over[0]: ratio}}
            if "pipeline" in over and {"pipeline", *_OF_PIPELINE} <= beside.keys():
                row["figures"] |= {"pipeline": _pipeline(ratio, *(beside[name] for name in _OF_PIPELINE))}
            elif "pipeline" in over:
                row |= {"notes": row["notes"] | {"pipeline": f"{compared} was not measured"}}
        elif over and ours is not None:
            row = row | {"notes": row["notes"] | dict.fromkeys(over, f"{base} was not measured")}
        found.append(row)
    return found


def _apart(ours: dict[str, float], base: str, plain: dict[str, float]) -> str:
    """In which sizes two parts differ, that each took as they fit; empty where they are alike."""
    sizes = (("micro_batch", "rows at once"), ("executed_gflop_per_token", "GFLOP a token with what is made again"))
    there = [(name, words) for name, words in sizes if name in ours and name in plain]
    said = [f"{ours[name]:g} {words} here, {plain[name]:g} in {base}" for name, words in there
            if ours[name] != plain[name]]  # fmt: skip
    return f"not of the same work: {'; '.join(said)}" if said else ""


_OF_PIPELINE = ("split", "tokens_per_s", "trainer_tokens_per_s", "align_over_trainer")


def _pipeline(ratio: float, split: float, pretrain: float, trainer: float, align_over_trainer: float) -> float:
    """`intervals.pipeline_speedup` of tokens/s, with a pretraining that is `ratio` times as fast."""
    return 1 / (split * trainer / (pretrain * ratio) + (1 - split) / align_over_trainer)


def judged(wanted: list[Asked], rows: list[dict[str, Any]], scale: str) -> list[dict[str, Any]]:
    """Every figure asked for with what was measured, and the verdict; as the record has them."""
    by_part = {row["part"]: row for row in rows}
    found = []
    for one in wanted:
        row = by_part.get(one.part)
        value = None if row is None else row["figures"].get(one.figure)
        verdict, why = one.verdict(value, "" if row is None else row["status"]), ""
        if value is None:
            why = _missing(one, row)
        elif verdict == "not run":
            why = f"not all of it: {row['why']}" if row else ""
        elif scale == "tiny":
            verdict, why = "not judged", TRIAL
        elif verdict == "not met":
            why = (row or {}).get("notes", {}).get(one.figure, "")
        found.append(
            {"part": one.part, "figure": one.figure, "label": one.label, "least": one.least, "most": one.most,
             "bound_from": one.why, "whole": one.whole, "measured": value, "verdict": verdict, "why": why}
        )  # fmt: skip
    return found


def _missing(one: Asked, row: dict[str, Any] | None) -> str:
    if row is None:
        return "the run ended before it"
    if note := row["notes"].get(one.figure):
        return str(note)
    if row["status"] == "ran":
        return "it ran and left no such figure"
    return str(row["why"])


def wrong_verdicts(result: dict[str, Any]) -> Iterator[str]:
    """Where a record's verdict does not follow from its own figures, or says nothing of why there is none."""
    rows = {row["part"]: row for row in result["parts"]}
    for one in result["asked"]:
        row = rows.get(one["part"], {"figures": {}, "status": ""})
        where, figures = f"asked, {one['label']}", row["figures"]
        if one["measured"] != figures.get(one["figure"]):
            yield f"{where}: measured {one['measured']}, and its part has {figures.get(one['figure'])}"
        known = Asked(one["part"], one["figure"], one["label"], one["least"], one["most"], whole=one["whole"])
        right = known.verdict(one["measured"], row["status"])
        if result["scale"] == "tiny" and one["measured"] is not None and right != "not run":
            right = "not judged"
        if one["verdict"] != right:
            yield f"{where}: the verdict is {one['verdict']!r}, and {one['measured']} is {right!r}"
        if one["verdict"] == "not run" and not one["why"]:
            yield f"{where}: it was not measured, and `why` says nothing"
    for row in rows.values():
        if row["status"] != "ran" and not row["why"]:
            yield f"parts, {row['part']}: its status is {row['status']!r}, and `why` says nothing"


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _bound(one: dict[str, Any]) -> str:
    least, most = one["least"], one["most"]
    if least is None and most is None:
        return ""
    if least is not None and most is not None:
        text = _number(least) if least == most else f"{_number(least)} to {_number(most)}"
    else:
        text = f"at least {_number(least)}" if least is not None else f"at most {_number(most)}"
    return f"{text} ({one['bound_from']})" if one["bound_from"] else text


def _cell(text: str) -> str:
    return textwrap.shorten(text.replace("|", "/"), WIDEST, placeholder=" ...")


def card_conditions(result: dict[str, Any]) -> str:
    """What was asked, in words."""
    said = f"every figure that is asked of a card, in up to {result['minutes']:g} minutes"
    if result["scale"] == "tiny":
        return f"{said}; {TRIAL}, whose sizes are a CPU's and whose figures say nothing"
    model = result["headline"] or "no model"
    room = f"{result['free_bytes'] / 2**30:.1f} GiB free"
    return f"{said}; {room}, so {model} is compared with full continual pretraining"


def card_tables(result: dict[str, Any]) -> list[str]:
    """Every figure asked for, then what became of every part."""
    rows = []
    for one in result["asked"]:
        value = "" if one["measured"] is None else _number(one["measured"])
        verdict = one["verdict"] if one["verdict"] != "not judged" or one["why"] else ""
        said = f"{verdict}: {_cell(one['why'])}" if one["why"] else verdict
        rows.append([one["label"], _bound(one), value, said])
    counts = [f"{sum(one['verdict'] == verdict for one in result['asked'])} {verdict}" for verdict in
              ("met", "not met", "not run")]  # fmt: skip
    parts = [
        [row["part"], f"{row['status']}: {_cell(row['why'])}" if row["why"] else row["status"],
         f"{row['seconds']:.0f} s", row["record"] or ""]
        for row in result["parts"]
    ]  # fmt: skip
    return [
        f"Of the figures with a bound, and those that were not measured: {', '.join(counts)}.",
        markdown_table(["figure", "bound", "measured", "verdict"], rows),
        markdown_table(["part", "what became of it", "took", "record"], parts),
    ]
