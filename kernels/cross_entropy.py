"""Cross-entropy in place: the loss of each row, and the row of logits overwritten by its gradient.

Shapes: N rows (tokens), V columns (vocabulary). A matrix of logits is the largest thing in a training step
(8192 x 128256 bf16 is 2.1 GB), so it is read twice, written once, and no second one is allocated:
softmax(logits) - onehot(label) is the gradient of the row's loss by its logits, ready for the product with
the frozen head. The log-sum-exp is online (Milakov and Gimelshein 2018, arXiv 1805.02867). Nothing is sent to
the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_rows, check_vector

IGNORED_LABEL = -100  # torch's ignore_index and the one of the token batches


@dataclass(frozen=True)
class CrossEntropyLaunch:
    """Launch numbers; the op is bound by memory, so they serve the loads. Not yet timed on a card.

    block_v: 4096 columns over num_warps: 8 (256 threads) are 16 bf16 values a thread, two 16-byte loads. At
        60 registers a thread four such programs share an SM and keep 32 KiB of loads in flight; an H200
        (4.3 TB/s over 132 SMs, about 0.6 us of latency) needs 20 KiB to keep its memory busy. A row of 128256
        is 32 steps.
    """

    block_v: int = 4096
    num_warps: int = 8


LAUNCH = CrossEntropyLaunch()


@triton.jit
def _cross_entropy_forward_kernel(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    stride_logits_n,
    V,
    IGNORED: tl.constexpr,
    NEED_D_LOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == IGNORED:
        if NEED_D_LOGITS:
            for start in range(0, V, BLOCK_V):
                col_V = start + tl.arange(0, BLOCK_V)
                zero_V = tl.zeros([BLOCK_V], dtype=tl.float32)
                tl.store(row_ptr + col_V, zero_V.to(logits_ptr.dtype.element_ty), mask=col_V < V)
        tl.store(loss_ptr + row, 0.0)
    else:
        # A label outside the vocabulary must not read foreign memory. It makes the loss and the row NaN: the
        # kernel cannot raise, and a zero would hide it.
        known = (label >= 0) & (label < V)
        target = tl.where(known, label, 0).to(tl.int32)
        target_logit = tl.load(row_ptr + target).to(tl.float32)
        poison = tl.where(known, 0.0, float("nan"))

        top = float("-inf")
        sum_V = tl.zeros([BLOCK_V], dtype=tl.float32)
        for start in range(0, V, BLOCK_V):
            col_V = start + tl.arange(0, BLOCK_V)
            x_V = tl.load(row_ptr + col_V, mask=col_V < V, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(x_V, axis=0))
            # While everything seen is -inf, subtracting the maximum would be -inf - -inf = NaN.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            sum_V = sum_V * tl.exp(top - shift) + tl.exp(x_V - shift)
            top = new_top
        total = tl.sum(sum_V, axis=0)
        # Not lse - logit: with logits of 10,000 the rounding of lse alone would be 0.0005 in the loss.
        tl.store(loss_ptr + row, tl.log(total) + (top - target_logit) + poison)

        if NEED_D_LOGITS:
            # Every thread must have read the target's logit before any thread overwrites it.
            tl.debug_barrier()
            scale = 1.0 / total
            for start in range(0, V, BLOCK_V):
                col_V = start + tl.arange(0, BLOCK_V)
                x_V = tl.load(row_ptr + col_V, mask=col_V < V, other=float("-inf")).to(tl.float32)
                d_x_V = tl.exp(x_V - top) * scale - tl.where(col_V == target, 1.0, 0.0) + poison
                tl.store(row_ptr + col_V, d_x_V.to(logits_ptr.dtype.element_ty), mask=col_V < V)


def cross_entropy_forward(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, need_d_logits: bool = True
) -> torch.Tensor:
    """The loss of each row; `logits_NV` is OVERWRITTEN by its gradient, softmax(logits) - onehot(label).

    The subtraction is done in fp32 before the one rounding, so the target's entry p - 1 keeps its precision
    as p nears 1. The division by the number of tokens that carry a loss is the caller's, who alone knows the
    whole step.

    Args:
        logits_NV: fp32 or bf16; rows contiguous, any row stride (a padded vocabulary may be passed as a
            slice).
        labels_N: int64 or int32, in [0, V) or -100 for a row without a loss.
        need_d_logits: False (evaluation) leaves the logits as they are: one read, no write.

    Returns:
        loss_N in fp32. A row labelled -100 has loss 0 and is overwritten by 0, whatever it held. A label
        outside the vocabulary, or a NaN or +inf logit, makes that row's loss NaN (no host synchronisation, so
        no exception).

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    check_rows("logits_NV", logits_NV)
    rows, vocabulary = logits_NV.shape
    check_vector("labels_N", labels_N, rows)
    if labels_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels_N: dtype {labels_N.dtype}; convert the token ids to torch.int64")
    check_device(logits_NV=logits_NV, labels_N=labels_N)
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    if rows:
        # A small vocabulary (byte models) needs no block of 4096; 1024 still feed all eight warps.
        block_v = max(1024, min(LAUNCH.block_v, triton.next_power_of_2(vocabulary)))
        with torch.cuda.device_of(logits_NV):
            _cross_entropy_forward_kernel[(rows,)](
                logits_NV,
                labels_N,
                loss_N,
                logits_NV.stride(0),
                vocabulary,
                IGNORED=IGNORED_LABEL,
                NEED_D_LOGITS=need_d_logits,
                BLOCK_V=block_v,
                num_warps=LAUNCH.num_warps,
            )
    return loss_N
