"""One of two processes of tests/test_adding_up.py: a few steps on its share of the rows, under one of several plans.

`torchrun ... adding_up_process.py PLAN OUT`: rank r writes OUT/r.json, with the events of the last step and what went
wrong, and OUT/r.pt.safetensors, its weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from planner_cases import Rows, case, llama
from safetensors.torch import save_file

from elo_engine.config import OptimizerConfig
from elo_engine.errors import FailedError
from elo_engine.model import names, ops
from elo_engine.model.decoder import Decoder
from elo_engine.train import adding_up, world
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

SPEC = llama(3, 300, 64, 160, 4, 2, tied=False)
STEPS = 3


def main(plan: str, out: Path) -> None:
    ops.configure("auto", torch.device("cpu"))
    dtype = torch.bfloat16 if "bf16" in plan else torch.float32
    whole = "whole" in plan
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.05).to(dtype)
        for name, shape in names.expected_shapes(SPEC).items()
    }
    layers = (0, 1, 2) if whole else (0, 2)
    again: Any = "layer" if "layer" in plan else "selective" if "selective" in plan else "none"
    model = Decoder(SPEC, tensors, layers, train_outer=whole, recompute=again)
    optimizer = MasterAdamW(model, OptimizerConfig(lr=1e-2))
    engine, rows = ResidentEngine(model, optimizer, 1), Rows(case("elo_pretrain", SPEC, 32, 1))
    events: list[str] = []
    begin_sum, sums = world.begin_sum, optimizer._grads._sums
    if sums is not None:
        numbers = {id(leaf.tensor): i for i, leaf in enumerate(model.leaves)}

        def begun(tensor: torch.Tensor) -> Any:
            events.append("sum")
            return begin_sum(tensor)

        world.begin_sum = begun  # type: ignore[assignment]
        if "at the end" in plan:
            sums.begin = lambda: None  # type: ignore[method-assign]
        if world.rank() == 1 and "late" in plan:  # gradients that arrive in another order than rank 0's
            arrived, held = sums.arrived, list[int]()

            def late(i: int) -> None:
                held.append(i)
                if len(held) == len(numbers):
                    for j in reversed(held):
                        arrived(j)
                    held.clear()

            sums.arrived = late  # type: ignore[method-assign]
            for i, leaf in enumerate(model.leaves):
                leaf.tensor._post_accumulate_grad_hooks.clear()
                leaf.tensor.register_post_accumulate_grad_hook(lambda _, i=i: late(i))  # type: ignore[misc]
    backward = torch.Tensor.backward

    def timed(self: torch.Tensor, *args: Any, **options: Any) -> None:
        events.append("backward begins")
        backward(self, *args, **options)
        events.append("backward ends")

    torch.Tensor.backward = timed  # type: ignore[method-assign,assignment]
    failed = ""
    try:
        for step in range(STEPS):
            events.clear()
            if step == 1 and world.rank() == 1 and sums is not None:
                assert isinstance(sums, adding_up.AddingUp) and sums._order is not None
                if "wrong order" in plan:  # two gradients of one shape change places on this process alone
                    same = [i for i in sums._order if model.leaves[i].tensor.shape == (SPEC.D,)]
                    a, b = (sums._order.index(i) for i in same[:2])
                    sums._order[a], sums._order[b] = sums._order[b], sums._order[a]
            engine.step(rows.rows(4 * step, 4), 128, 1e-2, first=step == 0, should_stop=lambda: False)
        world.require_equal(list(optimizer.weights().values()), "the weights")
    except FailedError as error:
        failed = str(error)
    (out / f"{world.rank()}.json").write_text(json.dumps({"events": events, "failed": failed}))
    save_file({name: w.clone() for name, w in optimizer.weights().items()}, out / f"{world.rank()}.safetensors")


if __name__ == "__main__":
    with world.joined("cpu"):
        main(sys.argv[1], Path(sys.argv[2]))
