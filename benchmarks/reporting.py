"""docs/benchmarks.md, its pictures and the README's table, from the records alone (`elo bench report`).

Nothing in them is written by hand, so a test can hold them in step with the records: texts byte for byte, pictures by
the hash of what they were drawn from. A withdrawn record is listed with its reason and feeds no table.
"""

from __future__ import annotations

import difflib
import os
import statistics
from pathlib import Path
from typing import Any

from elo_engine.benchmarks import plots
from elo_engine.benchmarks.contestants import BASELINES, DEFAULT_SIZE
from elo_engine.benchmarks.intervals import FEWEST, USUAL, percent, pipeline_speedup, rounds_of, stage_ratio
from elo_engine.benchmarks.recording import ROOT, Record, read_records
from elo_engine.benchmarks.tables import by_letter, conditions, number, subject, tables, times
from elo_engine.errors import FailedError
from elo_engine.measure.planner import STREAMED
from elo_engine.report import markdown_table

BEGIN, END = "<!-- speedup table: made by elo bench report -->", "<!-- end -->"
HEADINGS = {
    "speedup": "Speedup", "memory": "Memory", "kernels": "Kernels", "loading": "Loading", "loss": "Loss against time",
    "quality": "Quality: what is learned, and what is kept", "fp8": "8-bit operands against bf16",
    "card": "Everything asked of a card",
}  # fmt: skip
INTRODUCTION = """\
# Benchmarks

Made by `elo bench report` from the records alone; what is changed here by hand is lost. Every record has its raw steps,
its settings and its environment; `elo bench compare A B` holds two of them against each other.

Times are medians over all steps with the 10th and 90th percentile. Ratios are taken round by round, arms taking turns
within a round, and given as the median of the rounds with a bootstrap interval over whole rounds. **Pipeline speedup**
is the time of full continual pretraining on all tokens over the time of ELO pretraining on most of them and alignment
on the rest; the ideal beside it is what the operations alone would give if all ran at one rate. GFLOP a token: what the
method must compute, and what the arm executes with its recomputation. Peak memory: allocated on a GPU; on a CPU all
tensors, traced, where that was measured, else the resident size, which includes Python and its libraries."""


def report_command(records: Path | None, check: bool) -> list[str]:
    """`elo bench report [--records DIR] [--check]`: lines for a person.

    Without DIR: benchmarks/records below the current folder, else that of the source tree. For a folder named so, docs/
    and README.md beside benchmarks/ are written; for any other one, the page goes into `DIR-report/` beside it.

    Raises:
        UsageError: no such folder. FailedError: a record is damaged; with `check`, something is not in step.
    """
    if records is None:
        here = Path("benchmarks/records")
        records = here if here.is_dir() else ROOT / "benchmarks" / "records"
    place = records.resolve()
    in_tree = place.parts[-2:] == ("benchmarks", "records")
    docs = place.parents[1] / "docs" if in_tree else place.with_name(f"{place.name}-report")
    found = make_report(place, docs, place.parents[1] / "README.md" if in_tree else None, check=check)
    if check and found:
        raise FailedError("not in step with the records: " + "; ".join(found) + ". Run elo bench report.")
    return found or [f"{docs / 'benchmarks.md'}{' and the README' if in_tree else ''}: in step with the records"]


def make_report(records: Path, docs: Path, readme: Path | None, check: bool = False) -> list[str]:
    """Write docs/benchmarks.md, docs/plots/ and the README's block; returns what was written.

    `check`: write nothing and return how the files differ from what the records say; an empty list is agreement.

    Raises as `read_records` does, and UsageError where a picture has to be drawn and matplotlib is missing.
    """
    found = read_records(records)
    live = [record for record in reversed(found) if record.theme and not record.withdrawn]
    said = [fault for record in live for fault in faults(record)]
    page = docs / "benchmarks.md"
    said += _put(page, _page(found, live, docs), check)
    said += _pictures(live, docs, check)
    if readme is not None:
        said += _put_block(readme, readme_block(live, readme), check)
    return said


def faults(record: Record) -> list[str]:
    """Where a speed record's result does not follow from its raw steps."""
    if record.theme != "speedup":
        return []
    assert record.result
    result, rounds = record.result, rounds_of(record.raw())
    tokens = {name: arm["tokens_per_step"] for name, arm in result["arms"].items() if arm["status"] == "ran"}
    said = []

    def hold(what: str, value: float, truth: float) -> None:
        if abs(value - truth) > 1e-6 * abs(truth):
            said.append(f"{record.path.name}: {what} is {value:g}, and raw.json gives {truth:g}")

    for name in tokens:
        steps = [second for turn in rounds for second in turn.get(name, [])]
        hold(f"{name}'s count of steps", result["arms"][name]["step_s"]["count"], len(steps))
        if steps:
            hold(f"{name}'s median step", result["arms"][name]["step_s"]["median"], statistics.median(steps))
    for name, interval in result["stage_ratio"].items():
        hold(f"the stage ratio over {name}", interval["median"], stage_ratio(rounds, tokens, name).median)
    for name, interval in result["pipeline_speedup"].items():
        truth = pipeline_speedup(rounds, tokens, name, result["split"]).median
        hold(f"the pipeline speedup over {name}", interval["median"], truth)
    streamed = result.get("streamed") or {"pipeline": {}}
    for name, interval in streamed["pipeline"].items():
        truth = pipeline_speedup(rounds, tokens, name, result["split"], STREAMED).median
        hold(f"the pipeline speedup with {STREAMED} over {name}", interval["median"], truth)
    if over := streamed.get("over_resident"):
        hold(f"{STREAMED} over {over['resident']}", over["median"],
             stage_ratio(rounds, tokens, over["resident"], STREAMED).median)  # fmt: skip
    return said


def readme_block(live: list[Record], readme: Path) -> str:
    """The README's table, a column for the newest record of each model, device, sequence length and dtype, with its
    conditions; empty without one. What a record has to be for it: `readme_faults`.
    """
    newest: dict[tuple[str, ...], Record] = {}
    for record in live:  # newest first
        if record.theme == "speedup" and not readme_faults(record):
            newest.setdefault(_setting(record), record)
    if not newest:
        return ""
    chosen = sorted(newest.values(), key=_importance)
    results = [record.result or {} for record in chosen]
    labels = dict(
        (name, f"({arm['letter']}) {arm['label']}") for r in reversed(results) for name, arm in by_letter(r["arms"])
    )
    rows = []
    for base in BASELINES:
        if any(base in result["pipeline_speedup"] for result in results):
            rows.append([f"**pipeline** over {labels[base]}", *(_pipeline_cell(result, base) for result in results)])
    for name in sorted(labels, key=labels.__getitem__):
        rows.append([f"tokens/s, {labels[name]}", *(_tokens_cell(result["arms"].get(name)) for result in results)])
    rows.append(["", *(f"[record]({_link(record.path, readme.parent)}/README.md)" for record in chosen)])
    notes = [f"* {conditions(record.result or {}, record.config or {}, record.environment or {})}" for record in chosen]
    splits = " or ".join(sorted({f"{100 * result['split']:g} %" for result in results}))
    words = (
        f"Pipeline: {splits} of the tokens in ELO pretraining, the rest in alignment, against all in the baseline. "
        f"Medians of the rounds, arms taking turns within each; {percent(USUAL)} bootstrap intervals over whole rounds "
        "where no other confidence is stated. Ideal: what the executed operations alone would give. r, the stage "
        "ratio: seconds a token of ELO pretraining over the baseline's. Conditions:"
    )
    return "\n\n".join([markdown_table(["", *map(_heading, results)], rows), words, "\n".join(notes)])


def readme_faults(record: Record) -> list[str]:
    """Why a speed record stays out of the README; [] where it feeds it. The page lists it all the same.

    An arm that a machine cannot run ("not here") is no fault; a baseline that was not asked for is, as a table with the
    baselines of one's choice says what one likes.
    """
    result, config = record.result or {}, record.config or {}
    settings, git = config.get("settings") or {}, config.get("git") or {}
    arms = result["arms"]
    here = [name for name in BASELINES if arms.get(name, {}).get("status") != "not here"]
    missing = [name for name in here or BASELINES if name not in result["pipeline_speedup"]]
    said = [f"it has no pipeline speedup over {', '.join(missing)}"] if missing else []
    if settings.get("interrupted") is not False:
        said.append("it was interrupted")
    if (result["sequence_length"], settings.get("rows_a_step")) != DEFAULT_SIZE[result["device"]["type"]]:
        said.append("it is not of the default size")
    if result["rounds"] < FEWEST:
        said.append(f"it has {result['rounds']} rounds of at least {FEWEST}")
    if settings.get("align_recompute", "auto") != "auto":
        said.append("alignment was told whether to recompute")
    if settings.get("fp8", "none") != "none":
        said.append("ELO pretraining multiplied 8-bit operands")
    if settings.get("graph", "off") != "off":
        said.append("steps of this engine's arms were CUDA graphs")
    if git.get("dirty"):
        said.append("the source tree had changes that are in no commit")
    return said


def _setting(record: Record) -> tuple[str, ...]:
    result = record.result or {}
    return result["model"]["name"], result["device"]["name"], str(result["sequence_length"]), result["dtype"]


def _heading(result: dict[str, Any]) -> str:
    size = f"rows of {result['sequence_length']}, {result['dtype']}"
    return f"{result['model']['name']}, {size}, {result['device']['name']}"


def _pipeline_cell(result: dict[str, Any], base: str) -> str:
    found = result["pipeline_speedup"].get(base)
    if not found:
        return _tokens_cell(result["arms"].get(base))
    speedup, _, interval = times(found).partition(" ")
    return f"**{speedup}** {interval}; ideal {found['ideal']:.2f}x; r {result['stage_ratio'][base]['median']:.4f}"


def _tokens_cell(arm: dict[str, Any] | None) -> str:
    """What an arm does a second, or how it ended."""
    if arm is None:
        return "not measured"
    return number(arm["tokens_per_s"]["median"]) if arm["status"] == "ran" else str(arm["status"])


def _importance(record: Record) -> tuple[bool, int, tuple[str, ...]]:
    """Cards before processors, large models before small ones."""
    assert record.result
    return record.result["device"]["type"] != "cuda", -record.result["model"]["parameters"], _setting(record)


def _page(found: list[Record], live: list[Record], docs: Path) -> str:
    blocks = [INTRODUCTION]
    for theme, heading in HEADINGS.items():
        mine = [record for record in live if record.theme == theme]
        if mine:
            blocks.append(f"## {heading}")
        for record in mine:
            assert record.result and record.config
            blocks.append(f"### {subject(record.result) or record.path.name}, {record.config['created'][:10]}")
            link = f"[{record.path.name}]({_link(record.path, docs)}/README.md)"
            blocks.append(f"{conditions(record.result, record.config, record.environment or {})} Record: {link}.")
            blocks += tables(record.result)
            blocks += [f"![{alt}]({_link(path, docs)})" for path, _, alt in _wanted(record, docs)]
    earlier = [record for record in reversed(found) if not record.theme and not record.withdrawn]
    withdrawn = [record for record in reversed(found) if record.withdrawn]
    for heading, records in (("Earlier records", earlier), ("Withdrawn", withdrawn)):
        if records:
            lines = []
            for record in records:
                readme = f"{_link(record.path, docs)}/README.md"
                why = f" Withdrawn: {record.withdrawn}" if record.withdrawn else ""
                lines.append(f"* [{record.path.name}]({readme}): {record.title}.{why}")
            blocks += [f"## {heading}", "\n".join(lines)]
    return "\n\n".join(blocks) + "\n"


_ALT = {
    "steps": "time per 1000 tokens of each arm", "memory": "peak memory of each arm, predicted and measured",
    "frontier": "largest micro-batch under memory caps", "predicted": "predicted over measured peak memory",
    "loss": "held-out loss against time", "loading": "seconds of loading, cold and warm",
    "ends": "held-out loss of each method at the end", "course": "target loss against cost and against time",
    "level": "cost ratio at which ELO draws level with full continual pretraining",
    "fp8": "training loss with 8-bit operands and with bf16",
}  # fmt: skip


def _wanted(record: Record, docs: Path) -> list[tuple[Path, str, str]]:
    """(file, kind, what it shows) of each picture of a record."""
    assert record.result
    kinds = plots.kinds(record.result)
    return [(docs / "plots" / f"{record.path.name}_{kind}.png", kind, _ALT[kind]) for kind in kinds]


def _pictures(live: list[Record], docs: Path, check: bool) -> list[str]:
    """Draw what is missing or stale, and remove pictures of records that are gone or withdrawn."""
    said, wanted = [], set()
    for record in live:
        assert record.result and record.config
        caption = conditions(record.result, record.config, record.environment or {})
        for path, kind, _ in _wanted(record, docs):
            wanted.add(path)
            right = plots.input_key(kind, record.result, caption)
            state = "is missing" if not path.exists() else "is stale" if plots.key_in(path) != right else ""
            if state and not check:
                plots.draw(kind, record.result, caption, path)
            if state:
                said.append(f"plots/{path.name}{f' {state}' if check else ''}")
    for path in sorted((docs / "plots").glob("*.png")):
        if path not in wanted and plots.key_in(path) is not None:
            if not check:
                path.unlink()
            said.append(f"plots/{path.name} {'belongs to no record' if check else 'removed'}")
    return said


def _put(path: Path, text: str, check: bool) -> list[str]:
    """Write a file if it has to change; [] when it is right as it is."""
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if before == text:
        return []
    if check:
        return [f"{path.name} {_first_difference(before, text)}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}.tmp")
    writing.write_text(text, encoding="utf-8")
    writing.replace(path)
    return [str(path.name)]


def _first_difference(before: str | None, text: str) -> str:
    if before is None:
        return "is missing"
    lines = difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0)
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return f"differs in {len(changed)} lines, first: {changed[0][:100] if changed else '(line ends)'}"


def _put_block(readme: Path, block: str, check: bool) -> list[str]:
    """Put the table between the README's two markers."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        missing = f"{readme.name} has no place for the speedup table: add the lines '{BEGIN}' and '{END}'"
        return [missing] if block else []
    return _put(readme, f"{before}{begin}\n{block}{chr(10) if block else ''}{end}{after}", check)


def _link(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path.resolve(), start.resolve())).as_posix()
