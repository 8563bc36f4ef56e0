"""A step whose embedding and head come to the device in slices, for a vocabulary too large to be there whole.

The layers are those of `step.py`. A softmax and a norm over slices add up in another order than over a whole matrix, so
a step agrees with the whole one to rounding, not to the bit, and the random bits of 8-bit state are others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elo_engine.model.layers import final_norm, scale_embedded
from elo_engine.model.sliced_head import SlicedLoss
from elo_engine.stream.step import Step
from elo_engine.stream.vocabulary import Vocabulary
from elo_engine.train.resident import require_gradients


class SlicedStep(Step):
    """One step under way."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._vocabulary = Vocabulary(self.store, self.units)
        self._embedding, self._norm = self._vocabulary.embedding, self._vocabulary.norm
        self._head = self._vocabulary.head
        self._sums = self.engine.sums
        self._first_norms: dict[str, list[Tensor]] = {}

    def embed(self) -> None:
        """See `Step`: the rows of the step's tokens are gathered from the slices."""
        rows_of = self._vocabulary.embed(self.ids, self.poll)
        for m, (batch, _) in enumerate(self.batches):
            self.hidden.put(0, m, scale_embedded(self.spec, rows_of(batch.ids_N)))

    def head(self) -> None:
        """See `Step`: once through the slices for the losses, once back for the gradients."""
        hidden, L, back = self.hidden, self.spec.layers, self._head[::-1]
        with self.units.outer(self._norm) as last:
            norm_D = last.weights["norm"]

            def normed_ND(m: int) -> Tensor:
                made_ND = final_norm(self.spec, hidden.get(L, m), norm_D)
                self.soon(L, m)
                return made_ND

            def used(m: int) -> None:
                hidden.used(L, m, again=True)

            labels = [batch.labels_N for batch, _ in self.batches]
            losses = self._vocabulary.losses(normed_ND, labels, self.poll, used, after=back[0])
            for loss in losses:
                self.loss_sum += loss.losses_N().sum()
            with self._vocabulary.slices(back, L - 1) as slices:
                for number, head_SD in slices:
                    self._gradients(number, head_SD, norm_D, losses)
            self._through_norm(norm_D)
            self.wait(self._norm, list(last.grads.as_they_came()))

    def _gradients(self, number: int, head_SD: Tensor, norm_D: Tensor, losses: list[SlicedLoss]) -> None:
        """The second pass of one slice."""
        units, hidden, sums, L = self.units, self.hidden, self._sums, self.spec.layers
        d_head_SD = torch.zeros(head_SD.shape, dtype=torch.float32, device=head_SD.device)
        for m, loss in enumerate(losses):
            self.poll()
            normed_ND = final_norm(self.spec, hidden.get(L, m), norm_D)
            self.soon(L, m)
            d_normed_ND = loss.gradients(normed_ND, head_SD, self._vocabulary.rows(number)[0], d_head_SD)
            hidden.used(L, m, again=True)
            if number != self._head[-1]:
                d_normed_ND.add_(sums.get(0, m))
                sums.used(0, m)
                if m + 1 < len(losses):
                    sums.soon(0, m + 1)
            sums.put(0, m, d_normed_ND)
            del normed_ND, d_normed_ND
        units.let_leave()
        grads: list[Any] = [d_head_SD.mul_(self.scale)]
        del d_head_SD
        if self.spec.tied:  # until the embedding's rows are known
            units.send(number, grads)
        else:
            self.wait(number, grads)

    def _through_norm(self, norm_D: Tensor) -> None:
        """The gradient of the final norm, and that of what entered it."""
        hidden, sums, L = self.hidden, self._sums, self.spec.layers
        for m in range(len(self.batches)):
            self.poll()
            entered_ND = hidden.get(L, m).detach().requires_grad_()
            d_normed_ND = (sums.get(0, m) * self.scale).to(entered_ND.dtype)
            sums.used(0, m)
            if m + 1 < len(self.batches):
                sums.soon(0, m + 1)
            self.soon(L, m)
            with torch.enable_grad():
                final_norm(self.spec, entered_ND, norm_D).backward(d_normed_ND)
            hidden.used(L, m)
            assert entered_ND.grad is not None
            hidden.put(self.turn, m, entered_ND.grad)
            del entered_ND, d_normed_ND

    def embedding_rows(self) -> None:
        """See `Step`, slice by slice."""
        store, units, spec = self.store, self.units, self.spec
        units.let_leave()
        rows = self.rows()
        ids_U = torch.unique(self.ids.reshape(-1))
        for number in self._embedding:
            begin, first, last = self._vocabulary.span(ids_U, number)
            if spec.tied:
                d_SD = units.gradients_back(number)["embedding"]
            else:
                size = self._vocabulary.rows(number)[1] - begin
                d_SD = torch.zeros((size, spec.D), dtype=store.dtype, device=store.device)
            d_SD.index_add_(0, rows.ids_U[first:last] - begin, rows.sum_UD[first:last].to(d_SD.dtype))
            units.let_leave()
            grads: list[Any] = [d_SD]
            del d_SD
            self.wait(number, grads)
        units.let_leave()

    # -- the first step's check

    def checked(self, number: int, grads: list[Any]) -> list[Tensor]:
        """See `Step`. A slice may hold no token of the step, so a matrix is zero only where all its slices are."""
        part = self.store.parts[number]
        if not self.first or part.slice is None:
            return super().checked(number, grads)
        there, leaf = list(grads), part.unit.parts[0]
        grads.clear()
        norms = self._first_norms.setdefault(leaf.key, [])
        norms.append(torch.linalg.vector_norm(there[0], torch.inf))
        if len(norms) == len(self._embedding if leaf.key == "embedding" else self._head):
            require_gradients([(leaf.names[0], torch.stack(norms))])
        return there
