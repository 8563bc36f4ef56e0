"""The head's loss and its gradients where the head comes in slices of its vocabulary, each for all tokens of a step.

A token's softmax needs the whole vocabulary, so the head passes twice: the first time for the log-sum-exp, which adds
up slice by slice (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867), the second time for the gradients.
That is 8 D V operations a token where a whole head takes 6 D V. All in torch's own operations, in chunks of rows, so
that one chunk of one slice's logits is alive.

Shapes as in the legend; S rows of the head in a slice, R tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.model.chunked_head import CHUNK_ROWS, IGNORED

_SUM_ROWS = 4096  # of a slice whose product is made at a time, before it is added to the sum


class SlicedLoss:
    """The losses of one micro-batch.

    Args:
        labels_N: int64, -100 = no loss. softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
    """

    def __init__(self, labels_N: Tensor, softcap: float | None = None) -> None:
        self._softcap = softcap
        self._labels_N = labels_N
        self._kept_N = labels_N != IGNORED
        empty_N = torch.full(labels_N.shape, -torch.inf, dtype=torch.float32, device=labels_N.device)
        self._lse_N = empty_N
        self._target_N = torch.zeros_like(empty_N)

    @torch.no_grad()
    def observe(self, normed_ND: Tensor, head_SD: Tensor, begin: int) -> None:
        """First pass: the slice whose first row is row `begin` of the head."""
        for rows in self._chunks():
            logits_RS, _ = self._logits(normed_ND[rows], head_SD, slope=False)
            self._lse_N[rows] = torch.logaddexp(self._lse_N[rows], torch.logsumexp(logits_RS, dim=1))
            target_R1, inside_R = self._targets(rows, begin, len(head_SD))
            self._target_N[rows] += torch.where(inside_R, logits_RS.gather(1, target_R1)[:, 0], 0.0)

    def losses_N(self) -> Tensor:
        """After the first pass: cross-entropies in nats, fp32, 0 where there is no label."""
        return torch.where(self._kept_N, self._lse_N - self._target_N, 0.0)

    @torch.no_grad()
    def gradients(self, normed_ND: Tensor, head_SD: Tensor, begin: int, d_head_sum_SD: Tensor) -> Tensor:
        """Second pass: adds the gradient of the SUM of the losses by the slice to `d_head_sum_SD` (fp32), and returns
        the slice's part of that by `normed_ND`, fp32.
        """
        d_normed_ND = torch.empty(normed_ND.shape, dtype=torch.float32, device=normed_ND.device)
        for rows in self._chunks():
            logits_RS, slope_RS = self._logits(normed_ND[rows], head_SD, slope=True)
            d_logits_RS = logits_RS.sub_(self._lse_N[rows, None]).exp_()
            del logits_RS
            target_R1, inside_R = self._targets(rows, begin, len(head_SD))
            d_logits_RS.scatter_add_(1, target_R1, -inside_R.float()[:, None])
            if slope_RS is not None:
                d_logits_RS.mul_(slope_RS)
                del slope_RS
            typed_RS = d_logits_RS.mul_(self._kept_N[rows, None]).to(head_SD.dtype)
            del d_logits_RS
            d_normed_ND[rows] = _product(typed_RS, head_SD)
            _add_product(d_head_sum_SD, typed_RS.t(), normed_ND[rows])
        return d_normed_ND

    def _logits(self, normed_RD: Tensor, head_SD: Tensor, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """fp32 logits of a chunk, and the soft-cap's derivative at each where there is one and it is asked for."""
        logits_RS = F.linear(normed_RD, head_SD).float()
        if self._softcap is None:
            return logits_RS, None
        tanh_RS = logits_RS.div_(self._softcap).tanh_()
        slope_RS = 1.0 - tanh_RS.square() if slope else None
        return tanh_RS.mul_(self._softcap), slope_RS

    def _chunks(self) -> Iterator[slice]:
        for start in range(0, len(self._labels_N), CHUNK_ROWS):
            yield slice(start, start + CHUNK_ROWS)

    def _targets(self, rows: slice, begin: int, size: int) -> tuple[Tensor, Tensor]:
        """Where the label is in the slice (anywhere inside for the others), and whether it is there."""
        place_R = self._labels_N[rows] - begin
        return place_R.clamp(0, size - 1)[:, None], (place_R >= 0) & (place_R < size)


def _product(left_RS: Tensor, right_SD: Tensor) -> Tensor:
    """In fp32; a CPU has no product of bf16 with such an output, so there the product is rounded to bf16 first."""
    if left_RS.is_cuda and left_RS.dtype != torch.float32:
        return torch.mm(left_RS, right_SD, out_dtype=torch.float32)
    return torch.mm(left_RS, right_SD).float()


def _add_product(sum_SD: Tensor, left_SR: Tensor, right_RD: Tensor) -> None:
    if right_RD.dtype == torch.float32:
        sum_SD.addmm_(left_SR, right_RD)
        return
    for part_PD, left_PR in zip(sum_SD.split(_SUM_ROWS), left_SR.split(_SUM_ROWS), strict=True):
        part_PD.add_(_product(left_PR, right_RD))
