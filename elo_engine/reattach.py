"""Reattach: put the trained layers back into the original checkpoint (paper section 3.3).

Every shard is cloned and only the changed tensors' bytes are written, in the checkpoint's own dtype, so every other
byte is that of the source. Output: `RUN/reattached/`, published whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from elo_engine.checkpoint import CheckpointIndex, preflight_space, publish, rewrite_checkpoint
from elo_engine.detach import Source
from elo_engine.errors import FailedError, UsageError
from elo_engine.measure.meter import human_bytes
from elo_engine.model import names
from elo_engine.run_dir import RunDir
from elo_engine.train import state


def final_weights(run: RunDir, stage: str) -> dict[str, Tensor]:
    """fp32 weights of a finished stage by checkpoint name.

    Raises:
        UsageError: the stage has not run to its end.
    """
    folder = state.latest_snapshot(run.folder(stage), run.say)
    steps = run.config.steps("pretrain" if stage == "pretrain" else "align")
    if folder is None or folder != state.snapshot_folder(run.folder(stage), steps):
        at = folder.name if folder else "no snapshot"
        raise UsageError(
            f"{run.path}: {stage} is not finished ({at} of {steps} steps); run elo {stage} with --resume auto first"
        )
    return state.load_weights(folder)


def write_model(
    run: RunDir,
    index: CheckpointIndex,
    changed: dict[str, Tensor],
    target: Path,
    extra: dict[str, Any],
    card: str | None = None,
) -> None:
    """Publish a copy of the checkpoint with the changed tensors in it.

    Raises:
        RefusedError: the target exists or there is no room. FailedError: a changed tensor is not in the checkpoint,
        or not finite.
    """
    # some tied checkpoints store the head a second time; a changed embedding must change both or the tie is broken
    if names.EMBEDDING in changed and names.HEAD in index.entries and names.HEAD not in changed:
        changed = {**changed, names.HEAD: changed[names.EMBEDDING]}
    unknown = sorted(set(changed) - set(index.entries))
    if unknown:
        raise FailedError(f"{index.folder}: holds no tensor {unknown[0]!r}, so it cannot be written back")
    preflight_space(target, sum(shard.size for shard in index.shards.values()))
    with publish(target, extra=extra) as folder:
        stats = rewrite_checkpoint(index, changed, folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    run.say(
        f"wrote {target}: {len(changed)} of {len(index.entries)} tensors changed, "
        f"{human_bytes(stats.bytes_written)} written, "
        f"{human_bytes(stats.bytes_cloned)} cloned"
    )


def reattach(run: RunDir, source: Source) -> Path:
    """`RUN/pretrain` + the source checkpoint -> `RUN/reattached`; returns the folder, also when it is already there."""
    target = run.folder("reattached")
    if target.exists():
        run.say(f"reattach: {target} is already there")
        return target
    weights = final_weights(run, "pretrain")
    extra = {"kind": "reattached", "run_id": run.run_id, "source": source.index.identity()}
    write_model(run, source.index, weights, target, extra)
    return target
