"""Gradients are summed over the processes while the backward pass goes on: the bits of sums made after it, in an order
that all processes share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from test_distributed import ROOT, port

from elo_engine.errors import FailedError
from elo_engine.train import world
from elo_engine.train.adding_up import AddingUp

Trial = Callable[[str], tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]


@pytest.fixture
def trial(tmp_path: Path, forked: Forked) -> Trial:
    """What both processes tell under a plan, and the weights of the first."""

    def call(plan: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        out = tmp_path / plan.replace(" ", "-")
        out.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        program = (ROOT / "tests" / "adding_up_process.py").read_text(encoding="utf-8")
        done = forked.ranks(2, program, plan, out, port=port(), environment=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        told = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
        return told, load_file(out / "0.safetensors")

    return call


@pytest.mark.parametrize("kind", ["shallow", "shallow layer bf16", "whole selective", "whole bf16"])
def test_sums_begin_before_the_backward_pass_has_ended_and_give_the_same_bits(trial: Trial, kind: str) -> None:
    told, weights = trial(kind)
    _, after = trial(f"{kind} at the end")
    assert not any(one["failed"] for one in told)
    for one in told:
        last = one["events"][len(one["events"]) - one["events"][::-1].index("backward begins") :]
        inside = last[: last.index("backward ends")].count("sum")
        outside = last[last.index("backward ends") :].count("sum")
        # a whole model's embedding and head have their gradients beside autograd
        assert (inside, outside) == ((3 * 6 + 1, 2) if "whole" in kind else (2 * 6, 0))
        assert "sum" not in one["events"][: len(one["events"]) - len(last)], "before the last micro-batch"
    if kind != "whole bf16":  # there the outer gradients are no longer rounded to bf16 before they are summed
        assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_a_process_whose_gradients_arrive_otherwise_waits_with_them(trial: Trial) -> None:
    told, weights = trial("shallow late")
    _, usual = trial("shallow")
    assert not any(one["failed"] for one in told)
    assert all(torch.equal(weights[name], usual[name]) for name in weights)


def test_another_order_on_one_process_is_seen(trial: Trial) -> None:
    told, _ = trial("shallow wrong order")
    assert all("differ between the processes" in one["failed"] for one in told)


class Done:
    def wait(self) -> None: ...


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> tuple[AddingUp, list[torch.Tensor | None], list[int]]:
    """Three leaves, their gradients, and the numbers of those whose sum has begun."""
    grads: list[torch.Tensor | None] = [torch.full((2,), float(i)) for i in range(3)]
    begun: list[int] = []

    def begin(tensor: torch.Tensor) -> Any:
        begun.append(int(tensor[0]))
        return Done()

    monkeypatch.setattr(world, "begin_sum", begin)
    return AddingUp(["a", "b", "c"], lambda i: grads[i]), grads, begun


def test_the_first_step_decides_the_order(sums: tuple[AddingUp, list[torch.Tensor | None], list[int]]) -> None:
    adding, _, begun = sums
    adding.begin()
    for i in (2, 0):
        adding.arrived(i)
    assert begun == [], "nothing is agreed on yet"
    adding.finish()
    assert begun == [2, 0, 1]
    begun.clear()
    adding.arrived(2)  # of a micro-batch that is not the last
    assert begun == []
    adding.begin()
    adding.arrived(0)
    assert begun == [], "2 is first"
    adding.arrived(2)
    assert begun == [2, 0]
    adding.finish()
    assert begun == [2, 0, 1]


def test_a_gradient_that_is_missed_is_an_error_by_name(
    sums: tuple[AddingUp, list[torch.Tensor | None], list[int]]
) -> None:
    adding, grads, begun = sums
    adding.begin()
    adding.finish()
    grads[1] = None
    adding.begin()
    adding.arrived(0)
    adding.arrived(1)
    with pytest.raises(FailedError, match="b: got no gradient"):
        adding.finish()
    assert begun == [0, 1, 2, 0]
