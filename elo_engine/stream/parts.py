"""What comes to the device at once: a unit, or some rows of a large matrix.

A vocabulary's embedding and head can each be larger than any layer. Sliced, they come a few rows at a time, at most as
much as a layer, into the room that the layers have: then no part of the model needs more of the device than a layer.
In the store a matrix stays one leaf, so snapshots know nothing of slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elo_engine.config import OptimizerConfig
from elo_engine.measure.setting import vocabulary_slices
from elo_engine.model import names
from elo_engine.model.ops.adamw import StepNumbers
from elo_engine.model.reference_adamw import GROUP
from elo_engine.model.spec import ModelSpec
from elo_engine.stream.layout import Unit, make_unit

_SLICE_KEY = 0x9E3779B1  # odd, and not that of split_weights' chunks: no two slices draw the same bits


@dataclass(frozen=True)
class Part:
    """A unit, or rows of one matrix of it.

    Attributes:
        unit: laid out as it lies on the device. owner: the number of the unit that it is of, or is.
        slice: (number, first row, row after the last) of a matrix; None: a whole unit, or one leaf of it.
        whole: whether it is the unit itself, so that each of its blocks is one piece of the store.
    """

    unit: Unit
    owner: int
    slice: tuple[int, int, int] | None = None
    whole: bool = True

    def of(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """This part of the unit's tensors, by the part's own keys; views."""
        found = {key: view for key, view in views.items() if key.split(" ")[-1] in self.unit.keys}
        if self.slice is None:
            return found
        _, begin, end = self.slice
        return {key: _rows(key, view, found, begin, end) for key, view in found.items()}

    def numbers(self, numbers: StepNumbers) -> StepNumbers:
        """For the update of this part: the random bits of a matrix's slices differ."""
        if self.slice is None:
            return numbers
        return replace(numbers, key=(numbers.key + self.slice[0] * _SLICE_KEY) & 0xFFFFFFFF)


def _rows(key: str, view: Tensor, views: dict[str, Tensor], begin: int, end: int) -> Tensor:
    """Rows of a matrix, or the scales of their groups."""
    if "scales" not in key:
        return view[begin:end]
    matrix = views[f"{key[0]} {key.split(' ')[-1]}"]
    width = matrix.shape[1]
    return view[begin * width // GROUP : -(-end * width // GROUP)]


def whole_parts(units: Sequence[Unit]) -> list[Part]:
    """Every unit as it is."""
    return [Part(unit, number) for number, unit in enumerate(units)]


def sliced_parts(
    spec: ModelSpec, units: Sequence[Unit], dtype: torch.dtype, optimizer: OptimizerConfig
) -> list[Part]:
    """The layers, then the leaves of what follows them: the embedding in slices, the final norm, the head in slices."""
    return [*whole_parts(units[: spec.layers]), *_slices(spec, units, dtype, optimizer)]


def _slices(
    spec: ModelSpec, units: Sequence[Unit], dtype: torch.dtype, optimizer: OptimizerConfig
) -> Iterator[Part]:
    eight, master = optimizer.state == "8bit", optimizer.kept_master(bf16=dtype != torch.float32)
    for owner in range(spec.layers, len(units)):
        for i, leaf in enumerate(units[owner].parts):
            first = units[owner].first + i
            if len(leaf.shapes[0]) == 1:
                unit = make_unit("final norm", [leaf], first, dtype, eight=eight, master=master)
                yield Part(unit, owner, whole=False)
                continue
            for number, (begin, end) in enumerate(vocabulary_slices(spec)):
                rows = names.Part(leaf.key, leaf.names, ((end - begin, spec.D),))
                name = f"rows {begin} to {end} of the {leaf.key}"
                unit = make_unit(name, [rows], first, dtype, eight=eight, master=master)
                yield Part(unit, owner, (number, begin, end), whole=False)
