"""ELO pretraining: train the detached layers on the mixture, embedding, final norm and head frozen (paper section 3.2).

Inputs on disk: a checkpoint and token shards. Output: snapshots under `RUN/pretrain/`, the last one being the result.
"""

from __future__ import annotations

from typing import Any

from elo_engine.corpora import make_mixture, open_heldout
from elo_engine.detach import Source, detach
from elo_engine.plan import require_memory
from elo_engine.run_dir import RunDir
from elo_engine.stage import run_stage


def pretrain(run: RunDir, source: Source) -> dict[str, Any]:
    """Run the stage to its end (or from its newest snapshot) and return its summary; see `run_stage`."""
    config = run.config
    memory = require_memory(config, source, "pretrain")
    mixture = make_mixture(config, source.folder, source.spec.V)
    heldout = open_heldout(config, source.folder, source.spec.V) if config.evaluate.every else None
    model = detach(source, run, recompute=config.pretrain.recompute == "layer")
    return run_stage(run, "pretrain", model, source.index, mixture, heldout, memory=memory)
