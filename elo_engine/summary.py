"""What a stage came to, derived from the run's records alone: the same after any number of interruptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elo_engine.measure.meter import spread


def read_records(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a line torn by a power cut or a full disk is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            yield record


def read_steps(run: Path) -> list[dict[str, Any]]:
    """One record a step, pretraining first; after a resume the last line of a step counts."""
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for record in read_records(run):
        if "step_s" in record and "step" in record:
            steps[record["stage"], record["step"]] = record
    return [steps[key] for key in sorted(steps, key=lambda key: (key[0] != "pretrain", key[1]))]


def stage_summary(run: Path, stage: str) -> dict[str, Any]:
    """Tokens, losses, seconds in steps, speed with spread, peak memory against what was predicted; empty when the stage
    has no step on record.

    Speed leaves out the first step of each process, which also pays for set-up; `seconds` is the sum over the steps
    that counted, so it leaves out steps that were lost and done again.
    """
    steps = [record for record in read_steps(run) if record["stage"] == stage]
    if not steps:
        return {}
    warm = [record["step_s"] for record in steps if record["warm"]] or [record["step_s"] for record in steps]
    times = spread(warm)
    assert times is not None
    parts = [record for record in read_records(run) if record.get("event") == "stage ran" and record["stage"] == stage]
    largest = max(
        parts, key=lambda record: record["peak_bytes"], default={"peak_bytes": 0, "peak_what": "not recorded"}
    )
    last = steps[-1]
    fitted = [record for record in read_records(run) if record.get("event") == "bridge"] if stage == "pretrain" else []
    bridge = {"bridge": {key: value for key, value in fitted[-1].items() if key != "event"}} if fitted else {}
    return {
        "steps": last["step"],
        "steps_skipped": sum(not record["updated"] for record in steps),
        "tokens_total": last["tokens_total"],
        "tokens_loss": last["tokens_loss"],
        "loss_first_nats": steps[0]["loss_nats"],
        "loss_last_nats": last["loss_nats"],
        "seconds": sum(record["step_s"] for record in steps),
        "step_s": asdict(times),
        "tokens_per_s": last["tokens_total"] / last["step"] / times.median,
        "peak_bytes": largest["peak_bytes"],
        "peak_what": largest["peak_what"],
        "memory": largest.get("memory"),  # predicted against measured; runs of earlier versions have none
        **bridge,  # the fit of the maps in place of missing layers, where there are any
    }
