"""The frozen head in 8 bits is rounded anew for each step, always the same way for the same step.

The products are emulated here, as ELO_FP8=emulated asks for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elo_engine.config import OptimizerConfig
from elo_engine.data import Mixture
from elo_engine.model import ops, reference_fp8
from elo_engine.train.loop import to_batch
from elo_engine.train.optim import MasterAdamW
from elo_engine.train.resident import ResidentEngine

from .test_fp8 import emulated, mixture  # noqa: F401
from .test_loop import shallow

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("emulated")


def test_each_step_has_a_rounding_of_its_own(untied: Path, mixture: Mixture) -> None:  # noqa: F811
    """What 8 bits change of a logit averages out over steps, where of one rounding it stays; the same step of the same
    seed has the same bits, in the same memory.
    """
    model = shallow(untied, torch.bfloat16)
    hidden = model.hidden_states(to_batch(mixture.rows(0, 2), CPU)).detach()[:40]
    head = ops.Fp8Head(model.head_VD, None, hidden, seed=3)
    assert head.of_emulation is not None
    places = [tensor.data_ptr() for tensor in head.tensors]

    def errors() -> torch.Tensor:
        assert head.of_emulation is not None
        rows = reference_fp8.rounded_rows(hidden, reference_fp8.E4M3, head.outliers_J)
        found = rows.double() @ head.of_emulation[0].double().t()
        entered = rows[:, : model.spec.D].double()  # of the hidden states what rounding kept: their errors stay
        entered[:, head.outliers_J] += rows[:, -len(head.outliers_J) :].double()
        return found - entered @ (model.head_VD.double() - head.mean_D.double()).t()

    first = [tensor.clone() for tensor in head.tensors]
    made = []
    for step in range(1, 17):
        head.round(step)
        made.append(errors())
    assert not torch.equal(head.of_emulation[0], first[-2]) and not torch.equal(head.of_emulation[1], first[-1])
    one, mean = made[0].square().mean().sqrt(), torch.stack(made).mean(0).square().mean().sqrt()
    assert mean < one / 3, "the errors of sixteen roundings are no more apart from each other than from themselves"
    head.round(0)
    assert all(map(torch.equal, head.tensors, first)) and [t.data_ptr() for t in head.tensors] == places
    capped = ops.Fp8Head(model.head_VD, 20.0, hidden, seed=3)
    before = [tensor.clone() for tensor in capped.tensors]
    capped.round(5)
    assert all(map(torch.equal, capped.tensors, before)) and not capped.mean_D.any()


def test_a_step_rounds_the_head_that_it_trains_with(untied: Path, mixture: Mixture) -> None:  # noqa: F811
    model, seen = shallow(untied, torch.bfloat16), []
    model.use_fp8("head", seed=5)
    optimizer = MasterAdamW(model, OptimizerConfig(lr=1e-4))
    engine = ResidentEngine(model, optimizer, 2)
    for first in (True, False, False):
        rows = mixture.rows(0, 2)
        assert engine.step(rows, rows.tokens_loss, 1e-4, first=first, should_stop=lambda: False) is not None
        seen.append([tensor.clone() for tensor in model.fp8_tensors])
    wanted = ops.Fp8Head(model.head_VD, None, seed=5)
    for step, found in enumerate(seen):
        wanted.round(step)
        assert all(map(torch.equal, found, wanted.tensors))
