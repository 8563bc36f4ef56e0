"""ELO pretraining: train the detached layers on the mixture, embedding, final norm and head frozen (paper section 3.2).

Inputs on disk: a checkpoint and token shards. Output: snapshots under `RUN/pretrain/`, the last one being the result.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from elo_engine.config import RunConfig, StageConfig
from elo_engine.corpora import make_mixture, open_heldout
from elo_engine.detach import Source, detach
from elo_engine.errors import RefusedError
from elo_engine.measure.flops import full_step, ideal_speedup, shallow_step
from elo_engine.measure.meter import human_bytes
from elo_engine.run_dir import RunDir
from elo_engine.stage import run_stage


def state_bytes(stage: StageConfig, T: int, width: int) -> float:
    """Bytes a trainable parameter takes on the device: weight, gradient, optimizer state, and a compute copy where it
    is not the weight itself. A bf16 gradient is widened only when a second micro-batch adds to it.
    """
    once = stage.tokens_per_step <= stage.micro_batch * T
    gradient = width if once else 4
    if stage.optimizer.state == "8bit":
        return width + gradient + 2 + 2 * 4 / 256  # two codes, and two fp32 scales for 256 of them
    return 4 + gradient + 8 + (width if width == 2 else 0)


def plan(config: RunConfig, source: Source) -> dict[str, Any]:
    """What the stages will do, counted from shapes alone; written to `plan.json` and shown by `--dry-run`."""
    spec, T = source.spec, config.data.sequence_length
    shallow, full = shallow_step(spec, len(source.layers), T), full_step(spec, T)
    trains = len(source.layers) * spec.layer_parameters
    width = 2 if str(source.dtype) == "torch.bfloat16" else 4
    outer = spec.V * spec.D * (1 if spec.tied else 2) + spec.D
    share = config.pretrain.tokens / (config.pretrain.tokens + config.align.tokens)
    return {
        "model": {"family": spec.family, "layers": spec.layers, "parameters": spec.parameters, "tied": spec.tied},
        "device": str(source.device),
        "dtype": str(source.dtype).removeprefix("torch."),
        "detached_layers": list(source.layers),
        "pretrain": {
            "steps": config.steps("pretrain"),
            "tokens": config.pretrain.tokens,
            "trainable_parameters": trains,
            "weights_and_state_bytes": outer * width + int(trains * state_bytes(config.pretrain, T, width)),
            "flops_per_token": shallow.total,
        },
        "align": {
            "steps": config.steps("align"),
            "tokens": config.align.tokens,
            "trainable_parameters": spec.parameters,
            "weights_and_state_bytes": int(spec.parameters * state_bytes(config.align, T, width)),
            "flops_per_token": full.total,
        },
        "warning": ""
        if not 0 < spec.max_positions < T
        else f"data.sequence_length {T} is more than the {spec.max_positions} positions this model was trained for",
        "flops_ratio": shallow.total / full.total,
        "ideal_pipeline_speedup": ideal_speedup(spec, len(source.layers), T, share),
    }


def describe_plan(plan: dict[str, Any]) -> list[str]:
    """The plan in a few lines."""
    lines = [
        f"model: {plan['model']['family']}, {plan['model']['layers']} layers, "
        f"{plan['model']['parameters'] / 1e6:.1f}M parameters, "
        f"{'tied' if plan['model']['tied'] else 'untied'} head; {plan['device']}, {plan['dtype']}"
    ]
    for stage in ("pretrain", "align"):
        part = plan[stage]
        lines.append(
            f"{stage}: {part['steps']} steps, {part['tokens']:,} tokens, "
            f"{part['trainable_parameters'] / 1e6:.1f}M trainable, weights "
            f"and state {human_bytes(part['weights_and_state_bytes'])}, {part['flops_per_token'] / 1e9:.2f} GFLOP/token"
        )
    if plan["warning"]:
        lines.append(f"warning: {plan['warning']}")
    lines.append(f"ideal pipeline speedup from the operations alone: {plan['ideal_pipeline_speedup']:.2f}x")
    return lines


def require_memory(config: RunConfig, source: Source, stage: Literal["pretrain", "align"]) -> None:
    """Raises RefusedError, with numbers, when a stage's weights and optimizer state alone exceed the GPU's memory."""
    if source.device.type != "cuda":
        return
    need = plan(config, source)[stage]["weights_and_state_bytes"]
    there = torch.cuda.get_device_properties(source.device).total_memory
    if need > there:
        raise RefusedError(
            f"{stage}: weights, gradients and optimizer state need {human_bytes(need)} and the GPU has "
            f"{human_bytes(there)}; "
            "train fewer layers (detach.layers), or run this stage on a larger card: the run folder can be moved"
        )


def pretrain(run: RunDir, source: Source) -> dict[str, Any]:
    """Run the stage to its end (or from its newest snapshot) and return its summary; see `run_stage`."""
    config = run.config
    require_memory(config, source, "pretrain")
    mixture = make_mixture(config, source.folder, source.spec.V)
    heldout = open_heldout(config, source.folder, source.spec.V) if config.evaluate.every else None
    model = detach(source, run, recompute=config.pretrain.recompute == "layer")
    return run_stage(run, "pretrain", model, source.index, mixture, heldout)
