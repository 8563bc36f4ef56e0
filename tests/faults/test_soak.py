"""`make soak` in short: one kill among 60 steps, and a step that keeps memory or a descriptor is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_fixture import Processes
from faults.soak import judge, soak


def test_a_short_soak_and_a_planted_leak(processes: Processes, tmp_path: Path) -> None:
    """The run that is killed keeps 1 MiB a step, the one without a fault keeps nothing: one is flat, one is not."""
    found = soak(processes, tmp_path, 60, kills=1, leak=1 << 20)
    assert found["tensors_compared"] > 20
    with pytest.raises(AssertionError, match="memory grows"):
        judge(found)
    honest = found | {"killed": found["straight"]}
    judge(honest)
    for planted, message in (
        ({"differing": ["a"]}, "not the same"),
        ({"leftovers": [".a.tmp-1"]}, "left over"),
        ({"steps_done_twice": 6}, "lost by kills"),
        ({"killed": found["straight"] | {"descriptors_most": found["straight"]["descriptors"] + 10}}, "pile up"),
    ):
        with pytest.raises(AssertionError, match=message):
            judge(honest | planted)
