"""What is on the device: two slots that decoder layers and slices of the vocabulary take in turns, and what the ends of
the model need while they are used.

Before a unit is used, the update that waits for it is made (the lazy step): clipping by the norm of all gradients is
exact, although no gradient but one layer's was ever on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from elo_engine.model.decoder import Leaf
from elo_engine.model.ops.adamw import AdamwState, StepNumbers, adamw_update, leaf_norms
from elo_engine.stream.lanes import Fence, Lanes
from elo_engine.stream.layout import BLOCKS, BlockName, Field, Unit, adamw_state
from elo_engine.stream.store import Store
from elo_engine.train.gradients import Gradients


class Piece:
    """Memory of the device for one block of a unit."""

    def __init__(self, nbytes: int, lanes: Lanes) -> None:
        self.flat = torch.empty(nbytes, dtype=torch.uint8, device=lanes.device)
        self.fence = Fence()
        # The allocator may give out what a computation that is still queued reads: a copy into it comes after that.
        with lanes.on("compute", writes=[self.fence]):
            pass


@dataclass
class Present:
    """A unit that is on the device.

    Attributes:
        weights: by key, as leaves that learn. piece: their memory. grads: where their gradients add up.
    """

    number: int
    unit: Unit
    weights: dict[str, Tensor]
    piece: Piece
    grads: Gradients

    def leaves(self) -> list[Leaf]:
        """With the checkpoint's names."""
        return self.unit.leaves(self.weights)


class _Slot:
    """Room for the weights of a layer; all layers are laid out alike, so its leaves stay the same tensors."""

    def __init__(self, unit: Unit, nbytes: int, lanes: Lanes) -> None:
        self.piece = Piece(nbytes, lanes)
        self.views = unit.weights.views(self.piece.flat)
        self.leaves = {key: view.detach().requires_grad_() for key, view in self.views.items()}
        self.grads = Gradients(unit.leaves(self.leaves))


class DeviceUnits:
    """Brings parts of a store to the device, updates them there, and sends them and their gradients back.

    Attributes:
        numbers: of the last completed step by part, for the updates that wait. waiting: the numbers of the parts whose
            gradient waits in the store for them.
    """

    def __init__(self, store: Store, lanes: Lanes) -> None:
        self._store, self._lanes = store, lanes
        taking = [part.unit for part in store.parts if part.owner < store.layers or part.slice is not None]
        room = {name: max(unit.block(name).nbytes for unit in taking) for name in BLOCKS}
        self._slots = [_Slot(store.units[0], room["weights"], lanes) for _ in range(2)]
        self._state = Piece(room["state"], lanes)
        self._gradients = Piece(room["gradients"] if "gradients" in store.views[0] else 0, lanes)
        self._turn = 0
        self._coming: tuple[int, int] | None = None  # part, slot
        self._leaving: tuple[Fence, list[Tensor]] | None = None
        self.numbers: Mapping[int, StepNumbers] = {}
        self.waiting: set[int] = set()

    def held(self) -> dict[str, int]:
        """Bytes that stay on the device, by component."""
        return {
            "weights": sum(slot.piece.flat.numel() for slot in self._slots),
            "gradients": self._gradients.flat.numel(),
            "optimizer": self._state.flat.numel(),
        }

    # -- to the device

    def soon(self, number: int | None) -> None:
        """Begin to bring a layer or a slice; None: nothing."""
        if number is None or (self._coming is not None and self._coming[0] == number):
            return
        slot, self._turn = self._turn, (self._turn + 1) % len(self._slots)
        self._down(number, "weights", self._slots[slot].piece)
        if number in self.waiting:
            self._down(number, "state", self._state)
            self._down(number, "gradients", self._gradients)
        self._coming = number, slot

    def _down(self, number: int, block: BlockName, piece: Piece) -> None:
        self._store.soon(number, block)
        with self._lanes.on("down", reads=[self._store.fences[number][block]], writes=[piece.fence]):
            for here, there in self._store.copies(number, block, piece.flat):
                there.copy_(here, non_blocking=True)

    def _up(self, number: int, block: BlockName, piece: Piece) -> None:
        with self._lanes.on("up", reads=[piece.fence], writes=[self._store.fences[number][block]]):
            for here, there in self._store.copies(number, block, piece.flat):
                here.copy_(there, non_blocking=True)

    @contextmanager
    def layer(self, number: int) -> Iterator[Present]:
        """A decoder layer, updated; what is queued in the block may read it."""
        for neighbour in {max(0, number - 1), min(self._store.layers - 1, number + 1)}:
            for block in BLOCKS if neighbour in self.waiting else BLOCKS[:1]:
                self._store.soon(neighbour, block)  # from the disk into memory, while this one is used
        with self._in_slot(number) as slot:
            yield Present(number, self._store.units[number], slot.leaves, slot.piece, slot.grads)

    @contextmanager
    def rows(self, number: int) -> Iterator[Tensor]:
        """As `layer`, for a slice of the embedding or of the head: its weights, which autograd does not see."""
        with self._in_slot(number) as slot:
            (weights,) = self._store.parts[number].unit.weights.views(slot.piece.flat).values()
            yield weights

    @contextmanager
    def _in_slot(self, number: int) -> Iterator[_Slot]:
        self.soon(number)
        assert self._coming is not None
        slot, unit = self._slots[self._coming[1]], self._store.parts[number].unit
        if number in self.waiting:
            views, state = unit.weights.views(slot.piece.flat), unit.state.views(self._state.flat)
            adamw = adamw_state(unit, views, state, self._store.powers_of(number))
            grads = list(unit.gradients.views(self._gradients.flat).values())
            self._update(number, adamw, grads, self.numbers[number], slot.piece, self._state, self._gradients)
        self._coming = None
        with self._lanes.on("compute", reads=[slot.piece.fence]):
            yield slot

    def bring(self, number: int) -> None:
        """Bring a part for its update alone."""
        part = self._store.parts[number]
        if number < self._store.layers or part.slice is not None:
            with self._in_slot(number):
                pass
        else:
            with self.outer(number):
                pass

    @contextmanager
    def outer(self, number: int) -> Iterator[Present]:
        """As `layer`, for the embedding or for final norm and head: memory of their own while they are here."""
        unit, lanes = self._store.parts[number].unit, self._lanes
        piece = Piece(unit.weights.nbytes, lanes)
        self._down(number, "weights", piece)
        views = unit.weights.views(piece.flat)
        if number in self.waiting:
            state, gradients = Piece(unit.state.nbytes, lanes), Piece(unit.gradients.nbytes, lanes)
            self._down(number, "state", state)
            self._down(number, "gradients", gradients)
            adamw = adamw_state(unit, views, unit.state.views(state.flat), self._store.powers_of(number))
            grads = list(unit.gradients.views(gradients.flat).values())
            self._update(number, adamw, grads, self.numbers[number], piece, state, gradients)
            self._lanes.keep_until_read(state, gradients)
            del state, gradients, adamw, grads
        leaves = {key: view.detach().requires_grad_() for key, view in views.items()}
        with self._lanes.on("compute", reads=[piece.fence]):
            yield Present(number, unit, leaves, piece, Gradients(unit.leaves(leaves)))
        self._lanes.keep_until_read(piece)

    def _update(
        self, number: int, adamw: AdamwState, grads: list[Tensor], numbers: StepNumbers, weights: Piece,
        state: Piece, gradients: Piece,
    ) -> None:  # fmt: skip
        part = self._store.parts[number]
        with self._lanes.on("compute", writes=[weights.fence, state.fence, gradients.fence]):
            adamw_update(adamw, grads, part.numbers(numbers), first=part.unit.first)
        self._up(number, "weights", weights)
        self._up(number, "state", state)
        self.waiting.discard(number)

    # -- gradients

    def send(self, number: int, grads: list[Tensor]) -> list[Tensor]:
        """Start the gradients of a part, one a leaf, on their way to the store, in the type they wait in; returns the
        norm of each. They stay on the device until `let_leave`; the list is empty after this.
        """
        fields, there = self._store.parts[number].unit.gradients.fields, self._store.part_views[number]["gradients"]
        leaving = _cast(grads, fields)
        norms, made = leaf_norms(leaving), Fence()
        with self._lanes.on("compute", writes=[made]):
            pass
        with self._lanes.on("up", reads=[made], writes=[self._store.fences[number]["gradients"]]):
            for grad, field in zip(leaving, fields, strict=True):
                there[field.key].copy_(grad, non_blocking=True)
        if self._lanes.streams:
            self.let_leave()  # others that are on their way, which nobody would wait for from here on
            self._leaving = made, leaving
        return norms

    def gradients_back(self, number: int) -> dict[str, Tensor]:
        """The gradients that were sent, on the device once more."""
        block = self._store.parts[number].unit.gradients
        piece = Piece(block.nbytes, self._lanes)
        self._down(number, "gradients", piece)
        with self._lanes.on("compute", writes=[piece.fence]):
            return block.views(piece.flat)

    def forget(self) -> None:
        """Nothing that was begun will be used."""
        self.let_leave()
        self._coming = None

    def let_leave(self) -> None:
        """Order what follows after the gradients that are on their way, and let go of their memory."""
        if self._leaving is not None:
            made, self._leaving = self._leaving[0], None
            with self._lanes.on("compute", writes=[made]):
                pass

    def state_soon(self, number: int) -> None:
        """Begin to bring the state of a layer that `update_now` will update."""
        self._down(number, "state", self._state)

    def update_now(self, present: Present, grads: list[Tensor], numbers: StepNumbers) -> None:
        """Update a unit with gradients that are here, at once, and send it back: nothing waits. The list is empty after
        this.
        """
        unit, lanes = present.unit, self._lanes
        of_type, state = _cast(grads, unit.gradients.fields), self._state
        if present.number >= self._store.layers:
            state = Piece(unit.state.nbytes, lanes)
            self._down(present.number, "state", state)
        views = {key: leaf.detach() for key, leaf in present.weights.items()}
        adamw = adamw_state(unit, views, unit.state.views(state.flat), self._store.powers_of(present.number))
        self._update(present.number, adamw, of_type, numbers, present.piece, state, Piece(0, lanes))
        if state is not self._state:
            self._lanes.keep_until_read(state)


def _cast(grads: list[Tensor], fields: Sequence[Field]) -> list[Tensor]:
    """The gradients in the types of the fields, one by one: each is let go of before the next is cast."""
    assert len(grads) == len(fields)
    return [grads.pop(0).to(field.dtype) for field in fields]
