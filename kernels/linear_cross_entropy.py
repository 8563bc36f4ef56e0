"""The cross-entropy of a linear head, and its gradients made in the forward pass, one chunk of rows at a time.

Shapes: N rows (tokens), D model width, V vocabulary, R rows of one chunk. The logits are the largest thing in a
training step (32768 x 128256 in bf16 are 8.4 GB). Here one chunk of them is alive: a product makes it, one kernel turns
it in place into the gradient of its rows' losses, a second product turns that into the gradient of the hidden states,
and the next chunk takes the same memory. Chunks of rows and gradients in the forward pass are ideas of Liger-Kernel and
of Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009); the online log-sum-exp is that of Milakov and Gimelshein
(2018, arXiv 1805.02867).

The target is left out of the log-sum-exp. With z its logit, an fp32 dot product taken in the kernel, and o the
log-sum-exp of all other logits as the first product rounded them, the loss is softplus(o - z), the target's gradient
-sigmoid(o - z), and that of another logit x is sigmoid(o - z) * exp(x - o). Nothing cancels: a target of probability
1 - 1e-9 has a loss of 1e-9.

Counted a token: 4 D V FLOPs in the two products (6 D V where the head learns); the kernel reads V logits twice, writes
them once, and reads 2 D elements for z. For 4096 x 4096 x 128256 in bf16, forward and backward, on an H200 (790 TFLOP/s
in products, 4.3 TB/s in copies) that is 8.61 TFLOP or 10.9 ms, and 3.22 GB or 0.75 ms: 11.6 ms predicted, not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_rows, check_vector

IGNORED_LABEL = -100  # torch's ignore_index and the one of the token batches

# Before 2.10 torch refuses to add a bf16 product to an fp32 matrix (pytorch#167931).
_ADDS_IN_FP32 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


@dataclass(frozen=True)
class LinearCrossEntropyLaunch:
    """Launch numbers; the kernel is bound by memory, so they serve the loads. Not yet timed on a card.

    block_v: 4096 columns over num_warps: 8 (256 threads) are 16 bf16 values a thread, two 16-byte loads. At 64
        registers a thread four such programs share an SM and keep 32 KiB of loads in flight, at 80 (a vocabulary that
        16 does not divide) three and 24 KiB; an H200 (4.3 TB/s over 132 SMs, about 0.6 us of latency) needs 20 KiB to
        keep its memory busy. A row of 128256 is 32 steps.
    least_v: a vocabulary of at most 1024 (byte models) is one block of that size, which still feeds all eight warps.
    block_d: 2048, one 16-byte load of bf16 a thread from the hidden row and one from the head's.
    chunk_bytes: 1 GiB of logits at a time, 4096 rows of 128256 in bf16: its products are 8.6 TFLOP, for which reading
        the head (1.05 GB) twice costs 4.5 % of their time if none of it hides behind them.
    row_step: chunks are multiples of 256 rows, a whole number of any product's tiles, and have at least as many.
    most_rows: 8192; a small vocabulary gains nothing from more.
    align: the logits' row stride is a multiple of 16 elements, so that every row of a ragged vocabulary (GPT-2's
        50257) starts on 16 bytes and is read to the end of its padding with wide loads.
    sum_rows: torch before 2.10 adds the product of a learning head's gradient in pieces of so many rows of the head.
    """

    block_v: int = 4096
    least_v: int = 1024
    block_d: int = 2048
    num_warps: int = 8
    chunk_bytes: int = 1 << 30
    row_step: int = 256
    most_rows: int = 8192
    align: int = 16
    sum_rows: int = 8192

    def stride(self, vocabulary: int) -> int:
        """Elements from one row of a chunk's logits to the next."""
        return _round_up(vocabulary, self.align)

    def chunk(self, rows: int, vocabulary: int, itemsize: int, most: int | None = None) -> int:
        """Rows of a chunk: as `most` or the budget allow, evenly, since a tiny last chunk would read the whole head."""
        if most is None:
            fitting = self.chunk_bytes // (self.stride(vocabulary) * itemsize) // self.row_step * self.row_step
            most = max(self.row_step, min(self.most_rows, fitting))
        chunks = max(1, -(-rows // most))
        return min(rows, most, _round_up(-(-rows // chunks), self.row_step))


LAUNCH = LinearCrossEntropyLaunch()


def workspace_bytes(
    rows: int,
    width: int,
    vocabulary: int,
    itemsize: int,
    *,
    need_d_hidden: bool = True,
    need_d_head: bool = False,
    chunk_rows: int | None = None,
) -> int:
    """All that `linear_cross_entropy_forward` allocates, its results among it; the same arguments, `itemsize` in bytes.

    32768 x 4096 x 128256 in bf16: 1.05 GB of logits, 0.27 GB of gradient, 0.13 MB of losses. A head that learns adds
    4 V D (2.10 GB) unless `d_head_out_VD` is given. Not counted: the workspace of the library of products, and for a
    bf16 head that learns the pieces of torch before 2.10 or the fp32 copies on the CPU.
    """
    chunk = LAUNCH.chunk(rows, vocabulary, itemsize, chunk_rows)
    logits = chunk * LAUNCH.stride(vocabulary) * itemsize
    return logits + 4 * rows + rows * width * itemsize * need_d_hidden + 4 * vocabulary * width * need_d_head


@triton.jit
def _log1p(u):
    # log(1 + u) for u in [0, 1] as 2 atanh(u / (2 + u)): in fp32 1 + 1e-9 is 1, and its logarithm 0. The argument is at
    # most 1/3, so the next term of the series is below 2^-29.
    s = u / (2.0 + u)
    w = s * s
    series = 1.0 / 11.0 + w * (1.0 / 13.0 + w * (1.0 / 15.0))
    series = 1.0 / 5.0 + w * (1.0 / 7.0 + w * (1.0 / 9.0 + w * series))
    return 2.0 * s * (1.0 + w * (1.0 / 3.0 + w * series))


@triton.jit
def _softcap(x, cap):
    # cap * tanh(x / cap) and its slope 1 - tanh^2. Exponentials of negative numbers only, so nothing overflows; no
    # difference in the slope; and below 0.35, where 1 - e cancels, tanh is its series (next term below 2^-26).
    y = x * (1.0 / cap)
    e = tl.exp(-2.0 * tl.abs(y))
    w = y * y
    series = 62.0 / 2835.0 - w * (1382.0 / 155925.0)
    series = y * (1.0 - w * (1.0 / 3.0 - w * (2.0 / 15.0 - w * (17.0 / 315.0 - w * series))))
    far = (1.0 - e) / (1.0 + e)
    tanh = tl.where(tl.abs(y) < 0.35, series, tl.where(y < 0.0, -far, far))
    return cap * tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _others(row_ptr, target, V, V_OWNED, cap, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr):
    # The largest logit of a row but the target's, and the sum of exp(logit - largest) of those.
    top = float("-inf")
    sum_V = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        col_V = start + tl.arange(0, BLOCK_V)
        x_V = tl.load(row_ptr + col_V, mask=col_V < V_OWNED, other=0.0).to(tl.float32)
        if CAPPED:
            x_V, _ = _softcap(x_V, cap)
        x_V = tl.where((col_V < V) & (col_V != target), x_V, float("-inf"))
        new_top = tl.maximum(top, tl.max(x_V, axis=0))
        # While everything seen is -inf, subtracting the maximum would be -inf - -inf = NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        sum_V = sum_V * tl.exp(top - shift) + tl.exp(x_V - shift)
        top = new_top
    return top, tl.sum(sum_V, axis=0)


@triton.jit
def _loss(odds):
    # softplus, and exp(-|odds|), of which the share of the others is made.
    u = tl.exp(-tl.abs(odds))
    return tl.where(odds > 0.0, odds, 0.0) + _log1p(u), u


@triton.jit
def _cross_entropy_forward_kernel(
    logits_ptr,
    labels_ptr,
    hidden_ptr,
    head_ptr,
    loss_ptr,
    stride_logits_n,
    stride_hidden_n,
    stride_head_v,
    V,
    V_OWNED,
    D,
    cap,
    IGNORED: tl.constexpr,
    CAPPED: tl.constexpr,
    NEED_D_LOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Rows are counted in 64 bits: 20,000 rows of 128256 already pass 2^31 elements. V_OWNED >= V columns may be read
    # and written; the padding holds zeros at the end, where gradients are made.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == IGNORED:
        if NEED_D_LOGITS:
            for start in range(0, V_OWNED, BLOCK_V):
                col_V = start + tl.arange(0, BLOCK_V)
                zero_V = tl.zeros([BLOCK_V], dtype=tl.float32)
                tl.store(row_ptr + col_V, zero_V.to(logits_ptr.dtype.element_ty), mask=col_V < V_OWNED)
        tl.store(loss_ptr + row, 0.0)
    else:
        # A label outside the vocabulary must not read foreign memory. It makes the loss and the row NaN: the kernel
        # cannot raise, and a zero would hide it.
        known = (label >= 0) & (label < V)
        target = tl.where(known, label, 0)
        dot_D = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            col_D = start + tl.arange(0, BLOCK_D)
            hidden_D = tl.load(hidden_ptr + row * stride_hidden_n + col_D, mask=col_D < D, other=0.0)
            head_D = tl.load(head_ptr + target * stride_head_v + col_D, mask=col_D < D, other=0.0)
            dot_D += hidden_D.to(tl.float32) * head_D.to(tl.float32)
        z = tl.sum(dot_D, axis=0)
        if CAPPED:
            z, target_slope = _softcap(z, cap)
        target = target.to(tl.int32)

        top, total = _others(row_ptr, target, V, V_OWNED, cap, CAPPED, BLOCK_V)

        # Not (top + log) - z: with logits of 10,000 the rounding of the log-sum-exp alone would be 0.0005 in the loss.
        odds = tl.log(total) + (top - z)
        # A target of +inf would otherwise be a perfect prediction.
        odds += tl.where(known & (z < float("inf")), 0.0, float("nan"))
        loss, u = _loss(odds)
        tl.store(loss_ptr + row, loss)

        if NEED_D_LOGITS:
            # The sums above have synchronised the block: every thread has read what the others overwrite now.
            others = tl.where(odds > 0.0, 1.0, u) / (1.0 + u)
            d_target = -others
            if CAPPED:
                d_target = d_target * target_slope
            # No other logit but -inf, or none at all: their share is 0, not 0 / 0. NaN odds stay NaN.
            scale = others / tl.where(total == 0.0, 1.0, total)
            shift = tl.where(top == float("-inf"), 0.0, top)
            for start in range(0, V_OWNED, BLOCK_V):
                col_V = start + tl.arange(0, BLOCK_V)
                x_V = tl.load(row_ptr + col_V, mask=col_V < V_OWNED, other=0.0).to(tl.float32)
                if CAPPED:
                    x_V, slope_V = _softcap(x_V, cap)
                d_x_V = tl.exp(x_V - shift) * scale
                if CAPPED:
                    d_x_V = d_x_V * slope_V
                d_x_V = tl.where(col_V == target, d_target, d_x_V)
                # The padding came uninitialised. The products leave it out, but a library may read a whole vector of it
                # and multiply by zero, which of a NaN is NaN (seen with bf16 on a CPU with AVX-512).
                d_x_V = tl.where(col_V < V, d_x_V, 0.0)
                tl.store(row_ptr + col_V, d_x_V.to(logits_ptr.dtype.element_ty), mask=col_V < V_OWNED)


def cross_entropy_forward(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    *,
    softcap: float | None = None,
    need_d_logits: bool = True,
) -> torch.Tensor:
    """The loss of each row; `logits_NV` is OVERWRITTEN by the gradient of its rows' losses.

    The step between the two products. The target's logit is taken from hidden and head, not from `logits_NV`, which
    has it rounded. Each entry is rounded once.

    Args:
        logits_NV: fp32 or bf16, hidden times head; rows contiguous, any row stride (a slice of a padded matrix).
        labels_N: int64 or int32, in [0, V) or -100 for a row without a loss.
        hidden_ND, head_VD: in the type of the logits; rows contiguous, any row stride.
        softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2), infinite ones +-softcap; the gradient
            is that of the logits before it.
        need_d_logits: False (evaluation) leaves the logits as they are: one read, no write.

    Returns:
        loss_N in fp32. A row labelled -100 has loss 0 and is overwritten by 0, whatever it held. A label outside the
        vocabulary, or a NaN or +inf logit (without softcap, which bounds it), makes that row and its loss NaN: no host
        synchronisation, so no exception.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    _check_operands(hidden_ND, head_VD, labels_N, softcap)
    check_rows("logits_NV", logits_NV)
    if logits_NV.shape != (len(hidden_ND), len(head_VD)) or logits_NV.dtype != head_VD.dtype:
        raise ValueError(
            f"logits_NV: {tuple(logits_NV.shape)} of {logits_NV.dtype}; hidden_ND and head_VD make"
            f" {(len(hidden_ND), len(head_VD))} of {head_VD.dtype}. Pass their product"
        )
    check_device(logits_NV=logits_NV, labels_N=labels_N, hidden_ND=hidden_ND, head_VD=head_VD)
    loss_N = torch.empty(len(labels_N), dtype=torch.float32, device=logits_NV.device)
    _launch((logits_NV, labels_N, hidden_ND, head_VD, loss_N), len(head_VD), softcap, need_d_logits)
    return loss_N


@torch.no_grad()
def linear_cross_entropy_forward(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor, *, softcap: float | None = None,
    need_d_hidden: bool = True, need_d_head: bool = False, chunk_rows: int | None = None,
    d_head_out_VD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Cross-entropy of linear(hidden, head) and the gradients of the SUM of the losses; autograd is not involved.

    Gradients are scaled by nothing: the division by the number of tokens that carry a loss is the caller's, who alone
    knows the whole step. What is not asked for is neither computed nor allocated (`workspace_bytes`).

    Args:
        hidden_ND, head_VD: fp32 or bf16, both of one type; rows contiguous, any row stride.
        labels_N: int64 or int32, in [0, V) or -100 for a token without a loss.
        softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2).
        need_d_hidden, need_d_head: which gradients to make; neither for evaluation.
        chunk_rows: at most so many rows of logits at a time; by default `LAUNCH.chunk_bytes` of them.
        d_head_out_VD: fp32; the head's gradient is added to it and it is returned. Left alone without `need_d_head`.

    Returns:
        loss_N in fp32, d_hidden_ND in the type of hidden, contiguous, and d_head_VD in fp32, summed over the chunks in
        fp32; None in place of a gradient not asked for. A token labelled -100 has loss 0 and, the head being finite, a
        row of zeros in d_hidden. A label outside the vocabulary, or a NaN or +inf logit, makes that token's loss and
        row NaN, and with them all of d_head, as does a hidden row that is not finite, whatever its label.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    _check_operands(hidden_ND, head_VD, labels_N, softcap)
    check_device(hidden_ND=hidden_ND, head_VD=head_VD, labels_N=labels_N)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows: {chunk_rows}; pass at least 1, or None for {LAUNCH.chunk_bytes} bytes of logits")
    (rows, width), vocabulary = hidden_ND.shape, len(head_VD)
    device, dtype = hidden_ND.device, hidden_ND.dtype
    adding, d_head_VD = d_head_out_VD is not None, d_head_out_VD if need_d_head else None
    if d_head_VD is not None:
        _check_sum(d_head_VD, head_VD)
    elif need_d_head:
        # Written by the first chunk, so that no zeros are.
        make = torch.empty if rows else torch.zeros
        d_head_VD = make((vocabulary, width), dtype=torch.float32, device=device)
    loss_N = torch.empty(rows, dtype=torch.float32, device=device)
    d_hidden_ND = torch.empty((rows, width), dtype=dtype, device=device) if need_d_hidden else None
    chunk, owned = LAUNCH.chunk(rows, vocabulary, hidden_ND.element_size(), chunk_rows), LAUNCH.stride(vocabulary)
    buffer_RV = torch.empty((chunk, owned), dtype=dtype, device=device) if rows else None
    for start in range(0, rows, max(1, chunk)):
        assert buffer_RV is not None
        part = slice(start, start + chunk)
        hidden_RD, labels_R = hidden_ND[part], labels_N[part]
        logits_RV = buffer_RV[: len(labels_R), :vocabulary]
        torch.mm(hidden_RD, head_VD.t(), out=logits_RV)
        tensors = (logits_RV, labels_R, hidden_RD, head_VD, loss_N[part])
        _launch(tensors, owned, softcap, need_d_hidden or need_d_head)
        if d_hidden_ND is not None:
            torch.mm(logits_RV, head_VD, out=d_hidden_ND[part])
        if d_head_VD is not None:
            _add_product(d_head_VD, logits_RV, hidden_RD, beta=1 if adding or start else 0)
    return loss_N, d_hidden_ND, d_head_VD


def _add_product(sum_VD: torch.Tensor, d_logits_RV: torch.Tensor, hidden_RD: torch.Tensor, *, beta: int) -> None:
    """sum = beta * sum + d_logits^T @ hidden, added in fp32; with beta 0 the sum's content is not read."""
    left_VR = d_logits_RV.t()
    if hidden_RD.dtype == torch.float32 or hidden_RD.device.type == "cpu":
        torch.addmm(sum_VD, left_VR.float(), hidden_RD.float(), beta=beta, out=sum_VD)
    elif _ADDS_IN_FP32:
        torch.addmm(sum_VD, left_VR, hidden_RD, out_dtype=torch.float32, beta=beta, out=sum_VD)
    elif beta == 0:
        torch.mm(left_VR, hidden_RD, out_dtype=torch.float32, out=sum_VD)
    else:
        for part_PD, left_PR in zip(sum_VD.split(LAUNCH.sum_rows), left_VR.split(LAUNCH.sum_rows), strict=True):
            part_PD.add_(torch.mm(left_PR, hidden_RD, out_dtype=torch.float32))


def _launch(tensors: tuple[torch.Tensor, ...], owned: int, softcap: float | None, need_d_logits: bool) -> None:
    """One program a row on (logits, labels, hidden, head, loss); `owned` columns of the logits, V or more, are the
    kernel's to read and write.
    """
    logits_RV, _, hidden_RD, head_VD, _ = tensors
    (rows, vocabulary), width = logits_RV.shape, hidden_RD.shape[1]
    if rows == 0:
        return
    with torch.cuda.device_of(logits_RV):
        _cross_entropy_forward_kernel[(rows,)](
            *tensors,
            *(matrix.stride(0) for matrix in (logits_RV, hidden_RD, head_VD)),
            *(vocabulary, owned, width, float(softcap or 1.0)),
            IGNORED=IGNORED_LABEL, CAPPED=softcap is not None, NEED_D_LOGITS=need_d_logits,
            BLOCK_V=LAUNCH.block_v if vocabulary > LAUNCH.least_v else LAUNCH.least_v,
            BLOCK_D=LAUNCH.block_d, num_warps=LAUNCH.num_warps,
        )  # fmt: skip


def _check_operands(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor, softcap: float | None
) -> None:
    check_rows("hidden_ND", hidden_ND)
    check_rows("head_VD", head_VD)
    if head_VD.shape[1] != hidden_ND.shape[1] or head_VD.dtype != hidden_ND.dtype or len(head_VD) == 0:
        raise ValueError(
            f"head_VD: {tuple(head_VD.shape)} of {head_VD.dtype}, but hidden_ND is {tuple(hidden_ND.shape)} of"
            f" {hidden_ND.dtype}; pass a head of the same width and type, with at least one row"
        )
    check_vector("labels_N", labels_N, len(hidden_ND))
    if labels_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels_N: dtype {labels_N.dtype}; convert the token ids to torch.int64")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap: {softcap}; pass a positive number, or None for logits as they are")


def _check_sum(d_head_out_VD: torch.Tensor, head_VD: torch.Tensor) -> None:
    check_rows("d_head_out_VD", d_head_out_VD)
    if d_head_out_VD.shape != head_VD.shape or d_head_out_VD.dtype != torch.float32:
        raise ValueError(
            f"d_head_out_VD: {tuple(d_head_out_VD.shape)} of {d_head_out_VD.dtype}; pass torch.float32 of the head's"
            f" shape {tuple(head_VD.shape)}"
        )
    check_device(d_head_out_VD=d_head_out_VD, head_VD=head_VD)
