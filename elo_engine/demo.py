"""`elo demo`: the whole method on a real small model and real text, in minutes on two CPU cores.

SmolLM2-135M learns Japanese from the Bible, mixed 9 : 1 with English. The run is an ordinary one: its configuration
lies in the output folder and can be run again with `elo run`. What is only here: fetching the parts, holding out
documents, a sample before and after, and the time of transformers' own full continual pretraining on the same rows.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from elo_engine import console, demo_assets, report
from elo_engine.checkpoint import resolve_model
from elo_engine.config import RunConfig, load_config, make_config
from elo_engine.corpora import make_mixture
from elo_engine.data import build_tokens
from elo_engine.detach import Source, open_source
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.pipeline import read_results, run_pipeline
from elo_engine.run_dir import RunDir

SEQUENCE_LENGTH = 512
DETACH = {"bridge": "linear", "bridge_tokens": 8192}
PRETRAIN = {
    "tokens": 46_080, "tokens_per_step": 1536, "micro_batch": 3,
    "optimizer": {"lr": 3e-4}, "schedule": {"warmup": 0.05},
}  # fmt: skip
ALIGN = {
    "tokens": 5120, "tokens_per_step": 512, "micro_batch": 1, "recompute": "none",
    "optimizer": {"lr": 1.5e-4}, "schedule": {"warmup": 0.1}, "when": "interleaved",
}  # fmt: skip
HELDOUT_EVERY = 90  # one document in so many is set aside
HELDOUT_TOKENS = 3072  # a language; scored before and after
BASELINE_STEPS, BASELINE_WARMUP, BASELINE_MICRO_BATCH = 2, 1, 2


def run_demo(output: Path, model: str | None, texts: list[str], baseline: bool) -> None:
    """Fetch, prepare, run, time the baseline, report.

    Raises:
        UsageError: `--text` is not LANG=FILE. Everything that `run_pipeline` raises.
    """
    began = time.perf_counter()
    source_folder = _model_folder(model, output) if model else demo_assets.demo_model()
    documents = _read_texts(texts) if texts else demo_assets.demo_text()
    ready = time.perf_counter()
    console.err.print(f"model {source_folder}", markup=False)
    work = output.parent / f"{output.name}-data"
    shards, heldout = _prepare(documents, source_folder, work)
    named = model if model and not Path(model).expanduser().is_dir() else str(source_folder)
    config = _configuration(named, output, shards, heldout)
    source = open_source(config, source_folder)
    with RunDir.obtain(config, resume=True) as run:
        run_pipeline(run, source)
        results = read_results(run)
        with console.bytes_bar("fetch the rest of the model") as progress:
            source.index.completed(progress)  # transformers reads whole folders; the run may need no more of it
        if "samples" not in results:
            results["samples"] = _samples(source, run.folder("model"), next(iter(documents.values())))
            run.write_json("results.json", results)
        if baseline and "baseline" not in results:
            run.say("baseline: full continual pretraining in transformers, a few steps in a fresh process")
            results["baseline"] = _baseline(run, source)
            results["speedup"] = _speedup(results)
            run.write_json("results.json", results)
        sections = _sections(results)
        report.write_report(run.path, results, sections)
        _show(run, results, sections)
        total = time.perf_counter() - began
        run.say(
            f"demo: {console.format_seconds(total)} in all, {console.format_seconds(ready - began)} of it "
            "fetching and unpacking"
        )


def _model_folder(model: str, output: Path) -> Path:
    """One's own model; of a hub's, the commit that a demo in this output folder was started from."""
    stored = output / "config.resolved.yaml"
    before = load_config(stored) if stored.exists() else None
    return resolve_model(model, before.revision if before is not None and before.model == model else None)


def _read_texts(texts: list[str]) -> dict[str, list[str]]:
    """`LANG=FILE`: documents are separated by blank lines."""
    found: dict[str, list[str]] = {}
    for item in texts:
        language, equals, name = item.partition("=")
        path = Path(name)
        if not equals or not language or not path.is_file():
            raise UsageError(f"--text {item!r}: use LANG=FILE with a text file, documents separated by blank lines")
        try:
            documents = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n")]
        except UnicodeDecodeError as error:
            raise UsageError(f"--text {path}: not UTF-8 text ({error})") from error
        found[language] = [document for document in documents if document]
        if len(found[language]) < 2:
            raise UsageError(
                f"--text {path}: holds {len(found[language])} documents; at least 2 are needed, one to hold out"
            )
    return found


def _prepare(documents: dict[str, list[str]], tokenizer: Path, work: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Text and held-out text -> token shards, once; returns the folders by language.

    Of each document set aside only the beginning is scored, so that many documents fit into the held-out budget.
    """
    shards: dict[str, str] = {}
    heldout: dict[str, str] = {}
    for language, texts in documents.items():
        every = min(HELDOUT_EVERY, len(texts))
        aside = [text for number, text in enumerate(texts) if number % every == every // 2]
        kept = [text for number, text in enumerate(texts) if number % every != every // 2]
        share = _characters(aside, tokenizer, HELDOUT_TOKENS // len(aside))
        for kind, part, folders in (("train", kept, shards), ("heldout", [text[:share] for text in aside], heldout)):
            folder = work / f"{language}-{kind}"
            folders[language] = str(folder)
            lines = work / f"{language}-{kind}.jsonl"
            text = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in part)
            if (folder / "manifest.json").exists():
                if lines.read_text(encoding="utf-8") != text:
                    raise RefusedError(f"{folder}: was made from other text; choose another --output for this one")
                continue
            work.mkdir(parents=True, exist_ok=True)
            lines.write_text(text, encoding="utf-8")
            build_tokens([lines], tokenizer, folder)
    return shards, heldout


def _characters(texts: list[str], tokenizer: Path, tokens: int) -> int:
    """How many characters of these texts make so many tokens: from a quarter to two tokens each, by script."""
    from transformers import AutoTokenizer

    sample = "\n".join(text[:500] for text in texts)
    ids = AutoTokenizer.from_pretrained(tokenizer)(sample, add_special_tokens=False).input_ids
    return max(1, len(sample) * tokens // len(ids))


def _configuration(model: str, output: Path, shards: dict[str, str], heldout: dict[str, str]) -> RunConfig:
    """The first language is the target: 9 : 1 against all others together."""
    target, *others = shards
    mix = {target: 9 * max(1, len(others)), **dict.fromkeys(others, 1)}
    return make_config(
        {
            "model": model,
            "output": str(output),
            "data": {"shards": shards, "mix": mix, "sequence_length": SEQUENCE_LENGTH},
            "detach": DETACH,
            "pretrain": PRETRAIN,
            "align": ALIGN,
            "evaluate": {"every": 0, "shards": heldout, "tokens": HELDOUT_TOKENS},
        },
        "elo demo",
    )


def _samples(source: Source, aligned: Path, texts: list[str]) -> dict[str, str]:
    """The same prompt, the start of a document, continued by both models through transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading two small models would draw over the run's own bars
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    prompt = texts[min(HELDOUT_EVERY, len(texts)) // 2][:24]
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    found = {"prompt": prompt}
    for name, folder in (("base", source.folder), ("aligned", aligned)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2, pad_token_id=0)
        found[name] = tokenizer.decode(tokens[0][inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return found


def _baseline(run: RunDir, source: Source) -> dict[str, Any]:
    """transformers in a fresh process over the first rows of this run's own mixture."""
    config = run.config
    size = BASELINE_MICRO_BATCH
    mixture = make_mixture(config, source.folder, source.spec.V)
    rows = mixture.rows(0, size * (BASELINE_WARMUP + BASELINE_STEPS))
    packed = run.path / "baseline-rows.npz"
    np.savez(packed, ids_BT=rows.ids_BT, labels_BT=rows.labels_BT)
    spec = {
        "model": str(source.folder), "rows": str(packed), "micro_batch": size, "warmup": BASELINE_WARMUP,
        "steps": BASELINE_STEPS,
        "dtype": "bf16" if "bfloat16" in str(source.dtype) else "fp32", "lr": config.align.optimizer.lr,
        "device": source.device.type,
    }  # fmt: skip
    run.write_json("baseline.json", spec)
    command = [sys.executable, "-m", "elo_engine.measure.transformers_baseline", str(run.path / "baseline.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FailedError(f"the transformers baseline failed (exit {done.returncode}): {done.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["tokens_per_s"] = found["tokens_per_step"] / statistics.median(found["step_s"])
    return found


def _speedup(results: dict[str, Any]) -> dict[str, float]:
    """T(full CP on all tokens) / (T(ELO pretraining on its share) + T(alignment on the rest)), for the paper's 9 : 1
    split and for the split of this run.
    """
    stages, base = results["stages"], 1.0 / results["baseline"]["tokens_per_s"]
    assert {"pretrain", "align"} <= stages.keys(), "the pipeline keeps a summary of each stage"
    shallow, whole = (1.0 / stages[name]["tokens_per_s"] for name in ("pretrain", "align"))
    tokens = {name: stages[name]["tokens_total"] for name in ("pretrain", "align")}
    share = tokens["pretrain"] / sum(tokens.values())
    return {
        "paper_split": base / (0.9 * shallow + 0.1 * whole),
        "run_split": base / (share * shallow + (1 - share) * whole),
        "run_pretrain_share": share,
    }


def _sections(results: dict[str, Any]) -> list[str]:
    sections = []
    if "speedup" in results:
        speed, base = results["speedup"], results["baseline"]
        steps = ", ".join(f"{seconds:.2f}" for seconds in base["step_s"])
        sections.append(
            f"Pipeline speedup against transformers' full continual pretraining: **{speed['paper_split']:.2f}x** "
            "at the paper's 9 : 1 "
            f"split of tokens ({speed['run_split']:.2f}x at this run's {speed['run_pretrain_share']:.2f} : "
            f"{1 - speed['run_pretrain_share']:.2f}). transformers ran {base['tokens_per_s']:.0f} tokens/s (steps of "
            f"{base['tokens_per_step']} tokens took {steps} s in a fresh process, after the run). The fit of the "
            "bridge, once a run, is not in it."
        )
    if "samples" in results:
        shown = results["samples"]
        sections.append(
            f"Sample, greedy, after `{shown['prompt']}`:\n\n* base: {shown['base']!r}\n* aligned: {shown['aligned']!r}"
        )
    return sections


def _show(run: RunDir, results: dict[str, Any], sections: list[str]) -> None:
    from rich.table import Table

    evaluations, stages = results["evaluations"], results["stages"]
    for title, header, rows in (
        ("whole model, held-out loss in nats/token (change) and bits per byte", report.evaluation_header(evaluations),
         report.evaluation_rows(evaluations)),
        ("stages", report.STAGE_HEADER, report.stage_rows(stages)),
    ):  # fmt: skip
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.out.print(table)
    for section in sections:
        console.out.print(section.replace("**", ""), markup=False)
    console.out.print(f"report: {run.path / 'report.md'}", markup=False)
