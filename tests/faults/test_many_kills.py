"""SIGKILL at random moments of real runs, by the clock: where the process is then, nobody chose.

The suite kills a few times; docs/reliability.md has what `ELO_KILLS=200 pytest tests/faults/test_many_kills.py` found.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_fixture import Processes, differing, final_state, leftovers, records

Tree = dict[str, Any]
KILLS = int(os.environ.get("ELO_KILLS", "8"))
WAYS = [("resident", "after"), ("streamed", "after"), ("resident", "interleaved"), ("streamed", "interleaved")]


@pytest.mark.parametrize(("engine", "when"), WAYS)
def test_killed_by_the_clock(
    engine: str, when: str, run_tree: Tree, write_config: Callable[..., Path], processes: Processes,
    straight: Callable[..., dict[str, bytes]], tmp_path: Path,
) -> None:  # fmt: skip
    """Each kill is followed by a resumption, until the run is at its end; then another run begins. At its end the
    weights, moments and files are those of a run that nothing disturbed."""
    run_tree["align"] |= {"engine": engine, "when": when, "tokens": 12 * 128}
    run_tree["pretrain"]["tokens"] = 24 * 128
    run_tree["evaluate"]["every"] = 5
    every = run_tree["snapshot"]["every"]
    source = {path.name: path.read_bytes() for path in Path(run_tree["model"]).iterdir()}
    processes()  # what is measured below is a run, not the start of the process that forks
    began = time.monotonic()
    wanted = straight()
    whole_s = time.monotonic() - began
    chance, wished, killed, finished = random.Random(f"{engine} {when}"), -(-KILLS // len(WAYS)), 0, 0
    moments: dict[str, int] = {}
    while killed < wished:
        run, of_this_run = tmp_path / f"run-{finished}", 0
        config = write_config(run_tree | {"output": str(run)})
        while True:
            # short enough to strike, and now and then long enough to get on
            limit = chance.uniform(0.02, 0.6) * whole_s if killed < wished else 0.0
            status, shown = processes("run", config, "--resume", "auto", kill_after_s=limit)
            assert status in (0, -9), shown
            if status == 0:
                break
            killed, of_this_run = killed + 1, of_this_run + 1
            doing = json.loads((run / "STATUS").read_text()) if (run / "STATUS").exists() else {}
            at = f"{doing.get('stage', 'start')} {doing.get('doing', '')}".strip()
            moments[at] = moments.get(at, 0) + 1
            assert len(leftovers(run)) <= 1
        finished += 1
        assert differing(wanted, final_state(run)) == []
        assert leftovers(run) == []
        assert {path.name: path.read_bytes() for path in Path(run_tree["model"]).iterdir()} == source
        assert all(record["bit_exact"] for record in records(run) if record.get("event") == "resumed")
        done = [(record["stage"], record["step"]) for record in records(run) if "lr" in record]
        assert len(done) - len(set(done)) <= of_this_run * every, "no more than that is lost by a kill"
    print(f"{engine}, {when}: {killed} kills in {finished} runs, while: {dict(sorted(moments.items()))}")
