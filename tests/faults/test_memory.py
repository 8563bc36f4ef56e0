"""A cap below the plan, and memory that runs out although the plan fitted: fault 33."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_fixture import Processes, status_of

from elo_engine.out_of_memory import is_out_of_memory

Tree = dict[str, Any]

# So many bytes of addresses from here on beyond what the process has.
CAP = """
import resource
def cap(size):
    now = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (now + size, now + size))
"""


def test_a_cap_below_the_plan_is_refused_with_numbers(
    run_tree: Tree, write_config: Callable[..., Path], processes: Processes
) -> None:
    config = write_config(run_tree)
    status, shown = processes("pretrain", config, patch=CAP + "cap(100 << 20)")
    assert status == 3, shown
    for part in (
        "pretrain does not fit",
        "its tensors take",
        "ulimit -v",
        "The biggest levers",
        "pretrain.micro_batch=1",
    ):
        assert part in shown, (part, shown)
    assert not (Path(run_tree["output"]) / "pretrain").exists()
    assert processes("pretrain", config, "--resume", "auto")[0] == 0, "with the memory it goes on"


@pytest.mark.parametrize(("stage", "engine"), [("pretrain", "resident"), ("align", "resident"), ("align", "streamed")])
def test_memory_that_runs_out_is_told_with_the_plan_and_the_levers(
    stage: str, engine: str, run_tree: Tree, write_config: Callable[..., Path], processes: Processes
) -> None:
    """Another program takes the rest after the plan was made: here a limit, set in the third step, and a tensor."""
    run_tree["align"]["engine"] = engine
    run_tree["snapshot"]["every"] = 1
    config = write_config(run_tree)
    patch = (
        CAP
        + f"""
import torch
from elo_engine.train import loop
held = []
def starve():
    cap(1 << 20)
    torch.empty(64 << 20, dtype=torch.uint8)
plain, calls = loop.Mixture.rows, [0]
from elo_engine.stream.engine import StreamedEngine
from elo_engine.train.resident import ResidentEngine
after(StreamedEngine if {engine!r} == "streamed" else ResidentEngine, "step", 3, starve)
"""
    )
    status, shown = processes(stage, config, "evaluate.every=0", patch=patch)
    assert status == 1, shown
    for part in (
        f"{stage} ran out of memory",
        "DefaultCPUAllocator",
        "The plan said",
        "were measured",
        "The biggest levers",
    ):
        assert part in shown, (part, shown)
    run = Path(run_tree["output"])
    told = json.loads((run / "out-of-memory.json").read_text())
    assert told["stage"] == stage and told["memory"]["predicted_bytes"] > 0 and told["memory"]["predicted_components"]
    saved = [lever["saves_bytes"] for lever in told["levers"]]
    assert saved and saved == sorted(saved, reverse=True) and all(size > 0 for size in saved)
    assert status_of(run)["state"] == "failed"
    assert [path.name for path in (run / stage).iterdir()] == ["step-00000001", "step-00000002"]
    status, shown = processes(stage, run, "evaluate.every=0")
    assert status == 0 and "resumed at step 2" in shown, shown


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as huge:
        torch.empty(1 << 60)
    with pytest.raises(MemoryError) as wide:
        np.empty(1 << 60, dtype=np.uint8)
    assert is_out_of_memory(huge.value) and is_out_of_memory(wide.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(
        OSError(errno.ENOMEM, "x")
    )
    assert not is_out_of_memory(RuntimeError("shapes")) and not is_out_of_memory(OSError(errno.EIO, "x"))
