"""What embedding and head allocate where they come in slices: `stream/sliced.py` and `model/sliced_head.py`. All else
of the step is `memory_streamed`'s. Suffixes as in the shape legend; all sizes here are bytes.
"""

from __future__ import annotations

from elo_engine.measure.ledger import Held, Ledger
from elo_engine.measure.memory_engine import ACT
from elo_engine.measure.memory_engine_head import LOSS
from elo_engine.measure.memory_gradients import GRAD
from elo_engine.measure.memory_streamed import StreamedStep
from elo_engine.measure.memory_units import unit_bytes
from elo_engine.measure.setting import Setting, vocabulary_slices

_CHUNK_ROWS = 1024  # chunked_head.CHUNK_ROWS
_SUM_ROWS = 4096  # sliced_head
_SUMS_AHEAD = 2  # stream/hidden.py


class SlicedStep(StreamedStep):
    """One step, as entries of a ledger; the first slice is as large as any."""

    def __init__(self, setting: Setting, ledger: Ledger) -> None:
        super().__init__(setting, ledger)
        slices = vocabulary_slices(self.spec)
        self.count, self.S = len(slices), slices[0][1]
        self.slice = unit_bytes(setting, [self.S * self.spec.D])
        self.norm_unit = unit_bytes(setting, [self.spec.D])
        self.R = min(_CHUNK_ROWS, setting.N)

    def room(self) -> tuple[int, int]:
        """A slice may be a little larger than a layer: it holds whole groups of 256 moments."""
        layer = self.units.layer
        return max(layer.weights, self.slice.weights), max(layer.state, self.slice.state)

    def standing(self) -> None:
        """See `StreamedStep`."""
        super().standing()
        if not self.here:
            self.ledger.add(ACT, _SUMS_AHEAD * self.wide_ND)

    def embed(self) -> tuple[Held, list[Held]]:
        """A table of the step's rows, gathered slice by slice."""
        ledger, U, D = self.ledger, self.different, self.spec.D
        ids = ledger.add(ACT, 8 * U)
        table = ledger.add(ACT, self.w * U * D)
        for _ in range(min(self.count, 2)):
            ledger.moment = "update of a slice of the embedding"
            self.update_unit(self.slice)
            ledger.moment = "embedding"
            ledger.spike(ACT, (self.w * D + 8) * min(U, self.S))
        first = [self.lump()]
        for _ in range(self.detailed):
            ledger.spike(ACT, 8 * self.N)
            first.append(self.put(ledger.add(ACT, self.ND)))
        ledger.drop(ids, table)
        return ledger.add(ACT, 0), first

    # -- the head

    def head(self, places: list[Held]) -> list[Held]:
        """Two passes over the slices, then the norm's backward pass."""
        ledger, spec = self.ledger, self.spec
        last = self.enter(self.norm_unit, "the final norm", waits=self.lazy)
        kept = ledger.add(LOSS, 9 * self.setting.tokens_per_step)  # log-sum-exp, target, and whether it counts
        if not spec.tied:
            ledger.moment = "update of a slice of the head"
            self.update_unit(self.slice)
        ledger.moment = "loss"
        normed, rstd = self.norm()
        self.logits(gradients=False)
        ledger.drop(normed, rstd)
        sums: list[Held] = []
        for turn in range(2):  # the second slice adds to the first's, while that one's gradient leaves
            ledger.moment = "loss"
            d_head = ledger.add(GRAD, 4 * self.slice.elements)
            sums = self.second_pass(sums, first=turn == 0)
            ledger.moment = "gradients of the head"
            self.let_leave()
            self.send(self.slice, [d_head], self.slice.elements if self.w == 2 else 0)
        turn_places = [self.lump_of(places.pop(0))]
        ledger.drop(sums.pop(0))
        for place, total in zip(places, sums, strict=True):
            turn_places.append(self.through_norm(place, total))
        ledger.drop(kept, last)
        if not self.cuda:
            ledger.drop(*self.leaving)
            self.leaving.clear()
        return turn_places

    def second_pass(self, before: list[Held], *, first: bool) -> list[Held]:
        """One slice; the sums of the micro-batches that are not gone through one by one stand first."""
        ledger = self.ledger
        sums = [before[0]] if before else [ledger.add(ACT, 4 * self.rest * self.N * self.spec.D if self.here else 0)]
        for m in range(self.detailed):
            normed, rstd = self.norm()
            made = ledger.add(ACT, self.wide_ND)
            self.logits(gradients=True)
            if not first:
                ledger.drop(before[1 + m])
            sums.append(self.put(made))
            ledger.drop(normed, rstd)
        return sums

    def logits(self, *, gradients: bool) -> None:
        """One chunk of one slice, in fp32 and in the weights' type, one after the other; what is made of it."""
        ledger, R, S, D = self.ledger, self.R, self.S, self.spec.D
        narrow = ledger.add(LOSS, self.w * R * S if self.w == 2 else 0)
        wide = ledger.add(LOSS, 4 * R * S)
        ledger.drop(narrow)
        if not gradients:
            ledger.spike(LOSS, 4 * R * S)  # under the log-sum-exp
            ledger.drop(wide)
            return
        if self.w == 2:
            narrow = ledger.add(LOSS, 2 * R * S)
            ledger.drop(wide)
            wide = narrow
        ledger.spike(LOSS, (self.w + (4 if self.w == 2 else 0)) * R * D)
        if self.w == 2:
            ledger.spike(LOSS, (4 if self.cuda else 6) * min(_SUM_ROWS, S) * D)
        ledger.drop(wide)

    def through_norm(self, entered: Held, total: Held) -> Held:
        """One micro-batch: the scaled sum in the states' type, the norm again, and its backward pass."""
        ledger = self.ledger
        ledger.moment = "backward of the final norm"
        scaled = ledger.add(ACT, self.wide_ND)
        if self.w == 2:
            narrow = ledger.add(ACT, self.ND)
            ledger.drop(scaled)
            scaled = narrow
        ledger.drop(total)
        normed, rstd = self.norm()
        ledger.drop(normed)
        made = self.norm_backward()
        ledger.spike(GRAD, self.w * self.spec.D)
        ledger.drop(scaled, rstd)
        made = self.put(made)
        ledger.drop(entered)
        return made

    # -- the embedding's gradient

    def embedding_rows(self, turn: list[Held]) -> None:
        """Slice by slice; the gradient of one leaves while the next is made."""
        ledger, U, D = self.ledger, self.different, self.spec.D
        self.let_leave()
        ledger.moment = "backward of the embedding"
        rows = self.token_rows(turn)
        ledger.moment = "gradients of the embedding"
        for _ in range(min(self.count, 2)):
            made = ledger.add(GRAD, self.slice.weights)
            there = min(U, self.S)
            ledger.spike(GRAD, (2 * there * D if self.w == 2 else 0) + 8 * there)
            self.let_leave()
            self.send(self.slice, [made], 0)
        ledger.drop(*rows)
        self.let_leave()
