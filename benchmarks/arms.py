"""The arms of the speed comparison. Started as `python arms.py ARM SPEC.json`; for each line on stdin, one step is
run and one JSON line with its seconds and loss is printed; the first line printed describes what trains.

Arms: `engine_shallow` and `transformers_shallow` (first and last layer, embedding, norm and head frozen),
`engine_full` and `transformers_full` (everything learns). Same weights, rows, labels, dtype, clipping and fused
AdamW; every row is one document. In bf16 the engine keeps fp32 masters and transformers, as a user runs it, does not.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig
from elo_engine.measure.environment import choose_device

Step = Callable[[Tensor, Tensor], Tensor]


def engine(
    spec: dict[str, Any], device: torch.device, dtype: torch.dtype, shallow: bool
) -> tuple[Step, dict[str, Any]]:
    """This engine's model and optimizer, as the training loop drives them."""
    from elo_engine.checkpoint import open_checkpoint
    from elo_engine.model import ops
    from elo_engine.model.decoder import Batch
    from elo_engine.model.full import load_full
    from elo_engine.model.layers import Packing
    from elo_engine.model.shallow import load_shallow
    from elo_engine.model.spec import read_spec
    from elo_engine.train.optim import MasterAdamW

    index = open_checkpoint(Path(spec["model"]))
    shape = read_spec(index.config)
    how = ops.configure("auto", device)
    if shallow:
        model, _ = load_shallow(index, shape, (0, shape.layers - 1), device=device, dtype=dtype)
    else:
        model, _ = load_full(index, shape, device=device, dtype=dtype)
    optimizer = MasterAdamW(model, OptimizerConfig(lr=spec["lr"]))

    def step(ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        B, T = ids_BT.shape
        packing = Packing([row * T for row in range(B + 1)], torch.arange(T, device=device).repeat(B))
        batch = Batch(ids_BT.reshape(-1), labels_BT.reshape(-1), packing, T)
        optimizer.zero_grad()
        loss = model.loss_sum(batch) / (labels_BT >= 0).sum()
        loss.backward()
        optimizer.step(spec["lr"])
        return loss.detach()

    return step, {"trains": sum(tensor.numel() for tensor in model.trainable().values()), "kernels": how}


def transformers(
    spec: dict[str, Any], device: torch.device, dtype: torch.dtype, shallow: bool
) -> tuple[Step, dict[str, Any]]:
    """transformers' own model, as a user would train it: SDPA attention, its own loss, torch's fused AdamW."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, attn_implementation="sdpa").to(device)
    model.config.use_cache = False
    if shallow:
        layers = model.model.layers
        model.model.layers = torch.nn.ModuleList([layers[0], layers[-1]])
        model.model.layers[1].self_attn.layer_idx = 1
        model.config.num_hidden_layers = 2
        model.requires_grad_(False)
        model.model.layers.requires_grad_(True)
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=spec["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids_BT, labels=ids_BT, shift_labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        return loss.detach()

    return step, {"trains": sum(parameter.numel() for parameter in learning)}


def main() -> None:
    """Serve steps until stdin ends."""
    arm, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    device = choose_device(spec["device"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["dtype"]]
    library, kind = arm.split("_")
    step, described = {"engine": engine, "transformers": transformers}[library](spec, device, dtype, kind == "shallow")
    with np.load(spec["rows"], allow_pickle=False) as arrays:
        ids_RT, labels_RT = (torch.from_numpy(arrays[name]).to(device) for name in ("ids_BT", "labels_BT"))
    print(json.dumps(described), flush=True)
    size = spec["micro_batch"]
    for number, _ in enumerate(sys.stdin):
        first = number * size % (len(ids_RT) - size + 1)
        began = time.perf_counter()
        loss = float(step(ids_RT[first : first + size], labels_RT[first : first + size]))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
