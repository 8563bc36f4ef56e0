"""The head's cross-entropy on the CPU, its gradients made in the forward pass, in tiles of the vocabulary.

Frozen head: the gradient of a token's loss by its hidden state is softmax(x W^T) W - W[target]. As in flash
attention, an online maximum and sum make it in one sweep: a tile of logits is made, turned into
exp(logit - maximum so far) while it is in cache, and multiplied by the same rows of W. That is 4 D V FLOPs a
token, no gradient of W, and no N x V or V x D buffer.

The target is left out of the sweep and added exactly. With z its logit (a dot product in fp32) and o the
log-sum-exp of all others, the loss is softplus(o - z) and the weight of every term 1 - p = sigmoid(o - z):
    d_hidden = (1 - p) (softmax over the others @ W - W[target]).
Neither cancels: a target of probability 1 - 1e-9 has a loss of 1e-9, where lse - z in fp32 gives 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.errors import UsageError
from elo_engine.model.cpu_native import fits_frozen_head, frozen_head, softmax_tile

IGNORED = -100


@dataclass(frozen=True)
class HeadTiles:
    """Sizes of the tiles, chosen on two Zen 3 cores (AVX2, fp32, torch 2.13 with MKL), D = 576, V = 49152, N = 2048.

    Predicted, frozen: 4 D V N = 232 GFLOP at 140 GFLOP/s (MKL on tiles; the cores' peak is 190) = 1.66 s, and a
    hundredth for the exponentials. Trainable: 6 D V N = 348 GFLOP = 2.5 s, and 0.1 s to sweep 113 MB of gradient
    four times. Measured, rounds taking turns, both cores free, medians in s, forward + backward:
        frozen: eager 2.85, torch twin 2.19, C++ sweep 1.76 (3 rounds; earlier, before its prefetches: 2.83, 2.10,
        1.66 in 5 rounds); trainable: eager 3.50, torch twin 3.04, C++ pass over tiles 2.88 (3 rounds)
    Against torch's products with the C++ pass between them, at V = 9600 over 9 rounds: 150 against 125 GFLOP/s;
    with one core taken by others, V = 4800, 57 against 32, since the sweep has one barrier and the tiles have hundreds.
    """

    rows: int = 2048  # W is read once from memory for this many rows
    cols: int = 512
    most_cols: int = 4096  # few rows: wider tiles keep a product large enough for its call
    chunk_bytes: int = 128 << 20  # logits of the trainable head that are kept from the loss to the gradients


TILES = HeadTiles()


@torch.no_grad()
def frozen_head_loss(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, need_d_hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each token in nats, and the gradient of their SUM by the hidden states.

    -> losses fp32 [N], 0 where the label is -100; gradient [N, D] in hidden_ND's dtype, rows without a label
    exactly 0, or None. Sums are kept in fp32; bf16 operands meet in bf16 products where the processor has them,
    in fp32 otherwise.

    Raises:
        UsageError: shapes or dtypes do not fit, or a label is neither -100 nor a row of the head.
    """
    _check(hidden_ND, head_VD, labels_N)
    loss_N = torch.zeros(labels_N.shape, dtype=torch.float32)
    d_hidden_ND = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format) if need_d_hidden else None
    for rows_R in _labelled_rows(labels_N, TILES.rows):
        labels_R = labels_N[rows_R]
        part = _Rows(hidden_ND[rows_R], head_VD, labels_R, keep_acc=need_d_hidden)
        if fits_frozen_head(part.hidden_RD, head_VD):
            frozen_head(part.hidden_RD.contiguous(), head_VD, labels_R, part.max_R, part.sum_R, part.acc_RD)
        else:
            _sweep(part, labels_R, head_VD.shape[0])
        losses_R, others_R = part.finish()
        loss_N[rows_R] = losses_R
        if d_hidden_ND is not None and part.acc_RD is not None:
            part.acc_RD.mul_(part.share(others_R)[:, None]).sub_(part.target_RD.mul_(others_R[:, None]))
            d_hidden_ND[rows_R] = part.acc_RD.to(d_hidden_ND.dtype)
    return loss_N, d_hidden_ND


def _sweep(part: _Rows, labels_R: Tensor, V: int) -> None:
    """`cpu_native.frozen_head` with torch's products: a tile of logits stays in cache between its two products."""
    R = len(labels_R)
    cols = min(TILES.most_cols, max(TILES.cols, TILES.rows * TILES.cols // R))
    buffer = torch.empty(R * cols, dtype=torch.float32)
    for begin in range(0, V, cols):
        weight_CD = part.weight(begin, begin + cols)
        tile_RC = buffer[: R * len(weight_CD)].view(R, -1)
        part.multiply_into(tile_RC, weight_CD)
        softmax_tile(tile_RC, labels_R, begin, part.max_R, part.sum_R, part.acc_RD)
        if part.acc_RD is not None:
            part.add_product(part.acc_RD, tile_RC, weight_CD)


@torch.no_grad()
def head_loss(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, need_grads: bool, d_head_out_VD: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`frozen_head_loss` for a head that learns: also the gradient of the SUM of the losses by the head, fp32 [V, D].

    6 D V FLOPs a token. Rows go in chunks whose unnormalised probabilities are kept (`HeadTiles.chunk_bytes`)
    until their maximum and sum are known. Where `d_head_out_VD` (fp32) is given, the head's gradient is added to
    it and it is returned. Without `need_grads` it is left alone.

    Raises:
        UsageError: as `frozen_head_loss`; or `d_head_out_VD` is not a contiguous fp32 [V, D].
    """
    _check(hidden_ND, head_VD, labels_N)
    if not need_grads:
        loss_N, _ = frozen_head_loss(hidden_ND, head_VD, labels_N, need_d_hidden=False)
        return loss_N, None, None
    V = head_VD.shape[0]
    if d_head_out_VD is None:
        d_head_out_VD = torch.zeros(head_VD.shape, dtype=torch.float32)
    elif d_head_out_VD.shape != head_VD.shape or d_head_out_VD.dtype != torch.float32:
        found = f"{d_head_out_VD.dtype} {tuple(d_head_out_VD.shape)}"
        raise UsageError(f"d_head_out_VD is {found}; it must be torch.float32 {tuple(head_VD.shape)}")
    loss_N = torch.zeros(labels_N.shape, dtype=torch.float32)
    d_hidden_ND = torch.zeros_like(hidden_ND, memory_format=torch.contiguous_format)
    chunk = max(1, min(TILES.rows, TILES.chunk_bytes // (4 * V)))
    buffer: Tensor | None = None
    for rows_R in _labelled_rows(labels_N, chunk):
        hidden_RD, labels_R = hidden_ND[rows_R], labels_N[rows_R]
        R, cols = len(labels_R), TILES.cols
        buffer = torch.empty(R * V, dtype=torch.float32) if buffer is None else buffer  # the first chunk is the largest
        part = _Rows(hidden_RD, head_VD, labels_R, keep_acc=True)
        assert part.acc_RD is not None
        starts = range(0, V, cols)
        maxima_SR = torch.empty(len(starts), R)
        tiles = []
        for at, begin in enumerate(starts):
            weight_CD = part.weight(begin, begin + cols)
            tile_RC = buffer[R * begin :][: R * len(weight_CD)].view(R, -1)  # contiguous, beside the others
            part.multiply_into(tile_RC, weight_CD)
            softmax_tile(tile_RC, labels_R, begin, part.max_R, part.sum_R, None)
            maxima_SR[at] = part.max_R
            tiles.append(tile_RC)
        loss_N[rows_R], others_R = part.finish()
        # From each tile's own maximum to the last one; a tile before any finite logit holds zeros.
        scale_SR = torch.exp(maxima_SR - part.max_R).mul_(part.share(others_R))
        scale_SR.masked_fill_(maxima_SR == -torch.inf, 0.0)
        for at, (begin, tile_RC) in enumerate(zip(starts, tiles, strict=True)):
            tile_RC.mul_(scale_SR[at][:, None])
            hit = ((labels_R >= begin) & (labels_R < begin + cols)).nonzero().squeeze(1)
            tile_RC[hit, labels_R[hit] - begin] = -others_R[hit]
            part.add_product(part.acc_RD, tile_RC, part.weight(begin, begin + cols))
            part.add_product(d_head_out_VD[begin : begin + cols], tile_RC.t(), part.hidden_RD)
        d_hidden_ND[rows_R] = part.acc_RD.to(d_hidden_ND.dtype)
    return loss_N, d_hidden_ND, d_head_out_VD


class _Rows:
    """Some labelled rows on their way through the vocabulary: operands, running maximum and sum, accumulator."""

    def __init__(self, hidden_RD: Tensor, head_VD: Tensor, labels_R: Tensor, *, keep_acc: bool) -> None:
        R, D = hidden_RD.shape
        self._low = hidden_RD.dtype == head_VD.dtype == torch.bfloat16 and _has_bf16_products()
        self._head_VD = head_VD
        self.hidden_RD = hidden_RD if self._low else hidden_RD.float()
        self.target_RD = head_VD[labels_R].float()
        self._target_R = torch.linalg.vecdot(hidden_RD.float(), self.target_RD)
        self.max_R = torch.full((R,), -torch.inf)
        self.sum_R = torch.zeros(R)
        self.acc_RD = torch.zeros(R, D) if keep_acc else None

    def weight(self, begin: int, end: int) -> Tensor:
        weight_CD = self._head_VD[begin:end]
        return weight_CD if self._low else weight_CD.float()

    def multiply_into(self, tile_RC: Tensor, weight_CD: Tensor) -> None:
        """Logits of the tile, in fp32."""
        if self._low:
            tile_RC.copy_(torch.mm(self.hidden_RD, weight_CD.t()))
        else:
            torch.mm(self.hidden_RD, weight_CD.t(), out=tile_RC)

    def add_product(self, sum_AB: Tensor, left_AC: Tensor, right_CB: Tensor) -> None:
        """sum += left @ right. torch has no bf16 product that adds into fp32 on a CPU: it is rounded once."""
        if self._low:
            sum_AB.add_(torch.mm(left_AC.bfloat16(), right_CB))
        else:
            sum_AB.addmm_(left_AC, right_CB)

    def finish(self) -> tuple[Tensor, Tensor]:
        """-> the losses, and the probability of all tokens but the target, both [R]."""
        odds_R = self.max_R + self.sum_R.log() - self._target_R
        return F.softplus(odds_R), torch.sigmoid(odds_R)

    def share(self, others_R: Tensor) -> Tensor:
        """What turns exp(logit - maximum) into a probability; a vocabulary of one token has no others."""
        return (others_R / self.sum_R).masked_fill_(self.sum_R == 0, 0.0)


def _has_bf16_products() -> bool:
    """bf16 units in the processor; without them fp32 products are faster (and exact on bf16 operands)."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def _labelled_rows(labels_N: Tensor, most: int) -> Iterator[slice | Tensor]:
    """The rows with a label, in even parts of at most `most`; slices, which copy nothing, where all have one."""
    index_R = (labels_N != IGNORED).nonzero().squeeze(1)
    count = len(index_R)
    if count == 0:
        return
    size = -(-count // -(-count // most))
    for begin in range(0, count, size):
        end = min(begin + size, count)
        yield slice(begin, end) if count == len(labels_N) else index_R[begin:end]


def _check(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> None:
    shapes = f"hidden {tuple(hidden_ND.shape)}, head {tuple(head_VD.shape)}, labels {tuple(labels_N.shape)}"
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or labels_N.ndim != 1:
        raise UsageError(f"the head takes hidden [N, D], head [V, D] and labels [N]; found {shapes}")
    if hidden_ND.shape[1] != head_VD.shape[1] or hidden_ND.shape[0] != labels_N.shape[0] or 0 in head_VD.shape:
        raise UsageError(f"the head needs one D, one N and a vocabulary; found {shapes}")
    kinds = (torch.float32, torch.bfloat16)
    if hidden_ND.dtype not in kinds or head_VD.dtype not in kinds or labels_N.dtype != torch.int64:
        raise UsageError(
            "the head takes float32 or bfloat16 and int64 labels; found "
            f"hidden {hidden_ND.dtype}, head {head_VD.dtype}, labels {labels_N.dtype}"
        )
    wrong_N = (labels_N != IGNORED) & ((labels_N < 0) | (labels_N >= head_VD.shape[0]))
    if bool(wrong_N.any()):
        at = int(wrong_N.nonzero()[0])
        raise UsageError(
            f"label {int(labels_N[at])} at position {at} is neither {IGNORED} nor one of the head's "
            f"{head_VD.shape[0]} rows; was the text tokenised with this model's tokenizer?"
        )
