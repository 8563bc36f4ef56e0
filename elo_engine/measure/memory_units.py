"""A model as the streamed engine lays it out (`stream/layout.py`): the bytes of its units, and what they take on the
host.

Suffixes as in the shape legend; all sizes here are bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from elo_engine.measure.ledger import Ledger
from elo_engine.measure.memory_engine import EngineStep
from elo_engine.measure.memory_shapes import SCALE_GROUP
from elo_engine.measure.setting import Setting

_ALIGN = 256  # of a tensor in a unit's block: stream/layout.py


def _block(sizes: Sequence[int], width: int) -> int:
    return sum(-(-size * width // _ALIGN) * _ALIGN for size in sizes)


@dataclass(frozen=True)
class UnitBytes:
    """A decoder layer, the embedding, or final norm and head.

    Attributes:
        sizes: elements of its leaves. weights, state: of its blocks; a waiting gradient takes what the weights do.
    """

    sizes: tuple[int, ...]
    weights: int
    state: int

    @property
    def elements(self) -> int:
        """Of all leaves."""
        return sum(self.sizes)


def unit_bytes(setting: Setting, sizes: Sequence[int]) -> UnitBytes:
    if setting.state == "8bit":
        state = 2 * _block(sizes, 1) + 2 * _block([-(-size // SCALE_GROUP) for size in sizes], 4)
    else:
        state = 2 * _block(sizes, 4)
    state += _block(sizes, setting.master_bytes)
    return UnitBytes(tuple(sizes), _block(sizes, setting.width), state)


@dataclass(frozen=True)
class Units:
    """The units of a model; its layers are alike."""

    layer: UnitBytes
    embedding: UnitBytes
    last: UnitBytes

    @classmethod
    def of(cls, setting: Setting) -> Units:
        """Laid out as `stream/layout.py` lays them out."""
        spec = setting.spec
        leaves = EngineStep(setting, Ledger()).leaves()
        matrix, ends = spec.V * spec.D, 2 if spec.tied else 3
        last = [spec.D] if spec.tied else [spec.D, matrix]
        each = (len(leaves) - ends) // spec.layers
        return cls(unit_bytes(setting, leaves[:each]), unit_bytes(setting, [matrix]), unit_bytes(setting, last))

    def all(self, layers: int) -> list[UnitBytes]:
        """In the order of the store."""
        return [*itertools.repeat(self.layer, layers), self.embedding, self.last]


def host_parts(setting: Setting) -> dict[str, int]:
    """What the streamed model takes on the host by part; with `store: disk` all of it is on the disk."""
    spec, streaming = setting.spec, setting.streaming
    units = Units.of(setting).all(spec.layers)
    weights = sum(unit.weights for unit in units)
    return {
        "weights": weights,
        "optimizer state": sum(unit.state for unit in units),
        "waiting gradients": weights if streaming.update == "lazy" else 0,
        "layers' inputs": inputs_bytes(setting) if streaming.inputs == "host" else 0,
    }


def inputs_bytes(setting: Setting) -> int:
    """Hidden states of a step: what enters each layer and the final norm, and the gradient on its way down; with a
    sliced vocabulary also its fp32 sums over the head's slices.
    """
    spec = setting.spec
    sums = 4 if setting.streaming.vocabulary == "sliced" else 0
    return setting.tokens_per_step * spec.D * ((spec.layers + 2) * setting.width + sums)


def store_bytes(setting: Setting) -> int:
    """Of the store, wherever it is: `Store.nbytes`."""
    parts = host_parts(setting)
    return parts["weights"] + parts["optimizer state"] + parts["waiting gradients"]


def loading_bytes(setting: Setting) -> int:
    """The unit that is read from the checkpoint, before it is in its place."""
    return max(unit.weights for unit in Units.of(setting).all(1))
