"""How fast this machine can be, measured in the same run, and what an operation needs at least: together the share of
the roofline (Williams et al. 2009), max(FLOPs / matmul rate, bytes / memory rate) / time.

Bytes are those of inputs read once and outputs written once. A share above 1 means that they came from cache. torch's
own operations are counted from the shapes that its profiler records, the engine's own from the shapes of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch

from elo_engine.model.spec import ModelSpec


@dataclass(frozen=True)
class Ceilings:
    """This run's best: FLOP/s of a large product in the model's dtype, or in fp32 where a CPU has no faster one;
    bytes/s (read + write) of a large copy, and of a large update in place. A CPU reads the lines of a copy's target
    before it writes them, those of an update only once, so that the update moves more of the bytes that count.
    """

    matmul_flop_per_s: float
    copy_bytes_per_s: float
    update_bytes_per_s: float
    matmul_dtype: str = "float32"

    @property
    def memory_bytes_per_s(self) -> float:
        """The faster of the two."""
        return max(self.copy_bytes_per_s, self.update_bytes_per_s)

    def floor_s(self, work: Work) -> float:
        """Seconds that the work takes at these rates."""
        return max(work.flops / self.matmul_flop_per_s, work.bytes / self.memory_bytes_per_s)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "memory_bytes_per_s": self.memory_bytes_per_s}


@dataclass(frozen=True)
class Work:
    """What an operation does at least; one multiply-add is two FLOPs."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class NamedWork:
    """The work in one step of all kernels, or native ops, whose names `pattern` (a regular expression) matches."""

    pattern: str
    work: Work


@cache
def measure_ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 6) -> Ceilings:
    """The fastest of `rounds` turns after one that is not counted; measured once in a process. Takes up to 0.5 GiB."""
    n, count = (8192, 1 << 26) if device.type == "cuda" else (2048, 1 << 26)
    if device.type == "cpu" and dtype != torch.float32:
        # without such units a large product takes minutes, and the engine multiplies in fp32 where it can
        dtype = max((dtype, torch.float32), key=lambda kind: _matmul_rate(256, device, kind, 1))
    matmul_rate = _matmul_rate(n, device, dtype, rounds)
    # ones, because memory that was only asked to be zero may not be there yet
    source, target = torch.ones(count, device=device), torch.ones(count, device=device)
    copy_s = _fastest(partial(target.copy_, source), device, rounds)
    update_s = _fastest(partial(target.mul_, 1.0), device, rounds)
    moved = 2.0 * source.nbytes
    return Ceilings(matmul_rate, moved / copy_s, moved / update_s, str(dtype).removeprefix("torch."))


def _matmul_rate(n: int, device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """FLOP/s of a product of [n, n] matrices."""
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * n**3 / _fastest(partial(torch.mm, left, right, out=torch.empty_like(left)), device, rounds)


def _fastest(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_WIDTHS = {
    "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "int": 4, "long": 8, "long int": 8, "bool": 1,
    "signed char": 1, "unsigned char": 1, "short": 2,
}  # fmt: skip
# How many leading arguments are tensors that are read: an `out=` that follows them is written and not read.
_READ = {
    1: ("exp", "log", "neg", "sqrt", "rsqrt", "silu", "gelu", "sigmoid", "softplus", "clamp_min", "abs"),
    2: ("add", "sub", "mul", "div", "maximum", "silu_backward", "gelu_backward"),
    3: ("addcmul", "addcdiv"),
}
_POINTWISE = {op: count for count, group in _READ.items() for op in group}
_REDUCTIONS = ("sum", "mean", "amax", "linalg_vector_norm")


def op_work(name: str, arguments: dict[str, Any]) -> Work | None:
    """What one of torch's operations needs, from its entry in a trace; None where that is not counted here.

    Args:
        name: as in the trace, `aten::mm`.
        arguments: `Input Dims`, `Input Strides` and `Input type`, which the profiler records with record_shapes.
    """
    if not name.startswith("aten::"):
        return None
    dims, types = arguments.get("Input Dims"), arguments.get("Input type")
    if not dims or not types:
        return None
    op = name.removeprefix("aten::").removesuffix("_")
    if op in ("mm", "bmm"):
        return _product(dims, types, 0)
    if op in ("addmm", "baddbmm"):
        return _product(dims, types, 1)
    strides = arguments.get("Input Strides") or [[] for _ in dims]
    if op in _POINTWISE:
        read = [i for i in range(min(_POINTWISE[op], len(dims))) if types[i] in _WIDTHS]
        if not read:
            return None
        largest = max(read, key=lambda i: math.prod(dims[i]))
        written = math.prod(dims[largest]) * _WIDTHS[types[largest]]
        return Work(bytes=sum(_stored(dims[i], strides[i], types[i]) for i in read) + written)
    if types[0] not in _WIDTHS:
        return None
    if op in _REDUCTIONS:
        return Work(bytes=_stored(dims[0], strides[0], types[0]))
    if op in ("fill", "zero") and name.endswith("_"):
        return Work(bytes=math.prod(dims[0]) * _WIDTHS[types[0]])
    if name == "aten::copy_" and types[1] in _WIDTHS:
        return Work(bytes=math.prod(dims[0]) * _WIDTHS[types[0]] + _stored(dims[1], strides[1], types[1]))
    if name == "aten::index_select":
        return Work(bytes=2.0 * math.prod(dims[2]) * math.prod(dims[0][1:]) * _WIDTHS[types[0]])
    return None


def _stored(dims: list[int], strides: list[int], kind: str) -> float:
    """Bytes of a tensor where a dimension of stride 0 was expanded from one element."""
    sizes = [size for size, stride in zip(dims, strides, strict=True) if stride] if strides else dims
    return float(math.prod(sizes) * _WIDTHS[kind])


def _product(dims: list[list[int]], types: list[str], first: int) -> Work | None:
    """[.., m, k] x [.., k, n], and with `first` = 1 the matrix that it is added to."""
    left, right = dims[first], dims[first + 1]
    if types[first] not in _WIDTHS or len(left) < 2 or len(right) < 2:
        return None
    batch, (m, k), n = math.prod(left[:-2]), left[-2:], right[-1]
    read = m * k + k * n + (m * n if first and math.prod(dims[0]) == batch * m * n else 0)
    return Work(2.0 * batch * m * k * n, float(batch * (read + m * n) * _WIDTHS[types[first]]))


@dataclass(frozen=True)
class StepShapes:
    """What the engine's own kernels see in one step.

    Attributes:
        layers: decoder layers that are present.
        tokens, labelled: positions fed, and those with a loss.
        pairs: (query, key) pairs that causal attention inside the documents forms, of one head.
        trained: parameters that learn.
        width, gradient_width: bytes of a weight, and of a gradient as the optimizer reads it.
        recompute: each layer's forward pass runs twice, its kernels with it; `selective` runs none of them again.
    """

    layers: int
    tokens: int
    labelled: int
    pairs: int
    trained: int
    width: int
    gradient_width: int
    recompute: bool
    eight_bit: bool


def attention_pairs(segment_starts: list[int], window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, summed over the segments [start, next start)."""
    total = 0
    for start, stop in pairwise(segment_starts):
        length = stop - start
        seen = length if window is None else min(window, length)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total


def engine_work(spec: ModelSpec, step: StepShapes) -> list[NamedWork]:
    """The work of the engine's own kernels (Triton, C++) and of the fused ones that it calls, in one step."""
    passes = step.layers * (2 if step.recompute else 1)
    heads, kv, E, F, N, width = spec.H, spec.K, spec.E, spec.F, step.tokens, step.width
    score = 2.0 * heads * E * step.pairs  # one of the products of queries and keys
    turned = 2.0 * N * (heads + kv) * E * width
    # read the gradient; read and write weight and moments: of 8 bits two codes, and two scales for 256 of them
    per_weight = step.gradient_width + (2 * width + 4 + 16 / 256 if step.eight_bit else 24)
    leaf = width if width == 2 else 0  # the model's copy of an fp32 master
    return [
        NamedWork(
            r"csrc::attention_forward|flash_fwd|FlashAttnFwd",
            Work(2 * score * passes, 2.0 * N * (heads + kv) * E * width * passes),
        ),
        NamedWork(
            r"csrc::attention_backward|flash_bwd_dq_dk_dv|FlashAttnBwd",
            Work(5 * score * step.layers, 4.0 * N * (heads + kv) * E * width * step.layers),
        ),
        NamedWork(r"csrc::frozen_head", Work(4.0 * spec.D * spec.V * step.labelled, float(spec.V * spec.D * width))),
        NamedWork(r"_cross_entropy_forward_kernel", Work(bytes=2.0 * N * spec.V * width)),
        NamedWork(r"_gated_forward_kernel", Work(bytes=3.0 * N * F * width * passes)),
        NamedWork(r"_gated_backward_kernel", Work(bytes=6.0 * N * F * width * step.layers)),
        NamedWork(r"_rotary_kernel", Work(bytes=turned * (passes + step.layers))),
        NamedWork(
            r"csrc::adamw_8bit|_update_8bit_kernel|aten::_fused_adamw_", Work(bytes=per_weight * step.trained)
        ),
        NamedWork(r"_update_fp32_kernel", Work(bytes=(per_weight + leaf) * step.trained)),
        NamedWork(r"_sum_of_squares_kernel", Work(bytes=float(step.gradient_width * step.trained))),
    ]
