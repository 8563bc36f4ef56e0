"""fp8 against bf16: the same ELO pretraining of the demo's model and text, seed by seed, with and without products of
8-bit operands, and how far the loss curves lie apart against how far seeds lie apart.

On a machine without such products they are emulated: operands are rounded to 8 bits and multiplied in bf16, which
shows what rounding does to training and says nothing of speed. Held-out losses are the shallow model's, scored in bf16
for every arm, so they say what was learned and not how it was measured; they are compared with each other alone.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from elo_engine import demo, demo_assets
from elo_engine.benchmarks.recording import card_name, write_record
from elo_engine.config import RunConfig, make_config
from elo_engine.detach import open_source
from elo_engine.errors import FailedError
from elo_engine.measure.environment import describe_environment, device_name
from elo_engine.model.ops.quantize_fp8 import EMULATE, reason_without
from elo_engine.pipeline import start
from elo_engine.pretrain import pretrain
from elo_engine.run_dir import RunDir
from elo_engine.summary import read_records, read_steps

ARMS = ("none", "head", "all")
LABELS = {"none": "bf16", "head": "fp8, head", "all": "fp8, head and layers"}
WINDOW = 50  # steps that a point of a training curve is the mean of


def configuration(work: Path, shards: tuple[dict[str, str], dict[str, str]], arm: str, seed: int, steps: int,
                  tokens: int) -> RunConfig:  # fmt: skip
    """ELO pretraining of the first and the last layer, as the demo has it, with short rows."""
    train, heldout = shards
    row = min(256, tokens)
    return make_config(
        {
            "model": str(demo_assets.demo_model()), "output": str(work / f"{arm}-{seed}"), "dtype": "bf16",
            "seed": seed,
            "data": {"shards": train, "mix": {"ja": 9, "en": 1}, "sequence_length": row},
            "pretrain": {
                "tokens": steps * tokens, "tokens_per_step": tokens, "micro_batch": tokens // row, "fp8": arm,
                "optimizer": {"lr": 3e-4},
            },
            "align": {"tokens": tokens, "tokens_per_step": tokens},
            "evaluate": {"every": 99, "whole": False, "shards": heldout, "tokens": 4096},
            "snapshot": {"every": steps, "keep": 1},
        },
        "benchmarks/fp8.py",
    )  # fmt: skip


def run_arm(config: RunConfig, *, train: bool = True) -> dict[str, Any] | None:
    """Train one arm with one seed, or read what an earlier call trained. -> losses by step, held-out losses, and what
    the check before the first step found; None where it is not complete and is not to be trained.
    """
    folder = Path(config.output)
    if len(read_steps(folder) if folder.exists() else []) < config.steps("pretrain"):
        if not train:
            return None
        source = open_source(config)
        with RunDir.obtain(config, resume=True) as run:
            start(run, source)
            pretrain(run, source)
    records = list(read_records(folder))
    heldout = [
        {"step": record["step"], "language": record["language"], "loss_nats": record["heldout_loss_nats"]}
        for record in records
        if "heldout_loss_nats" in record
    ]
    checks = [record for record in records if record.get("event") == "fp8 checked"]
    steps = [{key: step[key] for key in ("step", "loss_nats", "step_s")} for step in read_steps(folder)]
    return {"steps": steps, "heldout": heldout, "check": checks[0] if checks else None}


def smoothed(run: dict[str, Any]) -> list[float]:
    """Training loss, means of WINDOW steps one after the other."""
    losses = [step["loss_nats"] for step in run["steps"]]
    return [statistics.fmean(losses[at : at + WINDOW]) for at in range(0, len(losses), WINDOW)]


def compared(runs: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each 8-bit arm: the largest and the mean distance from bf16 with the same seed and so the same text, and the
    spread of the seeds of bf16, point by point of the smoothed curves.

    spread: of a point, the standard deviation over bf16's seeds; `within` is the share of points of all seeds whose
    distance is no more than it.
    """
    found = []
    seeds = sorted(runs["none"])
    base = {seed: smoothed(runs["none"][seed]) for seed in seeds}
    points = range(min(map(len, base.values())))
    spread = [statistics.stdev(base[seed][at] for seed in seeds) for at in points]
    for arm in ARMS[1:]:
        if not runs.get(arm):
            continue
        there = sorted(runs[arm])
        apart = {seed: [a - b for a, b in zip(smoothed(runs[arm][seed]), base[seed], strict=True)] for seed in there}
        every = [(abs(apart[seed][at]), spread[at]) for seed in there for at in points]
        found.append(
            {
                "arm": LABELS[arm], "seeds": len(there),
                "mean_difference_nats": statistics.fmean(d for one in apart.values() for d in one),
                "largest_difference_nats": max(distance for distance, _ in every),
                "last_difference_nats": statistics.fmean(one[-1] for one in apart.values()),
                "mean_spread_nats": statistics.fmean(spread), "last_spread_nats": spread[-1],
                "within": statistics.fmean(distance <= limit for distance, limit in every),
                "heldout": _heldout(runs, arm, there),
            }
        )  # fmt: skip
    return found


def _heldout(runs: dict[str, dict[int, dict[str, Any]]], arm: str, seeds: list[int]) -> list[dict[str, Any]]:
    """At the last step, by language: mean distance from bf16 of the same seed, and the spread of bf16's seeds."""

    def last(kind: str, seed: int) -> dict[str, float]:
        scored = runs[kind][seed]["heldout"]
        end = max(one["step"] for one in scored)
        return {one["language"]: one["loss_nats"] for one in scored if one["step"] == end}

    found = []
    for language in sorted(last(arm, seeds[0])):
        apart = [last(arm, seed)[language] - last("none", seed)[language] for seed in seeds]
        base = [last("none", seed)[language] for seed in sorted(runs["none"])]
        found.append(
            {
                "language": language, "bf16_nats": statistics.fmean(base), "spread_nats": statistics.stdev(base),
                "mean_difference_nats": statistics.fmean(apart), "largest_difference_nats": max(map(abs, apart)),
            }
        )  # fmt: skip
    return found


def measure(
    work: Path, seeds: list[int], arms: list[str], steps: int, tokens: int, *, train: bool = True
) -> dict[str, Any]:
    """Every arm with every seed, seed by seed; what is in `work` already is not trained again, and without `train`
    nothing is: then what is complete is all there is.
    """
    shards = demo._prepare(demo_assets.demo_text(), demo_assets.demo_model(), work / "data")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emulated = reason_without(device) is not None
    if emulated:
        os.environ[EMULATE] = "emulated"
    runs: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in arms}
    for seed in seeds:
        for arm in arms:
            run = run_arm(configuration(work, shards, arm, seed, steps, tokens), train=train)
            if run is None:
                continue
            runs[arm][seed] = run
            losses = [step["loss_nats"] for step in run["steps"]]
            if not all(map(math.isfinite, losses)):
                raise FailedError(f"{LABELS[arm]}, seed {seed}: a loss is not finite, so there is no curve to compare")
    several = len(runs.get("none", {})) > 1
    return {"runs": runs, "emulated": emulated, "compared": compared(runs) if several else []}


def result_of(found: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """The record's result: smoothed curves, comparisons, and the checks before training."""
    curves, checks = [], []
    for arm, by_seed in found["runs"].items():
        for seed, run in by_seed.items():
            losses = smoothed(run)
            steps = [(at + 1) * WINDOW for at in range(len(losses))]
            curves.append({"arm": LABELS[arm], "seed": seed, "step": steps, "loss_nats": losses})
            if (check := run["check"]) is not None:
                parts = {name: part for name, part in check["gradients"].items() if name != "all"}
                worst = max(parts, key=lambda name: parts[name]["relative"])
                checks.append(
                    {
                        "arm": LABELS[arm], "seed": seed, "loss_bf16_nats": check["loss_bf16_nats"],
                        "loss_fp8_nats": check["loss_fp8_nats"], **check["gradients"]["all"], "worst": worst,
                        "worst_relative": parts[worst]["relative"],
                    }
                )  # fmt: skip
    how = (
        "products emulated on a CPU: operands rounded to 8 bits, multiplied in bf16 with sums in fp32; nothing here is "
        "a speed" if found["emulated"] else "products of 8-bit operands on the card"
    )  # fmt: skip
    conditions = (
        f"ELO pretraining of the first and last layer of SmolLM2-135M-Instruct, {given.steps} steps of {given.tokens} "
        f"tokens in rows of {min(256, given.tokens)}, Japanese and English 9 : 1, learning rate 3e-4; {how}; with one "
        f"seed every arm reads the same rows; a point of a curve is the mean of {WINDOW} steps; held-out losses "
        "are the shallow model's, scored in bf16 for all arms"
    ) + (f"; {given.note}" if given.note else "")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "schema": 1, "theme": "fp8", "conditions": conditions, "device": {"type": kind, "name": device_name(kind)},
        "emulated": found["emulated"], "compared": found["compared"], "curves": curves, "checks": checks,
    }  # fmt: skip


def keep(found: dict[str, Any], given: argparse.Namespace) -> Path:
    """Write the record; returns its folder."""
    environment = describe_environment()
    raw = {"runs": {arm: {str(seed): run for seed, run in by_seed.items()} for arm, by_seed in found["runs"].items()}}
    settings = {"seeds": given.seeds, "arms": given.arms, "steps": given.steps, "tokens": given.tokens}
    return write_record(
        given.records, card=card_name("auto", environment), result=result_of(found, given), raw=raw,
        environment=environment, settings=settings, command=["python", "-m", "elo_engine.benchmarks.fp8",
        "--steps", str(given.steps), "--tokens", str(given.tokens)], name="fp8-smollm2-135m-instruct",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; those there are not run again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=512, help="a step")
    parser.add_argument("--records", type=Path, help="keep a record in this folder")
    parser.add_argument("--show", action="store_true", help="train nothing: what is complete in --work")
    parser.add_argument("--note", default="", help="kept with the conditions")
    given = parser.parse_args()
    found = measure(given.work, given.seeds, given.arms, given.steps, given.tokens, train=not given.show)
    for line in found["compared"]:
        print(line)
    if given.records is not None:
        print(keep(found, given))


if __name__ == "__main__":
    main()
