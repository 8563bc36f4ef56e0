"""One optimizer step in layer-major order: embedding, layers, head, layers backwards, embedding's rows; see engine.py.

Everything between layers passes through `hidden`; everything that is complete goes to `device_units`, to wait in the
store or to be used at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.errors import FailedError
from elo_engine.model import ops
from elo_engine.model.bridge import Gap, GapStatistics
from elo_engine.model.decoder import Batch, Leaf
from elo_engine.model.layers import Ropes, decoder_layer, final_norm, layer_gradient, scale_embedded
from elo_engine.model.ops.adamw import StepNumbers, leaf_norms, step_numbers
from elo_engine.model.outer import TokenRows
from elo_engine.model.reference_adamw import step_key
from elo_engine.stream.device import Present
from elo_engine.stream.layout import Unit
from elo_engine.train.loop import StepOutcome
from elo_engine.train.resident import require_gradients

if TYPE_CHECKING:
    from elo_engine.stream.engine import StreamedEngine


class Stopped(Exception):
    """The step is given up."""


class Step:
    """One step under way."""

    def __init__(
        self, engine: StreamedEngine, batches: list[tuple[Batch, Ropes]], ids: Tensor, tokens_loss: int, lr: float, *,
        first: bool, should_stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.ids = ids  # of all micro-batches, on the host
        self.engine, self.batches, self.lr, self.first = engine, batches, lr, first
        self.store, self.spec, self.units, self.hidden = engine.store, engine.spec, engine.device_units, engine.hidden
        self.scale = 1 / max(1, tokens_loss)
        self._tokens = max(1, tokens_loss)
        self.should_stop = should_stop
        self.norms: dict[int, list[Tensor]] = {}
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=self.store.device)
        self.d_tied_VD: Tensor | None = None  # the head's part, where it does not wait in the store
        self.key = step_key(engine.seed, engine.attempts) if engine.config.state == "8bit" else 0

    def poll(self) -> None:
        """Between micro-batches."""
        if self.should_stop():
            raise Stopped

    @property
    def turn(self) -> int:
        """The place of the gradient of the hidden states."""
        return self.spec.layers + 1

    # -- the three parts

    def forward(self) -> None:
        """Inputs of all layers, for all micro-batches."""
        units, hidden, L = self.units, self.hidden, self.spec.layers
        self.poll()
        self.embed()
        for number in range(L):
            with units.layer(number) as present:
                for m, (batch, rope) in enumerate(self.batches):
                    self.poll()
                    entered_ND = hidden.get(number, m)
                    self.soon(number, m)
                    out_ND = decoder_layer(self.spec, number, present.weights, entered_ND, rope, batch.packing)
                    hidden.used(number, m, again=True)
                    hidden.put(number + 1, m, out_ND)
                    del entered_ND, out_ND
                units.soon(number + 1 if number + 1 < L else None)

    def observe(self, statistics: Mapping[Gap, GapStatistics]) -> None:
        """Count what enters and what leaves these gaps; between the forward and the backward pass, when it is there."""
        for gap, known in statistics.items():
            for m in range(len(self.batches)):
                self.poll()
                ends = gap[0] + 1, gap[1]
                known.add(*(self.hidden.get(place, m) for place in ends))
                for place in ends:
                    self.hidden.used(place, m, again=True)

    def embed(self) -> None:
        """What enters the first layer."""
        with self.units.outer(self.store.embedding) as present:
            self.units.soon(0)
            for m, (batch, _) in enumerate(self.batches):
                embedded_ND = F.embedding(batch.ids_N, present.weights["embedding"])
                self.hidden.put(0, m, scale_embedded(self.spec, embedded_ND))
                del embedded_ND

    def soon(self, place: int, m: int, *more: int) -> None:
        """The next micro-batch's hidden states of these places."""
        if m + 1 < len(self.batches):
            for where in (place, *more):
                self.hidden.soon(where, m + 1)

    def head(self) -> None:
        """Loss, and the gradients of the head, the final norm and the hidden states."""
        store, units, L = self.store, self.units, self.spec.layers
        with units.outer(store.last) as last:
            if self.spec.tied:
                with units.outer(store.embedding) as embedding:
                    d_head_VD = self._losses(last, embedding)
                del embedding
                if self.engine.at_once:
                    self.d_tied_VD = d_head_VD
                    del d_head_VD
                else:  # until the embedding's rows are known
                    tied: list[Any] = [d_head_VD]
                    del d_head_VD
                    units.send(store.embedding, tied)
                units.let_leave()
                self._take(last, last.grads.as_they_came())
            else:
                d_head_VD = self._losses(last, last)
                grads: list[Any] = [*last.grads.as_they_came()[:1], d_head_VD]
                del d_head_VD
                self._take(last, grads)
            units.soon(L - 1)

    def _losses(self, last: Present, owner: Present) -> Tensor:
        """The backward pass of the end of every micro-batch; returns the gradient of the head, `owner`'s last leaf."""
        head_VD = owner.weights[owner.unit.keys[-1]]
        hidden, plain = self.hidden, ops.use_reference()
        sum_VD = None if plain else torch.zeros_like(head_VD, dtype=torch.float32, requires_grad=False)
        for m, (batch, _) in enumerate(self.batches):
            self.poll()
            entered_ND = hidden.get(self.spec.layers, m).detach().requires_grad_()
            self.soon(self.spec.layers, m)
            with torch.enable_grad():
                normed_ND = final_norm(self.spec, entered_ND, last.weights["norm"])
                loss = ops.linear_cross_entropy(
                    normed_ND, head_VD, batch.labels_N, softcap=self.spec.head_softcap, d_head_sum_VD=sum_VD
                )
                del normed_ND
                (loss / self._tokens).backward()
            self.loss_sum += loss.detach()
            hidden.used(self.spec.layers, m)
            assert entered_ND.grad is not None
            hidden.put(self.turn, m, entered_ND.grad)
            del loss, entered_ND
        if sum_VD is not None:
            return sum_VD.mul_(self.scale)
        grad = owner.grads.as_they_came()[-1]
        assert grad is not None
        return grad

    def backward(self) -> None:
        """Layers from the last to the first, then the embedding's rows."""
        units, hidden, spec = self.units, self.hidden, self.spec
        for number in reversed(range(spec.layers)):
            with units.layer(number) as present:
                if self.engine.at_once:
                    units.state_soon(number)
                present.grads.clear()
                for m, (batch, rope) in enumerate(self.batches):
                    if not self.engine.at_once:
                        self.poll()
                    entered_ND, d_out_ND = hidden.get(number, m), hidden.get(self.turn, m)
                    self.soon(number, m, self.turn)
                    d_hidden_ND = layer_gradient(
                        spec, number, present.weights, entered_ND, rope, batch.packing, d_out_ND, need_d_hidden=True,
                        before=units.let_leave if m == 0 else None,
                    )  # fmt: skip
                    assert d_hidden_ND is not None
                    hidden.used(number, m)
                    hidden.used(self.turn, m)
                    hidden.put(self.turn, m, d_hidden_ND)
                    del entered_ND, d_out_ND, d_hidden_ND
                units.soon(number - 1 if number else None)
                grads = present.grads.as_they_came()
                present.grads.clear()
                self._take(present, grads)
                del grads
        self.embedding_rows()

    def embedding_rows(self) -> None:
        """The embedding's whole gradient: its rows, on top of the head's where the two are tied."""
        store, units, spec = self.store, self.units, self.spec
        units.let_leave()
        rows = self.rows()
        if spec.tied and self.d_tied_VD is None:
            d_VD = units.gradients_back(store.embedding)["embedding"]
        elif self.d_tied_VD is not None:
            d_VD, self.d_tied_VD = self.d_tied_VD, None
        else:
            d_VD = torch.zeros((spec.V, spec.D), dtype=store.dtype, device=store.device)
        d_VD.index_add_(0, rows.ids_U, rows.sum_UD.to(d_VD.dtype))
        grads = [d_VD]
        del d_VD, rows
        if self.engine.at_once:
            with units.outer(store.embedding) as present:
                self._take(present, grads)
        else:
            self.wait(store.embedding, grads)
        units.let_leave()

    def rows(self) -> TokenRows:
        """The gradient by the embedded tokens of the step."""
        found = TokenRows(self.ids, self.spec.D, self.store.device)
        for m, (batch, _) in enumerate(self.batches):
            found.add(batch.ids_N, scale_embedded(self.spec, self.hidden.get(self.turn, m)))
            self.hidden.used(self.turn, m)
        return found

    # -- gradients and numbers

    def _take(self, present: Present, grads: list[Any]) -> None:
        """The gradients of a unit are complete: they wait, or update it at once by numbers of its own."""
        if not self.engine.at_once:
            self.wait(present.number, grads)
            return
        made = self.checked(present.number, grads)
        norms = leaf_norms(made)
        self.norms[present.number] = norms
        powers = self.store.powers_of(present.number).clone()
        numbers = self._numbers(powers, norms, self.engine.config.clip)
        self.units.update_now(present, made, numbers)

    def wait(self, number: int, grads: list[Any]) -> None:
        self.norms[number] = self.units.send(number, self.checked(number, grads))

    def checked(self, number: int, grads: list[Any]) -> list[Tensor]:
        unit = self.store.parts[number].unit
        if self.first:
            require_gradients(_named(unit, grads))
        there = [grad for grad in grads if grad is not None]
        grads.clear()  # whoever has the new list lets go of each when it is done with it
        assert len(there) == len(unit.parts), f"{unit.name}: {len(there)} gradients for {len(unit.parts)} leaves"
        return there

    def _numbers(self, powers: Tensor, norms: list[Tensor], clip: float | None) -> StepNumbers:
        config = self.engine.config
        return step_numbers(
            powers, norms, bits=8 if config.state == "8bit" else 32, lr=self.lr, eps=config.eps,
            weight_decay=config.weight_decay, clip=clip, key=self.key,
        )  # fmt: skip

    def finish(self) -> StepOutcome:
        """The norm of all gradients, and what follows from it; the step's wait for the device."""
        engine, units, store = self.engine, self.units, self.store
        norms = [norm for number in store.order for norm in self.norms[number]]
        clip = None if engine.at_once else engine.config.clip  # at once, each unit has been clipped by its own
        numbers = self._numbers(store.powers, norms, clip)
        apart = self._numbers(store.apart_powers, norms, clip) if store.apart else numbers
        outcome = StepOutcome(torch.stack((self.loss_sum, *(part.float() for part in numbers.result))))
        engine.optimizer.attempts += 1
        units.forget()
        if not engine.at_once and outcome.updated:
            units.waiting = set(store.order)
            units.numbers = {n: apart if store.parts[n].owner in store.apart else numbers for n in store.order}
        if engine.at_once and not outcome.updated:
            engine.broken = (
                f"align.stream.update=at_once: the gradient's norm is {outcome.norm}, and what came before the first "
                "bad number has been updated already, so this step can be neither kept nor left out. The snapshots are "
                "whole; start a new run in another output folder with a lower learning rate, or with "
                "align.stream.update=lazy, which leaves such a step out"
            )
            raise FailedError(engine.broken)
        return outcome


def _named(unit: Unit, grads: Sequence[Tensor | None]) -> Iterator[tuple[str, Tensor | None]]:
    for part, grad in zip(unit.parts, grads, strict=True):
        if grad is None:
            yield from ((name, None) for name in part.names)
        else:
            yield from Leaf(grad, part.names, part.shapes).split(grad)
