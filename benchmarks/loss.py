"""`elo bench loss`: held-out loss of the whole model against seconds of training, for the pipeline of a configuration
and for full continual pretraining of the same model on the same text in this engine.

Seconds are those of optimizer steps alone: loading, evaluation and writing are left out for both. While the detached
layers train by themselves there is no whole model to score, so the pipeline's line begins again where they are put
back. Losses of the shallow model are never shown.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elo_engine import console, demo, demo_assets
from elo_engine.align import align
from elo_engine.config import RunConfig, load_config, make_config
from elo_engine.detach import open_source
from elo_engine.errors import UsageError
from elo_engine.pipeline import evaluate_once, keep_summary, read_results, run_pipeline, start
from elo_engine.run_dir import RunDir
from elo_engine.summary import read_records, read_steps


@dataclass(frozen=True)
class Options:
    """What the command line asks for; no configuration: the demo's model and text."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    full_tokens: int = 0  # of full continual pretraining; 0: as many as take as long as the pipeline took
    every: int = 2  # steps of the whole model from one evaluation to the next


def points_of(run: Path) -> list[dict[str, Any]]:
    """The whole model's held-out losses of a finished run, by seconds and tokens of training so far."""
    steps = read_steps(run)
    seconds, tokens, before = {("start", 0): 0.0}, {("start", 0): 0}, 0
    total, stage_tokens = 0.0, 0
    stage = None
    for record in steps:
        if record["stage"] != stage:
            before, stage, stage_tokens = before + stage_tokens, record["stage"], 0
        total += record["step_s"]
        stage_tokens = record["tokens_total"]
        seconds[record["stage"], record["step"]] = total
        tokens[record["stage"], record["step"]] = before + stage_tokens
    last = {name: max((step for kind, step in seconds if kind == name), default=0) for name in ("pretrain", "align")}
    moments = {"base": ("start", 0), "reattached": ("pretrain", last["pretrain"]), "aligned": ("align", last["align"])}
    found = []
    for moment, at in moments.items():
        for language, result in read_results_of(run).get(moment, {}).items():
            found.append((at, language, result["loss_nats"], moment))
    for record in read_records(run):
        if record.get("model") == "whole" and "heldout_loss_nats" in record:
            at = (record["stage"], record["step"])
            moment = "aligning" if record["stage"] == "align" else "pretraining"
            found.append((at, record["language"], record["heldout_loss_nats"], moment))
    found.sort(key=lambda one: (seconds[one[0]], one[1]))
    return [
        {"seconds": seconds[at], "tokens": tokens[at], "language": language, "loss_nats": loss, "stage": stage}
        for at, language, loss, stage in found
    ]


def memory_of(label: str, stages: dict[str, Any]) -> list[dict[str, Any]]:
    """Peaks of the stages of a finished run by component, predicted and measured; of those that counted them."""
    found = [(stage, summary.get("memory") or {}) for stage, summary in stages.items()]
    kept = ("predicted_bytes", "measured_bytes", "components")
    return [
        {"label": label, "stage": stage} | {field: memory[field] for field in kept}
        for stage, memory in found
        if "components" in memory
    ]


def read_results_of(run: Path) -> dict[str, Any]:
    """Evaluations of a run folder by moment."""
    with RunDir.open(run) as opened:
        return dict(read_results(opened)["evaluations"])


def full_config(config: RunConfig, output: Path, tokens: int) -> RunConfig:
    """The same run as one stage: the whole model from the start, with the alignment's settings and these tokens."""
    tree = config.model_dump(mode="json")
    steps = max(1, tokens // config.align.tokens_per_step)
    tree["align"]["tokens"] = steps * config.align.tokens_per_step
    tree["output"] = str(output)
    return make_config(tree, "elo bench loss")


def demo_config(output: Path, work: Path) -> RunConfig:
    """The demo's model, text and settings."""
    model = demo_assets.demo_model()
    shards, heldout = demo._prepare(demo_assets.demo_text(), model, work)
    return demo._configuration(str(model), output, shards, heldout)


def measure(options: Options, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> a `loss` result, and the settings; both runs are left in `folder`.

    Raises:
        UsageError: a configuration without held-out text.
    """
    if options.config is None:
        config = demo_config(folder / "elo", folder / "data")
    else:
        config = load_config(options.config, list(options.overrides))
    tree = config.model_dump(mode="json") | {"output": str(folder / "elo")}
    tree["evaluate"]["every"] = options.every
    config = make_config(tree, "elo bench loss")
    if not config.evaluate.shards:
        raise UsageError("elo bench loss needs held-out text: set evaluate.shards in the configuration")
    source = open_source(config)
    with RunDir.obtain(config, resume=True) as run:
        run_pipeline(run, source)
        stages = read_results(run)["stages"]
    spent = sum(stage["seconds"] for stage in stages.values())
    rate = stages["align"]["tokens_per_s"]  # of the whole model: full continual pretraining runs at the same
    full = full_config(config, folder / "full", options.full_tokens or int(spent * rate))
    with RunDir.obtain(full, resume=True) as run:
        start(run, source)
        evaluate_once(run, source, "base", source.folder)
        keep_summary(run, "align", align(run, source))
        evaluate_once(run, source, "aligned", run.folder("model"))
        whole = read_results(run)["stages"]
    detached = ", ".join(str(layer) for layer in source.layers)
    conditions = (
        f"{source.folder.name}, rows of {config.data.sequence_length}; pipeline: {config.pretrain.tokens:,} tokens in "
        f"layers {detached} at a learning rate of {config.pretrain.optimizer.lr:g}, {config.align.tokens:,} in the "
        f"whole model at {config.align.optimizer.lr:g}; full continual pretraining: {full.align.tokens:,} tokens at "
        f"{full.align.optimizer.lr:g}; seconds of optimizer steps; one seed ({config.seed})"
    )
    series = [
        {"label": "ELO and alignment", "points": points_of(folder / "elo")},
        {"label": "full continual pretraining", "points": points_of(folder / "full")},
    ]
    memory = memory_of(series[0]["label"], stages) + memory_of(series[1]["label"], whole)
    result = {"schema": 1, "theme": "loss", "conditions": conditions, "series": series, "memory": memory}
    return result, {"full_tokens": full.align.tokens, "every": options.every, "config": config.model_dump(mode="json")}


def run_command(
    options: Options, folder: Path | None, records: Path | None, command: list[str]
) -> tuple[dict[str, Any], Path | None]:
    """Measure, and keep the record where one is wanted; without `folder` the runs are thrown away."""
    from elo_engine.benchmarks.recording import card_name, write_record
    from elo_engine.benchmarks.speedup import slug
    from elo_engine.measure.environment import describe_environment

    with tempfile.TemporaryDirectory() as scratch:
        result, settings = measure(options, folder or Path(scratch))
    if records is None:
        return result, None
    environment = describe_environment()
    path = write_record(
        records, card=card_name("auto", environment), result=result, raw={"series": result["series"]},
        environment=environment, settings=settings, command=command, name=f"loss-{slug(_model_of(settings))}",
    )  # fmt: skip
    console.err.print(f"runs: {folder}" if folder else "the runs are not kept (--runs FOLDER keeps them)", markup=False)
    return result, path


def _model_of(settings: dict[str, Any]) -> str:
    return Path(settings["config"]["model"]).name
