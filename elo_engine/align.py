"""Layer alignment: train the whole reattached model briefly (paper section 3.3), with the loop of every other stage.

Without a reattached checkpoint in the run folder the source model itself is trained: that is full continual
pretraining, the paper's baseline. Output: `RUN/model/`, a checkpoint that loads wherever the source did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elo_engine.checkpoint import open_checkpoint
from elo_engine.config import RunConfig
from elo_engine.corpora import make_mixture, open_heldout
from elo_engine.detach import Source
from elo_engine.model.full import load_full
from elo_engine.reattach import final_weights, write_model
from elo_engine.run_dir import RunDir
from elo_engine.stage import log_model, run_stage


def align(run: RunDir, source: Source) -> dict[str, Any]:
    """Train the whole model and publish `RUN/model`; returns the stage's summary (empty when the model is already
    there).
    """
    config = run.config
    target = run.folder("model")
    if target.exists():
        run.say(f"align: {target} is already there")
        return {}
    start = run.folder("reattached")
    index = open_checkpoint(start) if start.exists() else source.index
    run.say(
        f"align: the whole model from {index.folder}"
        + ("" if start.exists() else " (nothing is reattached in this run: this is full continual pretraining)")
    )
    mixture = make_mixture(config, source.folder, source.spec.V)
    heldout = open_heldout(config, source.folder, source.spec.V) if config.evaluate.every else None
    model, _ = load_full(
        index, source.spec, device=source.device, dtype=source.dtype, recompute=config.align.recompute == "layer"
    )
    log_model(run, model, index)
    # after ELO pretraining the alignment goes on where that stopped reading; the paper's stages share no text either
    rows_read = config.steps("pretrain") * config.pretrain.tokens_per_step // config.data.sequence_length
    first_row = rows_read if start.exists() else 0
    summary = run_stage(run, "align", model, index, mixture, heldout, first_row=first_row)
    extra = {"kind": "aligned", "run_id": run.run_id, "source": source.index.identity()}
    write_model(run, index, final_weights(run, "align"), target, extra, _model_card(config, source, summary))
    return summary


def _model_card(config: RunConfig, source: Source, summary: dict[str, Any]) -> str:
    languages = ", ".join(f"{name} {weight:g}" for name, weight in (config.data.mix or {}).items()) or ", ".join(
        config.data.shards
    )
    base = Path(config.model).name or config.model
    steps = summary.get("tokens_total", 0)
    return f"""---
base_model: {base}
tags: [elo, continual-pretraining]
---
# {base}, taught by ELO

Continual pretraining by ELO (Efficient Layer-Specific Optimization, arXiv 2601.03648) with elo_engine: decoder layers
{list(source.layers)} of {source.spec.layers} were detached and trained on {config.pretrain.tokens:,} tokens, put back,
and the whole model was aligned on {steps:,} tokens.

* Mixture by tokens: {languages}; sequence length {config.data.sequence_length}; {config.data.packing} packing.
* Peak learning rates: {config.pretrain.optimizer.lr:g} for the detached layers, {config.align.optimizer.lr:g} for the
  alignment.
* Tokenizer and configuration are those of the base model, byte for byte; so are its licence and its limits.
"""
