"""A run of several processes as its verbs see it: rank 0 has the run folder and speaks, the others follow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from elo_engine import console
from elo_engine.config import RunConfig
from elo_engine.errors import UsageError
from elo_engine.run_dir import RunDir
from elo_engine.train import world


class Follower(RunDir):
    """The same run on every process but rank 0: what is written elsewhere is read, and nothing is written."""

    def __init__(self, path: Path, config: RunConfig, run_id: str, anyway: bool) -> None:
        self.path, self.config, self.run_id, self.anyway = path, config, run_id, anyway

    def pin(self, revision: str | None) -> None:
        """Rank 0 writes it down."""
        if revision is not None:
            self.config = self.config.model_copy(update={"revision": revision})

    def settle(self, chosen: RunConfig, said: list[str]) -> None:
        """Rank 0 writes it down."""
        self.config = chosen

    def say(self, text: str) -> None:
        """Rank 0 says it."""

    def log(self, text: str) -> None:
        """Rank 0 logs it."""

    def metric(self, record: dict[str, Any]) -> None:
        """Rank 0 records it."""

    def status(self, **fields: Any) -> None:
        """Rank 0's is the run's."""

    def beat(self, doing: str | None = None) -> None:
        """Rank 0's is the run's."""

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Rank 0 writes it."""

    def close(self) -> None:
        """Holds nothing."""


def obtain_run(config: RunConfig, resume: bool, *, anyway: bool = False) -> RunDir:
    """`RunDir.obtain`, made by rank 0 and followed by the others, which show no progress of their own.

    Raises:
        UsageError: the rows of a step cannot be shared evenly, or what this run wants goes with one process alone. And
        what `RunDir.obtain` raises.
    """
    if world.size() == 1:
        return RunDir.obtain(config, resume, anyway=anyway)
    refuse_what_needs_one_process(config, world.size())
    mine: list[RunDir] = []

    def open_it() -> dict[str, str]:
        mine.append(RunDir.obtain(config, resume, anyway=anyway))
        run = mine[0]
        return {"path": os.fspath(run.path), "config": run.config.model_dump_json(), "run_id": run.run_id}

    told = world.first(open_it)
    if mine:
        mine[0].say(f"{world.size()} processes, each with its share of the rows of every step")
        return mine[0]
    console.err.quiet = True
    return Follower(Path(told["path"]), RunConfig.model_validate_json(told["config"]), told["run_id"], anyway)


def refuse_what_needs_one_process(config: RunConfig, processes: int) -> None:
    """What cannot be made by so many processes; nothing where there is one.

    Raises:
        UsageError: steps that do not divide, interleaved stages, a streamed model, or 8-bit state of one in shares.
    """
    if processes == 1:
        return
    for name in ("pretrain", "align"):
        section = config.pretrain if name == "pretrain" else config.align
        world.require_whole_shares(section.tokens_per_step // config.data.sequence_length, name, processes)
    if config.align.when == "interleaved":
        raise UsageError(
            f"align.when: interleaved is for one process, and there are {processes}; set align.when: after, or "
            "start without torchrun"
        )
    if config.align.engine == "streamed":
        raise UsageError(
            f"align.engine: streamed is for one process, and there are {processes}; set align.engine: auto, which "
            "spreads the model over them, or start without torchrun"
        )
    if config.align.engine == "auto":
        world.require_whole_leaves(config.align.optimizer.state, processes)
