"""Reattach: put the trained layers back into the original checkpoint (paper section 3.3).

Every shard is cloned and only the changed tensors' bytes are written, in the checkpoint's own dtype, so every other
byte is that of the source. The trained weights go from the snapshot's file into the output's shards through a buffer
of a few MiB. Output: `RUN/reattached/`, published whole or not at all.

Unchanged shards share the source's extents where the filesystem can; otherwise they are copies, unless the
configuration says `hard_links: true`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from elo_engine import console
from elo_engine.checkpoint import (
    CheckpointIndex,
    Pieces,
    RewriteStats,
    StoredTensor,
    preflight_space,
    publish,
    rewrite_checkpoint,
    space_needed,
)
from elo_engine.detach import Source
from elo_engine.errors import FailedError, RefusedError, UsageError
from elo_engine.measure.meter import human_bytes
from elo_engine.model import names
from elo_engine.run_dir import RunDir
from elo_engine.train import state, world


def final_weights(run: RunDir, stage: str, index: CheckpointIndex) -> dict[str, StoredTensor]:
    """Weights of a finished stage by checkpoint name, left on the disk: `write_model` reads them piece by piece.

    Raises:
        UsageError: the stage has not run to its end. RefusedError: it was trained from another checkpoint than `index`.
    """
    folder = state.latest_snapshot(run.folder(stage), run.say)
    steps = run.config.last_step("pretrain" if stage == "pretrain" else "align")
    if folder is None or folder != state.snapshot_folder(run.folder(stage), steps):
        at = folder.name if folder else "no snapshot"
        raise UsageError(
            f"{run.path}: {stage} is not finished ({at} of {steps} steps); run elo {stage} with --resume auto first"
        )
    before = state.read_state(folder)["identity"].get("checkpoint")
    if before != index.identity():
        raise RefusedError(
            f"{index.folder}: is not the checkpoint that {folder} was trained from (identity {str(before)[:12]}, now "
            f"{index.identity()[:12]}); put that one back in its place, or start a new run in another output folder"
        )
    return state.stored_weights(folder)


def write_model(
    run: RunDir,
    index: CheckpointIndex,
    changed: Mapping[str, Tensor | Pieces],
    target: Path,
    extra: dict[str, Any],
    card: str | None = None,
    *,
    hard_links: bool | None = None,
) -> None:
    """Publish a copy of the checkpoint with the changed tensors in it; `hard_links` None: as the configuration says.

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
    if index.remote is not None:  # a hub's model, of which only the detached tensors have been fetched
        with console.bytes_bar(f"fetch the rest of {index.folder.parent.name}") as progress:
            index = index.completed(progress)
    hard_links = run.config.hard_links if hard_links is None else hard_links
    preflight_space(target, space_needed(index, changed, target, hard_links))
    total = sum(shard.size for shard in index.shards.values())
    run.beat("writing")
    with (
        console.progress_bar(f"write {target.name} (bytes)", total) as bar,
        publish(target, extra=extra) as folder,
    ):
        told = run.beating("writing", lambda done, _: bar(done, ""))
        stats = rewrite_checkpoint(index, changed, folder, told, hard_links=hard_links)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    run.say(f"wrote {target}: {len(changed)} of {len(index.entries)} tensors changed, {describe_rewrite(stats)}")
    if stats.not_linked:
        run.say(f"hard links were asked for and declined, so shards were cloned: {stats.not_linked}")


def describe_rewrite(stats: RewriteStats) -> str:
    """How the shards' bytes came about, naming only the ways that were taken."""
    ways = (
        (stats.bytes_cloned, "shared with the source"),
        (stats.bytes_copied, "copied"),
        (stats.bytes_linked, "in hard links to the source"),
    )
    parts = [f"{human_bytes(stats.bytes_written)} written", *(f"{human_bytes(n)} {way}" for n, way in ways if n)]
    return ", ".join(parts)


def refuse_interleaved(run: RunDir, verb: str) -> None:
    """Where alignment is interleaved, there is no stage of its own to do.

    Raises:
        UsageError: `align.when: interleaved`.
    """
    if run.config.align.when == "interleaved":
        raise UsageError(
            f"elo {verb}: align.when is interleaved, so pretraining and alignment are one stage that trains the whole "
            "model in place, and nothing is reattached; use elo run, or elo align, or set align.when: after"
        )


def reattach(run: RunDir, source: Source, *, hard_links: bool | None = None) -> Path:
    """`RUN/pretrain` + the source checkpoint -> `RUN/reattached`; returns the folder, also when it is already there.

    hard_links: as in `write_model`.
    """
    target = run.folder("reattached")
    if target.exists():
        run.say(f"reattach: {target} is already there")
        return target
    refuse_interleaved(run, "reattach")
    extra = {"kind": "reattached", "run_id": run.run_id, "source": source.index.identity()}

    def write() -> None:
        weights = final_weights(run, "pretrain", source.index)
        write_model(run, source.index, weights, target, extra, hard_links=hard_links)

    world.first(write)
    return target
