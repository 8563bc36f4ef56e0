"""The whole model on the host: weights, optimizer state and waiting gradients of every unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from elo_engine.checkpoint import CheckpointIndex, CheckpointReader
from elo_engine.config import OptimizerConfig
from elo_engine.model.full import check_shapes
from elo_engine.model.names import expected_shapes
from elo_engine.model.ops.adamw import AdamwState
from elo_engine.model.spec import ModelSpec
from elo_engine.stream.lanes import Fence
from elo_engine.stream.layout import BLOCKS, BlockName, Unit, adamw_state, model_units, numbered
from elo_engine.stream.parts import sliced_parts, whole_parts
from elo_engine.stream.slabs import Slab


class Store:
    """Units in memory of the host; the device has copies of a few of them.

    Args:
        dtype: of the weights the model computes with.
        folder: None keeps it in memory; else the folder whose disk holds it.
        waits: whether gradients wait here until their update (else they are never kept).
        sliced: whether embedding and head come to the device a few rows at a time.
        apart: layers whose steps AdamW counts apart, since they learn in other steps as well; their leaves are numbered
            before all others.

    Attributes:
        units: decoder layers, embedding, final norm and head, in the order of the model's leaves. views: their tensors.
        parts: what comes to the device at once: the units, or with `sliced` layers, slices, and the final norm. They
            have numbers, of which the layers' are those of the units. part_views: their tensors.
        powers: fp64, of AdamW, on the device. apart_powers: those of the layers `apart`.
        order: the numbers of the parts as their leaves are numbered.

    Raises:
        RefusedError: the memory or the disk does not have the room.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        optimizer: OptimizerConfig,
        device: torch.device,
        *,
        folder: Path | None = None,
        waits: bool = True,
        sliced: bool = False,
        apart: tuple[int, ...] = (),
    ) -> None:
        self.sliced, self.apart = sliced, apart
        self.spec, self.dtype, self.device = spec, dtype, device
        self.units = numbered(model_units(spec, dtype, optimizer), apart)
        self.powers = torch.tensor([1.0, 1.0, 0.0, *optimizer.betas], dtype=torch.float64, device=device)
        self.apart_powers = self.powers.clone()
        kept = [name for name in BLOCKS if waits or name != "gradients"]
        self._begins: dict[BlockName, list[int]] = {}
        self._slabs: dict[BlockName, Slab] = {}
        for name in kept:
            begins = [0]
            for unit in self.units:
                begins.append(begins[-1] + unit.block(name).nbytes)
            self._begins[name] = begins
            self._slabs[name] = Slab(begins[-1], folder=folder, pin=device.type == "cuda")
        self.views = [
            {name: unit.block(name).views(self._bytes(number, name)) for name in kept}
            for number, unit in enumerate(self.units)
        ]
        self.parts = sliced_parts(spec, self.units, dtype, optimizer) if sliced else whole_parts(self.units)
        self.order = sorted(range(len(self.parts)), key=lambda number: self.parts[number].owner not in apart)
        self.fences = [{name: Fence() for name in kept} for _ in self.parts]
        self.part_views = [
            {name: part.of(views) for name, views in self.views[part.owner].items()} for part in self.parts
        ]

    @property
    def layers(self) -> int:
        """The number of decoder layers; units 0 to this number less one."""
        return self.spec.layers

    @property
    def embedding(self) -> int:
        """The number of the embedding's unit."""
        return self.spec.layers

    @property
    def last(self) -> int:
        """The number of the unit of final norm and head."""
        return self.spec.layers + 1

    @property
    def nbytes(self) -> int:
        """Of the host's memory."""
        return sum(slab.memory.numel() for slab in self._slabs.values())

    def parts_of(self, owner: int, key: str) -> list[int]:
        """The numbers of the parts that hold this leaf of a unit."""
        return [i for i, part in enumerate(self.parts) if part.owner == owner and key in part.unit.keys]

    def _bytes(self, number: int, name: BlockName) -> Tensor:
        begins = self._begins[name]
        return self._slabs[name].memory[begins[number] : begins[number + 1]]

    def copies(self, number: int, name: BlockName, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A block of a part here, and in memory of the device: pieces of equal sizes, as few as there can be."""
        part = self.parts[number]
        block = part.unit.block(name)
        if part.whole:
            return [(self._bytes(part.owner, name), flat[: block.nbytes])]
        here, there = self.part_views[number][name], block.views(flat)
        return [(here[field.key], there[field.key]) for field in block.fields]

    def soon(self, number: int, name: BlockName) -> None:
        """This block will be read; for a slice, whose tensors lie apart, the file's own reading ahead will do."""
        part, begins = self.parts[number], self._begins[name]
        if part.whole:
            self._slabs[name].soon(begins[part.owner], begins[part.owner + 1])

    def powers_of(self, number: int) -> Tensor:
        """AdamW's for a part."""
        return self.apart_powers if self.parts[number].owner in self.apart else self.powers

    def state_of(self, numbers: Sequence[int], powers: Tensor) -> AdamwState:
        """AdamW's state of the leaves of these units, as views of this memory, with these powers."""
        states = [
            adamw_state(self.units[number], self.views[number]["weights"], self.views[number]["state"], powers)
            for number in numbers
        ]

        def joined(lists: list[list[Tensor]]) -> list[Tensor]:
            return [tensor for part in lists for tensor in part]

        scales = [state.scales for state in states if state.scales is not None]
        leaves = [state.leaves for state in states if state.leaves is not None]
        lows = [state.lows for state in states if state.lows is not None]
        return AdamwState(
            joined([state.weights for state in states]),
            joined(leaves) if leaves else None,
            joined([state.exp_avgs for state in states]),
            joined([state.exp_avg_sqs for state in states]),
            (joined([m for m, _ in scales]), joined([v for _, v in scales])) if scales else None,
            powers,
            joined(lows) if lows else None,
        )

    def load(self, index: CheckpointIndex, progress: Callable[[int, int], None] | None = None) -> int:
        """Read the checkpoint, unit by unit; returns the bytes taken from it.

        Raises:
            FailedError: a tensor is missing or has another shape, or what reading raises.
        """
        wanted = list(expected_shapes(self.spec))
        check_shapes(index, self.spec, wanted)
        total, done = index.bytes_of(wanted), 0
        with CheckpointReader(index) as reader:
            for number, unit in enumerate(self.units):
                names = [name for part in unit.parts for name in part.names]

                def told(part: int, _: int, before: int = done) -> None:
                    if progress is not None:
                        progress(before + part, total)

                tensors = reader.read(names, device="cpu", dtype=self.dtype, progress=told)
                done += index.bytes_of(names)
                self._fill(number, unit, tensors)
            taken = reader.bytes_read
        return taken

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take over the weights of a whole model that is in memory, by checkpoint name; the dictionary is emptied."""
        for number, unit in enumerate(self.units):
            self._fill(number, unit, tensors)

    def _fill(self, number: int, unit: Unit, tensors: dict[str, Tensor]) -> None:
        """Weights as they are, and the masters made of them; lower bits are zero."""
        weights, state = self.views[number]["weights"], self.views[number]["state"]
        for leaf in unit.leaves(weights):
            for name, view in leaf.split(leaf.tensor):
                view.copy_(tensors.pop(name))
        for key in unit.keys:
            if f"master {key}" in state:
                state[f"master {key}"].copy_(weights[key])
            elif f"low {key}" in state:
                state[f"low {key}"].zero_()
