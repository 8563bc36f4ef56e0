"""Full continual pretraining in transformers, timed over a few steps in a process of its own: what ELO is held
against.

Run as `python -m elo_engine.measure.transformers_baseline SPEC.json`; prints one JSON object. SPEC: `model` (folder),
`rows` (an .npz with ids_BT and labels_BT, one array of S * B rows), `micro_batch`, `warmup`, `steps`, `dtype`, `lr`.
Every parameter learns, AdamW is torch's fused one, attention is SDPA, no gradient checkpointing: the fastest plain
recipe on this device.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elo_engine.errors import FailedError
from elo_engine.measure.environment import choose_device


def time_steps(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each timed step; loss first and last, so that a reader sees that it learns.

    Raises:
        FailedError: a parameter got no gradient, so the timing would not be of full training.
    """
    from transformers import AutoModelForCausalLM

    device = choose_device(spec.get("device", "auto"))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, attn_implementation="sdpa").to(device)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    with np.load(spec["rows"], allow_pickle=False) as arrays:
        ids_RT, labels_RT = (torch.from_numpy(arrays[name]).to(device) for name in ("ids_BT", "labels_BT"))
    size, seconds, losses = spec["micro_batch"], [], []
    for step in range(spec["warmup"] + spec["steps"]):
        rows = slice(step * size % len(ids_RT), step * size % len(ids_RT) + size)
        _wait(device)
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        # labels_RT hold the next token already; shift_labels hands them over as they are
        loss = model(input_ids=ids_RT[rows], labels=ids_RT[rows], shift_labels=labels_RT[rows]).loss
        loss.backward()
        if step == 0:
            idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
            if idle:
                raise FailedError(f"the baseline does not train {idle[0]}, so it is no full continual pretraining")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        _wait(device)
        if step >= spec["warmup"]:
            seconds.append(time.perf_counter() - began)
    return {
        "step_s": seconds,
        "tokens_per_step": size * ids_RT.shape[1],
        "losses_nats": losses,
        "parameters_trained": sum(parameter.numel() for parameter in model.parameters()),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Read the specification named on the command line and print the result."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(time_steps(spec)))


if __name__ == "__main__":
    main()
