"""The chain `elo run`: evaluate, pretrain, reattach, evaluate, align, evaluate, report. Finished parts are not done
again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elo_engine import report
from elo_engine.align import align
from elo_engine.corpora import describe_corpora, open_heldout, require_shards
from elo_engine.detach import Source
from elo_engine.evaluate import evaluate_folder
from elo_engine.plan import plan, settle
from elo_engine.plan_text import describe_plan
from elo_engine.pretrain import pretrain
from elo_engine.reattach import reattach
from elo_engine.run_dir import RunDir
from elo_engine.summary import stage_summary
from elo_engine.train import world


def read_results(run: RunDir) -> dict[str, Any]:
    """`results.json`: evaluations of the whole model by moment, and the summary of each stage."""
    path = run.path / "results.json"
    if not path.exists():
        return {"evaluations": {}, "stages": {}}
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def start(run: RunDir, source: Source) -> None:
    """Say what will be done and on what; write `plan.json`, and the commit of a hub's model."""
    require_shards(run.config)
    run.pin(source.revision)
    settle(run, source)
    planned = plan(run.config, source)
    run.write_json("plan.json", planned)
    for line in (*describe_plan(planned), *source.reasons, *describe_corpora(run.config)):
        run.say(line)


def evaluate_once(run: RunDir, source: Source, moment: str, folder: Path) -> None:
    """Score the whole model on every held-out set, unless this run has done so already."""
    world.first(lambda: _evaluate(run, source, moment, folder))


def _evaluate(run: RunDir, source: Source, moment: str, folder: Path) -> None:
    results = read_results(run)
    if not run.config.evaluate.shards or moment in results["evaluations"]:
        return
    heldout = open_heldout(run.config, source.folder, source.spec.V)
    run.status(state="running", stage=f"evaluate {moment}")

    def alive() -> bool:
        run.beat()
        return False  # a signal unwinds by itself here: there is nothing to save

    found = evaluate_folder(
        folder, heldout, device=source.device, dtype=source.dtype, say=run.say, should_stop=alive
    )
    results["evaluations"][moment] = {language: asdict(result) for language, result in found.items()}
    run.write_json("results.json", results)
    for language, result in found.items():
        run.metric({"event": "evaluated", "model": moment, "language": language, **asdict(result)})
        run.say(
            f"{moment}: held-out {language} loss {result.loss_nats:.4f} nats/token, perplexity "
            f"{result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits/byte"
        )


def keep_summary(run: RunDir, stage: str, summary: dict[str, Any]) -> None:
    """Add a stage's summary to `results.json`; an empty one changes nothing."""
    if summary and world.rank() == 0:
        results = read_results(run)
        results["stages"][stage] = summary
        run.write_json("results.json", results)


def run_pipeline(run: RunDir, source: Source) -> Path:
    """The whole method, from the newest complete part on; returns the folder of the aligned model."""
    start(run, source)
    evaluate_once(run, source, "base", source.folder)
    if run.config.align.when == "interleaved":
        aligned = align(run, source)
        keep_summary(run, "pretrain", stage_summary(run.path, "pretrain"))
        keep_summary(run, "align", aligned)
    else:
        reattached = run.folder("reattached")
        if not reattached.exists():
            pretrain(run, source)
            reattach(run, source)
        keep_summary(run, "pretrain", stage_summary(run.path, "pretrain"))
        evaluate_once(run, source, "reattached", reattached)
        keep_summary(run, "align", align(run, source))
    evaluate_once(run, source, "aligned", run.folder("model"))
    world.first(lambda: report.write_report(run.path, read_results(run)))
    run.status(state="finished")
    run.say(f"finished: the model is in {run.folder('model')}, the report in {run.path / 'report.md'}")
    return run.folder("model")
