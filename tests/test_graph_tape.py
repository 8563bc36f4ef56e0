"""Steps that are taped once and done again, with new data copied into the same buffers, train as steps that the host
launches one by one: losses, norms, weights, copies and moments to the bit. Kernels run in Triton's interpreter: in one
case all of them, in the others those of the loss, the last norm and AdamW.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

pytest.importorskip("triton", reason="triton is not installed; pip install 'elo-engine[gpu]'")

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "pretraining": {
        # the gradient of two micro-batches adds up in fp32
        "fp32 state, two micro-batches": {"micro_batch": 1, "state": "fp32", "kernels": True, "last": True},
        # a bf16 gradient is used as it came, and bf16 weights are rounded at random
        "8-bit state, one micro-batch": {"micro_batch": 2, "state": "8bit", "resumed": True},
    },
    "whole model": {
        # rows of the embedding's gradient are added to the head's
        "tied, two micro-batches": {"micro_batch": 1, "state": "fp32", "whole": "tied", "plants": True},
        # rows are rounded to bf16 and put into a matrix of zeros
        "untied, one micro-batch": {"micro_batch": 2, "state": "fp32", "whole": "untied"},
    },
}
TURNS: dict[str, dict[str, Any]] = {
    "8-bit state": {"state": "8bit", "kinds": ["both", "shallow"], "plants": True},
    "fp32 state": {"state": "fp32", "kinds": ["both"]},
    "no bridge": {"state": "fp32", "kinds": ["whole"], "bridge": False},
}
PLANTS = "RateOfTheHost", "TextOfTheHost", "ScaleOfTheHost", "RowsOfTheHost"  # what they are: graph_tape.py
TURNS_PLANTS = "another_bridge", "gradients_kept", "sums_in_the_pool", "decay_of_the_other_kind"  # graph_turns.py


@pytest.mark.parametrize("which", CASES)
def test_taped_steps_train_as_launched_ones(which: str, forked: Forked) -> None:
    """Rates, keys, text and numbers of documents are others each step; one step has a loss that is no number and
    changes nothing; going on from a snapshot puts other steps into graphs and gives the same bits.
    """
    all_told = told_by("graph_tape.py", CASES[which], forked)
    for name, case in CASES[which].items():
        told = all_told[name]
        made = [updated for _, _, updated in told["steps"]]
        assert made == [True] * 4 + [False, True], f"{name}: the step that is spoilt, and no other"
        assert len(told["rooms"]) == 2, f"{name}: there were two graphs"
        assert told["outcomes"] and told["differing"] == [], name
        assert told.get("resumed", True) and not told.get("resumed differing"), name
        assert ("resumed" in told) == ("resumed" in case)
        for plant in PLANTS if "plants" in case else ():
            assert told[plant] is False, f"{name}: {plant} is not seen"


def test_taped_steps_in_turns_train_as_launched_ones(forked: Forked) -> None:
    """Those of either kind alone, and of both in one pool: going on from a snapshot, to a bridge that moves, with a
    whole-model step that is not finite, after which the bridge is what it was.
    """
    all_told = told_by("graph_turns.py", TURNS, forked)
    for name, case in TURNS.items():
        told = all_told[name]
        assert told["as planned"] and told["kinds"].keys() == set(case["kinds"])
        for kind, found in told["kinds"].items():
            assert found["same"] and found["differing"] == [] and found["let go"], f"{name}, {kind}"
            graphs = {"both": [2, 2], "shallow": [2, 0], "whole": [0, 2]}[kind]
            assert found["graphs"] == graphs and found["pool"] == sum(graphs), "two rooms of either kind, in one pool"
            assert found["eagerly"] == (0 if kind == "both" else 3), "launched steps go to the graphs' stream"
        for plant in TURNS_PLANTS if "plants" in case else ():
            assert told[plant] is False, f"{name}: {plant} is not seen"


# of test_graphed_cuda_turns.py, what means anything on a CPU: times, waits and allocations do not
CARD = {
    "test_turns_train_as_launched_ones": ["fp32 state", "both"],
    "test_memory_is_given_back_and_the_next_graphs_are_the_same": [],
    "test_a_whole_model_step_that_cannot_be_captured_ends_both_and_training_goes_on": [],
}


def test_what_a_card_is_asked_of_steps_in_turns_is_sound(forked: Forked) -> None:
    """Those tests with tapes for graphs, so that none is wrong by itself on the day there is a card."""
    assert told_by("graph_turns.py", {"card": {"tests": CARD}}, forked)["card"] == dict.fromkeys(CARD, "passed")


def told_by(name: str, cases: dict[str, Any], forked: Forked) -> dict[str, Any]:
    """What a script prints of its cases."""
    script = Path(__file__).with_name(name)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(script.parents[1])
    environment["PYTHONPATH"] += os.pathsep + str(script.parent)
    program = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = forked(program, json.dumps(cases), environment=environment, timeout_s=590)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found
