"""The head's loss, forward and backward. 4 D V FLOPs a token with a frozen head, 6 with one that learns.

Predicted on an H200 (790 TFLOP/s, 4.3 TB/s, not measured): 4096 x 4096 x 128256 in bf16 takes 10.9 ms of matrix
products and 0.7 ms for three passes over 1.05 GB of logits; with 8-bit operands 7.5 ms (docs/fp8.md). In fp32 on two
AVX2 cores: operations over 140 GFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.benchmarks.contest import (
    Contest,
    Missing,
    Run,
    compiled,
    engine_dtype,
    forward_backward,
    pytest_benchmark,
)
from elo_engine.model import cpu_native, ops
from elo_engine.model.ops.quantize_fp8 import reason_without


def _inputs(N: int, D: int, V: int, learns: bool) -> Callable[[torch.device], Any]:
    def make(device: torch.device) -> Any:
        torch.manual_seed(0)
        dtype = engine_dtype(device)
        hidden_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
        head_VD = (torch.randn(V, D, device=device) * 0.05).to(dtype).requires_grad_(learns)
        return hidden_ND, head_VD, torch.randint(0, V, (N,), device=device)

    return make


def _leaves(hidden_ND: Tensor, head_VD: Tensor) -> list[Tensor]:
    return [hidden_ND, head_VD] if head_VD.requires_grad else [hidden_ND]


def _loss(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, head_VD).float(), labels_N, reduction="sum")


def _eager(inputs: Any) -> Run:
    hidden_ND, head_VD, labels_N = inputs
    return forward_backward(lambda *_: _loss(hidden_ND, head_VD, labels_N), _leaves(hidden_ND, head_VD), None)


def _compiled(inputs: Any) -> Run:
    hidden_ND, head_VD, labels_N = inputs
    loss = compiled(_loss)
    return forward_backward(lambda *_: loss(hidden_ND, head_VD, labels_N), _leaves(hidden_ND, head_VD), None)


def _liger(inputs: Any) -> Run:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Missing("pip install liger-kernel") from error
    hidden_ND, head_VD, labels_N = inputs
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return forward_backward(lambda *_: loss(head_VD, hidden_ND, labels_N), _leaves(hidden_ND, head_VD), None)


def _cce(inputs: Any, filter_eps: float | str | None = None) -> Run:
    """`filter_eps` None: exact, as the other arms are; its default leaves out gradients that are small in bf16."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Missing("pip install cut-cross-entropy") from error
    hidden_ND, head_VD, labels_N = inputs
    return forward_backward(
        lambda *_: linear_cross_entropy(hidden_ND, head_VD, labels_N, reduction="sum", filter_eps=filter_eps),
        _leaves(hidden_ND, head_VD),
        None,
    )


def _cce_filtered(inputs: Any) -> Run:
    """Its default."""
    return _cce(inputs, "high")


def _engine(inputs: Any) -> Run:
    hidden_ND, head_VD, labels_N = inputs
    return forward_backward(
        lambda *_: ops.linear_cross_entropy(hidden_ND, head_VD, labels_N), _leaves(hidden_ND, head_VD), None
    )


def _engine_fp8(inputs: Any) -> Run:
    """Products of 8-bit operands; rounding the head, once a step, is not timed."""
    hidden_ND, head_VD, labels_N = inputs
    reason = reason_without(hidden_ND.device)
    if reason is not None:
        raise Missing(reason)
    head = ops.Fp8Head(head_VD, None, hidden_ND)
    return forward_backward(
        lambda *_: ops.linear_cross_entropy_fp8(hidden_ND, head_VD, head, labels_N), [hidden_ND], None
    )


def _twin(inputs: Any) -> Run:
    run = _engine(inputs)

    def without_csrc() -> object:
        with cpu_native.using("torch"):
            return run()

    return without_csrc


def _contest(name: str, N: int, D: int, V: int, learns: bool, device: str) -> Contest:
    arms: dict[str, Callable[[Any], Run]] = {"torch": _eager}
    if device == "cuda":
        arms |= {"torch.compile": _compiled, "liger": _liger, "cut-cross-entropy": _cce, "cce, filtered": _cce_filtered}
    else:
        arms |= {"twin": _twin}
    arms["engine"] = _engine
    if device == "cuda" and not learns:
        arms["engine, fp8"] = _engine_fp8
    products, size = (6 if learns else 4), (2 if device == "cuda" else 4)
    # hidden in, its gradient out, the head once; the logits are not needed in memory
    least = size * (2 * N * D + V * D) + (4 * V * D if learns else 0)
    shape = f"N {N}, D {D}, V {V}, {'bf16' if device == 'cuda' else 'fp32'}"
    return Contest(name, shape, _inputs(N, D, V, learns), arms, products * N * D * V, least, device)


CONTESTS = [
    _contest("head frozen", 2048, 576, 49152, False, "cpu"),
    _contest("head learns", 2048, 576, 49152, True, "cpu"),
    _contest("head frozen, 4k", 4096, 4096, 128256, False, "cuda"),
    _contest("head learns, 4k", 4096, 4096, 128256, True, "cuda"),
    _contest("head frozen, 32k", 32768, 4096, 128256, False, "cuda"),
]

test_linear_cross_entropy = pytest_benchmark(CONTESTS)
