"""One AdamW step over two decoder layers, clip by the global norm included.

Bytes at least a parameter: the gradient read twice (norm, update), weight and moments read and written. fp32 state
with a bf16 copy: 2 x 2 + 3 x 8 + 2 = 30 with bf16 gradients; 8-bit state and bf16 weights: 2 x 2 + 2 x 2 + 2 x 2 + 16
/ 256 = 12.1. Predicted on an H200 at 4.3 TB/s for two layers of Llama-3.1-8B (436 M parameters): 3.0 and 1.2 ms (not
measured).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from elo_engine.benchmarks.contest import Contest, Missing, Run, pytest_benchmark
from elo_engine.model.ops.adamw import AdamwState, adamw_step

LR, EPS, CLIP, BETAS = 1e-4, 1e-8, 1.0, (0.9, 0.95)
# rows and columns of one layer's matrices, and its two norms
LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4096,), (4096,)]
SMOLLM2 = [(960, 576), (576, 576), (3072, 576), (576, 1536), (576,), (576,)]


def _inputs(shapes: list[tuple[int, ...]], low: torch.dtype) -> Callable[[torch.device], Any]:
    def make(device: torch.device) -> Any:
        torch.manual_seed(0)
        leaves = [torch.randn(shape, device=device).mul_(0.02).to(low) for shape in shapes * 2]
        return leaves, [torch.randn_like(leaf).mul_(1e-3) for leaf in leaves]

    return make


def _engine(bits: Literal[8, 32]) -> Callable[[Any], Run]:
    def build(inputs: Any) -> Run:
        leaves, grads = inputs
        low = leaves[0].dtype == torch.bfloat16
        weights = [leaf.clone() if bits == 8 else leaf.float().clone() for leaf in leaves]
        copies = [leaf.clone() for leaf in leaves] if low and bits == 32 else None
        state = AdamwState.zeros(weights, copies, BETAS, bits=bits)

        def run() -> object:
            # Clipping on a CPU scales the gradients where they lie, so each turn gets its own, in every arm alike.
            given = grads if grads[0].is_cuda else [grad.clone() for grad in grads]
            return adamw_step(state, given, lr=LR, eps=EPS, weight_decay=0.0, clip=CLIP, key=7)

        return run

    return build


def _torch(inputs: Any) -> Run:
    """fp32 masters as a user of torch keeps them: fused AdamW, clip_grad_norm_, copies back."""
    leaves, grads = inputs
    low = leaves[0].dtype == torch.bfloat16
    masters = [leaf.float().clone().requires_grad_() for leaf in leaves]
    copies = [leaf.clone() for leaf in leaves]
    optimizer = torch.optim.AdamW(masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    def run() -> object:
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad.float() if low else grad.clone()
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        if low:
            torch._foreach_copy_(copies, [master.detach() for master in masters])
        return copies

    return run


def _peer_8bit(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[Any], Run]:
    def build(inputs: Any) -> Run:
        leaves, grads = inputs
        weights = [leaf.clone().requires_grad_() for leaf in leaves]
        optimizer = make(weights)

        def run() -> object:
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            return weights

        return run

    return build


def _bitsandbytes(weights: list[Tensor]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise Missing("pip install bitsandbytes") from error
    return AdamW8bit(weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)  # type: ignore[no-any-return]


def _torchao(weights: list[Tensor]) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise Missing("pip install torchao") from error
    return AdamW8bit(weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, bf16_stochastic_round=True)  # type: ignore


def _contest(name: str, shapes: list[tuple[int, ...]], bits: Literal[8, 32], device: str) -> Contest:
    low = torch.bfloat16 if device == "cuda" else torch.float32
    count = 2 * sum(torch.Size(shape).numel() for shape in shapes)
    size = 2 if device == "cuda" else 4
    if bits == 32:
        arms: dict[str, Callable[[Any], Run]] = {"torch": _torch}
        least = 2 * size + 3 * 8 + (2 if device == "cuda" else 0)
    else:
        arms = {"bitsandbytes": _peer_8bit(_bitsandbytes), "torchao": _peer_8bit(_torchao)} if device == "cuda" else {}
        least = 2 * size + 2 * size + 4 + 16 / 256
    arms["engine"] = _engine(bits)
    return Contest(name, f"{count / 1e6:.1f} M parameters", _inputs(shapes, low), arms, 0.0, least * count, device)


CONTESTS = [
    _contest("adamw, fp32 state", SMOLLM2, 32, "cpu"),
    _contest("adamw, 8-bit state", SMOLLM2, 8, "cpu"),
    _contest("adamw, fp32 state", LLAMA_8B, 32, "cuda"),
    _contest("adamw, 8-bit state", LLAMA_8B, 8, "cuda"),
]

test_adamw = pytest_benchmark(CONTESTS)
