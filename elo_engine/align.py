"""Layer alignment: train the whole reattached model briefly (paper section 3.3), with the loop of every other stage.
With `align.when: interleaved` its steps are spread through ELO pretraining, and both are this one stage.

Without a reattached checkpoint in the run folder the source model itself is trained: that is full continual
pretraining, the paper's baseline. Output: `RUN/model/`, a checkpoint that loads wherever the source did.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elo_engine import console, graphs
from elo_engine.calibrate import Calibration, obtain_bridge
from elo_engine.checkpoint import CheckpointIndex, open_checkpoint
from elo_engine.config import RunConfig
from elo_engine.corpora import make_mixture, open_heldout
from elo_engine.detach import Source
from elo_engine.engine_choice import EngineChoice
from elo_engine.errors import UsageError
from elo_engine.evaluate import Scorer, batch_tokens
from elo_engine.measure.expected import StageMemory, stage_memory
from elo_engine.model.full import load_full
from elo_engine.model.names import expected_shapes
from elo_engine.out_of_memory import explained
from elo_engine.plan import align_engine, settle
from elo_engine.reattach import final_weights, write_model
from elo_engine.run_dir import RunDir
from elo_engine.stage import StageEngine, log_model, run_stage
from elo_engine.stream.engine import open_streamed
from elo_engine.stream.interleaved import StreamedInterleaving, WholeTurn
from elo_engine.stream.scoring import LayerMajorScorer, why_not
from elo_engine.summary import stage_summary
from elo_engine.train import world
from elo_engine.train.interleaved import InterleavedEngine
from elo_engine.train.optim import MasterAdamW


def align(run: RunDir, source: Source) -> dict[str, Any]:
    """Train the whole model and publish `RUN/model`, unless it is already there; returns the stage's summary."""
    settle(run, source)
    config = run.config
    target = run.folder("model")
    if target.exists():
        run.say(f"align: {target} is already there")
        return stage_summary(run.path, "align")
    choice = align_engine(config, source)
    run.say(f"align: {choice.engine}, {choice.why}")
    memory = StageMemory.now(stage_memory(choice.setting), source.device)  # what does not fit is refused by now
    start = run.folder("reattached")
    index = open_checkpoint(start) if start.exists() else source.index
    run.say(
        f"align: the whole model from {index.folder}"
        + ("" if start.exists() else " (nothing is reattached in this run: this is full continual pretraining)")
    )
    mixture = make_mixture(config, source.folder, source.spec.V)
    heldout = open_heldout(config, source.folder, source.spec.V) if config.evaluate.every else None
    interleaved = config.align.when == "interleaved"
    if interleaved and start.exists():
        raise UsageError(
            f"{start}: was trained with align.when: after; interleaved begins with the source model, in another output "
            "folder"
        )
    fitted = obtain_bridge(run, source, mixture, keep_statistics=True) if interleaved else None
    if fitted is not None:  # its pass has left its own mark on the process
        memory = StageMemory.now(memory.predicted, source.device)
    # after ELO pretraining the alignment goes on where that stopped reading; the paper's stages share no text either
    rows_read = config.steps("pretrain") * config.pretrain.tokens_per_step // config.data.sequence_length
    first_row = rows_read if start.exists() else 0
    with explained(run, source, "align", memory, choice.setting):
        engine = _load(run, source, index, choice, fitted)
        del fitted  # its maps in fp32
        scorers: dict[str, Scorer] = {"whole": engine.scorer}
        if heldout is not None and isinstance(scorers["whole"], LayerMajorScorer):
            reason = why_not(scorers["whole"], batch_tokens(heldout.sequence_length))
            if reason:
                run.say(f"align: the held-out loss is not followed: {reason}")
                scorers = {}
        summary = run_stage(
            run, "align", engine, index, mixture, scorers, heldout,
            memory=memory, setting=choice.setting, first_row=first_row,
        )  # fmt: skip
    extra = {"kind": "aligned", "run_id": run.run_id, "source": source.index.identity()}
    reattached = start.exists() or interleaved

    def write() -> None:
        card = _model_card(config, source, summary, reattached=reattached)
        write_model(run, index, final_weights(run, "align", index), target, extra, card)

    world.first(write)
    return summary


def _load(
    run: RunDir, source: Source, index: CheckpointIndex, choice: EngineChoice, fitted: Calibration | None
) -> StageEngine:
    """The whole model: on the device, in shares of several processes, or in a store of the host. `fitted`: what begins
    as the bridge of interleaved steps.
    """
    config, spec = run.config, source.spec
    section = config.align
    bridges, statistics = ({}, {}) if fitted is None else (fitted.bridges, fitted.statistics)
    turns = section.when == "interleaved"
    if turns:
        steps = config.steps("align"), config.steps("pretrain")
        run.say("align: interleaved, {} whole-model steps among {} of the detached layers".format(*steps))
    with console.bytes_bar("load the whole model") as bar:
        progress = run.beating("loading", bar)
        if choice.engine == "sharded":
            graphs.launched(config, "align", graphs.SEVERAL, source.device, run.say)
            from elo_engine.model.sharded import load_sharded  # torch.distributed is for those who use it
            from elo_engine.train.sharded import ShardedAdamW, ShardedEngine

            shares, _ = load_sharded(
                index, spec, device=source.device, dtype=source.dtype, recompute=section.runs_again,
                progress=progress,
            )  # fmt: skip
            log_model(run, set(expected_shapes(spec)), set(), index)
            return ShardedEngine(shares, ShardedAdamW(shares, section.optimizer), section.rows_at_once)
        if choice.streaming is None:
            model, _ = load_full(
                index,
                spec,
                device=source.device,
                dtype=source.dtype,
                recompute=section.runs_again,
                progress=progress,
            )
            log_model(run, set(model.trainable()), set(model.frozen()), index)
            if turns:
                how = graphs.graphing_turns(config, model, run.say, choice.setting)
                return InterleavedEngine(model, source.layers, config, bridges=bridges, statistics=statistics, how=how)
            optimizer = MasterAdamW(model, section.optimizer, seed=config.seed)
            return graphs.resident_engine(config, "align", model, optimizer, run.say)
        graphs.launched(config, "align", graphs.LAYER_BY_LAYER, source.device, run.say)
        if turns:
            graphs.launched(config, "pretrain", graphs.BESIDE_STREAMED, source.device, run.say)
        engine = open_streamed(
            spec, source.dtype, section, source.device, choice.streaming, config.data.sequence_length,
            seed=config.seed, folder=run.path, apart=source.layers if turns else (), kind=WholeTurn if turns else None,
        )  # fmt: skip
        engine.store.load(index, progress)
    if isinstance(engine, WholeTurn):
        both = StreamedInterleaving(engine, source.layers, config, bridges=bridges, statistics=statistics)
        log_model(run, both.trainable(), set(), index)
        return both
    log_model(run, set(engine.trainable()), set(), index)
    return engine


def _model_card(config: RunConfig, source: Source, summary: dict[str, Any], *, reattached: bool) -> str:
    mix = config.data.mix
    languages = (
        ", ".join(f"{name} {weight:g}" for name, weight in mix.items()) if mix else ", ".join(config.data.shards)
    )
    # a hub id is the base model's name; of a folder only its own name means something elsewhere
    base = source.folder.name if Path(config.model).expanduser().is_dir() else config.model
    aligned, rate = summary.get("tokens_total", 0), config.align.optimizer.lr
    title, tags = f"{base}, continually pretrained", "[continual-pretraining]"
    how = f"Full continual pretraining of the whole model on {aligned:,} tokens (peak learning rate {rate:g})."
    if reattached:
        title, tags = f"{base}, taught by ELO", "[continual-pretraining, elo]"
        pretrained = config.steps("pretrain") * config.pretrain.tokens_per_step
        how = (
            "Continual pretraining by ELO (Efficient Layer-Specific Optimization, arXiv 2601.03648): layers "
            f"{list(source.layers)} of {source.spec.layers} were detached and trained on {pretrained:,} tokens (peak "
            f"learning rate {config.pretrain.optimizer.lr:g}), put back, and the whole model aligned on {aligned:,} "
            f"tokens (peak learning rate {rate:g})."
        )
        if config.align.when == "interleaved":
            how += " Steps of both kinds took turns."
    return f"""---
base_model: {base}
tags: {tags}
---
# {title}

{how} Made with elo_engine.

* Mixture by tokens: {languages}; sequence length {config.data.sequence_length}; {config.data.packing} packing.
* Tokenizer and configuration are those of the base model, byte for byte; so are its licence and its limits.
"""
