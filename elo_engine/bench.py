"""`elo bench`: the harness in benchmarks/, which is part of this package under the name `elo_engine.benchmarks`.

Records go to `benchmarks/records` in a source tree, to `./elo-records` elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elo_engine import console
from elo_engine.errors import Interrupted, UsageError


def records_folder(given: Path | None) -> Path:
    """Where records are."""
    if given is not None:
        return given
    tree = Path(__file__).resolve().parents[1] / "benchmarks" / "records"
    return tree if tree.is_dir() else Path("elo-records")


def _say(line: str) -> None:
    console.err.print(line, markup=False)


def _show(result: dict[str, Any], path: Path | None) -> None:
    from elo_engine.benchmarks.tables import tables

    console.out.print("\n\n".join(tables(result)), markup=False)
    if path is not None:
        console.err.print(f"record: {path}", markup=False)


def speedup(record: bool, records: Path | None, arms: str | None, **options: Any) -> None:
    """Measure the arms, print the tables, keep the record."""
    from elo_engine.benchmarks.contestants import parse_arms
    from elo_engine.benchmarks.speedup import Options, run_command

    chosen = Options(arms=parse_arms(arms) if arms else (), **options)
    result, path, interrupted = run_command(chosen, records_folder(records) if record else None, _command())
    _show(result, path)
    if interrupted:
        raise Interrupted("interrupted; what was measured until then is above" + (f" and in {path}" if path else ""))


def memory(
    record: bool, records: Path | None, arms: str | None, lengths: str | None, micro_batches: str, caps: str,
    **options: Any,
) -> None:  # fmt: skip
    """Predict and measure peaks over a grid, print the frontier, keep the record."""
    from elo_engine.benchmarks.contestants import parse_arms
    from elo_engine.benchmarks.memory import MEASURED, Options, run_command

    chosen = Options(
        arms=parse_arms(arms) if arms else MEASURED,
        sequence_lengths=_numbers("--sequence-lengths", lengths, int) if lengths else None,
        micro_batches=_numbers("--micro-batches", micro_batches, int),
        caps=tuple(int(cap * 2**30) for cap in _numbers("--caps", caps, float)),
        **options,
    )
    result, path, interrupted = run_command(chosen, records_folder(records) if record else None, _command())
    _show(result, path)
    if interrupted:
        raise Interrupted("interrupted; what was measured until then is above" + (f" and in {path}" if path else ""))


def loss(
    record: bool, records: Path | None, config: Path | None, overrides: list[str], runs: Path | None, **options: Any
) -> None:
    """Train both ways, print held-out losses by seconds, keep the record."""
    from elo_engine.benchmarks.loss import Options, run_command

    chosen = Options(config=config, overrides=tuple(overrides), **options)
    result, path = run_command(chosen, runs, records_folder(records) if record else None, _command())
    _show(result, path)


def quality(
    record: bool, records: Path | None, show: bool, texts: list[str], own: list[str], overrides: list[str],
    **options: Any,
) -> None:  # fmt: skip
    """Do the comparison's jobs that nobody has done, print its tables, keep the record once all are done."""
    from elo_engine.benchmarks.quality import Options, run_command

    chosen = Options(texts=tuple(texts), own=tuple(own), overrides=tuple(overrides), **options)
    result, path, missing = run_command(chosen, records_folder(records) if record else None, _command(), show)
    _show(result, path)
    if missing and not show:
        _say(
            f"{missing} jobs are another process's and not done yet: whoever ends last keeps the record; after that, "
            "or to see what is there by now: the same command with --resume --show"
        )


def traffic(model: str, gpus: list[str], tokens: int, micro_batch_tokens: int, link: str | None) -> None:
    """What streaming moves over the link, computed."""
    from elo_engine.benchmarks.traffic import Options, traffic_text

    options = Options(model, tuple(gpus), tokens, micro_batch_tokens, link)
    console.out.print("\n\n".join(traffic_text(options)), markup=False)


def kernels(stems: list[str], rounds: int, record: bool, records: Path | None, as_pytest: bool) -> None:
    """The ops' contests."""
    from elo_engine.benchmarks import bench_ops  # type: ignore[attr-defined]

    if as_pytest:
        bench_ops.run_pytest(stems, [])
        return
    _keep(bench_ops.measure_ops(stems, rounds, _say), record, records, "-".join(["kernels", *sorted(stems)]), rounds)


def loading(arguments: list[str], as_pytest: bool) -> None:
    """The loader against its peers; the options are benchmarks/bench_loading.py's."""
    from elo_engine.benchmarks import bench_loading, bench_ops  # type: ignore[attr-defined]

    if as_pytest:
        bench_ops.run_pytest(bench_ops.LOADING, arguments)
        return
    bench_loading.main(arguments, _command())


def card(records: Path | None, work: Path, unfinished: Path | None, **options: Any) -> None:
    """Run every part, or read what a run that was killed has left; print the table, keep the record."""
    from elo_engine.benchmarks.card import Options, finish, run_command

    if unfinished is not None:
        _show(*finish(unfinished))
        return
    chosen = Options(**options)
    # what a trial finds is no measurement, and no place of its own is found for it
    kept = None if records is None and chosen.scale != "full" else records_folder(records)
    result, path, interrupted = run_command(chosen, work, kept, _command(), _say)
    _show(result, path)
    if interrupted:
        raise Interrupted(f"interrupted; what was measured until then is above and in {path}")


def report(records: Path | None, check: bool) -> None:
    """Make docs/benchmarks.md and the README's table from the records; `check`: say what differs and fail."""
    from elo_engine.benchmarks.reporting import report_command

    for line in report_command(records_folder(records), check):
        console.out.print(line, markup=False)


def compare(a: Path, b: Path) -> None:
    """Two records of one theme."""
    from elo_engine.benchmarks.compare import compare as body

    for line in body(a, b):
        console.out.print(line, markup=False)


def _keep(result: dict[str, Any], record: bool, records: Path | None, name: str, rounds: int) -> None:
    from elo_engine.benchmarks.recording import card_name, write_record
    from elo_engine.measure.environment import describe_environment

    path = None
    if record:
        environment = describe_environment()
        path = write_record(
            records_folder(records), card=card_name(result["device"]["type"], environment), result=result,
            raw={"contests": result["contests"]}, environment=environment, settings={"rounds": rounds},
            command=_command(), name=name.replace("_", "-"),
        )  # fmt: skip
    _show(result, path)


def _command() -> list[str]:
    return ["elo", *sys.argv[1:]]


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """`1,2,4`; raises UsageError for anything that is no positive number."""
    try:
        found = tuple(kind(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r}: write numbers as 8,24") from None
    if min(found) <= 0:
        raise UsageError(f"{option} {text!r}: every number must be above 0")
    return found
