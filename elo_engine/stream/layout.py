"""How a model is cut into units that come and go as a whole, and how a unit lies in memory.

A unit is a decoder layer, the embedding, or what follows the last layer (final norm, and the head unless it is tied).
Its bytes are three blocks, each one piece of memory so that it is one copy over the link: the weights that the model
computes with, the optimizer's state (masters where there are some, and moments), and the gradient that waits for
its update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from elo_engine.config import Master, OptimizerConfig
from elo_engine.model import names
from elo_engine.model.decoder import Leaf
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.reference_adamw import GROUP
from elo_engine.model.spec import ModelSpec

ALIGN = 256  # of every tensor in a block: what CUDA's own allocations have

BlockName = Literal["weights", "state", "gradients"]
BLOCKS: tuple[BlockName, ...] = ("weights", "state", "gradients")


@dataclass(frozen=True)
class Field:
    """One tensor of a block."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Without the padding after it."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """Tensors one after the other in one piece of memory."""

    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]) -> Block:
        """(key, shape, dtype) in order."""
        fields, at = [], 0
        for key, shape, dtype in tensors:
            fields.append(Field(key, shape, dtype, at))
            at += -(-fields[-1].nbytes // ALIGN) * ALIGN
        return cls(tuple(fields), at)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors in `nbytes` of uint8 memory, by key."""
        return {
            field.key: flat[field.offset : field.offset + field.nbytes].view(field.dtype).view(field.shape)
            for field in self.fields
        }


@dataclass(frozen=True)
class Unit:
    """What comes and goes as a whole.

    Attributes:
        name: for messages. parts: key of each leaf with its full checkpoint names and their shapes.
        first: number of its first leaf in the model's order, which is that of `Decoder.leaves`.
    """

    name: str
    parts: tuple[names.Part, ...]
    first: int
    weights: Block
    state: Block
    gradients: Block

    def block(self, name: BlockName) -> Block:
        """One of the three."""
        found: Block = getattr(self, name)
        return found

    @property
    def keys(self) -> list[str]:
        """Of its leaves, in order."""
        return [part.key for part in self.parts]

    def leaves(self, weights: dict[str, Tensor]) -> list[Leaf]:
        """The leaves, as the snapshots know them."""
        return [Leaf(weights[part.key], part.names, part.shapes) for part in self.parts]


def packed_shape(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Of the tensors stacked along dimension 0."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def make_unit(
    name: str, parts: Sequence[names.Part], first: int, dtype: torch.dtype, *, eight: bool, master: Master
) -> Unit:
    """Lay out a unit whose weights have `dtype`, with 8-bit or fp32 moments and this master beside each weight."""
    shapes = [(part.key, packed_shape(part.shapes)) for part in parts]
    state: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    for key, shape in shapes:
        if master == "32":
            state.append((f"master {key}", shape, torch.float32))
        elif master == "24":
            state.append((f"low {key}", shape, torch.int8))
        if eight:
            groups = (-(-math.prod(shape) // GROUP),)
            state += [(f"m {key}", shape, torch.int8), (f"v {key}", shape, torch.uint8)]
            state += [(f"m scales {key}", groups, torch.float32), (f"v scales {key}", groups, torch.float32)]
        else:
            state += [(f"{kind} {key}", shape, torch.float32) for kind in ("m", "v")]
    weights = Block.of([(key, shape, dtype) for key, shape in shapes])
    # a gradient waits in the type that the model computes in, as it would cross the link
    return Unit(name, tuple(parts), first, weights, Block.of(state), weights)


def model_units(spec: ModelSpec, dtype: torch.dtype, optimizer: OptimizerConfig) -> list[Unit]:
    """Layers in order, then the embedding, then final norm and head."""
    eight, master = optimizer.state == "8bit", optimizer.kept_master(bf16=dtype != torch.float32)
    parts = names.layer_parts(spec)
    units = []
    for index in range(spec.layers):
        prefix = names.layer_prefix(index)
        full = [names.Part(part.key, tuple(prefix + name for name in part.names), part.shapes) for part in parts]
        units.append(make_unit(f"layer {index}", full, index * len(parts), dtype, eight=eight, master=master))
    first, matrix = spec.layers * len(parts), ((spec.V, spec.D),)
    embedding = names.Part("embedding", (names.EMBEDDING,), matrix)
    last = [names.Part("norm", (names.FINAL_NORM,), ((spec.D,),))]
    if not spec.tied:
        last.append(names.Part("head", (names.HEAD,), matrix))
    units.append(make_unit("embedding", [embedding], first, dtype, eight=eight, master=master))
    units.append(make_unit("final norm and head", last, first + 1, dtype, eight=eight, master=master))
    return units


def numbered(units: list[Unit], before: Sequence[int]) -> list[Unit]:
    """The same units, those of these numbers having the first leaves."""
    first, found = 0, list(units)
    for number in sorted(range(len(units)), key=lambda number: number not in before):
        found[number] = replace(units[number], first=first)
        first += len(units[number].parts)
    return found


def adamw_state(unit: Unit, weights: dict[str, Tensor], state: dict[str, Tensor], powers: Tensor) -> AdamwState:
    """AdamW's view of a unit's memory; the tensors are not copied."""

    def of(kind: str) -> list[Tensor]:
        return [state[f"{kind} {key}"] for key in unit.keys]

    leaves = [weights[key] for key in unit.keys]
    first = unit.parts[0].key
    scales = (of("m scales"), of("v scales")) if f"m scales {first}" in state else None
    lows = of("low") if f"low {first}" in state else None
    if f"master {first}" in state:
        return AdamwState(of("master"), leaves, of("m"), of("v"), scales, powers)
    return AdamwState(leaves, None, of("m"), of("v"), scales, powers, lows)
