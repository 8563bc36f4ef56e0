"""Steps in turns on any device, launched and as graphs of either kind: one engine of each, the same steps, and what is
the same. Shared by tapes on a CPU (graph_turns.py) and CUDA's graphs (test_graphed_cuda_turns.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elo_engine.config import make_config
from elo_engine.data import RowBatch
from elo_engine.model.bridge import GapStatistics, gaps
from elo_engine.model.decoder import Decoder
from elo_engine.model.spec import ModelSpec
from elo_engine.train.graphed import Captures, Graphing
from elo_engine.train.interleaved import InterleavedEngine

Kinds = tuple[bool, bool]  # whether shallow and whole-model steps are graphs
NAMED: dict[str, Kinds] = {"shallow": (True, False), "whole": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Case:
    """Steps of the two kinds alternate, a shallow one first.

    Attributes:
        tensors: bf16, by name, on the device. layers: the detached ones. row_tokens: of a row.
        step_rows: text of a step. rates: of each step. spoilt: the step whose loss is no number.
        captures: made for each engine. options: of the optimizer; `whole` of whole-model steps alone.
    """

    spec: ModelSpec
    tensors: Callable[[ModelSpec], dict[str, Tensor]]
    device: torch.device
    layers: tuple[int, ...]
    row_tokens: int
    micro_batch: int
    step_rows: Callable[[int], RowBatch]
    rates: Sequence[float]
    spoilt: int
    captures: Callable[[], Captures]
    options: dict[str, Any]
    whole: dict[str, Any]
    bridge: bool = True
    recompute: str = "none"
    say: Callable[[str], None] = print

    def engine(self, kinds: Kinds = (False, False), must: bool = False) -> Any:
        """An `InterleavedEngine` with steps of these kinds as graphs."""
        rows, each = len(self.step_rows(0).ids_BT), len(self.rates) // 2
        step = rows * self.row_tokens
        stage = {"tokens": each * step, "tokens_per_step": step, "micro_batch": self.micro_batch}
        stage |= {"recompute": self.recompute}
        config = make_config(
            {
                "model": "x", "output": "y", "seed": 11,
                "data": {"shards": {"ja": "z"}, "sequence_length": self.row_tokens},
                "detach": {"layers": list(self.layers), "bridge": "linear", "bridge_tokens": 12 * step},
                "pretrain": stage | {"optimizer": self.options},
                "align": stage | {"optimizer": self.options | self.whole, "when": "interleaved"},
            }
        )
        spec, D = self.spec, self.spec.D
        model = Decoder(
            spec, self.tensors(spec), tuple(range(spec.layers)), train_outer=True, recompute=config.align.runs_again
        )
        known, bridges = {}, {}
        generator = torch.Generator().manual_seed(5)
        for gap in gaps(spec.layers, self.layers) if self.bridge else ():
            known[gap] = GapStatistics(D, self.device)
            known[gap].add(*torch.randn(2, 4 * D, D, generator=generator).to(self.device))
            bridges[gap] = known[gap].fit(config.detach.ridge).bridge
        first = Graphing(self.captures(), self.say, must)
        how = first if kinds[0] else None, first.beside(self.say, must, "align.graph") if kinds[1] else None
        return InterleavedEngine(model, self.layers, config, bridges=bridges, statistics=known, how=how)

    def steps(self, engine: Any, first: int = 0, last: int | None = None) -> Iterator[list[Any]]:
        """Kind, loss, norm and whether the step was made, of each."""
        for step in range(first, len(self.rates) if last is None else last):
            turn, rows = engine.turns.turn(step), self.rows(step)
            outcome = turn.engine.step(
                rows, rows.tokens_loss, self.rates[step], first=turn.number == 0, should_stop=lambda: False
            )
            assert outcome is not None
            made = outcome.updated
            yield [turn.kind, outcome.loss_sum if made else "", outcome.norm if made else "", made]

    def rows(self, step: int) -> RowBatch:
        """With a label that no vocabulary has where the step is to be spoilt."""
        rows = self.step_rows(step)
        labels = rows.labels_BT.copy()
        if step == self.spoilt:
            labels[0, 0] = self.spec.V + 5
        return replace(rows, labels_BT=labels)

    @property
    def made(self) -> list[list[Any]]:
        """Which kinds of steps there are, and which are made."""
        kinds = ("pretrain", "align")
        return [[kinds[step % 2], step != self.spoilt] for step in range(len(self.rates))]

    def snapshot(self, engine: Any) -> list[dict[str, Tensor]]:
        """Weights and moments, as they are now."""
        parts = engine.optimizer.weights(), engine.optimizer.moments()
        return [{name: tensor.clone() for name, tensor in part.items()} for part in parts]


def everything(engine: Any) -> dict[str, Tensor]:
    """Leaves, what a snapshot has, and the bridge, as views."""
    leaves = {f"leaf {i}": leaf.tensor.detach() for i, leaf in enumerate(engine.model.leaves)}
    bridge = {f"bridge {i}": tensor for i, tensor in enumerate(engine.shallow.model.bridge_tensors)}
    return leaves | bridge | engine.optimizer.weights() | engine.optimizer.moments()


def differing(one: Any, other: Any) -> list[str]:
    """What is not the same in two engines, bit for bit."""
    left, right = everything(one), everything(other)
    return [name for name in sorted(left.keys() | right.keys()) if not torch.equal(left[name], right[name])]


def graphs_of(engine: Any) -> list[int]:
    """How many of either kind there are."""
    return [len(getattr(one, "_graphs", None) or ()) for one in (engine.shallow, engine.whole)]


def captures_of(engine: Any) -> Any:
    """Of the steps that are graphs."""
    return next(one._captures for one in (engine.shallow, engine.whole) if hasattr(one, "_captures"))


def gradients_left(engine: Any) -> bool:
    """Whether any leaf has one."""
    return any(one is not None for _, one in engine.optimizer.of("align").gradients())
