"""Steps of a run with whole-model steps among shallow ones (`align.when: interleaved`), which are timed as one: three
shallow steps and a whole-model one that moves the bridge, as the demo has them (elo_engine/demo.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from elo_engine.benchmarks.models import engine_model, open_model
from elo_engine.config import make_config
from elo_engine.data import RowBatch
from elo_engine.measure.setting import Setting, ShallowTurns
from elo_engine.model.bridge import GapStatistics, gaps

Steps = Callable[[RowBatch, bool], Any]  # rows, first -> what reads the step's loss

SHALLOW_STEPS = 3  # to a whole-model step of one row
BRIDGE_TOKENS = 8192


def setting_in_turns(shallow: Setting) -> Setting:
    """Whole-model steps of one row among such shallow ones, with the demo's fp32 state and a bridge at each gap."""
    layers, every = shallow.layers, tuple(range(shallow.spec.layers))
    bridges = len(gaps(shallow.spec.layers, layers))
    turns = ShallowTurns(layers, shallow.micro_batch, shallow.micro_batches, shallow.recompute, bridges)
    return replace(shallow, arm="elo_align", layers=every, micro_batch=1, micro_batches=1, state="fp32", turns=turns)


def rows_each(setting: Setting) -> list[int]:
    """Rows of each of the steps that are timed as one."""
    turns, own = setting.turns, setting.micro_batch * setting.micro_batches
    return [own] if turns is None else [turns.micro_batch * turns.micro_batches] * SHALLOW_STEPS + [own]


@dataclass(frozen=True)
class InTurns:
    """What is read of steps that are timed as one."""

    outcomes: list[Any]
    positions: list[int]  # of each step's rows

    @property
    def updated(self) -> bool:
        """Of all."""
        return all(outcome.updated for outcome in self.outcomes)

    @property
    def loss_sum(self) -> float:
        """Nats a position, of each step: by a sum over tokens a whole-model step's would hardly be seen."""
        each = zip(self.outcomes, self.positions, strict=True)
        return float(sum(outcome.loss_sum / positions for outcome, positions in each))


def steps_of(engine: Any) -> Steps:
    """Of one kind."""
    return lambda rows, first: engine.step(rows, rows.tokens_loss, 1e-5, first=first, should_stop=lambda: False)


def steps_in_turns(engine: Any, setting: Setting) -> Steps:
    """Shallow steps and a whole-model one; as in training each one's numbers are read when the next is launched."""
    kinds = [steps_of(engine.shallow)] * SHALLOW_STEPS + [steps_of(engine.whole)]
    bounds = [*pairwise(accumulate(rows_each(setting), initial=0))]

    def step(rows: RowBatch, first: bool) -> InTurns:
        made = list[Any]()
        for number, (kind, (begin, end)) in enumerate(zip(kinds, bounds, strict=True)):
            made.append(kind(rows.part(begin, end), first and number in (0, SHALLOW_STEPS)))
            assert number == 0 or made[-2].updated, "a step on random weights was not made"
        return InTurns(made, [(end - begin) * setting.sequence_length for begin, end in bounds])

    return step


def engine_in_turns(setting: Setting, model: str, device: torch.device, how: tuple[Any, Any] = (None, None)) -> Any:
    """An `InterleavedEngine` of random weights; its bridge begins as a fit to random states, and moves."""
    from elo_engine.train.interleaved import InterleavedEngine

    turns, T, D = setting.turns, setting.sequence_length, setting.spec.D
    assert turns is not None
    shallow, whole = (
        {"tokens": rows * T, "tokens_per_step": rows * T, "micro_batch": at_once, "recompute": again,
         "optimizer": {"state": setting.state}}
        for rows, at_once, again in ((rows_each(setting)[0], turns.micro_batch, turns.recompute),
                                     (rows_each(setting)[-1], setting.micro_batch, setting.recompute))
    )  # fmt: skip
    tree = {
        "model": model, "output": "none", "data": {"shards": {"random": "random"}, "sequence_length": T},
        "detach": {"layers": list(turns.layers), "bridge": "linear", "bridge_tokens": BRIDGE_TOKENS},
        "pretrain": shallow, "align": whole | {"when": "interleaved"},
    }  # fmt: skip
    config = make_config(tree, "steps in turns")
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    decoder = engine_model(
        open_model(model), setting.layers, shallow=False, recompute=setting.recompute, device=device, dtype=dtype
    )
    known = {gap: GapStatistics(D, device) for gap in gaps(setting.spec.layers, turns.layers)}
    generator = torch.Generator(device).manual_seed(5)
    for sums in known.values():
        sums.add(*torch.randn(2, 4 * D, D, generator=generator, device=device))
    bridges = {gap: sums.fit(config.detach.ridge).bridge for gap, sums in known.items()}
    return InterleavedEngine(decoder, turns.layers, config, bridges=bridges, statistics=known, how=how)
