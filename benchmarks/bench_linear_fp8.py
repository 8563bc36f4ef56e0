"""A projection with its two gradients, in bf16 and with 8-bit operands, rounding and all, at Llama-3.1-8B's shapes.

6 N D O operations. Predicted on an H200 (790 TFLOP/s in bf16 and 1.6 times that in 8 bits, 4.3 TB/s), N 8192, gate and
up (D 4096, O 28672): 5.77 TFLOP are 7.3 ms in bf16 and 4.6 ms in 8 bits. The rounding: of N O numbers 2 bytes are read
twice and 2 written, of N D and of O D twice 4 read and 1 written: 2.9 GB or 0.7 ms. So 5.3 ms, 1.4 times as fast; the
1.6 of PERFORMANCE is of the product alone. Not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from elo_engine.benchmarks.contest import Contest, Missing, Run, engine_dtype, forward_backward, pytest_benchmark
from elo_engine.model import ops
from elo_engine.model.ops.quantize_fp8 import reason_without


def _inputs(N: int, D: int, O: int) -> Callable[[torch.device], Any]:  # noqa: E741
    def make(device: torch.device) -> Any:
        torch.manual_seed(0)
        dtype = engine_dtype(device)
        x_ND = torch.randn(N, D, device=device).to(dtype).requires_grad_()
        weight_OD = (torch.randn(O, D, device=device) * D**-0.5).to(dtype).requires_grad_()
        return x_ND, weight_OD, torch.randn(N, O, device=device).to(dtype)

    return make


def _run(inputs: Any, *, fp8: bool) -> Run:
    x_ND, weight_OD, d_out_NO = inputs
    return forward_backward(lambda *_: ops.linear(x_ND, weight_OD, fp8=fp8), [x_ND, weight_OD], d_out_NO)


def _fp8(inputs: Any) -> Run:
    reason = reason_without(inputs[0].device)
    if reason is not None:
        raise Missing(reason)
    return _run(inputs, fp8=True)


def _contest(name: str, N: int, D: int, O: int) -> Contest:  # noqa: E741
    least = 2 * (2 * N * D + 2 * N * O + 2 * O * D)
    arms: dict[str, Callable[[Any], Run]] = {"torch": lambda inputs: _run(inputs, fp8=False), "engine, fp8": _fp8}
    return Contest(name, f"N {N}, D {D}, O {O}, bf16", _inputs(N, D, O), arms, 6 * N * D * O, least, "cuda")


CONTESTS = [
    _contest("gate and up, fp8", 8192, 4096, 28672),
    _contest("down, fp8", 8192, 14336, 4096),
    _contest("query, key, value, fp8", 8192, 4096, 6144),
]

test_linear_fp8 = pytest_benchmark(CONTESTS)
