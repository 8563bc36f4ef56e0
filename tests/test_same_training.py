"""One run with the kernels, one with the references, the same text: the losses follow each other, step by step.

Triton's kernels run through its interpreter on the CPU, some 50 ms a token, hence the 8 tokens a step; with a GPU
they run on it, at real widths. The real command line is driven: `elo run` on the tiny checkpoint, 20 steps of ELO
pretraining and 2 of alignment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import yaml
from forked import ELO, Forked

# Two orders of the same fp32 sums differ by about 2^-22 of a gradient. AdamW divides by the gradient's own size, so
# where a gradient is nearly 0 such a difference becomes a whole step of the learning rate, 3e-3 here, for that weight
# alone: a few weights in 46,000. Measured: 1.1e-7 of the loss after 20 steps. 1e-5 leaves room for another order of
# sums (another processor, another torch) and is a fortieth of what the weaker planted error below makes in 6 steps.
RELATIVE = 1e-5
STEPS, ALIGN = 20, 2


Train = Callable[..., list[float]]


@pytest.fixture(name="train")
def _train(forked: Forked) -> Train:
    return partial(train, forked)


def train(
    forked: Forked, tree: dict[str, Any], folder: Path, kernels: str, *, verb: str, steps: int, plant: str = ""
) -> list[float]:
    """Losses of every step of a run in a process of its own."""
    output = folder / f"run-{kernels}{'-planted' if plant else ''}"
    tree = tree | {"output": str(output), "kernels": kernels, "pretrain": {**tree["pretrain"], "tokens": 8 * steps}}
    config = folder / f"{output.name}.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    interpreted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if kernels == "fused" else {}
    start = f"import sys; sys.argv = ['elo', {verb!r}, {str(config)!r}]"
    quick = f"sys.path.append({str(Path(__file__).parent)!r}); import quick_interpreter; quick_interpreter.install()"
    program = f"{start}\n{quick if interpreted else ''}\n{plant}\n{ELO}"
    environment = {**os.environ, **interpreted, "OMP_NUM_THREADS": "1"}
    done = forked(program, environment=environment, timeout_s=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    told = {"fused": "Triton, interpreted", "reference": "plain torch references"}[kernels]
    assert told in (output / "log.txt").read_text(), "the run says which path computed it"
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss_nats"] for row in rows if "gradient_norm" in row]
    assert len(losses) == steps + (ALIGN if verb == "run" else 0)
    return losses


@pytest.fixture
def tree(run_tree: dict[str, Any]) -> dict[str, Any]:
    run_tree["data"]["sequence_length"] = 8
    # a constant rate, so that a shorter run is the beginning of a longer one
    schedule = {"warmup": 0.0, "decay": "constant"}
    run_tree["pretrain"] |= {"tokens_per_step": 8, "micro_batch": 1, "schedule": schedule}
    run_tree["align"] |= {"tokens": 8 * ALIGN, "tokens_per_step": 8, "micro_batch": 1}
    run_tree["evaluate"] = {"every": 0}
    run_tree["snapshot"] = {"every": 100, "keep": 1}
    return run_tree


def furthest(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=True))


pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")


def test_kernels_and_references_train_alike(tree: dict[str, Any], tmp_path: Path, train: Train) -> None:
    by_kernels, by_references = (
        train(tree, tmp_path, kernels, verb="run", steps=STEPS) for kernels in ("fused", "reference")
    )
    assert furthest(by_kernels, by_references) < RELATIVE
    assert mean(by_references[15:STEPS]) < mean(by_references[:5]) - 0.3, (
        "they must have learnt, or nothing is compared"
    )


PLANTS: dict[str, str] = {
    "the norm's gradient is half a percent too large": """
from elo_engine.kernels import rms_norm as kernel
right = kernel.rms_norm_backward
def wrong(*args, **kwargs):
    d_x, d_gamma = right(*args, **kwargs)
    return (None if d_x is None else d_x * 1.005), d_gamma
kernel.rms_norm_backward = wrong
""",
    "rotation back is left out": """
from elo_engine.kernels import rotary as kernel
right = kernel.rotary_forward
kernel.rotary_forward = lambda *args, **kwargs: None if kwargs.get("inverse") else right(*args, **kwargs)
""",
}


def test_planted_errors_make_the_losses_part(tree: dict[str, Any], tmp_path: Path, train: Train) -> None:
    """Each for itself, against one run of the references."""
    right = train(tree, tmp_path, "reference", verb="pretrain", steps=6)
    parted = {}
    for number, (name, plant) in enumerate(PLANTS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        parted[name] = furthest(train(tree, folder, "fused", verb="pretrain", steps=6, plant=plant), right)
    assert min(parted.values()) > RELATIVE, parted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: real widths")
def test_at_real_widths_on_a_gpu(make_checkpoint: Callable[..., Path], tree: dict[str, Any], tmp_path: Path) -> None:
    """Four layers of 2048, vocabulary 32000, 512 tokens a step, 20 steps at 1e-4.

    In fp32 kernels and references follow each other as above, at ten times its tolerance, for sums are 40 times as long
    and are ordered otherwise by each. In bf16 the yardstick is what bf16 itself does: the kernels' run may be no
    further from the fp32 references' than three times the bf16 references' run is.
    """
    folder = make_checkpoint(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, initializer_range=0.02,
    )  # fmt: skip
    tree["data"]["sequence_length"] = 64
    tree["pretrain"] |= {"tokens": 512 * STEPS, "tokens_per_step": 512, "micro_batch": 8, "optimizer": {"lr": 1e-4}}
    tree["align"] |= {"tokens": 512, "tokens_per_step": 512, "micro_batch": 8}
    losses: dict[tuple[str, str], list[float]] = {}
    for kernels, dtype in (("auto", "fp32"), ("reference", "fp32"), ("auto", "bf16"), ("reference", "bf16")):
        output = tmp_path / f"{kernels}-{dtype}"
        run = tree | {"output": str(output), "kernels": kernels, "model": str(folder), "device": "cuda", "dtype": dtype}
        config = tmp_path / f"{kernels}-{dtype}.yaml"
        config.write_text(yaml.safe_dump(run), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "elo_engine", "pretrain", str(config)], check=True, timeout=300)
        rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        losses[kernels, dtype] = [row["loss_nats"] for row in rows if "gradient_norm" in row]
        assert len(losses[kernels, dtype]) == STEPS
    truth = losses["reference", "fp32"]
    assert furthest(losses["auto", "fp32"], truth) < 10 * RELATIVE
    assert furthest(losses["auto", "bf16"], truth) < 3 * furthest(losses["reference", "bf16"], truth)
