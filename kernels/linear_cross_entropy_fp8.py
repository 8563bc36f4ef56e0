"""The loss of a frozen linear head, and the gradient of the hidden states, by products of 8-bit operands.

Shapes as in linear_cross_entropy.py, whose chunks of rows, log-sum-exp without the target and softplus these are. What
differs: both products take e4m3 operands, so the kernel between them reads bf16 logits and writes e4m3 gradients beside
them. The head is rounded without the mean of its rows, which adds the same to all logits of a token; J columns, those
whose terms are the largest, are multiplied with what rounding left of either operand as well (`quantize_rows`), 2 J
more columns of the first product, since a few columns can bring most of its error (docs/fp8.md). The target takes
no part in either product: its logit is an fp32 dot product of the rounded operands (of others, what rounding adds to
all other logits would not cancel), and its term of the gradient, -sigmoid(o - z) (head[target] - mean), is added
afterwards, of bf16 in fp32. Without it the largest gradient of a row is known when the row has been read once, exp(0) =
1 times a factor of the row; so what is rounded is 448 exp(logit - largest), the factor goes into the product's row
scale, and no pass looks for a maximum. Probabilities below 2^-19 of the row's
largest (but for the target) become 0: at most V 2^-19 of it all together, 9 % for V = 49152, and in docs/fp8.md 0.1 %.
With a soft-cap the gradient's largest is that times the slope of the cap there, so as many bits are left unused.

Counted a token: (4 D + 4 J) V operations of 8 bits; 4 V bytes of logits read, V written, V read by the product, and 8 D
for the hidden row and the target's. For 4096 x 4096 x 128256 and J 64 on an H200: 8.74 TFLOP at 1.6 times 790 TFLOP/s
are 6.9 ms, and 4 V + 2 V bytes a row (3.2 GB) 0.73 ms at 4.3 TB/s: 7.6 ms predicted against 11.6 in bf16, not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import check_device, check_vector
from .linear_cross_entropy import IGNORED_LABEL, LAUNCH, _check_operands, _loss, _others, _softcap
from .quantize_fp8 import quantize_rows, scaled_product

Pair = tuple[torch.Tensor, torch.Tensor]  # a matrix in e4m3 and the scales of its rows


def workspace_bytes(
    rows: int, width: int, vocabulary: int, outliers: int, *, need_d_hidden: bool = True, chunk_rows: int | None = None
) -> int:
    """All that `linear_cross_entropy_fp8_forward` allocates, its results and a chunk's rounded hidden rows among it.

    32768 x 4096 x 128256: 0.66 GB of logits and 0.33 GB of gradients, 0.27 GB of the hidden states'. Not counted: what
    the library of products takes, up to 1 KiB of scales.
    """
    chunk = LAUNCH.chunk(rows, vocabulary, 3 if need_d_hidden else 2, chunk_rows)
    found = chunk * LAUNCH.stride(vocabulary) * (3 if need_d_hidden else 2) + 4 * rows
    found += chunk * (width + 2 * outliers + 4)  # the rounded hidden rows and their scales
    return found + (2 * rows * width + 8 * chunk if need_d_hidden else 0)


@triton.jit
def _cross_entropy_fp8_kernel(
    logits_ptr,
    labels_ptr,
    q_hidden_ptr,
    hidden_scale_ptr,
    q_rows_ptr,
    rows_scale_ptr,
    loss_ptr,
    q_ptr,
    scale_ptr,
    weight_ptr,
    stride_logits_n,
    V,
    D,
    cap,
    IGNORED: tl.constexpr,
    CAPPED: tl.constexpr,
    NEED_D_LOGITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The logits' row stride is V rounded up; those columns may all be read, and all of q's are written.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_n
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == IGNORED:
        tl.store(loss_ptr + row, 0.0)
        if NEED_D_LOGITS:
            tl.store(scale_ptr + row, 0.0)
            tl.store(weight_ptr + row, 0.0)
            for start in range(0, stride_logits_n, BLOCK_V):
                col_V = start + tl.arange(0, BLOCK_V)
                zero_V = tl.zeros([BLOCK_V], dtype=tl.float32).to(q_ptr.dtype.element_ty)
                tl.store(q_ptr + row * stride_logits_n + col_V, zero_V, mask=col_V < stride_logits_n)
    else:
        known = (label >= 0) & (label < V)
        target = tl.where(known, label, 0)
        dot_D = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            col_D = start + tl.arange(0, BLOCK_D)
            hidden_D = tl.load(q_hidden_ptr + row * D + col_D, mask=col_D < D).to(tl.float32)
            head_D = tl.load(q_rows_ptr + target * D + col_D, mask=col_D < D).to(tl.float32)
            dot_D += tl.where(col_D < D, hidden_D * head_D, 0.0)
        z = tl.sum(dot_D, axis=0) * tl.load(hidden_scale_ptr + row) * tl.load(rows_scale_ptr + target)
        target_slope = 1.0
        if CAPPED:
            z, target_slope = _softcap(z, cap)
        target = target.to(tl.int32)
        top, total = _others(row_ptr, target, V, stride_logits_n, cap, CAPPED, BLOCK_V)
        odds = tl.log(total) + (top - z)
        odds += tl.where(known & (z < float("inf")), 0.0, float("nan"))
        loss, u = _loss(odds)
        tl.store(loss_ptr + row, loss)
        if NEED_D_LOGITS:
            others = tl.where(odds > 0.0, 1.0, u) / (1.0 + u)
            tl.store(weight_ptr + row, -others * target_slope)
            tl.store(scale_ptr + row, others / tl.where(total == 0.0, 1.0, total) * (1.0 / 448.0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            for start in range(0, stride_logits_n, BLOCK_V):
                col_V = start + tl.arange(0, BLOCK_V)
                x_V = tl.load(row_ptr + col_V, mask=col_V < stride_logits_n, other=0.0).to(tl.float32)
                if CAPPED:
                    x_V, slope_V = _softcap(x_V, cap)
                share_V = tl.exp(x_V - shift) * 448.0
                if CAPPED:
                    share_V = share_V * slope_V
                # A NaN has made the row's scale NaN already.
                share_V = tl.where((col_V < V) & (col_V != target), share_V, 0.0)
                tl.store(
                    q_ptr + row * stride_logits_n + col_V,
                    share_V.to(q_ptr.dtype.element_ty),
                    mask=col_V < stride_logits_n,
                )


@triton.jit
def _add_target_kernel(
    d_hidden_ptr,
    labels_ptr,
    weight_ptr,
    head_ptr,
    mean_ptr,
    stride_head_v,
    V,
    D,
    IGNORED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    weight = tl.load(weight_ptr + row)
    target = tl.where((label >= 0) & (label < V), label, 0)
    for start in range(0, D, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        rest_D = tl.load(d_hidden_ptr + row * D + col_D, mask=col_D < D, other=0.0).to(tl.float32)
        head_D = tl.load(head_ptr + target * stride_head_v + col_D, mask=col_D < D, other=0.0).to(tl.float32)
        head_D -= tl.load(mean_ptr + col_D, mask=col_D < D, other=0.0)
        d_D = tl.where(label == IGNORED, 0.0, rest_D + weight * head_D)
        tl.store(d_hidden_ptr + row * D + col_D, d_D.to(d_hidden_ptr.dtype.element_ty), mask=col_D < D)


@torch.no_grad()
def linear_cross_entropy_fp8_forward(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    rows: Pair,
    columns: Pair,
    mean_D: torch.Tensor,
    outliers_J: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    softcap: float | None = None,
    need_d_hidden: bool = True,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of linear(hidden, head) and the gradient of the SUM of the losses by the hidden states.

    Args:
        hidden_ND, head_VD: bf16; rows contiguous, any row stride. D is a multiple of 16.
        rows, columns: `quantize_both_layouts` of the head: [V, D + 2 J] and its scales, [D, V] and its scales, V
            rounded up to a multiple of 16.
        mean_D: fp32, what they are without. outliers_J: int64, the columns that are multiplied with their rests; J is a
            multiple of 8.
        labels_N: int64 or int32, in [0, V) or -100 for a token without a loss.
        softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2).
        chunk_rows: at most so many rows of logits at a time; by default `LAUNCH.chunk_bytes` of them and gradients.

    Returns:
        loss_N in fp32, d_hidden_ND in bf16, contiguous, or None. A token labelled -100 has loss 0 and a row of zeros. A
        label outside the vocabulary, or a NaN or +inf logit, makes that token's loss and row NaN.

    Raises:
        ValueError: wrong shape, type, strides or device.
    """
    _check_operands(hidden_ND, head_VD, labels_N, softcap)
    _check_layouts(hidden_ND, head_VD, rows, columns, outliers_J)
    check_vector("mean_D", mean_D, hidden_ND.shape[1])
    check_device(
        hidden_ND=hidden_ND, head_VD=head_VD, labels_N=labels_N, rows=rows[0], columns=columns[0], mean_D=mean_D,
        outliers_J=outliers_J,
    )  # fmt: skip
    (count, width), vocabulary = hidden_ND.shape, len(head_VD)
    device, owned = hidden_ND.device, LAUNCH.stride(vocabulary)
    chunk = LAUNCH.chunk(count, vocabulary, 3 if need_d_hidden else 2, chunk_rows)
    loss_N = torch.empty(count, dtype=torch.float32, device=device)
    d_hidden_ND = torch.empty((count, width), dtype=torch.bfloat16, device=device) if need_d_hidden else None
    if count == 0:
        return loss_N, d_hidden_ND
    logits_RV = torch.empty((chunk, owned), dtype=torch.bfloat16, device=device)
    made: tuple[torch.Tensor, ...] = ()  # the gradient of a chunk: in 8 bits, its rows' scales, the targets' weights
    if need_d_hidden:
        shapes = ((chunk, owned), torch.float8_e4m3fn), ((chunk, 1), torch.float32), ((chunk,), torch.float32)
        made = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes)
    for start in range(0, count, chunk):
        part = slice(start, min(count, start + chunk))
        now = slice(0, part.stop - start)
        left = quantize_rows(hidden_ND[part], outliers_J=outliers_J)
        scaled_product(left, rows, torch.bfloat16, out_MN=logits_RV[now])
        gradient = tuple(tensor[now] for tensor in made)
        _launch((logits_RV[now], labels_N[part], *left, *rows, loss_N[part]), gradient, len(head_VD), softcap)
        if d_hidden_ND is not None:
            q_RV, scale_R1, weight_R = gradient
            scaled_product((q_RV, scale_R1), columns, torch.bfloat16, out_MN=d_hidden_ND[part])
            _add_target(d_hidden_ND[part], labels_N[part], weight_R, head_VD, mean_D)
    return loss_N, d_hidden_ND


def _launch(
    step: tuple[torch.Tensor, ...], gradient: tuple[torch.Tensor, ...], vocabulary: int, softcap: float | None
) -> None:
    """One program a row on (logits, labels, hidden and its scales, rows and their scales, loss) and on (q, scale,
    weight), () without a gradient.
    """
    logits_RV, _, hidden_RD, *_ = step
    with torch.cuda.device_of(logits_RV):
        _cross_entropy_fp8_kernel[(len(logits_RV),)](
            *step,
            *(gradient or (None, None, None)),
            *(logits_RV.stride(0), vocabulary, hidden_RD.shape[1], float(softcap or 1.0)),
            IGNORED=IGNORED_LABEL,
            CAPPED=softcap is not None,
            NEED_D_LOGITS=bool(gradient),
            BLOCK_V=LAUNCH.block_v if vocabulary > LAUNCH.least_v else LAUNCH.least_v,
            BLOCK_D=LAUNCH.block_d,
            num_warps=LAUNCH.num_warps,
        )


def _add_target(
    d_hidden_RD: torch.Tensor, labels_R: torch.Tensor, weight_R: torch.Tensor, head_VD: torch.Tensor,
    mean_D: torch.Tensor,
) -> None:  # fmt: skip
    """d_hidden += weight * (head[label] - mean), in fp32, rounded once; zeros in rows without a label."""
    with torch.cuda.device_of(d_hidden_RD):
        _add_target_kernel[(len(d_hidden_RD),)](
            d_hidden_RD, labels_R, weight_R, head_VD, mean_D, head_VD.stride(0), *head_VD.shape,
            IGNORED=IGNORED_LABEL, BLOCK_D=LAUNCH.block_d, num_warps=LAUNCH.num_warps,
        )  # fmt: skip


def _check_layouts(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, rows: Pair, columns: Pair, outliers_J: torch.Tensor
) -> None:
    if hidden_ND.dtype != torch.bfloat16:
        raise ValueError(f"hidden_ND: dtype {hidden_ND.dtype}; 8-bit products are rounded from and to torch.bfloat16")
    (vocabulary, width), owned = head_VD.shape, LAUNCH.stride(len(head_VD))
    if width % 16:
        raise ValueError(f"hidden_ND: {width} columns; the libraries of 8-bit products want a multiple of 16")
    if outliers_J.dtype != torch.int64 or outliers_J.dim() != 1 or len(outliers_J) % 8:
        raise ValueError(
            f"outliers_J: {tuple(outliers_J.shape)} of {outliers_J.dtype}; pass a multiple of 8 columns as torch.int64"
        )
    wanted = {"rows": (rows, (owned, width + 2 * len(outliers_J))), "columns": (columns, (width, owned))}
    for name, ((matrix, scale), shape) in wanted.items():
        if matrix.shape != shape or matrix.dtype != torch.float8_e4m3fn or not matrix.is_contiguous():
            raise ValueError(
                f"{name}: {tuple(matrix.shape)} of {matrix.dtype}; pass {shape} of torch.float8_e4m3fn, contiguous, as"
                f" quantize_both_layouts makes it of a head of {(vocabulary, width)}"
            )
        if scale.shape != (shape[0], 1) or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(
                f"{name}: scales {tuple(scale.shape)} of {scale.dtype}; pass {(shape[0], 1)} of torch.float32"
            )
