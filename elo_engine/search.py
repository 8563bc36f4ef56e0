"""`elo search`: which layers to detach. Candidates train on the same rows in the same order, one after the other beside
one base model in memory, and are ranked by the whole model's held-out loss after a short alignment.

Each candidate with each seed is a job (`search_trial.py`). What a job found is kept in the output folder as JSON as
soon as it ends, so a search that was cut goes on where it stood. Nothing else of it is kept: no weights, no snapshots.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from elo_engine import console
from elo_engine.config import RunConfig, load_config
from elo_engine.corpora import Heldout, make_mixture, open_heldout, require_shards
from elo_engine.data import Mixture
from elo_engine.detach import Source, open_source
from elo_engine.errors import FailedError, Interrupted, UsageError
from elo_engine.evaluate import Stopped
from elo_engine.measure.flops import arm_flops
from elo_engine.measure.meter import human_bytes
from elo_engine.plan import fitted_here
from elo_engine.run_dir import RunDir
from elo_engine.search_jobs import Job, choose_candidates, make_jobs, target_of
from elo_engine.search_report import draw, make_result
from elo_engine.search_trial import (
    Layers,
    Part,
    Shared,
    require_room,
    run_trial,
    score_base,
    trial_flops,
    trial_setting,
)
from elo_engine.train.loop import StopSignal

_BAR = 1000  # parts of the work on the progress bar


def search_command(
    path: Path, overrides: list[str] | None, layers: str | None, seeds: int, pretrain_tokens: str | None,
    align_tokens: str | None, evaluate_tokens: str | None, out: Path | None, resume: bool,
) -> dict[str, Any]:  # fmt: skip
    """`elo search`: what `search.json` holds. Tokens of the command line come before those of the configuration.

    Raises:
        UsageError: a candidate or an amount that cannot be meant, no held-out text of the target, or a configuration
        whose alignment is not one of its own, after ELO pretraining, on the device. RefusedError: no room, an output
        that is there already, or results of other settings in it. Interrupted: a signal; what is done is kept.
    """
    given = {"pretrain.tokens": pretrain_tokens, "align.tokens": align_tokens, "evaluate.tokens": evaluate_tokens}
    more = [f"{key}={amount}" for key, amount in given.items() if amount is not None]
    config = load_config(path / "config.resolved.yaml" if path.is_dir() else path, [*(overrides or []), *more])
    output = path if path.is_dir() else Path(config.output)
    out = out or output.with_name(f"{output.name}-search")
    config = config.model_copy(update={"output": str(out)})
    if config.pretrain.fp8 != "none":
        raise UsageError(
            f"elo search: pretrain.fp8 is {config.pretrain.fp8}, and trials compute in the model's own type; set it to "
            "none for the search"
        )
    if config.align.when == "interleaved":
        raise UsageError(
            "elo search: align.when is interleaved, and candidates are scored when they are reattached and again after "
            "an alignment of its own; add align.when=after"
        )
    if config.align.engine == "streamed":
        raise UsageError(
            "elo search: align.engine is streamed, and the search keeps whole models on the device; add "
            "align.engine=auto, or run each candidate by itself with elo run CONFIG detach.layers=[...]"
        )
    require_shards(config)
    target = target_of(config)
    source = open_source(config)
    config = fitted_here(config, source).config
    jobs = make_jobs(config, source, choose_candidates(layers, source.spec.layers), seeds)
    done = {job.name: found for job in jobs if resume and (found := job.result(out)) is not None}
    heldout = open_heldout(config, source.folder, source.spec.V)
    make_mixture(config, source.folder, source.spec.V)  # every check of the data, before anything is written
    missing = [job for job in jobs if job.name not in done]
    most = require_room(source, {job.layers: job.config for job in missing if job.kind != "base"})
    with RunDir.obtain(config, resume) as run:
        run.pin(source.revision)
        (run.path / "results").mkdir(exist_ok=True)
        if missing:
            run.say(f"search: {len(missing)} of {len(jobs)} jobs to do, with at most {human_bytes(most)} predicted")
            _Search(run, source, heldout, jobs, done, target).do(missing)
        results = [(job.kind, job.layers, job.seed, done[job.name]) for job in jobs]
        found = make_result(_conditions(config, source, target), _costs(source, jobs), results)
        run.write_json("search.json", found)
        if not draw(found, run.path / "search.png"):
            run.say("no plot: matplotlib is not installed (pip install 'elo-engine[bench]')")
        run.status(state="finished", stage="search")
        run.say(f"search: results in {run.path / 'search.json'}")
    return found


def _conditions(config: RunConfig, source: Source, target: str) -> dict[str, Any]:
    """What the result is of."""
    return {
        "schema": 1,
        "model": config.model,
        "layers_total": source.spec.layers,
        "device": source.device.type,
        "dtype": str(source.dtype).removeprefix("torch."),
        "bridge": config.detach.bridge,
        "target": target,
        "tokens": {
            "shallow": config.steps("pretrain") * config.pretrain.tokens_per_step,
            "whole": config.steps("align") * config.align.tokens_per_step,
            "heldout": config.evaluate.tokens,
        },
    }


def _costs(source: Source, jobs: list[Job]) -> dict[Layers, float]:
    """Operations of a token of ELO pretraining, as executed and with its bridges, over those of first and last."""

    def flops(config: RunConfig) -> float:
        return arm_flops(trial_setting(source, config, "pretrain")).executed.total

    configs = {job.layers: job.config for job in jobs if job.kind == "candidate"}
    some = next(iter(configs.values()))
    ends = some.model_copy(update={"detach": some.detach.model_copy(update={"layers": ["first", "last"]})})
    return {layers: flops(config) / flops(ends) for layers, config in configs.items()}


class _Search:
    """The jobs that are not done, one after the other."""

    def __init__(
        self, run: RunDir, source: Source, heldout: Heldout, jobs: list[Job], done: dict[str, Any], target: str
    ) -> None:
        self._run, self._source, self._heldout, self._target = run, source, heldout, target
        self._jobs, self._done = jobs, done
        self._mixtures: dict[int, Mixture] = {}
        cap = heldout.tokens
        tokens = sum(min(s.tokens_total, cap or s.tokens_total) for s in heldout.stores.values())
        self._flops = {job.name: self._flops_of(job, tokens) for job in jobs}

    def _flops_of(self, job: Job, tokens: int) -> dict[Part, float]:
        found = trial_flops(self._source, job.config, job.layers, tokens)
        return {"aligned": found["aligned"]} if job.kind == "base" else found

    def do(self, missing: list[Job]) -> None:
        """All of them; `done` gets what they found.

        Raises:
            Interrupted: a signal came; the job in hand is lost, all before it are kept.
        """
        shared = Shared.load(self._source, self._heldout)
        total = sum(sum(self._flops[job.name].values()) for job in missing)
        began, behind, stop = time.monotonic(), 0.0, StopSignal()
        with stop.installed(), console.progress_bar("search (per mille)", _BAR) as bar:
            for job in missing:
                parts, title = self._flops[job.name], job.title(self._source.spec.layers)
                self._run.status(state="running", stage="search", job=title, done=len(self._done), of=len(self._jobs))

                def told(
                    part: Part, share: float, before: float = behind, of: dict[Part, float] = parts, note: str = title
                ) -> None:
                    parts_before = list(of)[: list(of).index(part)]
                    inside = sum(of[one] for one in parts_before) + share * of[part]
                    bar(int(_BAR * (before + inside) / total), f"{note}: {part}")

                try:
                    found = self._one(shared, job, told, stop)
                except Stopped:
                    self._interrupt(stop)
                behind += sum(parts.values())
                left = (time.monotonic() - began) / behind * (total - behind)
                self._keep(job, found, title, left)
                if stop():
                    self._interrupt(stop)

    def _interrupt(self, stop: StopSignal) -> None:
        what = stop.received.name if stop.received else "a signal"
        raise Interrupted(
            f"elo search interrupted by {what}: {len(self._done)} of {len(self._jobs)} jobs are done and kept in "
            f"{self._run.path}; go on with --resume"
        )

    def _one(
        self, shared: Shared, job: Job, told: Callable[[Part, float], None], stop: StopSignal
    ) -> dict[str, Any]:
        """A job's result, also where it failed by itself: the others go on."""
        try:
            if job.kind == "base":
                return score_base(shared, stop) | {"failed": None}
            if job.seed not in self._mixtures:
                self._mixtures = {job.seed: make_mixture(job.config, self._source.folder, self._source.spec.V)}
            source = replace(self._source, layers=job.layers)
            found = run_trial(
                replace(shared, source=source), job.config, job.layers, self._mixtures[job.seed],
                told=told, should_stop=stop,
            )  # fmt: skip
            return found | {"failed": None}
        except FailedError as error:
            if job.kind == "base":
                raise
            return {"failed": str(error)}

    def _keep(self, job: Job, found: dict[str, Any], title: str, left: float) -> None:
        about: dict[str, Any] = {"settings": job.settings, "layers": list(job.layers), "seed": job.seed}
        found = about | found
        self._run.write_json(job.name, found)
        self._done[job.name] = found
        shown = f"failed: {found['failed']}"
        if found["failed"] is None:
            moments = found["evaluations"].items()
            losses = [f"{moment} {by[self._target]['loss_nats']:.4f}" for moment, by in moments]
            shown = f"held-out {self._target} loss {', '.join(losses)} nats/token"
        self._run.say(
            f"search {len(self._done)} of {len(self._jobs)}: {title}: {shown}; eta {console.format_seconds(left)}"
        )
