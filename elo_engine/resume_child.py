"""A process of `elo verify-resume`: one stage of one run, to its end or killed on the way, and nothing after it.

`python -m elo_engine.resume_child CONFIG STAGE STEP DETERMINISTIC`: STEP above 0 is the last one before SIGKILL.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from elo_engine import console
from elo_engine.errors import EloError
from elo_engine.run_dir import RunDir


class StageRan(Exception):
    """The stage is at its end, its last snapshot is written."""


class WatchedRun(RunDir):
    """A run folder that ends its process.

    Attributes:
        last: step after which the process is killed, once the next one is on record; 0: it is not.
    """

    last = 0

    def metric(self, record: dict[str, Any]) -> None:
        """See `RunDir.metric`."""
        super().metric(record)
        if record.get("event") == "stage ran":
            raise StageRan  # a whole model would be written next
        if self.last and "lr" in record and record.get("at", record["step"]) > self.last:
            os.kill(os.getpid(), signal.SIGKILL)  # nothing is flushed, no handler runs


def main(config_path: str, stage: str, last: str, deterministic: str) -> int:
    """Exit status 0 at the end of the stage; that of the error otherwise."""
    import torch

    from elo_engine.align import align
    from elo_engine.config import load_config
    from elo_engine.detach import open_source
    from elo_engine.pretrain import pretrain

    if deterministic == "1":
        torch.use_deterministic_algorithms(True)
    try:
        config = load_config(Path(config_path))
        with WatchedRun.obtain(config, resume=True) as run:
            assert isinstance(run, WatchedRun)
            run.last = int(last)
            try:
                (pretrain if stage == "pretrain" else align)(run, open_source(config))
            except StageRan:
                return 0
    except EloError as error:
        console.err.print(f"error: {error}", markup=False)
        return error.exit_status
    console.err.print(f"error: the stage {stage} ended without a record of it")
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
