"""One of two processes of tests/test_planner_processes.py: the traced peak of a step of each case.

`ranks(2, ..., OUT)`: rank r writes OUT/r.json, the peaks in the order of `CASES` and what gloo copies, in bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from planner_cases import case, llama, measured_peak, only_what_is_made_here
from torch import Tensor

from elo_engine.measure.setting import ArmName, Processes, Setting
from elo_engine.measure.tensor_trace import traced_tensor_bytes
from elo_engine.train import world

GLOO_BYTES = 1 << 20
# What weighs most: activations, logits, or weights. Rows that do not divide by two are padded.
LONG, LOGITS = (llama(4, 301, 128, 351, 4, 2, tied=False), 256, 1), (llama(3, 4001, 64, 160, 2, 2, tied=True), 32, 2)
WEIGHTS = (llama(4, 3001, 192, 512, 4, 2, tied=False), 16, 1)
STEPS: list[tuple[ArmName, tuple[Any, int, int], dict[str, Any]]] = [
    ("elo_align", LONG, {}),
    ("elo_align", LONG, {"dtype": "bf16", "recompute": "layer", "micro_batches": 2}),
    ("elo_align", LOGITS, {"dtype": "bf16", "recompute": "selective", "micro_batches": 2}),
    ("elo_align", WEIGHTS, {"recompute": "layer"}),
    ("elo_align", WEIGHTS, {"dtype": "bf16", "micro_batches": 2}),
    ("elo_pretrain", WEIGHTS, {"dtype": "bf16"}),
    ("elo_pretrain", WEIGHTS, {"micro_batches": 2, "state": "8bit"}),
    ("engine_full", WEIGHTS, {"dtype": "bf16"}),
]
CASES: list[Setting] = [
    replace(case(arm, *size, **fields), processes=Processes(2, 2), sharded=arm == "elo_align")
    for arm, size, fields in STEPS
]


def _uses(tensor: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


@contextmanager
def _released(tensor: Tensor) -> Iterator[None]:
    """gloo's threads have let go of views of a tensor when the block ends: what they free, no trace sees."""
    before = _uses(tensor)
    yield
    while _uses(tensor) > before:
        time.sleep(0.0002)


def _gather(output: Tensor, piece: Tensor, group: Any = None, async_op: bool = False) -> None:
    with _released(output):
        for rank in range(world.size()):
            dist.broadcast(output.view(world.size(), -1)[rank], rank)


def _reduce_scatter(output: Tensor, input: Tensor, group: Any = None, op: Any = None, async_op: bool = False) -> None:
    with _released(input):
        dist.all_reduce(input.view(-1))
    output.copy_(input.chunk(world.size())[world.rank()])


def in_place() -> None:
    """Collectives that copy nothing meanwhile, as NCCL's; of gloo's own the copies are freed by its threads."""
    for name in ("all_gather_single", "all_gather_into_tensor"):  # the second before torch 2.13
        setattr(dist, name, _gather)
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        setattr(dist, name, _reduce_scatter)


def copied() -> list[int]:
    """What gloo's own collectives take beside a whole of `GLOO_BYTES`: all-gather and reduce-scatter."""
    whole = torch.zeros(GLOO_BYTES // 4)
    piece = whole.chunk(world.size())[0].clone()
    found = []
    for collective in (
        lambda: dist.all_gather_single(whole, piece, async_op=True),
        lambda: dist.reduce_scatter_single(piece, whole, async_op=True),
    ):
        with traced_tensor_bytes() as trace:
            collective().wait()
        found.append(trace.peak_bytes - trace.base_bytes)
    return found


def main(out: Path) -> None:
    with only_what_is_made_here():
        found = {"copied": copied()}
        in_place()
        found["peaks"] = [measured_peak(setting) for setting in CASES]
    (out / f"{world.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with world.joined("cpu"):
        main(Path(sys.argv[1]))
