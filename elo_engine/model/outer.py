"""The gradients of embedding and head over one optimizer step, added up outside autograd.

Autograd would make a dense [V, D] matrix of either for every micro-batch, and for a tied matrix the sum of two. Here
the head's gradient adds up in one fp32 buffer as the loss makes it, and the embedding's is kept as what it is: a row of
[D] for each token id of the step, in fp32. Both meet once, at the step's end. The sums go micro-batch by micro-batch,
the head's and the embedding's each by itself, so that it does not matter to a bit whether a step goes through the model
micro-batch by micro-batch or layer by layer.

Shapes as in the legend; U different token ids in the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class TokenRows:
    """The embedding's gradient of one step: a row for each token id that occurs.

    Args:
        ids: every token id of the step, in any shape, on any device.
        distinct: they are what has a row: ids in rising order, each once, those of the step among them, on the device.
            The row of one that does not occur stays zero.
    """

    def __init__(self, ids: Tensor, D: int, device: torch.device, *, distinct: bool = False) -> None:
        ids_U = ids if distinct else torch.unique(ids.reshape(-1))
        if device.type == "cuda" and not ids_U.is_cuda:
            ids_U = ids_U.pin_memory()  # from pageable memory the copy would wait for the device
        self.ids_U = ids_U.to(device, non_blocking=True)
        self.sum_UD = torch.zeros((len(self.ids_U), D), dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, ids_N: Tensor, d_hidden_ND: Tensor) -> None:
        """The gradient by the embedded tokens of a micro-batch."""
        self.sum_UD.index_add_(0, torch.searchsorted(self.ids_U, ids_N), d_hidden_ND.float())


class OuterGradients:
    """What has been added up of one step.

    Args:
        embedding_VD, head_VD: the weights; one tensor where they are tied.
        ids, distinct: as of `TokenRows`.
    """

    def __init__(self, embedding_VD: Tensor, head_VD: Tensor, ids: Tensor, *, distinct: bool = False) -> None:
        self._embedding_VD, self._head_VD = embedding_VD, head_VD
        self._ids, self._distinct = ids, distinct
        self._rows: TokenRows | None = None
        self._adds = 0
        self._sum_VD: Tensor | None = None

    @property
    def head_sum_VD(self) -> Tensor:
        """The gradient of the SUM of the step's losses by the head so far, fp32: to be added to."""
        if self._sum_VD is None:
            self._sum_VD = torch.zeros_like(self._head_VD, dtype=torch.float32, requires_grad=False)
        return self._sum_VD

    def add_rows(self, ids_N: Tensor, d_hidden_ND: Tensor) -> None:
        """The gradient by the embedded tokens of a micro-batch."""
        if self._rows is None:
            D, device = self._embedding_VD.shape[1], self._embedding_VD.device
            self._rows = TokenRows(self._ids, D, device, distinct=self._distinct)
        self._rows.add(ids_N, d_hidden_ND)
        self._adds += 1

    @torch.no_grad()
    def finish(self, scale: float | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The weights with their gradients, fp32 [V, D], one after the other, and the end of this object. After a
        single micro-batch, when the gradients of other weights have the weights' type, an embedding that is not tied
        has it too: no matrix of it is made in fp32.

        scale: of the losses, which the rows have in them and the head's sum has not; fp32 [] on the device where a step
        that is repeated finds its own there.
        """
        tied = self._embedding_VD is self._head_VD
        if self._sum_VD is not None:
            self._sum_VD.mul_(scale)
            if tied and self._rows is not None:
                self._sum_VD.index_add_(0, self._rows.ids_U, self._rows.sum_UD)
                self._rows = None
            yield self._head_VD, self._given()
        if self._rows is not None:
            dtype = self._embedding_VD.dtype if self._adds == 1 else torch.float32
            self._sum_VD = torch.zeros_like(self._embedding_VD, dtype=dtype, requires_grad=False)
            self._sum_VD.index_copy_(0, self._rows.ids_U, self._rows.sum_UD.to(dtype))
            self._rows = None
            yield self._embedding_VD, self._given()

    def _given(self) -> Tensor:
        """The sum, which whoever takes it is then alone to hold."""
        given, self._sum_VD = self._sum_VD, None
        assert given is not None
        return given


class _Embed(torch.autograd.Function):
    """Rows of the embedding; their gradient goes to the step's sums."""

    @staticmethod
    def forward(ctx: Any, ids_N: Tensor, embedding_VD: Tensor, outer: OuterGradients) -> Tensor:
        ctx.ids_N, ctx.outer = ids_N, outer
        return F.embedding(ids_N, embedding_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.outer.add_rows(ctx.ids_N, grads[0])
        return None, None, None


def embed(ids_N: Tensor, embedding_VD: Tensor, outer: OuterGradients) -> Tensor:
    """[N] -> [N, D]; the gradient by the rows goes to `outer` and not to the embedding."""
    return _Embed.apply(ids_N, embedding_VD, outer)  # type: ignore[no-any-return]
