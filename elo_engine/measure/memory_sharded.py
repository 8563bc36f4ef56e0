"""What one process of several allocates and frees in a step of a model that is spread over them, `model/sharded.py`: as
torch's `fully_shard` gathers weights and sums gradients (torch/distributed/fsdp/_fully_shard, read at 2.13).

Two kinds of units are gathered: a layer; and embedding, final norm and head, which stay gathered from the first to the
last moment of a micro-batch. Suffixes as in the shape legend; all sizes here are bytes unless they say elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elo_engine.measure import memory_engine_head as head
from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_engine import ACT, EngineStep, SavedLayer
from elo_engine.measure.memory_gradients import GRAD, Gradients
from elo_engine.measure.memory_rotary import gathered_bytes, rows_bytes, table_bytes
from elo_engine.measure.memory_shapes import adamw_plan_bytes, projections
from elo_engine.measure.setting import Setting
from elo_engine.model.spec import ModelSpec

WEIGHTS = "weights"


def layer_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """Rows and columns of a layer's weights, packed as `model.names.layer_parts` has them; of a vector one column."""
    p = projections(spec)
    found = [(size, 1) for size in spec.norm_sizes]
    found += [(p["q"].out + p["k"].out + p["v"].out, spec.D), (spec.D, p["o"].into)]
    found += [(2 * spec.F, spec.D), (spec.D, spec.F)]
    biases = (p["q"].biases + 2 * p["k"].biases, p["o"].biases, 2 * p["gate"].biases, p["down"].biases)
    return found + [(size, 1) for size in biases if size]


@dataclass(frozen=True)
class ShardedUnit:
    """Weights that are gathered together, in elements.

    Attributes:
        shares: of each weight what a process holds: as many whole rows as the process with the most, which all pad to.
        largest: of the largest weight. uneven: of all whose rows do not divide, padded.
        processes: over which they are spread.
    """

    shares: tuple[int, ...]
    largest: int
    uneven: int
    processes: int

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, int]], processes: int) -> ShardedUnit:
        """Weights of these rows and columns."""
        shares = tuple(-(-rows // processes) * columns for rows, columns in shapes)
        uneven = sum(share for share, (rows, _) in zip(shares, shapes, strict=True) if rows % processes)
        return cls(shares, max(rows * columns for rows, columns in shapes), processes * uneven, processes)

    @property
    def share(self) -> int:
        """What a process holds of all of them."""
        return sum(self.shares)

    @property
    def whole(self) -> int:
        """All of them with what each is padded by."""
        return self.processes * self.share


def units(setting: Setting) -> tuple[ShardedUnit, ShardedUnit]:
    """A decoder layer, and embedding with final norm and head."""
    spec, count = setting.spec, setting.processes.count
    outer = [(spec.V, spec.D), (spec.D, 1)] + ([] if spec.tied else [(spec.V, spec.D)])
    return ShardedUnit.of(layer_shapes(spec), count), ShardedUnit.of(outer, count)


def gloo_copy(setting: Setting, count: int) -> int:
    """What a collective that takes or gives `count` bytes copies them to meanwhile: gloo does, NCCL does not."""
    return count if setting.device == "cpu" else 0


class _UnitGradients(Gradients):
    """Those of the unit whose backward pass goes on, in the weights' type, until they are summed and shared out."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger, widens=False)
        self._there: list[Held] = []

    def arrive(self, name: str, count: int) -> None:
        self._there.append(self._ledger.add(GRAD, count))

    def settle(self) -> None:
        """No weight is used twice, but a tied matrix, whose second gradient is added into the first."""

    def take(self) -> list[Held]:
        found, self._there = self._there, []
        return found


class ShardedStep(EngineStep):
    """One step of one process, as entries of a ledger."""

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        super().__init__(setting, ledger)
        self.outer = None
        self.layer, self.around = units(setting)
        self._units = _UnitGradients(ledger)
        self.gradients = self._units
        self._shared = set[int]()  # of which this process has its share of the gradients
        self._summed = ledger.add(GRAD, 0)  # whole gradients, until the next unit's are there

    def standing(self) -> None:
        """Shares of masters and moments, all fp32; the masters are the weights."""
        shares = [*self.layer.shares * self.spec.layers, *self.around.shares]
        self.ledger.add(WEIGHTS, 4 * sum(shares))
        self.ledger.add("optimizer", 8 * sum(shares) + (adamw_plan_bytes(shares) if self.cuda else 0))
        self.ledger.add(ACT, table_bytes(self.setting))

    def collect(self, unit: ShardedUnit) -> Held:
        """-> all shares of a unit, process by process, in the compute dtype."""
        ledger = self.ledger
        with ledger.during(WEIGHTS, self.w * unit.share if self.w == 2 else 0):  # this process's, rounded
            found = ledger.add(WEIGHTS, self.w * unit.whole)
            ledger.spike(WEIGHTS, gloo_copy(self.setting, found.bytes))
        return found

    def unpack(self, unit: ShardedUnit, *collected: Held) -> Held:
        """-> the weights themselves, copied from what was collected, which is let go of then."""
        found = self.ledger.add(WEIGHTS, self.w * unit.whole)
        self.ledger.drop(*collected)
        return found

    def share_out(self, number: int, unit: ShardedUnit, gradients: list[Held]) -> None:
        """Sum a unit's gradients over the processes, in fp32, and keep this one's share of them. What they are summed
        from is let go of when the next unit's gradients are there.
        """
        ledger, unit_bytes = self.ledger, 4 * unit.whole
        ledger.drop(self._summed)
        self._summed = ledger.add(GRAD, unit_bytes)
        if not self.cuda:  # torch's CPU copies what it pads, and what it widens one after the other
            ledger.spike(GRAD, self.w * (unit.uneven + (unit.largest if self.w == 2 else 0)))
        *most, last = gradients
        ledger.drop(*most)
        share = ledger.add(GRAD, 4 * unit.share)
        ledger.spike(GRAD, gloo_copy(self.setting, unit_bytes))
        ledger.drop(last)
        if number in self._shared:  # added to that of an earlier micro-batch
            ledger.drop(share)
        self._shared.add(number)

    def micro_batch(self) -> None:
        """Forward and backward; a layer is gathered for either, and on the way back collected while the one above it
        is at work.
        """
        ledger, L, again = self.ledger, self.spec.layers, self.setting.recompute == "layer"
        tables = gathered_bytes(self.setting, self.indices) + rows_bytes(self.setting)
        graph, labels = ledger.add(ACT, 16 * self.N + tables), ledger.add(ACT, 8 * self.N)
        ledger.moment = "gathering embedding and head"
        collected = self.collect(self.around)
        around = self.unpack(self.around)
        hidden, saved = ledger.add(ACT, self.ND), list[SavedLayer]()
        for index in self.indices:
            ledger.moment = f"forward of layer {index}"
            here = self.collect(self.layer)
            weights = self.unpack(self.layer, collected)  # so the one before is let go of, not this one
            collected = here
            kept, out = self.forward_layer(index, graph=not again)
            ledger.drop(weights)
            saved.append(SavedLayer(hidden, None if again else kept))
            hidden = out
        ledger.moment = "final norm"
        normed, rstd = self.norm()
        ledger.moment = "loss"
        head_sum = ledger.add(GRAD, 4 * self.spec.V * self.spec.D)
        d_hidden = head.forward(self.setting, ledger, learns=True)
        ledger.drop(normed, labels, self._graph, collected)
        self._graph = graph
        ledger.moment = "backward of the loss"
        collected = self.collect(self.layer)
        head_grad = ledger.add(GRAD, 2 * self.spec.V * self.spec.D) if self.w == 2 else head_sum
        d_normed = ledger.add(ACT, self.ND)  # scaled by one over the tokens of the step
        if not self.cuda and self.w == 2:  # by way of fp32 copies
            ledger.spike(ACT, 2 * self.wide_ND)
        ledger.drop(d_hidden, *([head_sum] if self.w == 2 else []))
        ledger.moment = "backward of the final norm"
        d_out: Held | None = self.norm_backward()
        self.gradient(-1, "norm", self.spec.D)
        ledger.drop(d_normed, hidden, rstd)
        outer = self._units.take()
        for index in reversed(self.indices):
            assert d_out is not None
            ledger.moment = f"backward of layer {index}"
            weights = self.unpack(self.layer, collected)
            collected = self.collect(self.layer) if index else ledger.add(WEIGHTS, 0)
            d_out = self.backward_layer(index, saved[index], d_out, below=True)
            ledger.moment = f"sharing out gradients of layer {index}"
            ledger.drop(weights)
            self.share_out(index, self.layer, self._units.take())
        assert d_out is not None
        ledger.moment = "backward of the embedding"
        embedding = ledger.add(GRAD, self.w * self.spec.V * self.spec.D)
        ledger.drop(d_out)
        ledger.moment = "sharing out gradients of embedding and head"
        ledger.drop(around)
        if self.spec.tied:  # the second is added into the first
            ledger.drop(embedding)
            embedding = ledger.add(GRAD, 0)
        self.share_out(L, self.around, [embedding, *outer, head_grad])
        ledger.drop(self._summed)
        self._summed = ledger.add(GRAD, 0)


def run_step(setting: Setting, ledger: Ledger) -> None:
    """Enter one steady optimizer step of arm (g) of one process."""
    step = ShardedStep(setting, ledger)
    step.standing()
    for _ in range(min(2, setting.micro_batches)):  # the second finds the shares of the first, a third what it found
        step.micro_batch()
    ledger.moment = "optimizer step"
