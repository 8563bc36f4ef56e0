"""ELO pretraining: train the detached layers on the mixture, embedding, final norm and head frozen (paper section 3.2).

Inputs on disk: a checkpoint and token shards. Output: snapshots under `RUN/pretrain/`, the last one being the result.
With `detach.bridge: linear` frozen maps stand in for the missing layers while it trains; the result has none of them.
"""

from __future__ import annotations

from typing import Any

from elo_engine.calibrate import obtain_bridge
from elo_engine.corpora import make_mixture, open_heldout
from elo_engine.detach import Source, detach
from elo_engine.evaluate import Scorer, batch_tokens
from elo_engine.fp8_check import begin_fp8, refuse_without_fp8
from elo_engine.graphs import resident_engine
from elo_engine.measure.expected import StageMemory
from elo_engine.out_of_memory import explained
from elo_engine.plan import require_memory, setting_of, settle
from elo_engine.reattach import refuse_interleaved
from elo_engine.run_dir import RunDir
from elo_engine.stage import run_stage
from elo_engine.stream.scoring import whole_model_scorer, why_not
from elo_engine.train import world
from elo_engine.train.optim import MasterAdamW


def pretrain(run: RunDir, source: Source) -> dict[str, Any]:
    """Run the stage to its end (or from its newest snapshot) and return its summary; see `run_stage`."""
    refuse_interleaved(run, "pretrain")
    settle(run, source)
    config = run.config
    refuse_without_fp8(config, source.spec, source.device, source.dtype)
    memory = require_memory(config, source, "pretrain")
    mixture = make_mixture(config, source.folder, source.spec.V)
    heldout = open_heldout(config, source.folder, source.spec.V) if config.evaluate.every else None
    section = config.pretrain
    bridge = world.first_then_others(lambda: obtain_bridge(run, source, mixture))
    if bridge is not None:  # its pass has left its own mark on the process
        memory = StageMemory.now(memory.predicted, source.device)
    bridges = None if bridge is None else bridge.bridges
    setting = setting_of(config, source, "pretrain")
    with explained(run, source, "pretrain", memory, setting):
        model = detach(source, run, recompute=section.runs_again, bridges=bridges)
        del bridge, bridges
        begin_fp8(run, model, mixture)
        optimizer = MasterAdamW(model, section.optimizer, seed=config.seed)
        engine = resident_engine(config, "pretrain", model, optimizer, run.say)
        scorers: dict[str, Scorer] = {"shallow": engine.scorer}
        if heldout is not None and config.evaluate.whole:
            whole = whole_model_scorer(source.index, model)
            reason = why_not(whole, batch_tokens(heldout.sequence_length))
            if reason:
                run.say(f"pretrain: the whole model's held-out loss is not followed: {reason}")
            else:
                scorers["whole"] = whole
        return run_stage(
            run, "pretrain", engine, source.index, mixture, scorers, heldout, memory=memory, setting=setting
        )
