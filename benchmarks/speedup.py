"""Pipeline speedup, measured: four arms interleaved step by step in processes of their own, ratios taken round by
round.

Pipeline speedup = T(full CP on all tokens) / (T(ELO pretraining on 90 %) + T(alignment on 10 %)), from seconds per
token of the same run: against transformers' full CP, and against full CP in this engine. The demo's model and text
unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from elo_engine import demo_assets
from elo_engine.checkpoint import open_checkpoint
from elo_engine.data import Mixture, TokenStore, build_tokens
from elo_engine.errors import FailedError
from elo_engine.measure.environment import choose_device, choose_dtype, describe_environment
from elo_engine.measure.flops import full_step, ideal_speedup, shallow_step
from elo_engine.measure.meter import spread
from elo_engine.model.spec import read_spec

ARMS = ("engine_shallow", "transformers_shallow", "engine_full", "transformers_full")
# transformers again, told to keep freed memory as the engine tells itself (elo_engine/model/cpu_memory.py)
TUNED = ("transformers_shallow_tuned", "transformers_full_tuned")
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


class Arm:
    """A process that runs one training step when asked."""

    def __init__(self, name: str, spec: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("arms.py")), name.removesuffix("_tuned"), str(spec)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | (KEEP if name in TUNED else {}),
        )  # fmt: skip
        self.name = name
        self.described = self._read()

    def step(self) -> dict[str, float]:
        """Seconds and loss of one step."""
        stdin: IO[str] | None = self.process.stdin
        assert stdin is not None
        stdin.write("step\n")
        stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            raise FailedError(f"arm {self.name} ended: {self.process.stderr.read()[-1500:]}")
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def make_rows(folder: Path, model: Path, T: int, count: int) -> Path:
    """Rows of real text, 9 : 1 Japanese to English, each row one document to attention."""
    stores = {}
    for language, texts in demo_assets.demo_text().items():
        lines = folder / f"{language}.jsonl"
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:200]), encoding="utf-8")
        build_tokens([lines], model, folder / language)
        stores[language] = TokenStore(folder / language)
    rows = Mixture(stores, {"ja": 9.0, "en": 1.0}, T, 42, "concat").rows(0, count)
    path = folder / "rows.npz"
    np.savez(path, ids_BT=rows.ids_BT, labels_BT=rows.labels_BT)
    return path


def check_engagement(described: dict[str, Any], losses: dict[str, list[float]], parameters: dict[str, int]) -> None:
    """Every arm trains what it claims to and starts at the loss of its twin.

    Raises:
        FailedError: naming the arm that does not.
    """
    for name in ARMS:
        expected = parameters["shallow" if name.endswith("shallow") else "full"]
        if described[name]["trains"] != expected:
            raise FailedError(f"{name} trains {described[name]['trains']} parameters, expected {expected}")
    for kind in ("shallow", "full"):
        ours, theirs = losses[f"engine_{kind}"][0], losses[f"transformers_{kind}"][0]
        if abs(ours - theirs) > 0.02 * theirs:
            raise FailedError(f"the {kind} arms start at different losses: engine {ours}, transformers {theirs}")


def ratios(seconds: dict[str, list[float]], share: float = 0.9) -> dict[str, list[float]]:
    """Round by round: how many times faster."""
    rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]

    def pipeline(r: dict[str, float], base: str) -> float:
        return r[base] / (share * r["engine_shallow"] + (1 - share) * r["engine_full"])

    found = {
        "ELO pretraining, engine over transformers": [r["transformers_shallow"] / r["engine_shallow"] for r in rounds],
        "full CP, engine over transformers": [r["transformers_full"] / r["engine_full"] for r in rounds],
        "pipeline over transformers' full CP": [pipeline(r, "transformers_full") for r in rounds],
        "pipeline over this engine's full CP": [pipeline(r, "engine_full") for r in rounds],
        "pipeline made of transformers' parts over its full CP": [
            r["transformers_full"] / (share * r["transformers_shallow"] + (1 - share) * r["transformers_full"])
            for r in rounds
        ],
    }
    if TUNED[0] in seconds:
        found |= {
            "ELO pretraining, engine over transformers told to keep memory": [
                r["transformers_shallow_tuned"] / r["engine_shallow"] for r in rounds
            ],
            "full CP, engine over transformers told to keep memory": [
                r["transformers_full_tuned"] / r["engine_full"] for r in rounds
            ],
            "pipeline over the full CP of transformers told to keep memory": [
                pipeline(r, "transformers_full_tuned") for r in rounds
            ],
        }
    return found


def measure(model: Path, T: int, micro_batch: int, rounds: int, warmup: int) -> dict[str, Any]:
    """Run all arms interleaved, in an order shuffled each round, and gather the record."""
    device = choose_device("auto")
    dtype, why = choose_dtype("auto", device)
    shape = read_spec(open_checkpoint(model).config)
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        rows = make_rows(Path(scratch), model, T, micro_batch * (rounds + warmup))
        spec = {
            "model": str(model), "rows": str(rows), "micro_batch": micro_batch, "lr": 1e-5, "device": device.type,
            "dtype": "bf16" if "bfloat16" in str(dtype) else "fp32",
        }  # fmt: skip
        path = Path(scratch) / "spec.json"
        path.write_text(json.dumps(spec))
        names = ARMS + TUNED if device.type == "cpu" else ARMS
        arms = {name: Arm(name, path) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        losses: dict[str, list[float]] = {name: [] for name in names}
        for number in range(warmup + rounds):
            for name in order.sample(names, len(names)):
                result = arms[name].step()
                losses[name].append(result["loss"])
                if number >= warmup:
                    seconds[name].append(result["seconds"])
            print(f"round {number + 1}/{warmup + rounds}", file=sys.stderr, flush=True)
        described = {name: arm.described for name, arm in arms.items()}
        for arm in arms.values():
            arm.close()
    check_engagement(described, losses, {"shallow": 2 * shape.layer_parameters, "full": shape.parameters})
    tokens = micro_batch * T
    found = ratios(seconds)
    return {
        "model": model.name, "sequence_length": T, "micro_batch": micro_batch, "dtype": spec["dtype"], "why": why,
        "device": device.type, "rounds": rounds, "warmup_rounds": warmup, "arms": described,
        "tokens_per_s": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "step_s": {name: vars(s) for name, values in seconds.items() if (s := spread(values))},
        "ratios": {name: vars(s) for name, values in found.items() if (s := spread(values))},
        "counted": {
            "full_gflop_per_token": full_step(shape, T).total / 1e9,
            "shallow_gflop_per_token": shallow_step(shape, 2, T).total / 1e9,
            "ideal_pipeline_speedup": ideal_speedup(shape, 2, T, 0.9),
        },
        "raw_step_s": seconds, "raw_losses_nats": losses, "environment": describe_environment(),
    }  # fmt: skip


def main() -> None:
    """Measure, print the ratios, keep the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the demo's SmolLM2-135M)")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--record", type=Path, help="folder to keep the record in; its file is named after the setting")
    options = parser.parse_args()
    model = options.model or demo_assets.demo_model()
    record = measure(model, options.sequence_length, options.micro_batch, options.rounds, options.warmup)
    for name, value in record["tokens_per_s"].items():
        print(f"{name}: {value:.0f} tokens/s")
    for name, value in record["ratios"].items():
        print(f"{name}: {value['median']:.2f}x (p10 {value['p10']:.2f}, p90 {value['p90']:.2f})")
    if options.record:
        options.record.mkdir(parents=True, exist_ok=True)
        path = options.record / f"speedup_{options.micro_batch}x{options.sequence_length}_{record['dtype']}.json"
        if path.exists():
            raise SystemExit(f"{path} exists; records are never written over")
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
