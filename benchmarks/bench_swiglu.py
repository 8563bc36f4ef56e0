"""SwiGLU and GeGLU with the projection after them, forward and backward, and the activation's kernels alone.

Bytes at least of the activation alone, bf16: forward reads gate and up and writes the product; backward reads d_y,
gate and up and writes two gradients and the product again: 9 passes of N x F. Predicted on an H200 at 4.3 TB/s for
16384 x 14336: 0.98 ms (not measured).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from elo_engine.benchmarks.contest import Contest, Missing, Run, compiled, engine_dtype, pytest_benchmark
from elo_engine.model.ops import swiglu as op

Kind = Literal["silu", "gelu_tanh"]


def _inputs(N: int, F_: int) -> Callable[[torch.device], Any]:
    def make(device: torch.device) -> Any:
        torch.manual_seed(0)
        dtype = engine_dtype(device)
        gate_up_N2F = torch.randn(N, 2 * F_, device=device).to(dtype).requires_grad_()
        return gate_up_N2F, torch.randn(N, F_, device=device).to(dtype)

    return make


def _plain(kind: Kind) -> Callable[[Tensor], Tensor]:
    def function(gate_up_N2F: Tensor) -> Tensor:
        gate_NF, up_NF = gate_up_N2F.chunk(2, dim=-1)
        return (F.silu(gate_NF) if kind == "silu" else F.gelu(gate_NF, approximate="tanh")) * up_NF

    return function


def _torch(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Run]:
    def build(inputs: Any) -> Run:
        gate_up_N2F, d_y_NF = inputs
        return lambda: torch.autograd.grad(function(gate_up_N2F), gate_up_N2F, d_y_NF)

    return build


def _liger(kind: Kind) -> Callable[[Any], Run]:
    def build(inputs: Any) -> Run:
        try:
            from liger_kernel.ops.geglu import LigerGELUMulFunction
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction
        except ImportError as error:
            raise Missing("pip install liger-kernel") from error
        peer = LigerSiLUMulFunction if kind == "silu" else LigerGELUMulFunction
        gate_up_N2F, d_y_NF = inputs
        gate_NF, up_NF = (x.contiguous().detach().requires_grad_() for x in gate_up_N2F.chunk(2, dim=-1))
        # It writes its gradients over gate and up; later turns find those there, which cost the same.
        return lambda: torch.autograd.grad(peer.apply(gate_NF, up_NF), (gate_NF, up_NF), d_y_NF)

    return build


def _engine(kind: Kind) -> Callable[[Any], Run]:
    """The forward pass and the backward pass that makes the product again, as `gated_linear` runs them."""

    def build(inputs: Any) -> Run:
        gate_up_N2F, d_y_NF = inputs[0].detach(), inputs[1]

        def run() -> object:
            # On a GPU the backward pass writes the product over d_y: later turns find the product there, of equal size.
            op.gated(gate_up_N2F, kind)
            return op.gated_backward(d_y_NF, gate_up_N2F, kind, need_y=True)

        return run

    return build


def _contest(kind: Kind, N: int, F_: int, device: str) -> Contest:
    arms = {"torch": _torch(_plain(kind))}
    if device == "cuda":
        arms |= {"torch.compile": _torch(compiled(_plain(kind))), "liger": _liger(kind)}
    arms["engine"] = _engine(kind)
    size, name = (2 if device == "cuda" else 4), {"silu": "swiglu", "gelu_tanh": "geglu"}[kind]
    return Contest(name, f"N {N}, F {F_}", _inputs(N, F_), arms, 0.0, 9 * size * N * F_, device)


CONTESTS = [
    _contest("silu", 2048, 1536, "cpu"),
    _contest("gelu_tanh", 2048, 1536, "cpu"),
    _contest("silu", 16384, 14336, "cuda"),
    _contest("gelu_tanh", 16384, 14336, "cuda"),
]

test_swiglu = pytest_benchmark(CONTESTS)
