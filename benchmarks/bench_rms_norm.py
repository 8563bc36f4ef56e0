"""The residual add and the norm of its result, forward and backward: bound by memory.

Bytes at least, bf16: forward reads hidden and update, writes sum and normed; backward reads sum, d_normed and d_sum,
writes one gradient: 8 passes of N x D. Predicted on an H200 at 4.3 TB/s for 16384 x 4096: 0.25 ms (not measured).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.benchmarks.contest import Contest, Missing, Run, compiled, engine_dtype, pytest_benchmark
from elo_engine.model.ops import choice
from elo_engine.model.ops.rms_norm import add_rms_norm

EPS = 1e-5


def _inputs(N: int, D: int) -> Callable[[torch.device], Any]:
    def make(device: torch.device) -> Any:
        torch.manual_seed(0)
        dtype = engine_dtype(device)
        hidden_ND, update_ND = (torch.randn(N, D, device=device).to(dtype).requires_grad_() for _ in range(2))
        d_sum_ND, d_normed_ND = (torch.randn(N, D, device=device).to(dtype) for _ in range(2))
        gamma_D = torch.ones(D, device=device, dtype=dtype).requires_grad_()
        return [hidden_ND, update_ND, gamma_D], [d_sum_ND, d_normed_ND]

    return make


def _turn(function: Callable[..., tuple[Tensor, Tensor]], inputs: Any) -> Run:
    leaves, d_outs = inputs
    return lambda: torch.autograd.grad(function(*leaves), leaves, d_outs)


def _plain(hidden_ND: Tensor, update_ND: Tensor, gamma_D: Tensor) -> tuple[Tensor, Tensor]:
    sum_ND = hidden_ND + update_ND
    return sum_ND, F.rms_norm(sum_ND, (sum_ND.shape[-1],), gamma_D, EPS)


def _liger(inputs: Any) -> Run:
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Peer
    except ImportError as error:
        raise Missing("pip install liger-kernel") from error

    def function(hidden_ND: Tensor, update_ND: Tensor, gamma_D: Tensor) -> tuple[Tensor, Tensor]:
        normed_ND, sum_ND = Peer.apply(update_ND, hidden_ND, gamma_D, EPS, 0.0, "llama", False)
        return sum_ND, normed_ND

    return _turn(function, inputs)


def _engine(inputs: Any) -> Run:
    assert not choice.use_reference()
    return _turn(lambda hidden, update, gamma: add_rms_norm(hidden, update, gamma, EPS), inputs)


def _contest(N: int, D: int, device: str) -> Contest:
    arms: dict[str, Callable[[Any], Run]] = {"torch": lambda inputs: _turn(_plain, inputs)}
    if device == "cuda":
        arms |= {"torch.compile": lambda inputs: _turn(compiled(_plain), inputs), "liger": _liger}
    arms["engine"] = _engine
    size = 2 if device == "cuda" else 4
    return Contest("add + rms_norm", f"N {N}, D {D}", _inputs(N, D), arms, 0.0, 8 * size * N * D, device)


CONTESTS = [_contest(2048, 576, "cpu"), _contest(16384, 4096, "cuda")]

test_rms_norm = pytest_benchmark(CONTESTS)
