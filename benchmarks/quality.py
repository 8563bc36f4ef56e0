"""`elo bench quality`: does it teach the language and keep the others, method beside method: one mixture in
one order, same evaluation, several seeds.

Each method with each seed is a job. What a job found is kept in the work folder as JSON as soon as it ends, so a
comparison that was cut goes on where it stood (`--resume`), and several processes may share the jobs: whoever makes a
job's claim file does it. The last one to finish writes the record.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from elo_engine import console, demo, demo_assets
from elo_engine.benchmarks.claims import only_one, take_claim
from elo_engine.benchmarks.quality_costs import COST_LENGTH, COST_MODEL, equal_cost, relative_costs
from elo_engine.benchmarks.quality_methods import (
    Evaluations,
    Method,
    base_evaluations,
    choose_methods,
    drop_weights,
    run_method,
)
from elo_engine.checkpoint import resolve_model
from elo_engine.config import RunConfig, apply_override, make_config
from elo_engine.data import build_tokens
from elo_engine.detach import Source, open_source
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.environment import describe_environment

HELDOUT_EVERY = 90  # one document in so many is set aside, as in the demo


@dataclass(frozen=True)
class Options:
    """What the command line asks for. Tokens are rounded down to whole steps; the first language of `texts` is the
    target.
    """

    work: Path
    model: str | None = None
    texts: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    sequence_length: int = 512
    seeds: int = 3
    methods: str | None = None
    own: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()  # of every method's configuration
    pretrain_tokens: int = 147_456
    align_tokens: int = 16_384
    whole_tokens: int = 81_920
    heldout_tokens: int = 8192
    pretrain_step_tokens: int = 1536
    align_step_tokens: int = 512
    pretrain_lr: float = 3e-4
    align_lr: float = 1.5e-4
    whole_lr: float = 1.5e-4
    lora_lr: float = 1e-3
    outer_lr: float = 3e-4
    lora_rank: int = 16
    evaluations: int = 4
    threads: int = 0
    resume: bool = False
    keep_weights: bool = False
    note: str = ""


def prepare(options: Options, model: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Text -> training shards and held-out shards by language, once in a work folder; of each document set aside only
    the beginning is scored, so that many fit into the budget.

    Raises:
        UsageError: text that cannot be read. RefusedError: the folder holds shards of other text.
    """
    documents = demo._read_texts(list(options.texts)) if options.texts else demo_assets.demo_text()
    folder = options.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, str] = {}
    heldout: dict[str, str] = {}
    with only_one(folder / ".lock"):
        for language, texts in documents.items():
            every = min(HELDOUT_EVERY, len(texts))
            aside = [text for number, text in enumerate(texts) if number % every == every // 2]
            kept = [text for number, text in enumerate(texts) if number % every != every // 2]
            share = demo._characters(aside, model, math.ceil(options.heldout_tokens / len(aside)))
            for kind, part, found in (("train", kept, shards), ("heldout", [one[:share] for one in aside], heldout)):
                target, lines = folder / f"{language}-{kind}", folder / f"{language}-{kind}.jsonl"
                found[language] = str(target)
                text = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in part)
                if (target / "manifest.json").exists():
                    if lines.read_text(encoding="utf-8") != text:
                        raise RefusedError(f"{target}: was made from other text; choose another --work folder")
                    continue
                lines.write_text(text, encoding="utf-8")
                build_tokens([lines], model, target)
    return shards, heldout


def configuration(
    options: Options, method: Method, seed: int, model: str, data: tuple[Any, Any], share: float = 1.0
) -> RunConfig:
    """The run of one method with one seed, with this share of the shallow tokens.

    Raises:
        UsageError: an override that is no key, or a budget below one step.
    """
    shards, heldout = data
    target, *others = shards
    pretrain, align = options.pretrain_tokens, options.align_tokens
    if method.share is not None:
        align = int((pretrain + align) * method.share)
        pretrain = options.pretrain_tokens + options.align_tokens - align
    if method.budget == "whole":
        align = options.whole_tokens
    align = int(align * method.scale)
    rates = {"elo": options.align_lr, "lora": options.lora_lr, "outer": options.outer_lr}
    lr = rates.get(method.kind, options.align_lr if method.budget == "align" else options.whole_lr)

    def section(tokens: int, step_tokens: int, lr: float, rows: int, warmup: float) -> dict[str, Any]:
        return {
            "tokens": max(1, tokens // step_tokens) * step_tokens, "tokens_per_step": step_tokens,
            "micro_batch": min(rows, step_tokens // options.sequence_length), "recompute": "none",
            "optimizer": {"lr": lr}, "schedule": {"warmup": warmup},
        }  # fmt: skip

    tree: dict[str, Any] = {
        "model": model, "output": str(options.work / "runs" / f"{method.name}-{seed}"), "device": options.device,
        "dtype": options.dtype, "seed": seed,
        "data": {
            "shards": shards, "mix": {target: 9 * max(1, len(others)), **dict.fromkeys(others, 1)},
            "sequence_length": options.sequence_length,
        },
        "pretrain": section(int(share * pretrain), options.pretrain_step_tokens, options.pretrain_lr, 4, 0.05),
        "align": section(align, options.align_step_tokens, lr, 1, 0.1),
        "evaluate": {"shards": heldout, "tokens": options.heldout_tokens},
        "snapshot": {"every": 1_000_000_000, "keep": 1},
    }  # fmt: skip
    for override in (*options.overrides, *method.overrides):
        apply_override(tree, override)
    where = f"elo bench quality, {method.name}"
    config = make_config(tree, where)
    steps = config.steps("align") + (config.steps("pretrain") if method.kind == "elo" else 0)
    tree["evaluate"]["every"] = math.ceil(steps / (options.evaluations + 1)) if options.evaluations else 0
    return make_config(tree, where)


@dataclass(frozen=True)
class Job:
    """One method with one seed."""

    method: Method
    seed: int
    config: RunConfig
    work: Path
    about: str  # hash of everything its numbers depend on

    @property
    def path(self) -> Path:
        """Its result."""
        return self.work / "results" / f"{self.method.name}-{self.seed}.json"

    def result(self) -> dict[str, Any] | None:
        """What it found; None: it is not done.

        Raises:
            RefusedError: it was done with other settings.
        """
        if not self.path.exists():
            return None
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        if found["about"] != self.about:
            raise RefusedError(
                f"{self.path}: was measured with other settings, data or model; choose another --work folder, or give "
                "the method another name"
            )
        return found

    def keep(self, found: dict[str, Any]) -> None:
        """Whole or not at all."""
        writing = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        text = json.dumps({"about": self.about, "method": self.method.name, "seed": self.seed} | found)
        writing.write_text(text + "\n", encoding="utf-8")
        os.replace(writing, self.path)

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Whether this process may do it; let go in the end. The claim of a process of this machine that is gone is
        taken over.
        """
        claim = self.path.with_suffix(".claim")
        mine = take_claim(claim)
        try:
            yield mine
        finally:
            if mine:
                claim.unlink(missing_ok=True)


def make_jobs(options: Options, source: Source, data: tuple[Any, Any]) -> list[Job]:
    """Seed by seed, so that what is there when the comparison is cut can be paired."""
    methods = choose_methods(options.methods, options.own)
    manifests = [Path(folder, "manifest.json").read_bytes() for part in data for folder in part.values()]
    common = hashlib.sha256(source.index.identity().encode() + b"".join(manifests)).hexdigest()
    jobs = []
    for seed in range(1, options.seeds + 1):
        for method in methods:
            kept = method.trial.kept if method.trial else 0
            share = equal_cost(source.spec, options.sequence_length, source.layers, kept)
            config = configuration(options, method, seed, str(source.folder), data, share)
            tree = config.model_dump(mode="json")
            for part in (tree, tree["data"], tree["evaluate"]):  # folders may move; manifests say what is in them
                for key in ("model", "output", "shards"):
                    part.pop(key, None)
            about = [common, tree, method.kind, options.lora_rank if method.kind == "lora" else 0]
            about += [asdict(method.trial)] if method.trial else []
            digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
            jobs.append(Job(method, seed, config, options.work, digest))
    return jobs


def do_jobs(jobs: list[Job], base: Evaluations, options: Options) -> None:
    """All that are not done and not another process's; a method that fails is kept as failed, with its reason."""
    for number, job in enumerate(jobs, 1):
        with job.claimed() as mine:
            if not mine or job.result() is not None:
                continue
            title = f"{number} of {len(jobs)}: {job.method.label}, seed {job.seed}"
            console.err.print(f"-- {title} ({job.config.output})", markup=False)
            try:
                outcome = run_method(job.method, job.config, base, options.lora_rank).to_json()
                job.keep(outcome | {"threads": torch.get_num_threads(), "failed": None})
            except FailedError as error:
                console.err.print(f"{title}: failed: {error}", markup=False)
                job.keep({"failed": str(error)})
            if not options.keep_weights:
                drop_weights(Path(job.config.output))


def open_base(options: Options, job: Job, source: Source) -> Evaluations:
    """The source model's evaluations, made by whoever comes first."""
    path = options.work / "results" / "base.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = job.config
    heldout = [Path(folder, "manifest.json").read_text() for folder in config.evaluate.shards.values()]
    settings = [config.data.sequence_length, config.evaluate.tokens, str(source.dtype), source.device.type]
    about = hashlib.sha256(json.dumps([source.index.identity(), heldout, settings]).encode()).hexdigest()
    with only_one(path.with_name(".base.lock")):
        if not path.exists():
            writing = path.with_name(".base.tmp")
            found = {"about": about, "evaluations": base_evaluations(source, config)}
            writing.write_text(json.dumps(found), encoding="utf-8")
            os.replace(writing, path)
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kept.get("about") != about:
        raise RefusedError(f"{path}: was measured with other settings, text or model; choose another --work folder")
    evaluations: Evaluations = kept["evaluations"]
    return evaluations


def make_result(options: Options, jobs: list[Job], base: Evaluations, source: Source) -> tuple[dict[str, Any], Any]:
    """-> a `quality` result and the raw steps, of the jobs that are done."""
    from elo_engine.benchmarks.speedup import model_json

    environment = describe_environment()
    on = source.device.type
    name = environment["gpus"][0]["name"] if on == "cuda" else environment["cpu"]
    found = [(job, result) for job in jobs if (result := job.result()) is not None]
    methods = []
    for method in dict.fromkeys(job.method for job in jobs):
        mine = [(job, result) for job, result in found if job.method == method]
        config = next(job.config for job in jobs if job.method == method)
        layers = open_source(config, source.folder).layers
        ran = [(job.seed, result) for job, result in mine if result["failed"] is None]
        bridged = method.kind == "elo" and config.detach.bridge != "none"
        methods.append({
            "letter": method.letter, "name": method.name, "label": method.label, "kind": method.kind,
            "full": method.kind == "whole" and method.budget == "whole",
            "tokens": ran[0][1]["tokens"] if ran else {"shallow": 0, "whole": 0, "fit": 0},
            "overrides": list(method.overrides), "lr": config.align.optimizer.lr,
            "cost": relative_costs(
                method.kind, layers, source.spec.layers, bridged, options.lora_rank,
                method.trial.kept if method.trial else 0,
            ),
            "runs": [{"seed": seed, "seconds": one["seconds"], "fit_seconds": one["fit_seconds"], "steps": one["steps"],
                      "seconds_per_token": _per_token(one), "points": one["points"]} for seed, one in ran],
            "failed": [{"seed": job.seed, "why": result["failed"]} for job, result in mine if result["failed"]],
        })  # fmt: skip
    target, *others = jobs[0].config.data.shards
    result = {
        "schema": 1, "theme": "quality", "conditions": _conditions(options, jobs[0].config, found),
        "model": model_json(source.folder.name, source.spec), "device": {"type": on, "name": name},
        "dtype": str(source.dtype).removeprefix("torch."), "sequence_length": options.sequence_length,
        "target": target, "others": others, "seeds": sorted({job.seed for job, _ in found}),
        "base": {language: {key: one[key] for key in ("loss_nats", "bits_per_byte")} for language, one in base.items()},
        "cost_model": COST_MODEL, "cost_length": COST_LENGTH, "methods": methods,
    }  # fmt: skip
    raw = {"jobs": [{"method": job.method.name, "seed": job.seed, "step_s": one.get("step_s")} for job, one in found]}
    return result, raw


def _per_token(one: dict[str, Any]) -> dict[str, float | None]:
    """Median step over its tokens, without the first step of a kind, which warms up."""
    found: dict[str, float | None] = {}
    for kind in ("shallow", "whole"):
        warm = one["step_s"][kind][1:]
        found[kind] = statistics.median(warm) * one["steps"][kind] / one["tokens"][kind] if warm else None
    return found


def _conditions(options: Options, config: RunConfig, found: list[tuple[Job, dict[str, Any]]]) -> str:
    threads = sorted({result["threads"] for _, result in found if result["failed"] is None})
    mix = ", ".join(f"{language} {weight:g}" for language, weight in (config.data.mix or {}).items())
    said = [
        f"rows of {options.sequence_length}, mixture {mix}",
        f"learning rates: detached layers {options.pretrain_lr:g}, alignment {options.align_lr:g}, full continual "
        f"pretraining {options.whole_lr:g}, LoRA (rank {options.lora_rank}) {options.lora_lr:g}, unfrozen layers "
        f"{options.outer_lr:g}",
        f"{options.pretrain_step_tokens} tokens a step in the detached layers, {options.align_step_tokens} in the "
        "whole model, cosine schedule to a tenth",
        f"about {options.heldout_tokens:,} held-out tokens a language, of documents that no run is fed",
        f"{options.seeds} seeds, which change the order of the text",
        f"{' or '.join(map(str, threads))} threads a run" if threads else "nothing ran",
    ]
    said += [f"every run with {', '.join(options.overrides)}"] if options.overrides else []
    return "; ".join(said + ([options.note] if options.note else []))


def measure(options: Options, *, run: bool = True) -> tuple[dict[str, Any], Any, int]:
    """Do the jobs -> a `quality` result, the raw steps, and how many jobs are not done; `run` False: of what is there.

    Raises:
        UsageError: options that cannot be meant. RefusedError: the work folder is another comparison's, or is there
            and `resume` is not set.
    """
    if options.work.exists() and any(options.work.iterdir()) and not options.resume:
        raise RefusedError(f"{options.work}: is there already; go on with it by --resume, or choose another --work")
    if options.seeds < 1 or options.heldout_tokens < 1:
        raise UsageError("--seeds and --heldout-tokens must be at least 1")
    choose_methods(options.methods, options.own)  # said before anything is fetched
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = resolve_model(options.model) if options.model else demo_assets.demo_model()
    options.work.mkdir(parents=True, exist_ok=True)
    data = prepare(options, folder)
    first = configuration(options, choose_methods("f", ())[0], 1, str(folder), data)
    source = open_source(first)
    jobs = make_jobs(options, source, data)
    base = open_base(options, jobs[0], source)
    (options.work / "options.json").write_text(json.dumps(asdict(options), default=str, indent=1), encoding="utf-8")
    if run:
        do_jobs(jobs, base, options)
    result, raw = make_result(options, jobs, base, source)
    return result, raw, sum(job.result() is None for job in jobs)


def run_command(
    options: Options, records: Path | None, command: list[str], show: bool
) -> tuple[dict[str, Any], Path | None, int]:
    """Measure, and keep the record once every job is done; `show`: measure nothing, show what is there."""
    from elo_engine.benchmarks.recording import card_name, write_record
    from elo_engine.benchmarks.speedup import slug

    result, raw, missing = measure(options, run=not show)
    if missing or show or records is None:
        return result, None, missing
    environment = describe_environment()
    path = write_record(
        records, card=card_name(result["device"]["type"], environment), result=result, raw=raw,
        environment=environment, settings=asdict(options) | {"work": options.work.name}, command=command,
        name=f"quality-{slug(result['model']['name'])}",
    )  # fmt: skip
    return result, path, 0
