"""An arm's process up to where it would touch the device: `python -m elo_engine.benchmarks.waiting SPEC.json`.

It imports what its arm will import (torch, transformers: most of a process's start), prints `{"waiting": ...}` and
stands still until `go` comes on stdin; then it is `arm.py` with the same SPEC. So the next visit's process can be
started while the present one makes its model and warms up. Nothing is imported that the arm itself would not import, so
that its resident memory is what it would be. Some libraries ask a GPU on import what it is (bitsandbytes, which the
Trainer brings by way of peft); that makes no context on it, and whether one is there is looked at, not believed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ARM = "elo_engine.benchmarks.arm"
ENGINE_PARTS = ("elo_engine.data", "elo_engine.model.ops", "elo_engine.train.loop", "elo_engine.train.optim")
TRAINER_PARTS = ("elo_engine.benchmarks.trainer_arms", "transformers.trainer")


def modules(spec: dict[str, Any]) -> list[str]:
    """What the arm of a SPEC imports before it needs its device."""
    from elo_engine.benchmarks.models import open_model
    from elo_engine.measure.planner import STREAMED
    from elo_engine.measure.setting import ENGINE

    if spec["arm"] in ENGINE:
        streamed = ["elo_engine.stream.engine"] if spec["arm"] == STREAMED else []
        graph = ["elo_engine.benchmarks.graph_arms"] if spec.get("graph") else []
        return [*ENGINE_PARTS, *streamed, *graph, *(["triton"] if spec["device"] == "cuda" else [])]
    family = open_model(spec["model"]).config["model_type"]
    liger = ["liger_kernel.transformers"] if spec["arm"] == "liger_full" else []
    return [*TRAINER_PARTS, f"transformers.models.{family}.modeling_{family}", *liger]


def on_device() -> bool:
    """Whether this process has a context on a GPU, which takes memory of it."""
    import torch

    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    return any(torch._C._cuda_hasPrimaryContext(device) for device in devices)  # type: ignore[attr-defined]


def main() -> None:
    """Import, wait, be the arm."""
    began_s = time.monotonic()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    arm = importlib.import_module(ARM)
    for name in modules(spec):
        importlib.import_module(name)
    said = {"began_s": began_s, "ready_s": time.monotonic(), "on_device": on_device()}
    replies.write(json.dumps({"waiting": said}) + "\n")
    replies.flush()
    if sys.stdin.readline().strip() != "go":
        return  # the harness has ended, or has no use for this arm any more
    os.dup2(replies.fileno(), 1)
    replies.close()
    arm.main()


if __name__ == "__main__":
    main()
