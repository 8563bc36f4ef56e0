"""What one optimizer step of arm (s) allocates and frees on the device, in the order of `stream/step.py`, and what the
model takes on the host. The layer itself is `memory_engine`'s; on a CPU the store is host memory that torch's allocator
does not hand out, so it is on the host's side there too.

Suffixes as in the shape legend; all sizes here are bytes.
"""

from __future__ import annotations

from elo_engine.measure import memory_engine_head as head
from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_engine import ACT, EngineStep, SavedLayer
from elo_engine.measure.memory_gradients import GRAD, Gradients
from elo_engine.measure.memory_rotary import gathered_bytes, rows_bytes, table_bytes
from elo_engine.measure.memory_shapes import ADAMW_TILE, split_spike
from elo_engine.measure.memory_units import UnitBytes, Units
from elo_engine.measure.setting import Setting

_AHEAD = 4  # buffers on the device for hidden states that are kept on the host: stream/hidden.py
_SLOTS = 2  # layers on the device: stream/device.py
_DETAILED = 3  # micro-batches gone through op by op: the first makes the gradients, the second widens their sums


def standing_bytes(setting: Setting) -> int:
    """What stays on the device between two steps."""
    ledger = Ledger()
    step_of(setting, ledger).standing()
    return ledger.live_bytes


class _Sums(Gradients):
    """Gradients of one unit, until they are let go of."""

    def gone(self) -> list[Held]:
        """The sums, which are its caller's from now on."""
        sums, self._sums = [*self._sums.values()], {}
        return sums


class StreamedStep(EngineStep):
    """One step, as entries of a ledger."""

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        super().__init__(setting, ledger)
        self.units = Units.of(setting)
        self.lazy, self.here = setting.streaming.update == "lazy", setting.streaming.inputs == "device"
        self.detailed = min(_DETAILED, setting.micro_batches)
        self.rest = setting.micro_batches - self.detailed
        self.matrix = self.spec.V * self.spec.D
        self.leaving: list[Held] = []
        self.passing: Held | None = None  # a GPU's memory that is still on its way to the host
        self.tied_sum: Held | None = None

    def standing(self) -> None:
        """Room for layers, for one layer's state and for its waiting gradient."""
        ledger, weights, state = self.ledger, *self.room()
        ledger.add("weights", _SLOTS * weights)
        ledger.add("optimizer", state)
        ledger.add(GRAD, weights if self.lazy else 0)
        ledger.add(ACT, table_bytes(self.setting))
        if not self.here:
            ledger.add(ACT, _AHEAD * self.ND)
        if self.cuda:
            sizes = [size for unit in self.units.all(1) for size in unit.sizes]
            ledger.add("optimizer", 8 * sum(-(-size // ADAMW_TILE) for size in sizes))

    def room(self) -> tuple[int, int]:
        """Of a slot, and of the state beside it."""
        return self.units.layer.weights, self.units.layer.state

    # -- hidden states

    def put(self, made: Held) -> Held:
        """-> what a place holds from now on. On its way to the host it lives until the next one is made."""
        if self.here:
            return made
        if self.passing is not None:
            self.ledger.drop(self.passing)
        self.passing = made if self.cuda else None
        if not self.cuda:
            self.ledger.drop(made)
        return self.ledger.add(ACT, 0)

    def lump(self) -> Held:
        """A place of the micro-batches that are not gone through one by one."""
        return self.ledger.add(ACT, self.rest * self.ND if self.here else 0)

    # -- a unit's update and its gradients

    def update_unit(self, unit: UnitBytes) -> None:
        """AdamW in place. torch's, on a CPU, takes fp32 copies of bf16 gradients."""
        if not self.cuda and self.w == 2 and self.setting.state == "fp32":
            self.ledger.spike(GRAD, 4 * unit.elements)
        if self.setting.master_bytes == 1:
            self.ledger.spike("optimizer", split_spike(max(unit.sizes)))

    def enter(self, unit: UnitBytes, name: str, *, waits: bool) -> Held:
        """An outer unit comes; what waits for its update comes with it and goes again. -> its weights."""
        ledger = self.ledger
        weights = ledger.add("weights", unit.weights)
        if waits:
            ledger.moment = f"update of {name}"
            with ledger.during("optimizer", unit.state), ledger.during(GRAD, unit.weights):
                self.update_unit(unit)
        return weights

    def send(self, unit: UnitBytes, grads: list[Held], cast: int) -> None:
        """Gradients go to the store, in its type: of `cast` elements a copy is made. They are gone when they are
        there: at once on a CPU, when something waits for it on a GPU.
        """
        ledger = self.ledger
        grads = self.cast(unit, grads, cast)
        self.norms(unit)
        if self.cuda:
            self.leaving += grads
        else:
            ledger.drop(*grads)

    def cast(self, unit: UnitBytes, grads: list[Held], cast: int) -> list[Held]:
        """Leaf by leaf: each fp32 sum is let go of before the next is cast."""
        if not cast:
            return grads
        ledger = self.ledger
        ledger.drop(*grads)
        sums, copies = [ledger.add(GRAD, 4 * size) for size in unit.sizes], []
        for total, size in zip(sums, unit.sizes, strict=True):
            copies.append(ledger.add(GRAD, self.w * size))
            ledger.drop(total)
        return copies

    def norms(self, unit: UnitBytes) -> None:
        """On a CPU the norm of a bf16 gradient is that of an fp32 copy."""
        if not self.cuda and self.w == 2:
            self.ledger.spike(GRAD, 4 * max(unit.sizes))

    def update_now(self, unit: UnitBytes, grads: list[Held], cast: int, *, state: bool) -> None:
        """Update with gradients that are here; `state`: in memory of its own. The gradients go."""
        ledger = self.ledger
        self.norms(unit)
        grads = self.cast(unit, grads, cast)
        with ledger.during("optimizer", unit.state if state else 0):
            self.update_unit(unit)
        ledger.drop(*grads)

    def until_down(self, index: int) -> dict[str, Held]:
        """After a recomputation what was leaving is gone."""
        kept = super().until_down(index)
        self.let_leave()
        return kept

    def run_again(self, index: int) -> dict[str, Held]:
        """As `until_down`."""
        kept = super().run_again(index)
        self.let_leave()
        return kept

    def let_leave(self) -> None:
        """See `DeviceUnits`."""
        self.ledger.drop(*self.leaving)
        self.leaving.clear()

    # -- the step

    def step(self) -> None:
        """Forward, head, backward, the embedding's rows."""
        ledger, L, setting = self.ledger, self.spec.layers, self.setting
        ids = ledger.add(ACT, 3 * 8 * setting.tokens_per_step)  # ids, labels, positions
        # rotary tables by token stay on a CPU from the first layer on
        ropes = setting.micro_batches * (gathered_bytes(setting, range(L)) + rows_bytes(setting))
        ledger.moment = "embedding"
        embedding, first = self.embed()
        places = [first]
        tables: Held | None = None
        for number in range(L):
            if self.lazy:
                ledger.moment = f"update of layer {number}"
                self.update_unit(self.units.layer)
            if number == 0:
                ledger.drop(embedding)
                tables = ledger.add(ACT, ropes)
            ledger.moment = f"forward of layer {number}"
            made = [self.lump()]
            for _ in range(self.detailed):
                _, out = self.forward_layer(number, graph=False)
                made.append(self.put(out))
            places.append(made)
        turn = self.head(places.pop())
        for number in reversed(range(L)):
            turn = self.backward(number, places.pop(), turn)
        self.embedding_rows(turn)
        assert tables is not None
        ledger.drop(ids, tables, *([] if self.passing is None else [self.passing]))
        self.let_leave()

    def embed(self) -> tuple[Held, list[Held]]:
        """-> what is there until the first layer is updated, and what enters it."""
        ledger = self.ledger
        embedding = self.enter(self.units.embedding, "the embedding", waits=self.lazy)
        ledger.moment = "embedding"
        return embedding, [self.lump(), *(self.put(ledger.add(ACT, self.ND)) for _ in range(self.detailed))]

    def head(self, places: list[Held]) -> list[Held]:
        """-> the gradients of the hidden states."""
        ledger, tied, units = self.ledger, self.spec.tied, self.units
        last = self.enter(units.last, "final norm and head", waits=self.lazy)
        matrix = self.enter(units.embedding, "the embedding", waits=False) if tied else ledger.add("weights", 0)
        total = ledger.add(GRAD, 4 * self.matrix)
        self.gradients = sums = _Sums(ledger, widens=self.w == 2, copies=not self.cuda)
        turn = [self.lump_of(places.pop(0)), *(self.loss(place) for place in places)]
        ledger.moment = "gradients of the head"
        cast = self.matrix if self.w == 2 else 0
        ledger.drop(matrix)
        if tied:
            if self.lazy:
                self.send(units.embedding, [total], cast)
                self.let_leave()
            else:
                self.tied_sum = total
            self.take(units.last, sums.gone(), 0, state=True)
        else:
            self.take(units.last, [*sums.gone(), total], cast, state=True)
        ledger.drop(last)
        return turn

    def lump_of(self, place: Held) -> Held:
        """The same micro-batches' gradients in their states' place."""
        self.ledger.drop(place)
        return self.lump()

    def loss(self, entered: Held) -> Held:
        """End of one micro-batch and its backward pass."""
        ledger = self.ledger
        ledger.moment = "final norm"
        normed, rstd = self.norm()
        ledger.moment = "loss"
        d_hidden = head.forward(self.setting, ledger, learns=True)
        ledger.drop(normed)
        ledger.moment = "backward of the loss"
        d_normed = ledger.add(ACT, self.ND)
        if not self.cuda and self.w == 2:  # torch multiplies two types on the CPU by way of fp32 copies
            ledger.spike(ACT, 2 * self.wide_ND)
        ledger.drop(d_hidden)
        ledger.moment = "backward of the final norm"
        d_out = self.norm_backward()
        self.gradient(-1, "norm", self.spec.D)
        ledger.drop(d_normed, rstd)
        self.gradients.settle()
        d_out = self.put(d_out)
        ledger.drop(entered)
        return d_out

    def backward(self, number: int, places: list[Held], turn: list[Held]) -> list[Held]:
        """A layer, all micro-batches. -> gradients of what entered it."""
        ledger = self.ledger
        self.gradients = sums = _Sums(ledger, widens=self.w == 2, copies=not self.cuda)
        below = []
        for entered, d_out in zip(places[1:], turn[1:], strict=True):
            d_hidden = self.backward_layer(number, SavedLayer(entered, None), d_out, below=True)
            assert d_hidden is not None
            below.append(self.put(d_hidden))
        ledger.drop(places[0])
        ledger.moment = f"gradients of layer {number}"
        cast = self.units.layer.elements if self.w == 2 and self.setting.micro_batches > 1 else 0
        self.take(self.units.layer, sums.gone(), cast, state=False)
        return [turn[0], *below]

    @property
    def different(self) -> int:
        """Ids of a step: no more different ones than that."""
        return min(self.spec.V, self.setting.tokens_per_step)

    def token_rows(self, turn: list[Held]) -> list[Held]:
        """The embedding's gradient as rows, of the gradients of what entered the first layer."""
        ledger, U = self.ledger, self.different
        if not self.cuda:  # a GPU's are found on the host
            ledger.spike(ACT, 3 * 8 * self.setting.tokens_per_step)
        rows = [ledger.add(ACT, 8 * U), ledger.add(GRAD, 4 * U * self.spec.D)]
        for d_hidden in turn:
            ledger.spike(ACT, 8 * self.N + (self.wide_ND if self.w == 2 else 0))
            ledger.drop(d_hidden)
        return rows

    def take(self, unit: UnitBytes, grads: list[Held], cast: int, *, state: bool) -> None:
        """Complete gradients: they wait, or update their unit."""
        if self.lazy:
            self.send(unit, grads, cast)
        else:
            self.update_now(unit, grads, cast, state=state)

    def embedding_rows(self, turn: list[Held]) -> None:
        """The embedding's gradient: rows of the step's tokens, on top of the head's where the two are tied."""
        ledger, unit, U = self.ledger, self.units.embedding, self.different
        self.let_leave()
        ledger.moment = "backward of the embedding"
        rows = self.token_rows(turn)
        ledger.moment = "gradients of the embedding"
        cast = self.matrix if self.w == 2 else 0
        whole, self.tied_sum = self.tied_sum, None
        if self.spec.tied and self.lazy:
            whole, cast = ledger.add(GRAD, unit.weights), 0
        elif whole is None:
            whole, cast = ledger.add(GRAD, self.w * self.matrix), 0
        ledger.spike(GRAD, 2 * U * self.spec.D if self.w == 2 and not cast else 0)
        ledger.drop(*rows)
        if self.lazy:
            self.send(unit, [whole], cast)
        else:
            weights = self.enter(unit, "the embedding", waits=False)
            self.update_now(unit, [whole], cast, state=True)
            ledger.drop(weights)
        self.let_leave()


def run_step(setting: Setting, ledger: Ledger) -> None:
    """Enter one steady optimizer step of arm (s); what is live after it stays on the device between steps."""
    step = step_of(setting, ledger)
    step.standing()
    step.step()


def step_of(setting: Setting, ledger: Ledger) -> StreamedStep:
    """The step as the vocabulary comes: whole, or in slices."""
    if setting.streaming.vocabulary == "sliced":
        from elo_engine.measure.memory_sliced import SlicedStep

        return SlicedStep(setting, ledger)
    return StreamedStep(setting, ledger)
