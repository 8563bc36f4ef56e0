"""How long the first step of a training process takes, with Triton's cache empty, and what a step takes once it is
compiled: `python -m elo_engine.benchmarks.first_step OUT.json --model NAME`.

The cache is TRITON_CACHE_DIR, which must name a folder that has nothing in it. What is timed is ELO pretraining's first
optimizer step of one row: kernels are compiled as it meets them, libraries choose their algorithms, memory is asked
for. Imports and the making of the model are given beside it and are no part of it.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elo_engine.benchmarks.arm import resident_engine
from elo_engine.benchmarks.card_report import leave, refusing
from elo_engine.benchmarks.models import open_model, random_rows
from elo_engine.config import OptimizerConfig, ScheduleConfig, StageConfig
from elo_engine.data import RowBatch
from elo_engine.errors import UsageError
from elo_engine.measure.environment import choose_device, choose_dtype
from elo_engine.measure.roofline import synchronize
from elo_engine.measure.setting import Setting
from elo_engine.model import ops

LATER_STEPS = 3


def empty_cache() -> Path:
    """Triton's cache folder.

    Raises:
        UsageError: TRITON_CACHE_DIR names none that is empty: nothing would be compiled.
    """
    named = os.environ.get("TRITON_CACHE_DIR")
    if not named or not Path(named).is_dir() or any(Path(named).iterdir()):
        raise UsageError(f"TRITON_CACHE_DIR is {named!r}; it must name an empty folder, else little is compiled")
    return Path(named)


def engine_of(setting: Setting, model: str, device: torch.device) -> Any:
    """ELO pretraining of random weights, as `elo pretrain` runs it without graphs."""
    section = StageConfig(
        tokens=setting.tokens_per_step, tokens_per_step=setting.tokens_per_step, micro_batch=setting.micro_batch,
        optimizer=OptimizerConfig(lr=1e-4, state=setting.state),
        schedule=ScheduleConfig(warmup=0.0, decay="constant"),
    )  # fmt: skip
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    engine, _ = resident_engine(setting, open_model(model), section, device, dtype)
    return engine


def whole_rows(setting: Setting) -> RowBatch:
    """The rows of one step, each a document."""
    ids_RT, labels_RT = random_rows(setting)
    count, T = setting.micro_batch * setting.micro_batches, setting.sequence_length
    return RowBatch(
        ids_BT=ids_RT[:count].numpy(), labels_BT=labels_RT[:count].numpy(),
        positions_BT=np.tile(np.arange(T), (count, 1)), segment_starts=np.arange(count + 1) * T,
        languages=("random",) * count,
    )  # fmt: skip


def setting_for(model: str, length: int, device: torch.device, rows: int = 1, micro_batches: int = 1) -> Setting:
    """ELO pretraining of the first and the last layer, with this device's dtype and state."""
    spec, gpu = open_model(model).spec, device.type == "cuda"
    dtype, _ = choose_dtype("bf16" if gpu else "auto", device)
    return Setting(
        arm="elo_pretrain", spec=spec, layers=(0, spec.layers - 1), sequence_length=length, micro_batch=rows,
        micro_batches=micro_batches, dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        state="8bit" if gpu else "fp32", device=device.type,  # type: ignore[arg-type]
    )  # fmt: skip


def measure(model: str, length: int, device: torch.device) -> dict[str, float]:
    """Seconds of making the model, of the first step and of a later one, and how many kernels were compiled."""
    cache = empty_cache()
    ops.configure("auto", device)
    setting = setting_for(model, length, device)
    began = time.perf_counter()
    engine = engine_of(setting, model, device)
    synchronize(device)
    made_s = time.perf_counter() - began
    rows, seconds = whole_rows(setting), []
    for number in range(1 + LATER_STEPS):
        synchronize(device)
        began = time.perf_counter()
        outcome = engine.step(rows, rows.tokens_loss, 1e-4, first=number == 0, should_stop=lambda: False)
        assert outcome is not None and outcome.updated, "a step on random weights was not made"
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    compiled = len([path for path in cache.rglob("*") if path.suffix in (".cubin", ".hsaco")])
    return {"first_step_s": seconds[0], "later_step_s": min(seconds[1:]), "model_s": made_s, "kernels": float(compiled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequence-length", type=int, default=8192)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args()
    with refusing():
        leave(given.out, measure(given.model, given.sequence_length, choose_device(given.device)))


if __name__ == "__main__":
    main()
