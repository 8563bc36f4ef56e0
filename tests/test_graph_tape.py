"""Steps that are taped once and done again, with new data copied into the same buffers, train as steps that the host
launches one by one: losses, norms, weights, copies and moments to the bit. Every kernel runs in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

CASES = {
    # the gradient of two micro-batches adds up in fp32
    "fp32 state, two micro-batches": {"micro_batch": 3, "state": "fp32", "plants": True},
    # a bf16 gradient is used as it came, and bf16 weights are rounded at random
    "8-bit state, one micro-batch": {"micro_batch": 4, "state": "8bit"},
}


@pytest.mark.parametrize("case", CASES)
def test_taped_steps_train_as_launched_ones(case: str) -> None:
    """Rates, keys, text and numbers of documents are others each step; one step has a loss that is no number and
    changes nothing; going on from a snapshot puts other steps into graphs and gives the same bits.
    """
    script = Path(__file__).with_name("graph_tape.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(script.parents[1])
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(CASES[case])], env=environment, capture_output=True, text=True,
        timeout=590,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout)
    made = [updated for _, _, updated in told["steps"]]
    assert made == [True] * 5 + [False] + [True] * 2, "the step that is spoilt, and no other"
    assert told["rooms"] == [16, 32], "there were two graphs"
    assert told["outcomes"] and told["differing"] == []
    assert told["resumed"] and told["resumed differing"] == []
    if CASES[case].get("plants"):
        assert told["RateOfTheHost"] is False and told["TextOfTheHost"] is False, "planted errors are not seen"
