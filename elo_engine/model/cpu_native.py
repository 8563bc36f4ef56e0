"""The C++ kernels of csrc/ behind checks, each beside its twin in torch.

The extension takes bare addresses and sizes, so every property it relies on (dtype, device, layout, shape) is
checked here first. Where it was not built, the twin serves: `HAS_CSRC` says which, `CSRC_REASON` why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from elo_engine.errors import UsageError
from elo_engine.model.reference_adamw import GROUP
from elo_engine.native import CSRC as _csrc
from elo_engine.native import CSRC_REASON as CSRC_REASON

HAS_CSRC = _csrc is not None
_choice = "auto"


def instruction_set() -> str:
    """What computes now: "avx512", "avx2", "base" (4-wide vectors), or "torch" for the twins."""
    if _csrc is None or _choice == "torch":
        return "torch"
    return str(_csrc.instruction_set(_choice))


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Force "torch", "base", "avx2" or "avx512" inside the block, for tests and benchmarks; process-wide.

    Raises:
        UsageError: it is unknown, the extension is missing, or this processor does not have it.
    """
    global _choice
    if choice not in ("auto", "torch"):
        if _csrc is None:
            raise UsageError(f"instruction set {choice!r} needs the C++ extension: {CSRC_REASON}")
        try:
            _csrc.instruction_set(choice)
        except ValueError as error:
            raise UsageError(f"{error}; use auto, torch, base, avx2 or avx512") from None
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def _native() -> ModuleType | None:
    return None if _choice == "torch" else _csrc


def _expect(tensor: Tensor, what: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """C++ is about to read or write this memory."""
    assert tensor.device.type == "cpu", f"{what} is on {tensor.device}"
    assert tensor.dtype == dtype, f"{what} is {tensor.dtype}, expected {dtype}"
    assert tuple(tensor.shape) == shape, f"{what} is {tuple(tensor.shape)}, expected {shape}"
    inner = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        assert stride == inner or size == 1, f"{what} has strides {tensor.stride()}"
        inner *= size
    assert tensor.ndim > 1 or tensor.numel() < 2 or tensor.stride(0) == 1, f"{what} has strides {tensor.stride()}"
    assert tensor.ndim < 2 or tensor.shape[0] < 2 or tensor.stride(0) >= inner, f"{what} overlaps itself"


def _row_stride(tensor: Tensor) -> int:
    """Elements from row to row; a single row may carry any stride, which is not trusted."""
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor[0].numel()


def softmax_tile(
    tile_RC: Tensor, labels_R: Tensor, col_begin: int, max_R: Tensor, sum_R: Tensor, acc_RD: Tensor | None
) -> None:
    """One tile of an online softmax over the vocabulary without the target, everything in place.

    The tile [R, C] of fp32 logits, columns col_begin.. of the whole, becomes exp(logit - max_R) with the maximum
    so far; a row's target (`labels_R`, int64) becomes 0 and counts in neither. Where a maximum grows, `sum_R` and
    the row of `acc_RD` (fp32, may be None) are rescaled to it. One sweep over a tile in cache; torch needs five.
    """
    native = _native()
    if native is None:
        _softmax_tile_torch(tile_RC, labels_R, col_begin, max_R, sum_R, acc_RD)
        return
    R, C = tile_RC.shape
    if R == 0 or C == 0:
        return
    _expect(tile_RC, "tile", (R, C), torch.float32)
    _expect(labels_R, "labels", (R,), torch.int64)
    _expect(max_R, "maximum", (R,), torch.float32)
    _expect(sum_R, "sum", (R,), torch.float32)
    acc = (0, 0, 0)
    if acc_RD is not None:
        _expect(acc_RD, "accumulator", (R, acc_RD.shape[1]), torch.float32)
        acc = (acc_RD.data_ptr(), acc_RD.shape[1], _row_stride(acc_RD))
    native.softmax_tile(
        tile_RC.data_ptr(), R, C, _row_stride(tile_RC), labels_R.data_ptr(), col_begin,
        max_R.data_ptr(), sum_R.data_ptr(), *acc, _choice,
    )  # fmt: skip


def _softmax_tile_torch(
    tile_RC: Tensor, labels_R: Tensor, col_begin: int, max_R: Tensor, sum_R: Tensor, acc_RD: Tensor | None
) -> None:
    columns_R = labels_R - col_begin
    hit = ((columns_R >= 0) & (columns_R < tile_RC.shape[1])).nonzero().squeeze(1)
    tile_RC[hit, columns_R[hit]] = -torch.inf
    top_R = torch.maximum(max_R, tile_RC.amax(dim=1))
    reference_R = top_R.masked_fill(top_R == -torch.inf, 0.0)  # only -inf so far: any finite number gives zeros
    shrink_R = torch.exp(max_R - reference_R)
    tile_RC.sub_(reference_R[:, None]).exp_()
    sum_R.mul_(shrink_R).add_(tile_RC.sum(dim=1))
    if acc_RD is not None:
        acc_RD.mul_(shrink_R[:, None])
    max_R.copy_(top_R)


def fits_frozen_head(hidden_RD: Tensor, head_VD: Tensor) -> bool:
    """Whether C++ computes these: fp32 and a width of whole register tiles. The twin is cpu_head's loop over tiles."""
    both = hidden_RD.dtype == head_VD.dtype == torch.float32
    return _native() is not None and both and hidden_RD.shape[1] % 32 == 0 and head_VD.is_contiguous()


def frozen_head(
    hidden_RD: Tensor, head_VD: Tensor, labels_R: Tensor, max_R: Tensor, sum_R: Tensor, acc_RD: Tensor | None
) -> None:
    """The whole vocabulary without each row's target: the largest logit, the sum of exp(logit - largest), and where
    `acc_RD` is given the same sum over rows of the head, weighted; all fp32, all written over."""
    native = _native()
    assert native is not None
    (R, D), V = hidden_RD.shape, head_VD.shape[0]
    _expect(hidden_RD, "hidden", (R, D), torch.float32)
    _expect(head_VD, "head", (V, D), torch.float32)
    _expect(labels_R, "labels", (R,), torch.int64)
    _expect(max_R, "maximum", (R,), torch.float32)
    _expect(sum_R, "sum", (R,), torch.float32)
    for tensor in (hidden_RD, head_VD) if acc_RD is None else (hidden_RD, head_VD, acc_RD):
        assert tensor.is_contiguous()
    if acc_RD is not None:
        _expect(acc_RD, "accumulator", (R, D), torch.float32)
    native.frozen_head(
        hidden_RD.data_ptr(), head_VD.data_ptr(), labels_R.data_ptr(), R, D, V,
        max_R.data_ptr(), sum_R.data_ptr(), 0 if acc_RD is None else acc_RD.data_ptr(), _choice,
    )  # fmt: skip


def has_attention() -> bool:
    """Whether C++ computes the attention; its twin is torch's scaled_dot_product_attention."""
    return _native() is not None


def attention_forward(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, segment_starts: list[int], scale: float,
    window: int | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out [N, H, E] and the log-sum-exp of a query's scores [H, N], both fp32; under a softcap the latter in two
    parts [2, H, N], the largest score and the log of the sum relative to it."""
    native = _native()
    assert native is not None
    (N, H, E), K = q_NHE.shape, k_NKE.shape[1]
    _expect(q_NHE, "q", (N, H, E), torch.float32)
    _expect(k_NKE, "k", (N, K, E), torch.float32)
    _expect(v_NKE, "v", (N, K, E), torch.float32)
    out_NHE = q_NHE.new_empty(N, H, E)
    lse_HN = q_NHE.new_empty((H, N) if softcap is None else (2, H, N))
    native.attention_forward(
        q_NHE.data_ptr(), k_NKE.data_ptr(), v_NKE.data_ptr(),
        _row_stride(q_NHE), _row_stride(k_NKE), _row_stride(v_NKE),
        N, H, K, E, scale, out_NHE.data_ptr(), lse_HN.data_ptr(), segment_starts, _choice,
        0 if window is None else min(window, N), 0.0 if softcap is None else softcap,
    )  # fmt: skip
    return out_NHE, lse_HN


def attention_backward(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, out_NHE: Tensor, lse_HN: Tensor, d_out_NHE: Tensor,
    segment_starts: list[int], scale: float, window: int | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> d_q [N, H, E], d_k and d_v [N, K, E], fp32 and contiguous."""
    native = _native()
    assert native is not None
    (N, H, E), K = q_NHE.shape, k_NKE.shape[1]
    _expect(q_NHE, "q", (N, H, E), torch.float32)
    _expect(k_NKE, "k", (N, K, E), torch.float32)
    _expect(v_NKE, "v", (N, K, E), torch.float32)
    for tensor, what in ((out_NHE, "out"), (d_out_NHE, "d_out")):
        _expect(tensor, what, (N, H, E), torch.float32)
        assert _row_stride(tensor) == H * E, f"{what} has strides {tensor.stride()}"
    _expect(lse_HN, "log-sum-exp", (H, N) if softcap is None else (2, H, N), torch.float32)
    assert lse_HN.is_contiguous()
    d_q_NHE, d_k_NKE, d_v_NKE = q_NHE.new_empty(N, H, E), q_NHE.new_empty(N, K, E), q_NHE.new_empty(N, K, E)
    delta_HN = q_NHE.new_empty(H, N)
    native.attention_backward(
        q_NHE.data_ptr(), k_NKE.data_ptr(), v_NKE.data_ptr(),
        _row_stride(q_NHE), _row_stride(k_NKE), _row_stride(v_NKE),
        N, H, K, E, scale, out_NHE.data_ptr(), d_out_NHE.data_ptr(), lse_HN.data_ptr(),
        d_q_NHE.data_ptr(), d_k_NKE.data_ptr(), d_v_NKE.data_ptr(), delta_HN.data_ptr(),
        segment_starts, _choice, 0 if window is None else min(window, N), 0.0 if softcap is None else softcap,
    )  # fmt: skip
    return d_q_NHE, d_k_NKE, d_v_NKE


def fits_adamw(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> bool:
    """Whether C++ makes the 8-bit step of these: fp32 or bf16, one type each. The twin is `reference_adamw`."""
    kinds = ({grad.dtype for grad in grads if grad is not None}, {weight.dtype for weight in weights})
    return _native() is not None and all(len(k) < 2 and k <= {torch.float32, torch.bfloat16} for k in kinds)


def adamw_8bit(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], exp_avg_scales: Sequence[Tensor], exp_avg_sq_scales: Sequence[Tensor],
    numbers: Mapping[str, float], *, eps: float, decay: float, key: int, first: int = 0,
) -> None:  # fmt: skip
    """The update of `reference_adamw.update_8bit`, in place and bit for bit. `numbers` are those of `control` there;
    `decay` is the learning rate times the weight decay; the tensors are number `first`, first + 1, ... in the model. A
    tensor whose gradient is None stays as it is.
    """
    native = _native()
    assert native is not None
    assert 0 <= key < 2**32, f"key: {key} is outside 0 to 2^32 - 1"
    assert first >= 0, f"first: {first} is negative"
    lists = (grads, weights, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales)
    assert len({len(part) for part in lists}) == 1, f"lists of {[len(part) for part in lists]} tensors"
    there = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
    if not there:
        return
    rows = [
        (grad, weights[i], exp_avgs[i], exp_avg_sqs[i], exp_avg_scales[i], exp_avg_sq_scales[i]) for i, grad in there
    ]
    kinds = (rows[0][0].dtype, rows[0][1].dtype)
    assert {*kinds} <= {torch.float32, torch.bfloat16}, f"gradients {kinds[0]}, weights {kinds[1]}"
    types = (*kinds, torch.int8, torch.uint8, torch.float32, torch.float32)
    names = ("gradient", "weight", "exp_avg", "exp_avg_sq", "exp_avg's scales", "exp_avg_sq's scales")
    for (i, _), row in zip(there, rows, strict=True):
        shape, groups = tuple(row[1].shape), -(-row[1].numel() // GROUP)
        for tensor, what, dtype in zip(row, names, types, strict=True):
            _expect(tensor, f"{what} {i}", (groups,) if what.endswith("scales") else shape, dtype)
            assert tensor.is_contiguous(), f"{what} {i} has strides {tensor.stride()}"
    native.adamw_8bit(
        [tuple(tensor.data_ptr() for tensor in row) for row in rows],
        [row[1].numel() for row in rows],
        [first + i for i, _ in there],
        *(kind == torch.bfloat16 for kind in kinds),
        (*(numbers[name] for name in ("factor", "step", "root", "rate1", "rate2")), eps, decay),
        key,
        _choice,
    )
